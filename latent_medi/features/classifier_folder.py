"""The folder of an image classifier: weights, labels and preprocessing. It also serves as an encoder.

``model.safetensors`` and ``classifier.json`` are all that a prediction needs; ``checksums.json`` is compared whenever
the folder is read. The network is one of timm's, by its name.
"""

from __future__ import annotations

import dataclasses  # an entry is named `field`
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from latent_medi import __version__
from latent_medi.core.checksums import verify_checksums, write_checksums
from latent_medi.core.errors import UserError, nearest, needs
from latent_medi.core.files import atomic_path, read_object, write_json
from latent_medi.core.records import Mismatch, decode, encode
from latent_medi.features.networks import Network, find_weights, read_weights
from latent_medi.features.registry import IMAGENET_MEAN, IMAGENET_STD, Preprocessing

CLASSIFIER_FILE, WEIGHTS_FILE = "classifier.json", "model.safetensors"
KIND, FORMAT = "latent-medi image classifier", 1
REMEDY = "Copy the whole folder again, or train the classifier again."
HUB = "pretrained"
"""In place of a file with weights: those that timm names for the network, from the Hugging Face hub."""


@dataclass(frozen=True)
class ClassifierFacts:
    """What a prediction depends on but for the weights, and where the classifier is from.

    Args:
        network: Name of the network in timm.
        labels: Values of the field, in the order of the logits.
        field: The field that it predicts.
        preprocessing: From stored patches to the network's input.
        patch_size: Edge of the training patches in pixels.
        mpp: Micrometres per pixel of the training patches.
        patient_is: What the training data's split is by: "patient", or "slide", "image" or "group".
        provenance: JSON-able facts about the training.
        kind, format, version: What the file is, and the program that wrote it.
    """

    network: str
    labels: list[str]
    field: str
    preprocessing: Preprocessing
    patch_size: int
    mpp: float
    patient_is: str
    provenance: dict[str, object] = dataclasses.field(default_factory=dict)
    kind: str = KIND
    format: int = FORMAT
    version: str = __version__


def build_network(
    name: str, size: int, classes: int, drop_path: float = 0.0, dropout: float = 0.0, weights: str = ""
) -> nn.Module:
    """A network of timm, in fp32 on the CPU.

    Args:
        name: Its name in timm.
        size: Edge of its input in pixels.
        classes: Number of logits.
        drop_path: Share of residual branches dropped while training.
        dropout: Share of the last features dropped while training.
        weights: File or folder with weights to start from, all of which but those of the last layer must fit;
            :data:`HUB` for timm's own; "" for random ones.

    Raises:
        UserError: timm has no such network, it does not take such images, or the weights are absent or do not fit.
    """
    with needs("An image classifier", "timm"):
        import timm
        from timm.models import get_pretrained_cfg
    base = name.partition(".")[0]
    if base not in timm.list_models():
        raise UserError(f"timm has no network {name!r}; {nearest(base, timm.list_models())}.")
    try:
        config = get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError as error:  # unknown weights after the point
        raise UserError(f"The network {name!r} cannot be made: {error}", f"Leave out what follows {base}.") from None
    known: dict[str, Any] = {"num_classes": classes, "pretrained": weights == HUB}
    known |= {"drop_rate": dropout} if dropout else {}
    known |= {"drop_path_rate": drop_path} if drop_path else {}
    if config is not None and config.fixed_input_size:
        known["img_size"] = size
    try:
        module: nn.Module = timm.create_model(name, **known)
    except Exception as error:  # each network and the hub's client have their own
        remedy = "Give the weights as a file: weights=PATH." if weights == HUB else "Choose other settings of it."
        raise UserError(f"The network {name!r} cannot be made for images of {size} px: {error}", remedy) from None
    if weights not in ("", HUB):
        path = find_weights(weights, (WEIGHTS_FILE, "*.safetensors", "pytorch_model.bin", "*.pth"))
        load_body(module, read_weights(path), path)
    return module.float()


def preprocessing_for(name: str, size: int, weights: str) -> Preprocessing:
    """How patches become inputs of a network: normalised as for the weights that it starts from, those of another
    classifier or of timm, else by ImageNet's means.
    """
    from timm.models import get_pretrained_cfg

    folder = Path(weights) if Path(weights).is_dir() else Path(weights).parent
    if weights not in ("", HUB) and (folder / CLASSIFIER_FILE).is_file():
        return dataclasses.replace(read_facts(folder).preprocessing, size=size)
    config = get_pretrained_cfg(name) if weights else None
    mean, std = (config.mean, config.std) if config is not None else (IMAGENET_MEAN, IMAGENET_STD)
    return Preprocessing(size, tuple(mean), tuple(std), "bicubic")


def load_body(module: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Load every tensor but those of the last layer, which may have other classes.

    The position embedding of a transformer for other images is resampled as timm does.

    Raises:
        UserError: A tensor is missing, unknown or of another shape.
    """
    own, last = module.state_dict(), _last_layer(module)
    body = {name: tensor for name, tensor in state.items() if not name.startswith(last)}
    if "pos_embed" in body and "pos_embed" in own and body["pos_embed"].shape != own["pos_embed"].shape:
        from timm.layers import resample_abs_pos_embed

        grid = list(module.patch_embed.grid_size)  # type: ignore[union-attr, arg-type]
        prefix = 0 if getattr(module, "no_embed_class", False) else int(module.num_prefix_tokens)  # type: ignore[arg-type]
        body["pos_embed"] = resample_abs_pos_embed(body["pos_embed"], grid, num_prefix_tokens=prefix)
    expected = {name for name in own if not name.startswith(last)}
    wrong = sorted(expected ^ set(body)) or sorted(name for name in expected if own[name].shape != body[name].shape)
    if wrong:
        raise UserError(
            f"The weights {path} do not fit the network: {len(wrong)} tensors, such as {wrong[0]!r}.",
            "Give weights of the same network of timm.",
        )
    module.load_state_dict(body, strict=False)


def _last_layer(module: nn.Module) -> tuple[str, ...]:
    names = module.pretrained_cfg.get("classifier") or "head"  # type: ignore[union-attr, operator]
    return tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))


class Pooled(nn.Module):
    """The features before the last layer of a network of timm, such as the class token of a vision transformer."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Features [n, dim] of normalised images [n, 3, S, S]."""
        maps = self.network.forward_features(x)  # type: ignore[operator]
        return self.network.forward_head(maps, pre_logits=True)  # type: ignore[operator]


def write_classifier(folder: str | Path, state: Mapping[str, Tensor], facts: ClassifierFacts) -> None:
    """Write a classifier's folder, at once or not at all; an older classifier there is replaced.

    Raises:
        UserError: The folder holds something that is not an image classifier.
    """
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / CLASSIFIER_FILE).is_file():
        raise UserError(f"{folder} is not empty and holds no image classifier.", "Choose another folder.")
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        save_file(tensors, temporary / WEIGHTS_FILE)
        write_json(temporary / CLASSIFIER_FILE, encode(facts))
        write_checksums(temporary)


def read_facts(folder: str | Path) -> ClassifierFacts:
    """The facts of a classifier's folder, whose files are compared with their checksums.

    Raises:
        UserError: It is no image classifier, is from a newer version, or is damaged.
    """
    folder = Path(folder)
    path = folder / CLASSIFIER_FILE
    if not path.is_file():
        raise UserError(f"{folder} is no image classifier.", "Give out/model of `latent-medi image-classifier`.")
    if not verify_checksums(folder, REMEDY):
        raise UserError(f"{folder} has no checksums.json.", REMEDY)
    content = read_object(path)
    if (content.get("kind"), content.get("format")) != (KIND, FORMAT):
        raise UserError(
            f"{path} is of kind {content.get('kind')!r} and format {content.get('format')!r}; this program reads "
            f"{KIND!r} of format {FORMAT}.",
            f"It was written by version {content.get('version')}: use that version, or train the classifier again.",
        )
    try:
        return decode(ClassifierFacts, content)
    except Mismatch as error:
        raise UserError(f"{path} cannot be read: {error}", REMEDY) from None


def read_classifier(folder: str | Path) -> tuple[ClassifierFacts, nn.Module]:
    """The facts and the network of a classifier's folder, in evaluation mode.

    Raises:
        UserError: See :func:`read_facts`, or the weights do not fit the network.
    """
    facts = read_facts(folder)
    size = facts.preprocessing.size
    with torch.random.fork_rng(devices=[]):
        module = build_network(facts.network, size, len(facts.labels))
    try:
        module.load_state_dict(load_file(Path(folder) / WEIGHTS_FILE), strict=True)
    except Exception as error:  # safetensors and torch have their own
        raise UserError(f"The classifier {folder} cannot be read: {error}", REMEDY) from None
    return facts, module.eval().requires_grad_(False)


def classifier_encoder(folder: str | Path) -> Network:
    """A trained classifier without its last layer, for :func:`latent_medi.features.encoders.load_encoder`."""
    facts, module = read_classifier(folder)
    folder = Path(folder)
    name = folder.parent.name if folder.name == "model" and folder.parent.name else folder.name
    dim = int(getattr(module, "head_hidden_size", None) or module.num_features)  # type: ignore[arg-type]
    readout = f"{facts.network} before its last layer"
    return Network(name, Pooled(module), dim, facts.preprocessing, "of the training data", readout)
