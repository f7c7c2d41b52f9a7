"""The autoencoder's reconstruction error: its numbers, and that it is measured once and kept."""

from __future__ import annotations

import json

import numpy as np
import pytest
from latents_parts import make_dataset
from parts import make_autoencoder, random_images

from latent_medi.core.errors import UserError
from latent_medi.features.encoders import load_encoder
from latent_medi.latents import encode as module
from latent_medi.latents.autoencoder import save_autoencoder
from latent_medi.latents.encode import encode_dataset
from latent_medi.latents.reconstruction_error import paired_kid, psnr, reconstruction_text
from latent_medi.latents.settings import ReconstructionSettings as Settings
from latent_medi.statistics.distances import frechet_distance
from latent_medi.statistics.kernel_distance import kid


def test_psnr_is_in_decibels_per_image() -> None:
    images = random_images(3) // 2
    others = images.copy()
    others[1] += 10
    others[2, 0, 0, 0] += 1
    equal, ten, one = psnr(images, others)
    assert ten == pytest.approx(20 * np.log10(25.5))
    assert equal == one == pytest.approx(10 * np.log10(255**2 * 32 * 32 * 3))


def test_the_kernel_distance_of_pairs_has_no_bias() -> None:
    rng = np.random.default_rng(0)
    values, plain = [], []
    for _ in range(300):
        a = rng.normal(size=(12, 6))
        b = a + rng.normal(0, 0.05, a.shape)
        values.append(paired_kid(a, b))
        plain.append(kid(a, b))
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(300) + 1e-3
    assert np.mean(plain) < -0.1  # what leaving the pairs in would give


@pytest.mark.parametrize("count", [100, 12])
def test_the_error_is_of_reconstructions_from_what_is_stored(tmp_path, count: int) -> None:
    data, autoencoder = make_dataset(tmp_path / "data", count=count, per_shard=40), make_autoencoder()
    out = encode_dataset(data.folder, autoencoder, tmp_path / "latents", 7, reconstruction=Settings(patches=98))
    error = json.loads((out / "latents.json").read_text())["floor"]
    n = min(count, 98)
    assert (error["patches"], error["of"]) == (n, count)
    rows = np.sort(np.random.default_rng(0).choice(count, n, replace=False))
    images = data.read(rows)
    decoded = autoencoder.decode(autoencoder.encode(images)[0].half().float())
    ratio = psnr(images, decoded)
    assert error["psnr"]["mean"] == pytest.approx(ratio.mean(), abs=1e-6)
    assert error["psnr"]["worst"] == pytest.approx(ratio.min(), abs=1e-6)
    assert error["psnr"]["worst_key"] == data.index["key"].iloc[rows[ratio.argmin()]]
    encoder = load_encoder("demo")
    a, b = (encoder.features([side]) for side in (images, decoded))
    assert error["encoder"] == {"name": "demo", "fingerprint": encoder.fingerprint, "dim": 48}
    assert error["kid"] == pytest.approx(paired_kid(a, b), rel=1e-4)
    text = reconstruction_text(error)
    if n >= 96:
        assert error["metric"] == "fd"
        assert error["fd"] == pytest.approx(frechet_distance(a, b), rel=1e-4)
        assert "Fréchet distance" in text
    else:
        assert (error["metric"], error["fd"]) == ("kid", None)
        assert "a Fréchet distance takes 96 patches" in text
    assert f"over {n} of {count} patches" in text


def test_the_error_is_measured_once_and_kept(tmp_path, monkeypatch) -> None:
    data, autoencoder = make_dataset(tmp_path / "data"), make_autoencoder()
    plain = encode_dataset(data.folder, autoencoder, tmp_path / "plain")
    assert "floor" not in json.loads((plain / "latents.json").read_text())
    # Cut off between the encoding and the measurement: the folder is whole, and the same command adds what is missing.
    with monkeypatch.context() as patch:
        patch.setattr(module, "measure_reconstruction", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            encode_dataset(data.folder, autoencoder, tmp_path / "cut", reconstruction=Settings())
    assert (tmp_path / "cut" / "latents.json").read_bytes() == (plain / "latents.json").read_bytes()
    cut = encode_dataset(data.folder, autoencoder, tmp_path / "cut", reconstruction=Settings())
    whole = encode_dataset(data.folder, autoencoder, tmp_path / "whole", reconstruction=Settings())
    assert (cut / "latents.json").read_bytes() == (whole / "latents.json").read_bytes()
    monkeypatch.setattr(module, "measure_reconstruction", lambda *a: pytest.fail("measured again"))
    before = (cut / "latents.json").read_bytes()
    encode_dataset(data.folder, autoencoder, cut, reconstruction=Settings(patches=3))
    encode_dataset(data.folder, autoencoder, cut)
    assert (cut / "latents.json").read_bytes() == before
    assert encode_dataset(data.folder, autoencoder, tmp_path / "none", reconstruction=Settings(patches=0)).is_dir()


def test_an_unknown_encoder_is_refused_before_anything_is_decoded(tmp_path, monkeypatch) -> None:
    data, autoencoder = make_dataset(tmp_path / "data"), make_autoencoder()
    monkeypatch.setattr(autoencoder, "encode", lambda images: pytest.fail("encoded for hours first"))
    with pytest.raises(UserError, match="There is no encoder 'demmo'"):
        encode_dataset(data.folder, autoencoder, tmp_path / "latents", reconstruction=Settings(encoder="demmo"))


def test_the_verb_tells_it_as_json(tmp_path) -> None:
    from latent_medi.cli import main

    data = make_dataset(tmp_path / "data", count=6)
    save_autoencoder(make_autoencoder(), tmp_path / "vae")
    words = ["encode", f"data={data.folder}", f"out={tmp_path / 'latents'}", f"autoencoder={tmp_path / 'vae'}"]
    words += ["device=cpu", "reconstruction_error.patches=5", "--json", str(tmp_path / "told.json")]
    assert main(words) == 0
    told = json.loads((tmp_path / "told.json").read_text())
    assert told["floor"]["patches"] == 5
    assert 0 < told["floor"]["psnr"]["worst"] <= told["floor"]["psnr"]["mean"]
