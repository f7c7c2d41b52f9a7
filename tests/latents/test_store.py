"""Random access to latents, and their statistics."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from latents_parts import make_dataset
from parts import random_model
from safetensors.torch import load_file

from latent_medi.core.errors import UserError
from latent_medi.latents import store as module
from latent_medi.latents.autoencoder import Autoencoder
from latent_medi.latents.encode import encode_dataset
from latent_medi.latents.store import LatentStore, choose_residence


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    base = tmp_path_factory.mktemp("store")
    data = make_dataset(base / "data", count=11)
    return encode_dataset(data.folder, Autoencoder(random_model("AutoencoderKL"), "random"), base / "latents")


@pytest.fixture(scope="module")
def everything(folder):
    parts = [load_file(p) for p in sorted((folder / "data").iterdir())]
    return tuple(torch.cat([p[name] for p in parts]).float() for name in ("mean", "std"))


@pytest.mark.parametrize("resident", ["mmap", "ram", "device", "auto"])
def test_rows_come_in_the_order_asked_for(folder, everything, resident):
    store = LatentStore(folder, resident)
    assert len(store) == 11
    assert store.shape == (4, 8, 8)
    assert store.resident == ("ram" if resident == "auto" else resident)
    for rows in ([10, 0, 5, 5, 4, 3], np.arange(11), [], np.array([7], dtype=np.int32)):
        mean, std = store.moments(rows)
        assert mean.dtype == std.dtype == torch.float32
        assert torch.equal(mean, everything[0][torch.as_tensor(np.asarray(rows, dtype=np.int64))])
        assert torch.equal(std, everything[1][torch.as_tensor(np.asarray(rows, dtype=np.int64))])


@pytest.mark.parametrize("rows", [[11], [-1], [0, 99]])
def test_rows_out_of_range_are_refused(folder, rows):
    with pytest.raises(UserError, match="from 0 to 10"):
        LatentStore(folder, "mmap").moments(rows)


@pytest.mark.parametrize("resident", ["mmap", "ram"])
def test_shift_and_scale_are_of_sampled_latents_over_the_rows_asked_for(folder, everything, resident):
    rows = [0, 3, 7, 8, 10]
    shift, scale = LatentStore(folder, resident).statistics(rows)
    mean, std = everything[0][rows].double(), everything[1][rows].double()
    noise = torch.randn(400, *mean.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sampled = mean + std * noise
    torch.testing.assert_close(shift.double(), mean.mean((0, 2, 3)), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(scale.double(), sampled.std((0, 1, 3, 4)), atol=0, rtol=5e-3)
    expected = (mean.var((0, 2, 3), unbiased=False) + std.square().mean((0, 2, 3))).sqrt()
    torch.testing.assert_close(scale.double(), expected, atol=1e-6, rtol=1e-6)
    assert not torch.equal(shift, LatentStore(folder).statistics(range(11))[0])


def test_statistics_do_not_depend_on_the_order_of_rows(folder):
    store = LatentStore(folder)
    a, b = store.statistics([1, 2, 9]), store.statistics([9, 1, 2])
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[1], b[1])


def test_no_rows_have_no_statistics(folder):
    with pytest.raises(UserError, match="no row"):
        LatentStore(folder).statistics([])


def test_a_constant_channel_is_refused(tmp_path):
    data = make_dataset(tmp_path / "data", count=3)
    model = random_model("AutoencoderTiny")
    with torch.no_grad():
        last = list(model.encoder.modules())[-1]
        last.weight[2], last.bias[2] = 0, 0.5
    out = encode_dataset(data.folder, Autoencoder(model, "x"), tmp_path / "latents")
    with pytest.raises(UserError, match=r"channels \[2\].*constant"):
        LatentStore(out).statistics([0, 1, 2])


@pytest.mark.parametrize("damage", ["cut", "absent", "other shape", "no info", "newer"])
def test_damaged_folders_are_refused(tmp_path, damage):
    data = make_dataset(tmp_path / "data", count=3)
    out = encode_dataset(data.folder, Autoencoder(random_model("AutoencoderKL"), "x"), tmp_path / "latents")
    file, info = out / "data/part-000000.safetensors", json.loads((out / "latents.json").read_text())
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-10])
    elif damage == "absent":
        file.unlink()
    elif damage == "no info":
        (out / "latents.json").unlink()
    else:
        changed = {"shape": [4, 4, 4]} if damage == "other shape" else {"schema_version": 99}
        del info["seal"]
        (out / "latents.json").write_text(json.dumps({**info, **changed}))
    with pytest.raises(UserError):
        LatentStore(out)


@pytest.mark.parametrize(
    ("size", "device", "place"),
    [
        (10, "cuda", "device"),
        (11, "cuda", "ram"),
        (400, "cuda", "ram"),
        (401, "cuda", "mmap"),
        (40, "cpu", "ram"),
        (401, "cpu", "mmap"),
    ],
)
def test_the_nearest_place_where_they_fit_with_room_is_chosen(monkeypatch, size, device, place):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 1 << 40))
    monkeypatch.setattr(module, "_free_memory", lambda: 1000)
    assert choose_residence(size, device) == place


def test_processes_of_one_machine_share_its_memory(monkeypatch):
    monkeypatch.setattr(module.os, "sysconf", lambda name: 10**6)
    monkeypatch.setattr(module.Path, "read_text", lambda self: "max")
    assert module._free_memory() == 10**12
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert module._free_memory() == 10**12 // 4
    # A container that may take less than the machine has.
    monkeypatch.setattr(module.Path, "read_text", lambda self: "9000" if self.name == "memory.max" else "1000")
    assert module._free_memory() == 2000


def test_another_place_is_refused(folder):
    with pytest.raises(UserError, match="'device', not 'gpu'"):
        LatentStore(folder, "gpu")


def test_a_folder_of_version_1_reads_as_one_view(folder, everything, tmp_path):
    info = json.loads((folder / "latents.json").read_text())
    del info["views"], info["seal"]  # neither was written then
    (tmp_path / "data").symlink_to(folder / "data")
    (tmp_path / "latents.json").write_text(json.dumps({**info, "schema_version": 1}))
    store = LatentStore(tmp_path)
    assert (store.views, store.identity) == (1, "")
    assert torch.equal(store.moments(range(11))[0], everything[0])
