"""One path for every patch, strict loading, and errors that say what to do."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from latent_medi.core.checksums import write_checksums
from latent_medi.core.errors import UserError
from latent_medi.features.encoders import ImageEncoder, colour_free, load_encoder
from latent_medi.features.networks import Network, Preprocessing
from latent_medi.features.tiny_encoder import TinyEncoder

TINY = {"dim": 12, "channels": [8, 16], "groups": 4, "image_size": 32, "mean": [0.7, 0.5, 0.6], "std": [0.2, 0.2, 0.1]}


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (7, 32, 32, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    TinyEncoder(TINY).save(tmp_path / "enc")
    return tmp_path / "enc"


def test_folder_encoder_normalises_once(folder: Path, images: np.ndarray) -> None:
    encoder = load_encoder(folder)
    x = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - torch.tensor(TINY["mean"])[:, None, None]) / torch.tensor(
        TINY["std"]
    )[:, None, None]
    with torch.no_grad():
        expected = TinyEncoder.load(folder)(x).numpy()
    got = encoder.features([images])
    assert got.dtype == np.float32
    assert got.shape == (7, encoder.dim) == (7, 12)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_batches_do_not_matter_and_empty_input_is_empty(folder: Path, images: np.ndarray) -> None:
    encoder = load_encoder(folder)
    np.testing.assert_allclose(encoder.features([images]), encoder.features([images[:3], images[3:]]), atol=1e-5)
    assert encoder.features([]).shape == (0, 12)


def test_fingerprint_covers_weights_and_preprocessing(folder: Path) -> None:
    encoder = load_encoder(folder)
    assert encoder.fingerprint == load_encoder(folder).fingerprint
    assert encoder.fingerprint != colour_free(encoder).fingerprint
    changed = load_encoder(folder)
    next(changed.module.parameters()).data[0] += 1
    assert changed.fingerprint != encoder.fingerprint


def test_fingerprint_covers_what_is_in_no_tensor(folder: Path, images: np.ndarray) -> None:
    """Two networks of the same weights may give other features: one cache entry for both would serve the wrong ones."""
    first = load_encoder(folder)
    (folder / "encoder.json").write_text(json.dumps(TINY | {"groups": 8}))
    write_checksums(folder)
    second = load_encoder(folder)
    assert np.abs(first.features([images]) - second.features([images])).max() > 0.01
    assert first.fingerprint != second.fingerprint


def test_colour_free_twin_sees_no_eosin(folder: Path) -> None:
    from latent_medi.features.stain import STAINS

    twin = colour_free(load_encoder(folder))
    assert twin.name.endswith(":haematoxylin")
    rng = np.random.default_rng(1)
    h = rng.random((2, 32, 32, 1)) * 0.4
    eosin = rng.random((2, 32, 32, 1)) * 0.25

    def render(e: np.ndarray) -> np.ndarray:
        return np.rint(255 * 10 ** -(h * STAINS[0] + e * STAINS[1])).astype(np.uint8)

    plain, stained = render(0 * eosin), render(eosin)
    moved = np.abs(twin.features([plain]) - twin.features([stained])).max()
    rgb = load_encoder(folder)
    assert moved < 0.1 * np.abs(rgb.features([plain]) - rgb.features([stained])).max()


def test_resize_is_antialiased_and_stays_in_range() -> None:
    checker = np.zeros((1, 64, 64, 3), np.uint8)
    checker[:, ::2, ::2] = checker[:, 1::2, 1::2] = 255
    how = Preprocessing(16, (0.0,) * 3, (1.0,) * 3, "bicubic")
    x = ImageEncoder(Network("id", nn.Flatten(), 768, how, "")).prepare(checker)
    assert x.shape == (1, 3, 16, 16)
    assert float(x.min()) >= 0
    assert float(x.max()) <= 1
    assert float((x - 0.5).abs().max()) < 0.05


@pytest.mark.parametrize("bad", [np.zeros((2, 8, 8, 3), np.float32), np.zeros((8, 8, 3), np.uint8)])
def test_other_arrays_are_refused(folder: Path, bad: np.ndarray) -> None:
    with pytest.raises(UserError, match="uint8"):
        load_encoder(folder).features([bad])


def test_features_that_are_not_finite_are_an_error(images: np.ndarray) -> None:
    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean(dim=(2, 3)) / 0

    with pytest.raises(ValueError, match="finite"):
        ImageEncoder(Network("broken", Broken(), 3, Preprocessing(0, (0.5,) * 3, (1.0,) * 3), "")).features([images])


def test_a_precision_below_fp32_is_the_network_s_alone_and_part_of_the_name(images: np.ndarray) -> None:
    plain, low = load_encoder("demo"), load_encoder("demo@bf16")
    assert (plain.name, low.name, colour_free(low).name) == ("demo", "demo@bf16", "demo@bf16:haematoxylin")
    assert colour_free(low).precision == "bf16"
    assert torch.equal(plain.prepare(images), low.prepare(images))
    full, half = plain.features([images]), low.features([images])
    assert half.dtype == np.float32
    assert not np.array_equal(full, half)
    assert np.abs(half - full).max() < 0.05 * np.abs(full).max()
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert np.array_equal(plain.module(plain.prepare(images)).float().numpy(), half)
    for wrong in ("demo@bf17", "squeezenet@bf16@128"):
        with pytest.raises(UserError, match="number of pixels"):
            load_encoder(wrong)


def test_features_beyond_half_precision_are_told_with_a_way_out(images: np.ndarray) -> None:
    class Large(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.full((3, 3), 6e4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x.mean(dim=(2, 3)), self.weight)

    network = Network("large", Large(), 3, Preprocessing(0, (0.0,) * 3, (1.0,) * 3), "")
    assert np.isfinite(ImageEncoder(network).features([images])).all()
    with pytest.raises(UserError, match=r"(?s)not finite in fp16.*Leave out '@fp16'"):
        ImageEncoder(network, precision="fp16").features([images])


def test_features_come_in_order_whatever_the_batches(folder: Path, images: np.ndarray) -> None:
    """One batch's features are fetched while the next one's are made."""
    encoder, empty = load_encoder(folder), images[:0]
    batches = [empty, images[:2], empty, images[2:3], images[3:], empty]
    np.testing.assert_allclose(encoder.features(batches), encoder.features([images]), atol=1e-5)


def test_errors_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="squeezenet"):
        load_encoder("squeezenett")
    with pytest.raises(UserError, match="weights=PATH"):
        load_encoder("squeezenet")
    with pytest.raises(UserError, match="weights=PATH"):
        load_encoder("inception")
    with pytest.raises(UserError, match="not exist"):
        load_encoder("squeezenet", weights=tmp_path / "absent.safetensors")
    with pytest.raises(UserError, match="owkin/phikon-v2"):
        load_encoder("phikon-v2", weights=tmp_path / "absent")
    (tmp_path / "w.safetensors").write_bytes(b"not weights")
    with pytest.raises(UserError, match="cannot be read"):
        load_encoder("squeezenet", weights=tmp_path / "w.safetensors")


def test_weights_with_code_are_not_run(tmp_path: Path) -> None:
    import pickle

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (str(tmp_path / "ran"),))  # type: ignore[return-value]

    (tmp_path / "w.pth").write_bytes(pickle.dumps({"a": Evil()}))
    for name in ("squeezenet", "inception", "uni"):
        with pytest.raises(UserError, match="cannot be read"):
            load_encoder(name, weights=tmp_path / "w.pth")
    assert not (tmp_path / "ran").exists()


def test_squeezenet_loads_strictly(shared: Path) -> None:
    weights = shared / "models" / "squeezenet"
    encoder = load_encoder("squeezenet@64", weights=weights)
    noise = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    features = encoder.features([noise])
    assert features.shape == (3, 512)
    assert features.std() > 0
    assert (features >= 0).all()
    tile = np.asarray(Image.open(min((shared / "data" / "tcga_tiles").rglob("*.png"))).convert("RGB"))
    assert 0.5 < np.sqrt(np.square(load_encoder("squeezenet", weights=weights).features([tile[None]])).mean()) < 2
    assert load_encoder("squeezenet", weights=weights / "squeezenet1_0_imagenet.safetensors").preprocessing.size == 224


def test_squeezenet_refuses_partial_weights(shared: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(shared / "models" / "squeezenet" / "squeezenet1_0_imagenet.safetensors")
    state.pop(sorted(state)[0])
    save_file(state, tmp_path / "part.safetensors")
    with pytest.raises(UserError, match="does not fit"):
        load_encoder("squeezenet", weights=tmp_path / "part.safetensors")
