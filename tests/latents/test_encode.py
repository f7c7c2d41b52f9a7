"""Encoding a dataset: content, layout, resume, refusals."""

from __future__ import annotations

import json
from dataclasses import replace

import fsspec
import numpy as np
import pytest
import torch
from latents_parts import make_dataset
from parts import random_model
from safetensors.torch import load_file

from latent_medi.core.errors import UserError
from latent_medi.latents import encode as module
from latent_medi.latents.autoencoder import Autoencoder, save_autoencoder
from latent_medi.latents.encode import encode, encode_dataset
from latent_medi.latents.settings import EncodeSettings
from latent_medi.latents.store import LatentStore
from latent_medi.latents.views import view_of
from latent_medi.shards.reading.read_ahead import read_ahead_threads
from latent_medi.shards.reading.remote import open_dataset


@pytest.fixture(scope="module")
def autoencoder() -> Autoencoder:
    return Autoencoder(random_model("AutoencoderKL"), "random")


@pytest.fixture
def dataset(tmp_path):
    return make_dataset(tmp_path / "data")


def test_one_file_per_shard_row_aligned_with_the_index(dataset, autoencoder, tmp_path):
    out = encode_dataset(dataset.folder, autoencoder, tmp_path / "latents", device_batch=3)
    assert sorted(p.name for p in (out / "data").iterdir()) == [f"part-{i:06d}.safetensors" for i in range(3)]
    assert not (out / ".progress").exists()
    tensors = [load_file(out / "data" / f"part-{i:06d}.safetensors") for i in range(3)]
    assert {t.dtype for part in tensors for t in part.values()} == {torch.float16}
    mean, std = autoencoder.encode(dataset.read(np.arange(10)))
    torch.testing.assert_close(torch.cat([t["mean"] for t in tensors]).float(), mean, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(torch.cat([t["std"] for t in tensors]).float(), std, atol=2e-3, rtol=2e-3)


def test_latents_json_identifies_everything(dataset, autoencoder, tmp_path):
    out = encode_dataset(dataset.folder, autoencoder, tmp_path / "latents")
    info = json.loads((out / "latents.json").read_text())
    assert info["autoencoder"]["hash"] == autoencoder.hash
    assert info["autoencoder"]["source"] == "random"
    assert info["shape"] == [4, 8, 8]
    assert info["count"] == 10
    assert [s["source_sha256"] for s in info["shards"]] == [s["sha256"] for s in dataset.info["shards"]]
    assert [s["count"] for s in info["shards"]] == [4, 4, 2]
    for shard in info["shards"]:
        tensors = load_file(out / shard["file"])
        mean = tensors["mean"].double()
        np.testing.assert_allclose(shard["sum"], mean.sum((0, 2, 3)), rtol=1e-9)
        np.testing.assert_allclose(shard["sum_squares"], mean.square().sum((0, 2, 3)), rtol=1e-9)
        np.testing.assert_allclose(shard["sum_variances"], tensors["std"].double().square().sum((0, 2, 3)), rtol=1e-9)


@pytest.mark.parametrize("kind", ["AutoencoderTiny", "AutoencoderTAEF2"])
def test_a_deterministic_autoencoder_stores_the_mean_only(dataset, tmp_path, kind):
    out = encode_dataset(dataset.folder, Autoencoder(random_model(kind), "x"), tmp_path / "latents")
    assert set(load_file(out / "data/part-000000.safetensors")) == {"mean"}
    mean, std = LatentStore(out).moments([0, 9])
    assert std is None
    assert mean.shape[0] == 2


def test_a_cut_off_encoding_goes_on_and_gives_the_same_bytes(dataset, autoencoder, tmp_path, monkeypatch):
    whole = encode_dataset(dataset.folder, autoencoder, tmp_path / "whole")
    real, done = module._Encoding.encode, []

    def count_and_fail(encoding, reader, number, shown):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(number)
        real(encoding, reader, number, shown)

    monkeypatch.setattr(module._Encoding, "encode", count_and_fail)
    with pytest.raises(KeyboardInterrupt):
        encode_dataset(dataset.folder, autoencoder, tmp_path / "cut")
    with pytest.raises(UserError, match="not finished"):
        LatentStore(tmp_path / "cut")
    # A shard that was damaged meanwhile is made again, the other one is kept.
    damaged = tmp_path / "cut" / "data" / "part-000001.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    monkeypatch.setattr(module._Encoding, "encode", lambda *a: (done.append(a[2]), real(*a)))
    encode_dataset(dataset.folder, autoencoder, tmp_path / "cut")
    assert done == [0, 1, 1, 2]
    for file in sorted(p.relative_to(whole) for p in whole.rglob("*") if p.is_file()):
        assert (whole / file).read_bytes() == (tmp_path / "cut" / file).read_bytes(), file


def test_a_finished_folder_is_left_alone_and_another_one_is_refused(dataset, autoencoder, tmp_path, monkeypatch):
    out = encode_dataset(dataset.folder, autoencoder, tmp_path / "latents")
    monkeypatch.setattr(module._Encoding, "encode", lambda *a: pytest.fail("encoded again"))
    assert encode_dataset(dataset.folder, autoencoder, out) == out
    with pytest.raises(UserError, match="another autoencoder"):
        encode_dataset(dataset.folder, Autoencoder(random_model("AutoencoderKL", seed=1), "y"), out)
    with pytest.raises(UserError, match="other images"):
        encode_dataset(make_dataset(tmp_path / "other", seed=1).folder, autoencoder, out)


def test_shards_are_shared_by_processes(dataset, autoencoder, tmp_path):
    class Process:
        num_processes = 2

        def __init__(self, index):
            self.process_index = index

        def wait_for_everyone(self):
            pass

    out = tmp_path / "latents"
    encode_dataset(dataset.folder, autoencoder, out, accelerator=Process(1))
    assert [p.name for p in (out / "data").iterdir()] == ["part-000001.safetensors"]
    encode_dataset(dataset.folder, autoencoder, out, accelerator=Process(0))
    whole = encode_dataset(dataset.folder, autoencoder, tmp_path / "whole")
    assert (whole / "latents.json").read_bytes() == (out / "latents.json").read_bytes()


def test_patches_that_do_not_fit_are_refused(autoencoder, tmp_path):
    data = make_dataset(tmp_path / "odd", count=2, size=30)
    with pytest.raises(UserError, match="multiple of 4"):
        encode_dataset(data.folder, autoencoder, tmp_path / "latents")


def test_latents_beyond_fp16_are_refused_and_name_the_patch(dataset, tmp_path):
    model = random_model("AutoencoderTiny")
    with torch.no_grad():
        list(model.encoder.modules())[-1].bias += 1e5
    with pytest.raises(UserError, match="'k0'"):
        encode_dataset(dataset.folder, Autoencoder(model, "x"), tmp_path / "latents")


def test_the_verb(dataset, tmp_path):
    save_autoencoder(Autoencoder(random_model("AutoencoderKL"), "x"), tmp_path / "vae")
    settings = EncodeSettings(str(dataset.folder), str(tmp_path / "out"), str(tmp_path / "vae"), device="cpu")
    assert len(LatentStore(encode(settings))) == 10
    with pytest.raises(UserError, match=r"views .* 1 or 8, not 4"):
        encode(replace(settings, views=4))
    with pytest.raises(UserError, match="workers is -1"):
        replace(settings, workers=-1)


def test_threads_that_read_ahead_change_nothing(dataset, autoencoder, tmp_path):
    plain = encode_dataset(dataset.folder, autoencoder, tmp_path / "plain", device_batch=1)
    ahead = encode_dataset(dataset.folder, autoencoder, tmp_path / "ahead", device_batch=1, workers=3)
    assert (plain / "latents.json").read_bytes() == (ahead / "latents.json").read_bytes()


def test_a_url_is_encoded_like_a_folder(dataset, autoencoder, tmp_path):
    files = fsspec.filesystem("memory")
    files.put(str(dataset.folder), "/encoded-from-here", recursive=True)
    plain = encode_dataset(dataset.folder, autoencoder, tmp_path / "plain")
    there = encode_dataset("memory://encoded-from-here", autoencoder, tmp_path / "there", workers=2)
    assert (plain / "latents.json").read_bytes() == (there / "latents.json").read_bytes()


def test_threads_read_ahead_only_where_they_do_not_take_the_autoencoders_cores(dataset):
    files = fsspec.filesystem("memory")
    files.put(str(dataset.folder), "/read-ahead-of", recursive=True)
    assert read_ahead_threads(torch.device("cpu"), dataset) == 0
    assert read_ahead_threads(torch.device("cuda:1"), dataset) == 4
    assert read_ahead_threads(torch.device("cpu"), open_dataset("memory://read-ahead-of")) == 4


@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderTiny", "AutoencoderTAEF2"])
def test_slicing_passes_patches_one_by_one_and_gives_the_same(kind, tmp_path):
    save_autoencoder(Autoencoder(random_model(kind), "x"), tmp_path / "vae")
    data = make_dataset(tmp_path / "data")
    settings = EncodeSettings(str(data.folder), str(tmp_path / "a"), str(tmp_path / "vae"), device="cpu")
    a = LatentStore(encode(settings)).moments(range(10))
    sizes: list[int] = []
    sliced = Autoencoder(random_model(kind), "x").enable_slicing()
    for part in (sliced.model.encoder, sliced.model.decoder):
        part.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    sliced.decode(sliced.encode(data.read(range(4)))[0])
    assert sizes == [1] * 8
    b = LatentStore(encode(replace(settings, out=str(tmp_path / "b"), slicing=True))).moments(range(10))
    torch.testing.assert_close(a[0], b[0], atol=2e-3, rtol=2e-3)


def test_views_are_encoded_in_pixel_space(dataset, autoencoder, tmp_path):
    out = encode_dataset(dataset.folder, autoencoder, tmp_path / "latents", device_batch=3, views=8)
    assert load_file(out / "data/part-000000.safetensors")["mean"].shape == (4, 8, 4, 8, 8)
    images = dataset.read(np.arange(10))
    for resident in ("mmap", "ram"):
        store = LatentStore(out, resident)
        assert (store.views, store.nbytes) == (8, 10 * 8 * 2 * 4 * 8 * 8 * 2)
        rows, views = np.array([9, 0, 4, 4, 7]), np.array([0, 7, 3, 4, 5])
        mean, std = store.moments(rows, views)
        expected = [autoencoder.encode(view_of(images[[r]], int(v))) for r, v in zip(rows, views, strict=True)]
        # A patch by itself may be encoded with other roundings than among others.
        for found, alone in ((mean, [m for m, _ in expected]), (std, [s for _, s in expected])):
            torch.testing.assert_close(found, torch.cat(alone).half().float(), rtol=2**-9, atol=2**-10)
        assert torch.equal(store.moments(rows)[0], store.moments(rows, [0] * 5)[0])
        with pytest.raises(UserError, match=r"Views of .* from 0 to 7, not 0 to 8"):
            store.moments([0, 1], [0, 8])
    # Statistics and sums are over all views.
    info = json.loads((out / "latents.json").read_text())
    everything = torch.cat([load_file(out / s["file"])["mean"] for s in info["shards"]]).double()
    torch.testing.assert_close(store.statistics(range(10))[0].double(), everything.mean((0, 1, 3, 4)))
    total = np.sum([s["sum"] for s in info["shards"]], axis=0)
    np.testing.assert_allclose(total, everything.sum((0, 1, 3, 4)), rtol=1e-9)
    one = encode_dataset(dataset.folder, autoencoder, tmp_path / "one")
    with pytest.raises(UserError, match=r"8 view\(s\) per patch, not 1"):
        encode_dataset(dataset.folder, autoencoder, out)
    firsts = [of.moments(range(10))[0] for of in (LatentStore(one), store)]
    torch.testing.assert_close(*firsts, rtol=2**-9, atol=2**-10)
    with pytest.raises(UserError, match="from 0 to 0"):
        LatentStore(one).moments([0], [1])
