"""Published encoders without their weights: the architecture, strict loading, the readout, and what to do for access.

Files in the form of the published ones are made with random or blank weights. A blank file has every tensor in its full
shape and holds one number, so that networks of a billion weights can be loaded strictly in no memory.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from latent_medi.core.errors import UserError
from latent_medi.features import registry
from latent_medi.features.encoders import KNOWN, load_encoder
from latent_medi.features.registry import ENCODERS, IMAGENET_MEAN, IMAGENET_STD

TIMM = [name for name, entry in ENCODERS.items() if entry.library == "timm"]
HUB = [name for name, entry in ENCODERS.items() if entry.library in ("timm", "transformers")]
# What the authors say, once more: width, depth, tokens before the patches, patch side, weights in millions.
PUBLISHED = {
    "uni": (1024, 24, 1, 16, 303.4),
    "uni2-h": (1536, 24, 9, 14, 681.4),
    "virchow2": (1280, 32, 5, 14, 631.2),
    "h-optimus-0": (1536, 40, 5, 14, 1134.8),
    "phikon": (768, 12, 1, 16, 85.8),
    "phikon-v2": (1024, 24, 1, 16, 303.4),
    "midnight": (1536, 40, 1, 14, 1134.8),
    "dinov2": (1024, 24, 1, 14, 303.2),
}
PATCHES = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)


def _uni() -> torch.nn.Module:
    """The network as its authors ask for it, without memory."""
    import timm

    with torch.device("meta"):
        return timm.create_model(
            "vit_large_patch16_224", img_size=224, patch_size=16, init_values=1e-5, num_classes=0, dynamic_img_size=True
        )


def _blank(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(1).expand(tensor.shape) for name, tensor in module.state_dict().items()}


def _filled(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, tensor in module.state_dict().items():
        state[name] = torch.empty(tensor.shape).normal_(0.0, 0.03, generator=generator)
        if name.endswith(("norm1.weight", "norm2.weight", "norm.weight")):
            state[name] += 1.0
    return state


@pytest.mark.parametrize("name", HUB)
def test_without_access_the_steps_are_told(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.TRANSFORMERS_CACHE", str(tmp_path), raising=False)
    entry = ENCODERS[name]
    with pytest.raises(UserError) as told:
        load_encoder(name)
    message = str(told.value)
    assert f"{name!r} cannot be loaded" in message
    assert f"https://huggingface.co/{entry.source}" in message
    assert "weights=PATH" in message
    assert all(step in message for step in ("1. Accept", "2. Log in with `hf auth login`", "3. ")) == entry.gated
    assert entry.license in message or not entry.gated


def test_every_entry_is_whole() -> None:
    assert set(KNOWN) == set(PUBLISHED) | {"demo", "squeezenet", "inception"}
    for name, entry in ENCODERS.items():
        width = PUBLISHED.get(name, (entry.dim,))[0]
        assert entry.dim == width * (2 if entry.tokens == "cls+mean" else 1)
        assert entry.license
        assert entry.prefix == PUBLISHED.get(name, (0, 0, 1))[2]
    assert {name for name, entry in ENCODERS.items() if entry.gated} == {"uni", "uni2-h", "virchow2", "h-optimus-0"}
    normalised = {e.preprocessing.mean for e in ENCODERS.values() if e.preprocessing}
    assert normalised == {IMAGENET_MEAN, (0.5,) * 3, (0.0,) * 3, (0.707223, 0.578729, 0.703617)}


def _dry(encoder: Any) -> torch.Size:
    """Shape of two patches' features, computed without numbers."""
    side = encoder.preprocessing.size
    return encoder.module.to("meta")(torch.zeros(2, 3, side, side, device="meta")).shape


@pytest.mark.parametrize("name", ["uni", *(pytest.param(n, marks=pytest.mark.slow) for n in TIMM if n != "uni")])
def test_files_of_the_published_shapes_load_strictly(name: str, tmp_path: Path) -> None:
    from latent_medi.features.transformer import build_timm

    state = _blank(build_timm(ENCODERS[name]))
    width, depth, prefix, side, millions = PUBLISHED[name]
    assert sum(t.numel() for t in state.values()) / 1e6 == pytest.approx(millions, abs=0.1)
    assert state["patch_embed.proj.weight"].shape == (width, 3, side, side)
    assert len([k for k in state if k.endswith("attn.qkv.weight")]) == depth
    assert 1 + state.get("reg_token", torch.zeros(1, 0)).shape[1] == prefix
    torch.save(state, tmp_path / "pytorch_model.bin")
    encoder = load_encoder(name, weights=tmp_path)
    assert encoder.dim == ENCODERS[name].dim
    assert _dry(encoder) == (2, encoder.dim)

    wrong = {
        "blocks.0.attn.qkv.weight": torch.zeros(1).expand(3 * width, width + 1),
        "head.weight": torch.zeros(1).expand(10, width),
    }
    for key, tensor in wrong.items():
        torch.save(state | {key: tensor}, tmp_path / "pytorch_model.bin")
        with pytest.raises(UserError, match=f"does not fit[^$]*{key}"):
            load_encoder(name, weights=tmp_path / "pytorch_model.bin")
    torch.save({k: v for k, v in state.items() if k != "norm.bias"}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"does not fit[^$]*norm\.bias"):
        load_encoder(name, weights=tmp_path)


@pytest.mark.slow  # writes and reads two files of 1.2 GB
def test_uni_from_its_file_gives_the_features_of_its_network(tmp_path: Path) -> None:
    module = _uni()
    state = _filled(module)
    torch.save(state, tmp_path / "pytorch_model.bin")
    encoder = load_encoder("uni", weights=tmp_path)
    features = encoder.features([PATCHES])
    assert features.shape == (2, 1024)
    module.load_state_dict(state, assign=True)
    x = torch.from_numpy(PATCHES).permute(0, 3, 1, 2) / 255
    x = (x - torch.tensor(IMAGENET_MEAN)[:, None, None]) / torch.tensor(IMAGENET_STD)[:, None, None]
    with torch.no_grad():
        expected = module.eval()(x).numpy()
    np.testing.assert_allclose(features, expected, atol=1e-5)
    assert np.abs(features[0] - features[1]).max() > 1e-3
    (tmp_path / "pytorch_model.bin").unlink()
    save_file(state, tmp_path / "model.safetensors")
    again = load_encoder("uni", weights=tmp_path)
    assert again.fingerprint == encoder.fingerprint
    np.testing.assert_array_equal(again.features([PATCHES]), features)


def _tiny(monkeypatch: pytest.MonkeyPatch, name: str, folder: Path) -> Any:
    """An entry of the table with a small network, and that network's files in a folder."""
    import transformers

    entry = ENCODERS[name]
    small = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    arguments: Mapping[str, Any] = {**entry.arguments, **small}
    dim = 96 if entry.tokens == "cls+mean" else 48
    monkeypatch.setitem(registry.ENCODERS, name, replace(entry, dim=dim, arguments=arguments))  # type: ignore[arg-type]
    architecture = getattr(transformers, entry.architecture)
    torch.manual_seed(0)
    model = architecture(architecture.config_class(**arguments, image_size=224, intermediate_size=64))
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("name", ["phikon", "phikon-v2", "midnight", "dinov2"])
def test_a_transformers_folder_is_read_out_by_its_rule(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _tiny(monkeypatch, name, tmp_path)  # phikon's holds a pooling layer, which nothing depends on
    encoder = load_encoder(name, weights=tmp_path)
    how = encoder.preprocessing
    x = torch.from_numpy(PATCHES).permute(0, 3, 1, 2) / 255
    x = (x - torch.tensor(how.mean)[:, None, None]) / torch.tensor(how.std)[:, None, None]
    with torch.no_grad():
        tokens = model(pixel_values=x).last_hidden_state
    expected = [tokens[:, 0], tokens[:, 1:].mean(1)] if name == "midnight" else [tokens[:, 0]]
    np.testing.assert_allclose(encoder.features([PATCHES]), torch.cat(expected, 1).numpy(), atol=1e-4)


def test_fingerprint_covers_the_activation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _tiny(monkeypatch, "phikon-v2", tmp_path)
    first, again = (load_encoder("phikon-v2", weights=tmp_path).fingerprint for _ in range(2))
    assert first == again
    moved = shutil.copytree(tmp_path, tmp_path / "moved")
    assert load_encoder("phikon-v2", weights=moved).fingerprint == first
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    assert load_encoder("phikon-v2", weights=moved).fingerprint != first


def test_a_transformers_folder_is_loaded_strictly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers itself would fill in random numbers for what is missing."""
    _tiny(monkeypatch, "phikon-v2", tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    key = "encoder.layer.1.attention.attention.key.bias"
    broken = {
        "is missing": {k: v for k, v in state.items() if k != key},
        "is unknown": state | {"pooler.dense.bias": torch.zeros(48)},
        "has another shape": state | {key: torch.zeros(47)},
    }
    for said, tensors in broken.items():
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(UserError, match=rf"does not fit the network: \S+ {said}"):
            load_encoder("phikon-v2", weights=tmp_path)
    file.write_bytes(b"not weights")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_encoder("phikon-v2", weights=tmp_path)
    with pytest.raises(UserError, match=r"is not facebook/dinov2-large: it has .*patch_size 16"):
        load_encoder("dinov2", weights=tmp_path)  # another network under the same class
    with pytest.raises(UserError, match=r"config\.json"):
        load_encoder("phikon-v2", weights=file)


@pytest.mark.slow  # writes and reads a file of 1.2 GB
def test_phikon_v2_from_a_folder_of_its_size(tmp_path: Path) -> None:
    from transformers import Dinov2Config, Dinov2Model

    width, depth, _, side, millions = PUBLISHED["phikon-v2"]
    config = Dinov2Config(
        hidden_size=width, num_hidden_layers=depth, num_attention_heads=16, patch_size=side, image_size=224
    )
    with torch.device("meta"):
        model = Dinov2Model(config)
    state = _filled(model)
    assert sum(t.numel() for t in state.values()) / 1e6 == pytest.approx(millions, abs=0.1)
    model.load_state_dict(state, assign=True)
    model.eval().save_pretrained(tmp_path)
    encoder = load_encoder("phikon-v2", weights=tmp_path)
    features = encoder.features([PATCHES])
    assert features.shape == (2, 1024)
    x = encoder.prepare(PATCHES)
    with torch.no_grad():
        expected = model(pixel_values=x).last_hidden_state[:, 0].numpy()
    np.testing.assert_allclose(features, expected, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["phikon", "midnight", "dinov2"])
def test_large_transformers_have_the_published_shape(name: str) -> None:
    """Built without memory: a file of Midnight's size does not fit everywhere."""
    import transformers

    from latent_medi.features.transformer import _ClassToken, _StatesClassAndMean

    entry = ENCODERS[name]
    width, depth, prefix, side, millions = PUBLISHED[name]
    assert (entry.arguments["hidden_size"], entry.arguments["num_hidden_layers"]) == (width, depth)
    assert entry.arguments["patch_size"] == side
    architecture = getattr(transformers, entry.architecture)
    more = {"intermediate_size": 4 * width} if name == "phikon" else {}
    options = {"add_pooling_layer": False} if name == "phikon" else {}
    with torch.device("meta"):
        model = architecture(architecture.config_class(**entry.arguments, image_size=224, **more), **options)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=1.0)
    module = _StatesClassAndMean(model, prefix) if entry.tokens == "cls+mean" else _ClassToken(model)
    assert module(torch.zeros(2, 3, 224, 224, device="meta")).shape == (2, entry.dim)
