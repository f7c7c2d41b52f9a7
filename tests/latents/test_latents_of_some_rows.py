"""Latents of the rows that a filter keeps: their place, their checks, and training on them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from latents_parts import make_dataset
from parts import put_index, random_model

from latent_medi.core.errors import UserError
from latent_medi.core.files import read_sealed, write_sealed
from latent_medi.latents import encode as module
from latent_medi.latents.autoencoder import Autoencoder
from latent_medi.latents.encode import encode_dataset
from latent_medi.latents.info import as_ranges, held_rows
from latent_medi.latents.settings import ReconstructionSettings
from latent_medi.latents.store import LatentStore
from latent_medi.shards.dataset import PatchDataset
from latent_medi.training.data import open_latents, training_rows

A_ROWS = [0, 2, 4, 6, 8]


@pytest.fixture(scope="module")
def autoencoder() -> Autoencoder:
    return Autoencoder(random_model("AutoencoderKL"), "random")


@pytest.fixture
def dataset(tmp_path):
    """Ten patches in shards of 4, 4 and 2; even rows are of class a."""
    return make_dataset(tmp_path / "data")


def test_rows_keep_their_numbers_and_values(dataset, autoencoder, tmp_path):
    whole = LatentStore(encode_dataset(dataset.folder, autoencoder, tmp_path / "whole"))
    some = encode_dataset(dataset.folder, autoencoder, tmp_path / "some", only={"class": ["a"]})
    info = json.loads((some / "latents.json").read_text())
    assert info["only"] == {"class": ["a"]}
    assert info["count"] == 5
    for resident in ("mmap", "ram"):
        store = LatentStore(some, resident)
        assert store.rows.tolist() == A_ROWS
        for rows in (A_ROWS, [8, 0, 0, 6]):
            for ours, theirs in zip(store.moments(rows), whole.moments(rows), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3)
        for ours, theirs in zip(store.statistics(A_ROWS), whole.statistics(A_ROWS), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
        with pytest.raises(UserError, match=r"1 of 2 patches have no latents .* class a"):
            store.moments([0, 1])
        with pytest.raises(UserError, match="from 0 to 9"):
            store.moments([10])


def test_shards_without_a_row_have_no_file(dataset, autoencoder, tmp_path):
    out = encode_dataset(dataset.folder, autoencoder, tmp_path / "some", only={"patient": ["p4"]})
    assert [path.name for path in (out / "data").iterdir()] == ["part-000002.safetensors"]
    assert LatentStore(out).rows.tolist() == [8, 9]


def test_training_takes_rows_that_were_encoded_alone(dataset, autoencoder, tmp_path):
    folder = str(encode_dataset(dataset.folder, autoencoder, tmp_path / "some", only={"class": ["a"]}))
    rows = training_rows(dataset, "", "", {"class": ["a"]})
    assert rows.tolist() == A_ROWS
    assert len(open_latents(dataset, folder, rows=rows)) == 5
    with pytest.raises(UserError, match="5 of 10 patches have no latents"):
        open_latents(dataset, folder, rows=training_rows(dataset, "", "", {}))
    with pytest.raises(UserError, match="not encoded from the dataset"):
        open_latents(make_dataset(tmp_path / "other", seed=1), folder)


def test_a_finished_folder_serves_what_it_holds(dataset, autoencoder, tmp_path, monkeypatch):
    some = encode_dataset(dataset.folder, autoencoder, tmp_path / "some", only={"class": ["a"]})
    whole = encode_dataset(dataset.folder, autoencoder, tmp_path / "whole")
    monkeypatch.setattr(module._Encoding, "encode", lambda *a: pytest.fail("encoded again"))
    encode_dataset(dataset.folder, autoencoder, whole, only={"class": ["a"]})
    encode_dataset(dataset.folder, autoencoder, some, only={"class": ["a"], "patient": ["p0"]})
    with pytest.raises(UserError, match="latents of patches with class a alone"):
        encode_dataset(dataset.folder, autoencoder, some)


def test_corrected_metadata_do_not_move_latents(dataset, autoencoder, tmp_path):
    """The folder says which rows it holds: what the filter would choose today does not matter."""
    out = encode_dataset(dataset.folder, autoencoder, tmp_path / "some", only={"class": ["a"]})
    put_index(dataset.folder, dataset.index.assign(**{"class": ["b", "a"] * 5}))
    changed = PatchDataset.open(dataset.folder)
    assert LatentStore(out).rows.tolist() == A_ROWS
    with pytest.raises(UserError, match="5 of 5 patches have no latents"):
        open_latents(changed, str(out), rows=training_rows(changed, "", "", {"class": ["a"]}))
    with pytest.raises(UserError, match="latents of patches with class a alone"):
        encode_dataset(changed.folder, autoencoder, out, only={"class": ["a"]})


def test_a_cut_off_encoding_with_another_filter_leaves_nothing_of_the_first(
    dataset, autoencoder, tmp_path, monkeypatch
):
    finish = module._Encoding.finish
    monkeypatch.setattr(module._Encoding, "finish", lambda encoding: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        encode_dataset(dataset.folder, autoencoder, tmp_path / "out", only={"class": ["a"]})
    monkeypatch.setattr(module._Encoding, "finish", finish)
    out = encode_dataset(dataset.folder, autoencoder, tmp_path / "out", only={"patient": ["p0"]})
    fresh = encode_dataset(dataset.folder, autoencoder, tmp_path / "fresh", only={"patient": ["p0"]})
    files = sorted(p.relative_to(fresh) for p in fresh.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(out) for p in out.rglob("*") if p.is_file())
    for file in files:
        assert (fresh / file).read_bytes() == (out / file).read_bytes()


def test_the_reconstruction_error_is_of_encoded_patches(dataset, autoencoder, tmp_path):
    error = ReconstructionSettings(patches=100)
    out = encode_dataset(dataset.folder, autoencoder, tmp_path / "some", only={"class": ["a"]}, reconstruction=error)
    found = json.loads((out / "latents.json").read_text())["floor"]
    assert (found["patches"], found["of"]) == (5, 5)
    assert found["psnr"]["worst_key"] in {f"k{i}" for i in A_ROWS}


@pytest.mark.parametrize("rows", [[0, 1, 2], [2, 1], [0, 4], [0, 1, 0, 1], [9, 14]])
def test_ranges_that_do_not_fit_are_damage(dataset, autoencoder, tmp_path, rows):
    out = encode_dataset(dataset.folder, autoencoder, tmp_path / "some", only={"patient": ["p0"]})
    info, _ = read_sealed(out / "latents.json", "")
    assert info["shards"][0]["rows"] == [0, 2]
    info["shards"][0]["rows"] = rows
    write_sealed(out / "latents.json", {key: value for key, value in info.items() if key != "seal"})
    with pytest.raises(UserError, match="damaged"):
        LatentStore(out)


@pytest.mark.parametrize("rows", [[0], [0, 1, 2], [1, 3, 4, 9], [5, 7]])
def test_ranges_name_the_rows(rows):
    info = {"only": {}, "of": 10, "shards": [{"rows": as_ranges(np.array(rows)), "count": len(rows)}]}
    assert held_rows(info, "x").tolist() == rows
