"""The table of published encoders: source, architecture, preprocessing and readout of each.

It imports neither torch nor a model library; :mod:`latent_medi.features.networks` and
:mod:`latent_medi.features.transformer` build its entries. Patches are square, so "resize the shorter side to 224, then
crop the centre", as most authors write, is one resize of the whole patch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

DEMO_GENERATOR = "latent_medi.demo.cohort"
"""Generator in the provenance of the demo's procedural tissue, the only data that the demo's encoder was trained on."""

HUB_FILES = ("model.safetensors", "pytorch_model.bin")
"""Names of the file with the weights in a repository of the Hugging Face hub, in order of preference."""

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_HALF = (0.5,) * 3


@dataclass(frozen=True)
class Preprocessing:
    """The steps between a stored patch and the network.

    Args:
        size: Side of the network's input in pixels; 0 keeps the patch's own.
        mean, std: Per-channel normalisation of images in [0, 1].
        resize: "bilinear" or "bicubic", both antialiased.
        channel: "rgb", or "haematoxylin" repeated three times.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: str = "bilinear"
    channel: str = "rgb"

    @property
    def text(self) -> str:
        """One line, different for every preprocessing."""
        return f"uint8/255 -> {self.channel} -> {self.resize} antialiased {self.size} -> ({self.mean}, {self.std})"


@dataclass(frozen=True)
class Entry:
    """A published encoder.

    Args:
        library: Library that builds it.
        source: Where its weights are: a repository of the Hugging Face hub for timm and transformers, elsewhere the
            name of the file.
        url: Where such a file is downloaded.
        dim: Features per patch.
        license: Licence of the weights.
        preprocessing: The preprocessing that it was trained with.
        gated: Whether its licence must be accepted on the hub before it can be downloaded.
        architecture: Name in timm, or class in transformers.
        arguments: Arguments of the architecture in timm, or entries that a transformers configuration must have.
        tokens: "cls" reads the class token; "cls+mean" appends the mean of the patch tokens.
        prefix: Tokens before the first patch token: the class token and the registers.
        unused: Beginnings of the names of stored tensors that the features do not depend on.
    """

    library: Literal["package", "torchvision", "torch-fidelity", "timm", "transformers"]
    source: str
    dim: int
    license: str
    preprocessing: Preprocessing | None
    gated: bool = False
    url: str = ""
    architecture: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    tokens: Literal["cls", "cls+mean"] = "cls"
    prefix: int = 1
    unused: tuple[str, ...] = ()

    @property
    def resizable(self) -> bool:
        """Whether the network takes images of another size than that of its entry."""
        if self.library == "torch-fidelity":
            return False
        return bool(self.arguments.get("dynamic_img_size", self.architecture != "ViTModel"))


_IMAGENET = Preprocessing(224, IMAGENET_MEAN, IMAGENET_STD)
_IMAGENET_BICUBIC = Preprocessing(224, IMAGENET_MEAN, IMAGENET_STD, "bicubic")
# Its authors do not resize, since their patches have 224 px; others are resized as timm does for the architecture.
_H_OPTIMUS = Preprocessing(224, (0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517), "bicubic")
# Named, not imported: the classes are looked up in timm and torch when a network is built.
_SWIGLU = {"mlp_layer": "SwiGLUPacked", "act_layer": "SiLU"}
_VIT_L = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}

ENCODERS: Mapping[str, Entry] = {
    "demo": Entry("package", "", 48, "same as latent-medi", None),
    "squeezenet": Entry(
        "torchvision", "squeezenet1_0-b66bff10.pth", 512, "BSD-2-Clause", _IMAGENET,
        url="https://download.pytorch.org/models/squeezenet1_0-b66bff10.pth",
    ),
    # torch-fidelity's network resizes and normalises 8-bit images itself.
    "inception": Entry(
        "torch-fidelity", "weights-inception-2015-12-05-6726825d.pth", 2048, "Apache-2.0",
        Preprocessing(0, (0.0,) * 3, (1.0,) * 3),
        url="https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    ),
    "uni": Entry(
        "timm", "MahmoodLab/UNI", 1024, "CC-BY-NC-ND-4.0", _IMAGENET, gated=True, architecture="vit_large_patch16_224",
        arguments={"img_size": 224, "patch_size": 16, "init_values": 1e-5, "num_classes": 0, "dynamic_img_size": True},
    ),
    "uni2-h": Entry(
        "timm", "MahmoodLab/UNI2-h", 1536, "CC-BY-NC-ND-4.0", _IMAGENET, gated=True,
        architecture="vit_giant_patch14_224",
        arguments={
            "img_size": 224, "patch_size": 14, "depth": 24, "num_heads": 24, "init_values": 1e-5, "embed_dim": 1536,
            "mlp_ratio": 2.66667 * 2, "num_classes": 0, "no_embed_class": True, "reg_tokens": 8,
            "dynamic_img_size": True, **_SWIGLU,
        },
        prefix=9,
    ),
    "virchow2": Entry(
        "timm", "paige-ai/Virchow2", 2560, "CC-BY-NC-ND-4.0", _IMAGENET_BICUBIC, gated=True,
        architecture="vit_huge_patch14_224",
        arguments={
            "img_size": 224, "patch_size": 14, "init_values": 1e-5, "num_classes": 0, "reg_tokens": 4,
            "mlp_ratio": 5.3375, "global_pool": "", "dynamic_img_size": True, **_SWIGLU,
        },
        tokens="cls+mean", prefix=5,
    ),
    "h-optimus-0": Entry(
        "timm", "bioptimus/H-optimus-0", 1536, "Apache-2.0", _H_OPTIMUS, gated=True,
        architecture="vit_giant_patch14_reg4_dinov2",
        arguments={"img_size": 224, "patch_size": 14, "init_values": 1e-5, "num_classes": 0, "dynamic_img_size": False},
        prefix=5,
    ),
    "phikon": Entry(
        "transformers", "owkin/phikon", 768, "Owkin non-commercial", _IMAGENET, architecture="ViTModel",
        arguments={"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "patch_size": 16},
        unused=("pooler.",),
    ),
    "phikon-v2": Entry(
        "transformers", "owkin/phikon-v2", 1024, "Owkin non-commercial", _IMAGENET_BICUBIC, architecture="Dinov2Model",
        arguments={**_VIT_L, "patch_size": 16},
    ),
    "midnight": Entry(
        "transformers", "kaiko-ai/midnight", 3072, "MIT", Preprocessing(224, _HALF, _HALF), architecture="Dinov2Model",
        arguments={
            "hidden_size": 1536, "num_hidden_layers": 40, "num_attention_heads": 24, "patch_size": 14,
            "use_swiglu_ffn": True,
        },
        tokens="cls+mean",
    ),
    "dinov2": Entry(
        "transformers", "facebook/dinov2-large", 1024, "Apache-2.0", _IMAGENET_BICUBIC, architecture="Dinov2Model",
        arguments={**_VIT_L, "patch_size": 14},
    ),
}  # fmt: skip
"""By name. The demo's preprocessing is in its folder."""


def access_hint(entry: Entry) -> str:
    """Steps to take if weights cannot be downloaded."""
    page = f"https://huggingface.co/{entry.source}"
    by_hand = f"download the files of {page} by hand and name their folder: weights.NAME=PATH (`select`: weights=PATH)"
    if entry.gated:
        return (
            f"1. Accept its licence ({entry.license}) at {page}. 2. Log in with `hf auth login` and run the command "
            f"again. 3. Without a connection here: {by_hand}."
        )
    return f"It needs no login: run the command again with a connection (HF_HUB_OFFLINE unset), or {by_hand}."
