"""Autoencoders: ranges, raw moments, loading by folder and name, refusals, and real weights."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from parts import random_images, random_model
from PIL import Image

from latent_medi.core.errors import UserError
from latent_medi.latents.autoencoder import Autoencoder, load_autoencoder, save_autoencoder
from latent_medi.latents.taef2 import AutoencoderTAEF2

KINDS = ["AutoencoderKL", "AutoencoderTiny", "AutoencoderDC", "AutoencoderTAEF2"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_local_folder_loads_and_is_the_same(kind, tmp_path):
    model = random_model(kind)
    model.save_pretrained(tmp_path / "a")
    loaded = load_autoencoder(tmp_path / "a")
    assert loaded.kind == kind
    assert loaded.factor == (8 if kind == "AutoencoderTAEF2" else 4)
    assert loaded.latent_channels == (6 if kind == "AutoencoderTAEF2" else 4)
    assert loaded.deterministic == (kind != "AutoencoderKL")
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    images = random_images()
    mean, std = loaded.encode(images)
    assert mean.shape == (3, loaded.latent_channels, 32 // loaded.factor, 32 // loaded.factor)
    assert (std is None) == loaded.deterministic
    save_autoencoder(loaded, tmp_path / "b")
    again = load_autoencoder(tmp_path / "b")
    assert again.hash == loaded.hash == Autoencoder(random_model(kind), "x").hash
    assert torch.equal(again.encode(images)[0], mean)
    assert np.array_equal(again.decode(mean), loaded.decode(mean))


def test_kl_moments_are_diffusers_own_on_minus_one_to_one():
    model = random_model("AutoencoderKL")
    images = random_images()
    mean, std = Autoencoder(model, "x").encode(images)
    with torch.no_grad():
        x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
        assert (x.min(), x.max()) == (-1, 1)
        expected = model.encode(x).latent_dist
    torch.testing.assert_close(mean, expected.mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(std, expected.std, atol=1e-5, rtol=1e-5)
    assert mean.dtype == std.dtype == torch.float32


def test_tiny_latents_are_diffusers_own_on_minus_one_to_one():
    model = random_model("AutoencoderTiny")
    images = random_images()
    mean, std = Autoencoder(model, "x").encode(images)
    with torch.no_grad():
        expected = model.encode(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1).latents
    assert std is None
    torch.testing.assert_close(mean, expected, atol=1e-5, rtol=1e-5)


def test_an_autoencoder_of_stable_diffusion_3_loads(tmp_path):
    """16 channels, a shift, and no convolution between encoder and latents; raw latents as of any other."""
    torch.manual_seed(0)
    model = AutoencoderKL(
        block_out_channels=(8, 16, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=16,
        layers_per_block=1,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        force_upcast=True,
    ).eval()
    model.save_pretrained(tmp_path)
    loaded = load_autoencoder(tmp_path)
    assert (loaded.latent_channels, loaded.factor, loaded.deterministic) == (16, 8, False)
    images = random_images()
    mean, std = loaded.encode(images)
    with torch.no_grad():
        expected = model.encode(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1).latent_dist
    torch.testing.assert_close(mean, expected.mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(std, expected.std, atol=1e-5, rtol=1e-5)
    assert loaded.decode(mean).shape == images.shape


@pytest.mark.parametrize("kind", KINDS)
def test_decoded_pixels_are_rounded_and_clamped(kind):
    autoencoder = Autoencoder(random_model(kind), "x")
    z = 3 * torch.randn(2, autoencoder.latent_channels, 8, 8)
    with torch.no_grad():
        out = autoencoder.model.decode(z)
        x = out if kind == "AutoencoderTAEF2" else out.sample / 2 + 0.5
    expected = (x.double() * 255).clamp(0, 255).round().permute(0, 2, 3, 1).numpy()
    decoded = autoencoder.decode(z)
    assert decoded.dtype == np.uint8
    assert decoded.shape == (2, 8 * autoencoder.factor, 8 * autoencoder.factor, 3)
    assert np.abs(decoded - expected).max() <= 1
    assert (decoded == expected).mean() > 0.999


def test_arrays_and_tensors_are_alike_and_the_rest_is_refused():
    autoencoder = Autoencoder(random_model("AutoencoderKL"), "x")
    images = random_images()
    assert torch.equal(autoencoder.encode(images)[0], autoencoder.encode(torch.from_numpy(images))[0])
    for wrong in (images.astype(np.float32), images[0], images.transpose(0, 3, 1, 2)):
        with pytest.raises(UserError, match="uint8"):
            autoencoder.encode(wrong)
    with pytest.raises(UserError, match="multiples of 4"):
        autoencoder.encode(random_images(size=30))


def test_the_hash_is_of_the_weights_whatever_the_precision(tmp_path):
    model = random_model("AutoencoderKL").half().float()
    plain = Autoencoder(model, "x")
    model.half().save_pretrained(tmp_path / "half")
    halved = load_autoencoder(tmp_path / "half")
    assert halved.hash == plain.hash
    assert halved.dtype == torch.float32
    assert load_autoencoder(tmp_path / "half", dtype=torch.bfloat16).hash == plain.hash
    assert Autoencoder(random_model("AutoencoderKL", seed=1), "x").hash != plain.hash


@pytest.mark.parametrize("name", ["sd-vae-ft-mse", "taesd", "somebody/vae"])
def test_offline_names_say_what_to_download_and_where_to_put_it(name, monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError) as error:
        load_autoencoder(name)
    hub = {"sd-vae-ft-mse": "stabilityai/sd-vae-ft-mse", "taesd": "madebyollin/taesd"}.get(name, name)
    assert f"hf download {hub} config.json diffusion_pytorch_model.safetensors --local-dir FOLDER" in error.value.hint
    assert "give its path as the autoencoder" in error.value.hint


def test_a_folder_is_never_taken_for_a_hub_id(tmp_path, monkeypatch):
    random_model("AutoencoderKL").save_pretrained(tmp_path / "somebody" / "vae")
    monkeypatch.chdir(tmp_path)
    assert load_autoencoder("somebody/vae").source == str(tmp_path / "somebody" / "vae")


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        ("no config", "no config.json"),
        ("other class", "UNet2DModel"),
        ("pickle", "pickled weights are not loaded"),
        ("cut", "cannot be loaded"),
        ("absent", "no such folder"),
    ],
)
def test_folders_that_cannot_be_loaded(tmp_path, damage, why):
    folder = tmp_path / "a"
    model = random_model("AutoencoderKL")
    if damage != "absent":
        model.save_pretrained(folder)
    weights = folder / "diffusion_pytorch_model.safetensors"
    if damage == "no config":
        (folder / "config.json").unlink()
    elif damage == "other class":
        (folder / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    elif damage == "pickle":
        weights.unlink()
        torch.save(model.state_dict(), folder / "diffusion_pytorch_model.bin")
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-50])
    with pytest.raises(UserError, match=why):
        load_autoencoder(folder)


class _Evil:
    def __reduce__(self):
        return (print, ("code ran",))


def test_a_pickle_that_runs_code_is_not_opened(tmp_path, capsys):
    for name in ("taef2_encoder.pth", "taef2_decoder.pth"):
        with open(tmp_path / name, "wb") as handle:
            pickle.dump({"0.weight": _Evil()}, handle, protocol=2)
    with pytest.raises(UserError, match="not a plain file of tensors"):
        load_autoencoder(tmp_path)
    assert "code ran" not in capsys.readouterr().out


def test_taef2_weights_that_do_not_fit_or_are_absent(tmp_path):
    torch.save({"0.weight": torch.zeros(1)}, tmp_path / "taef2_encoder.pth")
    with pytest.raises(UserError, match=r"taef2_decoder\.pth does not exist"):
        load_autoencoder(tmp_path)
    torch.save({"0.weight": torch.zeros(1)}, tmp_path / "taef2_decoder.pth")
    with pytest.raises(UserError, match="not the TAEF2 weights"):
        load_autoencoder(tmp_path)


def psnr(decoded: np.ndarray, images: np.ndarray) -> float:
    """Mean over the images of their peak signal-to-noise ratio in dB."""
    error = (decoded.astype(float) - images) ** 2
    return float((10 * np.log10(255**2 / error.mean((1, 2, 3)))).mean())


def test_real_taef2_weights_reconstruct_real_patches(shared, tmp_path):
    autoencoder = load_autoencoder(shared / "models" / "taef2")
    assert isinstance(autoencoder.model, AutoencoderTAEF2)
    assert (autoencoder.latent_channels, autoencoder.factor, autoencoder.deterministic) == (32, 8, True)
    for part in (autoencoder.model.encoder, autoencoder.model.decoder):
        assert 1.2e6 < sum(p.numel() for p in part.parameters()) < 1.45e6
    tiles = sorted((shared / "data" / "tcga_tiles").glob("*.png"))[:2]
    images = np.stack([np.asarray(Image.open(p).convert("RGB"))[256:512, 256:512] for p in tiles])
    latents, std = autoencoder.encode(images)
    assert std is None
    assert psnr(autoencoder.decode(latents), images) > 31.0  # 31.3; the pooled branch elsewhere gives 29.4
    # Patches that were halved before have finer detail per pixel, of which an 8× autoencoder keeps less.
    halved = sorted((shared / "data" / "prostate" / "images").glob("*.jpeg"))[::1100][:2]
    patches = np.stack([np.asarray(Image.open(p).convert("RGB")) for p in halved])
    assert psnr(autoencoder.decode(autoencoder.encode(patches)[0]), patches) > 24.8  # 25.1
    save_autoencoder(autoencoder, tmp_path / "taef2")
    again = load_autoencoder(tmp_path / "taef2")
    assert again.hash == autoencoder.hash
    assert torch.equal(again.encode(images)[0], latents)
    assert np.array_equal(again.decode(latents), autoencoder.decode(latents))
