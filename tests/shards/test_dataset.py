from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parts import put_index

from latent_medi.core.errors import UserError
from latent_medi.core.files import read_sealed, write_sealed
from latent_medi.metadata.schema import Schema
from latent_medi.shards.dataset import PatchDataset
from latent_medi.shards.writing.writer import Patch, write_dataset

Make = Callable[..., list[Patch]]


@pytest.fixture
def dataset(tmp_path: Path, make_patches: Make, schema: Schema) -> PatchDataset:
    return write_dataset(tmp_path / "d", make_patches(), "d", schema, 16, 0.5, patches_per_shard=7)


@pytest.fixture(scope="module")
def shared_dataset(tmp_path_factory: pytest.TempPathFactory, make_patches: Make, schema: Schema) -> PatchDataset:
    return write_dataset(tmp_path_factory.mktemp("d"), make_patches(), "d", schema, 16, 0.5, patches_per_shard=7)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.integers(0, 23), max_size=40), workers=st.sampled_from([0, 3]))
def test_any_rows_come_back_in_the_order_asked_for(
    shared_dataset: PatchDataset, make_patches: Make, rows: list[int], workers: int
) -> None:
    patches = make_patches()
    read = shared_dataset.read(np.array(rows, dtype=int), workers=workers)
    assert read.shape == (len(rows), 16, 16, 3)
    assert all(np.array_equal(image, patches[row].image) for image, row in zip(read, rows, strict=True))


def test_iterate_covers_the_rows_in_batches(shared_dataset: PatchDataset) -> None:
    batches = list(shared_dataset.iterate(np.arange(23, -1, -1), 10))
    assert [len(rows) for rows, _ in batches] == [10, 10, 4]
    rows = np.concatenate([rows for rows, _ in batches])
    assert rows.tolist() == list(range(23, -1, -1))
    assert np.array_equal(np.concatenate([images for _, images in batches]), shared_dataset.read(rows))
    assert sum(len(rows) for rows, _ in shared_dataset.iterate(None, 5)) == 24


def test_the_index_holds_every_column(shared_dataset: PatchDataset, make_patches: Make) -> None:
    index = shared_dataset.index
    patches = make_patches()
    assert index["key"].tolist() == [p.key for p in patches]
    assert index["site"].tolist() == [p.fields["site"] for p in patches]
    assert index["number"].tolist() == list(range(24))
    assert index["note"].tolist() == [f"n{i}" for i in range(24)]
    assert index["age"].dtype == np.float64
    assert np.isnan(index["age"][:8]).all()
    assert index["age"][8:].tolist() == [p.fields["age"] for p in patches[8:]]  # to the last bit
    codes, _ = shared_dataset.schema.encode(index)
    assert (codes[:8, 2] == 1).all()
    assert (codes[8:, 2] == 2).all()


def test_rows_select_by_field_split_and_number(dataset: PatchDataset) -> None:
    dataset.add_split("main", ["train" if p in ("p0", "p1", "p2") else "test" for p in dataset.index["patient"]], {})
    assert dataset.rows().tolist() == list(range(24))
    assert dataset.rows({"split_main": "train", "class": "b"}).tolist() == [4, 5, 6, 7]
    assert dataset.rows({"site": ["NA", "01"]}).tolist() == list(range(24))
    assert dataset.rows({"age": "unknown"}).tolist() == list(range(8))
    assert dataset.rows({"split_main": "val"}).tolist() == []
    assert dataset.rows({"site": "unknown"}).tolist() == []
    for where, message in [
        ({"sites": "NA"}, "'sites'.*'site'"),
        ({"class": "c"}, "'class' has no value 'c'"),
        ({"split_main": "tran"}, "'tran'.*'train'"),
        ({"origin": "reel"}, "'reel'"),
    ]:
        with pytest.raises(UserError, match=message):
            dataset.rows(where)


def test_a_split_that_shares_a_patient_is_refused(dataset: PatchDataset) -> None:
    before = (dataset.folder / "index.parquet").read_bytes(), (dataset.folder / "dataset.json").read_bytes()
    shared = ["train"] * 6 + ["test"] * 18
    with pytest.raises(UserError, match=r"'p1' in \['test', 'train'\]"):
        dataset.add_split("main", shared, {})
    assert before == ((dataset.folder / "index.parquet").read_bytes(), (dataset.folder / "dataset.json").read_bytes())
    assert "split_main" not in dataset.index.columns


def test_splits_are_recorded_and_not_overwritten_unasked(dataset: PatchDataset) -> None:
    parts = pd.Series(["train"] * 12 + ["test"] * 12)
    dataset.add_split("main", parts, {"seed": 3})
    dataset.add_split("main", parts, {"seed": 3})
    reopened = PatchDataset.open(dataset.folder)
    assert reopened.index["split_main"].tolist() == parts.tolist()
    assert reopened.info["splits"]["main"]["recipe"] == {"seed": 3}
    assert reopened.splits == ["main"]
    assert reopened.verify() == []
    with pytest.raises(UserError, match="already has another split"):
        reopened.add_split("main", ["train"] * 24, {})
    reopened.add_split("main", ["train"] * 24, {}, replace=True)
    assert set(PatchDataset.open(dataset.folder).index["split_main"]) == {"train"}
    with pytest.raises(UserError, match="3 rows"):
        reopened.add_split("x", ["train"] * 3, {})
    with pytest.raises(UserError, match="'a b'"):
        reopened.add_split("a b", ["train"] * 24, {})


def test_synthetic_patches_never_test(tmp_path: Path, make_patches: Make, schema: Schema) -> None:
    synthetic = write_dataset(tmp_path, make_patches(8, origin="synthetic"), "s", schema, 16, 0.5)
    assert synthetic.info["counts"]["synthetic"] == 8
    for part in ("test", "val", "reference"):
        with pytest.raises(UserError, match="synthetic"):
            synthetic.add_split("main", [part] * 8, {})
    synthetic.add_split("main", ["train"] * 8, {})


def test_counts_by_unit(dataset: PatchDataset) -> None:
    assert dataset.counts("class", "site").to_dict() == {"01": {"a": 4, "b": 4}, "NA": {"a": 8, "b": 8}}
    assert dataset.counts("class", "site", "patients").loc["a", "NA"] == 2
    assert dataset.counts("class", "site", "slides").loc["a", "NA"] == 4
    with pytest.raises(UserError, match="'pages'"):
        dataset.counts("class", "site", "pages")


def test_verify_finds_every_kind_of_damage(dataset: PatchDataset, make_patches: Make) -> None:
    assert dataset.verify(images=True) == []
    (dataset.folder / "data/part-000003.tar").unlink()
    (dataset.folder / "data/part-000009.tar").write_bytes(b"")
    tar = dataset.folder / "data/part-000001.tar"
    data = bytearray(tar.read_bytes())
    offset = int(dataset.index["offset"][9])
    data[offset : offset + 60] = bytes(60)
    tar.write_bytes(bytes(data))
    problems = "\n".join(dataset.verify(images=True))
    assert "part-000003.tar is missing" in problems
    assert "part-000001.tar is damaged" in problems
    assert "part-000009.tar is not part" in problems
    assert "'p2/009'" in problems
    with pytest.raises(UserError, match=r"'p2/009'.*part-000001\.tar"):
        dataset.read(np.arange(7, 14))
    assert np.array_equal(dataset.read([8])[0], make_patches()[8].image)


def test_offsets_that_lie_are_found(dataset: PatchDataset) -> None:
    path = dataset.folder / "index.parquet"
    table = pq.read_table(path).to_pandas()
    table.loc[[2, 3], "offset"] = table.loc[[3, 2], "offset"].to_numpy()
    table.loc[[2, 3], "size"] = table.loc[[3, 2], "size"].to_numpy()
    put_index(dataset.folder, table)
    assert [p for p in PatchDataset.open(dataset.folder).verify() if "not where the index says" in p]


def test_opening_what_is_no_dataset(tmp_path: Path, dataset: PatchDataset) -> None:
    with pytest.raises(UserError, match="no dataset folder"):
        PatchDataset.open(tmp_path / "nothing")
    with pytest.raises(UserError, match="Row numbers run from 0 to 23"):
        dataset.read([24])
    info, _ = read_sealed(dataset.folder / "dataset.json", "")
    write_sealed(dataset.folder / "dataset.json", {**info, "schema_version": 7})
    with pytest.raises(UserError, match="version 7"):
        PatchDataset.open(dataset.folder)


def test_reading_keeps_one_file_open_and_closes_it(
    shared_dataset: PatchDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    original = os.open
    monkeypatch.setattr(os, "open", lambda path, *a, **k: (opened.append(str(path)), original(path, *a, **k))[1])
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    shared_dataset.read(np.random.default_rng(0).permutation(24))
    assert len(opened) == 4
    assert before == (len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0)


@pytest.mark.slow
def test_eight_thousand_patches_take_seconds(tmp_path: Path, make_patches: Make, schema: Schema) -> None:
    patches = make_patches(8000, 64)
    start = time.process_time()
    dataset = write_dataset(tmp_path, patches, "d", schema_for(patches), 64, 0.5)
    wrote = time.process_time()
    dataset.read(np.random.default_rng(0).permutation(8000))
    assert wrote - start < 30
    assert time.process_time() - wrote < 10


def schema_for(patches: list[Patch]) -> Schema:
    return Schema.from_table(pd.DataFrame([dict(p.fields) for p in patches]), "class", ["site"], ["age"])


def test_a_selection_is_columns_and_a_record(dataset: PatchDataset) -> None:
    chosen = np.arange(24) < 5
    columns = {"": chosen, "_control": chosen[::-1], "_score": np.where(chosen, np.nan, np.arange(24))}
    dataset.add_selection("best", columns, {"per_cell": 5}, {"n": 5})
    reopened = PatchDataset.open(dataset.folder)
    assert reopened.verify() == []
    assert reopened.rows({"selected_best": True}).tolist() == [0, 1, 2, 3, 4]
    assert reopened.rows({"selected_best": "true", "selected_best_control": False}).tolist() == [0, 1, 2, 3, 4]
    assert reopened.index["selected_best_score"].iloc[5:].tolist() == list(range(5, 24))
    assert reopened.selections["best"]["recipe"] == {"per_cell": 5}
    assert reopened.selections["best"]["columns"]["selected_best"]["patches"] == 5
    with pytest.raises(UserError, match="true or false, not 'yes'"):
        reopened.rows({"selected_best": "yes"})
    with pytest.raises(UserError, match="already has a selection 'best'"):
        reopened.add_selection("best", columns, {}, {})
    for name, bad in (
        ("best_control", columns),
        ("a b", columns),
        ("x", {"": chosen[:3]}),
        ("x", {"_control": chosen}),
    ):
        with pytest.raises(UserError, match=r"best_control|a b|3 rows|columns"):
            reopened.add_selection(name, bad, {}, {})
    reopened.add_split("main", ["train"] * 24, {})  # and what else is recorded keeps it
    assert PatchDataset.open(dataset.folder).selections["best"]["result"] == {"n": 5}
    reopened.add_selection("best", {"": ~chosen}, {"per_cell": 19}, {}, replace=True)
    reopened = PatchDataset.open(dataset.folder)
    assert [c for c in reopened.index.columns if c.startswith("selected_")] == ["selected_best"]
    assert reopened.verify() == []


def test_two_who_opened_one_dataset_do_not_lose_each_others_splits(
    tmp_path: Path, make_patches: Callable[..., list[Patch]], schema: Schema
) -> None:
    write_dataset(tmp_path / "set", make_patches(), "d", schema, 16, 0.5)
    one, other = PatchDataset.open(tmp_path / "set"), PatchDataset.open(tmp_path / "set")
    one.add_split("a", ["train"] * len(one), {})
    with pytest.raises(UserError, match="has changed since it was opened"):
        other.add_split("b", ["train"] * len(other), {})
    with pytest.raises(UserError, match="has changed since it was opened"):
        other.add_selection("c", {"": np.ones(len(other), bool)}, {}, {})
    PatchDataset.open(tmp_path / "set").add_split("b", ["train"] * len(one), {})
    assert PatchDataset.open(tmp_path / "set").splits == ["a", "b"]
