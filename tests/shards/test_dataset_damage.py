"""Damage to a dataset folder is named, never read; folders of earlier versions open; a mistyped file is one message."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parts import put_index

from latent_medi.cli import main
from latent_medi.core.errors import UserError
from latent_medi.core.files import read_sealed, write_json
from latent_medi.diffusion.conditioning import Conditions
from latent_medi.metadata.schema import Schema
from latent_medi.metadata.training_record import was_trained_on
from latent_medi.shards.dataset import PatchDataset
from latent_medi.shards.export import export, samples
from latent_medi.shards.format import folder as folder_module
from latent_medi.shards.format.codec import encode_image
from latent_medi.shards.reading.remote import open_dataset
from latent_medi.shards.reading.stream import PatchStream, epochs, webdataset_of
from latent_medi.shards.settings import ExportSettings
from latent_medi.shards.writing.finish import Description, finish_dataset
from latent_medi.shards.writing.records import finished_shards
from latent_medi.shards.writing.writer import Patch, write_dataset, write_shard

Make = Callable[..., list[Patch]]
OLD = Path(__file__).resolve().parents[1] / "fixtures" / "datasets"
"""Small folders as revision 2bebcb5 wrote them: a split, a selection, an unknown age, the site NA."""


@pytest.fixture
def dataset(tmp_path: Path, make_patches: Make, schema: Schema) -> PatchDataset:
    return write_dataset(tmp_path / "d", make_patches(), "d", schema, 16, 0.5, patches_per_shard=7)


@pytest.fixture(autouse=True)
def _fresh_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_module, "_warned", set())


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Fail instead of waiting for ever."""

    def fail(*_: Any) -> None:
        raise TimeoutError(f"still waiting after {seconds} s")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("codec", ["png", "jpg"])
def test_a_folder_of_an_earlier_version_opens_reads_and_is_sealed(
    tmp_path: Path, codec: str, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(OLD / codec, tmp_path / "old"))
    for _ in range(3):
        dataset = PatchDataset.open(folder)
        images = dataset.read(np.arange(8))
    warned = [record.getMessage() for record in caplog.records]
    assert len(warned) == 1, "one warning for the folder, however often it is opened"
    assert "without checksums" in warned[0]
    assert f"`latent-medi shards verify {folder} seal=true`" in warned[0]
    assert dataset.index["site"].tolist() == ["NA"] * 4 + ["01"] * 4
    assert dataset.index["age"].isna().tolist() == [True] * 2 + [False] * 6
    assert dataset.rows({"split_main": "test"}).tolist() == [6, 7]
    assert dataset.rows({"selected_best": True}).tolist() == [0, 1, 2]
    assert len(list(webdataset_of(dataset))) == len(list(samples(dataset, np.arange(8)))) == 8
    assert dataset.verify(images=True) == []
    before = dataset.index
    shards = {p: p.read_bytes() for p in folder.glob("data/*")}
    assert main(["shards", "verify", str(folder), "seal=true"]) == 0
    assert "checksums added" in capsys.readouterr().out
    caplog.clear()
    sealed = PatchDataset.open(folder)
    assert sealed.index[list(before.columns)].equals(before)
    assert set(sealed.index) - set(before) == {"image_crc32", "json_crc32", "image_fingerprint", "shared_picture"}
    assert np.array_equal(sealed.read(np.arange(8)), images)
    assert len(list(webdataset_of(sealed))) == 8
    assert sealed.verify(images=True) == []
    assert not caplog.records
    assert shards == {p: p.read_bytes() for p in folder.glob("data/*")}
    content = (folder / "dataset.json").read_bytes(), (folder / "index.parquet").read_bytes()
    assert main(["shards", "verify", str(folder), "seal=true"]) == 0
    assert content == ((folder / "dataset.json").read_bytes(), (folder / "index.parquet").read_bytes())


def test_damage_to_an_unsealed_index_is_found_before_it_is_sealed(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(OLD / "png", tmp_path / "old"))
    index = pd.read_parquet(folder / "index.parquet")
    for column, value in (("class", "b"), ("patient", "p3"), ("age", 7.0), ("number", 5), ("origin", "synthetic")):
        changed = index.copy()
        changed.loc[1, column] = value
        changed.to_parquet(folder / "index.parquet", index=False)
        (found,) = [p for p in PatchDataset.open(folder).verify() if "JSON members" in p]
        assert f"'{column}' of 1 patches" in found
        assert f"'p0/001': {value!r} in the index" in found
        assert main(["shards", "verify", str(folder), "seal=true"]) == 2
    assert read_sealed(folder / "dataset.json", "")[1] is False


def test_a_split_that_an_earlier_version_did_not_finish_does_not_exist(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(OLD / "png", tmp_path / "old"))
    index = pd.read_parquet(folder / "index.parquet").assign(split_cut="train", selected_cut=True)
    index.to_parquet(folder / "index.parquet", index=False)
    dataset = PatchDataset.open(folder)
    assert not [c for c in dataset.index if c.endswith("cut")]
    assert dataset.verify() == []


def test_a_split_added_to_an_earlier_versions_folder_seals_what_it_writes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(OLD / "jpg", tmp_path / "old"))
    PatchDataset.open(folder).add_split("later", ["train"] * 8, {})
    assert read_sealed(folder / "dataset.json", "")[1]
    caplog.clear()
    folder_module._warned.clear()
    reopened = PatchDataset.open(folder)
    assert reopened.verify(images=True) == []
    assert "seal=true" in caplog.text  # the patches have no checksums yet
    assert main(["shards", "verify", str(folder), "seal=true"]) == 0
    assert "image_crc32" in PatchDataset.open(folder).index


def test_shards_that_an_earlier_version_left_unfinished_are_kept(tmp_path: Path, make_patches: Make) -> None:
    folder = Path(shutil.copytree(OLD / "unfinished", tmp_path / "old"))
    (record,) = finished_shards(folder).values()
    table = pd.DataFrame([json.loads(text) for text in record.rows["fields"]])
    made = finish_dataset(folder, Description("d", Schema.from_table(table, "class", ["site"], ["age"]), 8, 0.5))
    whole = PatchDataset.open(OLD / "png")
    assert np.array_equal(made.read(np.arange(4)), whole.read(np.arange(4)))
    assert made.verify(images=True) == []
    fresh = [dict(zip(("image_crc32", "json_crc32"), pair, strict=True)) for pair in _sums(made)]
    assert made.index[["image_crc32", "json_crc32"]].to_dict("records") == fresh


def _sums(dataset: PatchDataset) -> list[tuple[int, int]]:
    import zlib

    return [(zlib.crc32(i), zlib.crc32(t)) for _, i, t in samples(dataset, np.arange(len(dataset)))]


def test_a_record_of_an_unfinished_shard_that_says_something_else_is_not_kept(
    tmp_path: Path, make_patches: Make, caplog: pytest.LogCaptureFixture
) -> None:
    write_shard(tmp_path, 0, make_patches()[:4])
    assert list(finished_shards(tmp_path)) == [0]
    path = tmp_path / ".progress" / "part-000000.parquet"
    table = pq.read_table(path)
    rows = table.to_pandas()
    rows.loc[0, "fields"] = rows.loc[0, "fields"].replace('"a"', '"b"')
    pq.write_table(pa.Table.from_pandas(rows, table.schema, preserve_index=False), path)
    assert finished_shards(tmp_path) == {}
    assert "part-000000.parquet is not readable" in caplog.text


def readers(folder: Path) -> dict[str, Callable[[], Any]]:
    """Everything that reads patches, each opening the folder anew."""

    def streamed() -> Any:
        dataset = PatchDataset.open(folder)
        stream = PatchStream(dataset, epochs(np.arange(len(dataset)), 0), images=len(dataset), global_batch=4)
        return [(batch.rows, batch.images) for batch in stream]

    def remote() -> Any:
        memory = fsspec.filesystem("memory")
        if memory.exists("/damaged"):
            memory.rm("/damaged", recursive=True)
        memory.put(str(folder), "/damaged", recursive=True)
        dataset = open_dataset("memory://damaged")
        return dataset.read(np.arange(len(dataset)))

    return {
        "read": lambda: PatchDataset.open(folder).read(np.arange(24)),
        "threads": lambda: PatchDataset.open(folder).read(np.arange(24), workers=2),
        "iterate": lambda: [images for _, images in PatchDataset.open(folder).iterate(None, 5)],
        "stream": streamed,
        "export": lambda: list(samples(PatchDataset.open(folder), np.arange(24))),
        "webdataset": lambda: [[s["__key__"], s["png"], s["json"]] for s in webdataset_of(PatchDataset.open(folder))],
        "remote": remote,
    }


def test_every_reader_compares_the_image(dataset: PatchDataset) -> None:
    """A flip that leaves a readable PNG with another pixel: nothing but the checksum can tell."""
    shard = dataset.folder / "data/part-000001.tar"
    row = 9
    image = dataset.read([row])[0]
    image[3, 3, 0] ^= 1
    data, offset = bytearray(shard.read_bytes()), int(dataset.index["offset"][row])
    other = encode_image(image)
    size = int(dataset.index["size"][row])
    assert len(other) <= size + -size % 512
    data[offset : offset + size] = other[:size].ljust(size, b"\0")
    shard.write_bytes(bytes(data))
    for read in readers(dataset.folder).values():
        with pytest.raises(UserError, match=r"'p2/009'.*part-000001\.tar: its image is damaged"):
            read()
    assert any("part-000001.tar is damaged" in problem for problem in dataset.verify())


def test_readers_of_the_json_member_compare_it_too(dataset: PatchDataset) -> None:
    shard = dataset.folder / "data/part-000001.tar"
    shard.write_bytes(shard.read_bytes().replace(b'"key": "p2/009"', b'"key": "p2/008"'))
    for name in ("export", "webdataset"):
        with pytest.raises(UserError, match=r"'p2/009'.*part-000001\.tar: its JSON member is damaged"):
            readers(dataset.folder)[name]()
    assert readers(dataset.folder)["read"]().shape == (24, 16, 16, 3)


def test_a_tar_that_ends_early_for_webdataset_loses_nothing(dataset: PatchDataset) -> None:
    """To tarfile and so to webdataset, a header that is not one is the end of the archive."""
    shard = dataset.folder / "data/part-000001.tar"
    data = bytearray(shard.read_bytes())
    header = int(dataset.index["offset"][10]) - 512
    data[header + 148] ^= 1  # in its checksum
    shard.write_bytes(bytes(data))
    for name in ("export", "webdataset"):
        with pytest.raises(UserError, match=r"part-000001\.tar cannot be read"):
            readers(dataset.folder)[name]()


def test_every_reader_compares_the_index_and_its_description(dataset: PatchDataset, tmp_path: Path) -> None:
    index = pd.read_parquet(dataset.folder / "index.parquet")
    whole = (dataset.folder / "index.parquet").read_bytes()
    index.loc[0, "class"] = "b"
    index.to_parquet(dataset.folder / "index.parquet", index=False)
    for read in readers(dataset.folder).values():
        with pytest.raises(UserError, match=r"(d|damaged)/index\.parquet is damaged.*\n.*write the dataset again"):
            read()
    assert main(["shards", "verify", str(dataset.folder)]) == 2
    (dataset.folder / "index.parquet").write_bytes(whole)
    text = (dataset.folder / "dataset.json").read_text()
    assert '"mpp": 0.5' in text
    (dataset.folder / "dataset.json").write_text(text.replace('"mpp": 0.5', '"mpp": 0.7'))
    for read in readers(dataset.folder).values():
        with pytest.raises(UserError, match=r"(d|damaged)/dataset\.json is damaged"):
            read()
    info = json.loads(text)
    for key in ("seal", "index_sha256"):  # one alone is not what an earlier version wrote
        write_json(dataset.folder / "dataset.json", {k: v for k, v in info.items() if k != key})
        with pytest.raises(UserError, match=r"dataset\.json is damaged"):
            PatchDataset.open(dataset.folder)


def test_a_copy_taken_between_the_two_steps_of_a_writer_is_read(dataset: PatchDataset) -> None:
    before = (dataset.folder / "index.parquet").read_bytes()
    dataset.add_split("s", ["train"] * 24, {})
    (dataset.folder / "index.parquet").rename(dataset.folder / ".index-next.parquet")
    (dataset.folder / "index.parquet").write_bytes(before)
    assert PatchDataset.open(dataset.folder).splits == ["s"]
    memory = fsspec.filesystem("memory")
    memory.put(str(dataset.folder), "/between", recursive=True)
    assert open_dataset("memory://between").rows({"split_s": "train"}).tolist() == list(range(24))


def test_a_damaged_dataset_is_written_again_with_a_warning(
    dataset: PatchDataset, make_patches: Make, schema: Schema, caplog: pytest.LogCaptureFixture
) -> None:
    dataset.add_split("s", ["train"] * 24, {})
    path = dataset.folder / "index.parquet"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    again = write_dataset(dataset.folder, make_patches(), "d", schema, 16, 0.5, patches_per_shard=7)
    assert again.verify(images=True) == []
    assert "splits and selections cannot be kept" in caplog.text


@pytest.mark.parametrize("kind", ["fifo", "folder", "link to nothing", "socket"])
@pytest.mark.parametrize("name", ["index.parquet", "dataset.json", "data/part-000001.tar"])
def test_what_is_no_file_is_one_message(dataset: PatchDataset, name: str, kind: str) -> None:
    import socket

    path = dataset.folder / name
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        here = os.getcwd()
        os.chdir(path.parent)  # a socket's path is short
        try:
            socket.socket(socket.AF_UNIX).bind(path.name)
        finally:
            os.chdir(here)
    else:
        path.symlink_to(dataset.folder / "nothing")
    with at_most(60):
        for reader in ("read", "export", "webdataset"):
            with pytest.raises(UserError) as error:
                readers(dataset.folder)[reader]()
            assert Path(name).name in str(error.value)
            assert str(error.value).count("\n") == 1
        assert main(["shards", "verify", str(dataset.folder)]) == 2


def test_a_record_that_is_a_pipe_is_not_waited_for(tmp_path: Path, make_patches: Make) -> None:
    write_shard(tmp_path, 0, make_patches()[:4])
    os.mkfifo(tmp_path / ".progress" / "part-000001.parquet")
    with at_most(60):
        assert list(finished_shards(tmp_path)) == [0]


def test_links_out_of_the_folder_are_followed(dataset: PatchDataset, tmp_path: Path) -> None:
    shutil.move(dataset.folder / "data", tmp_path / "elsewhere")
    (dataset.folder / "data").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert PatchDataset.open(dataset.folder).verify(images=True) == []


OTHERS = [None, True, -1, 2.5, 10**400, "x", [], ["x"], [1], {}, {"x": 1}, [{}], float("inf")]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all entries of some JSON, at any depth."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, inner in entries for found in [(*path, key), *places(inner, (*path, key))]]


INFO = json.loads((OLD / "png" / "dataset.json").read_text())
INFO["provenance"]["seen"] = {"complete": True, "parts": [{"fields": ["class"], "rows": [["a", 3]], "patients": "x"}]}


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_mistyped_entry_is_one_message_or_none(tmp_path: Path, data: st.DataObject) -> None:
    """Any entry of dataset.json replaced by one of another type, or left out: never a traceback."""
    folder = tmp_path / "old"
    if not folder.exists():
        shutil.copytree(OLD / "png", folder)
    info = json.loads(json.dumps(INFO))
    *path, last = data.draw(st.sampled_from(places(info)))
    inside = info
    for key in path:
        inside = inside[key]
    if data.draw(st.booleans(), "left out"):
        del inside[last]
    else:
        was = type(inside[last])
        inside[last] = data.draw(st.sampled_from([v for v in OTHERS if type(v) is not was]))
    (folder / "dataset.json").write_text(json.dumps(info))
    _all_that_reads(folder)


def _all_that_reads(folder: Path) -> None:
    out = folder.parent / "out"
    shutil.rmtree(out, ignore_errors=True)
    with suppress(UserError):
        dataset = PatchDataset.open(folder)
        dataset.verify(images=True)
        list(webdataset_of(dataset))
        dataset.counts("class", "site")
        dataset.rows({"split_main": "test"})
        repr((dataset, dataset.name, dataset.splits, dataset.selections))
        was_trained_on(dataset.info["provenance"].get("seen"), {"class": "b"})
        export(ExportSettings(str(folder), str(out), "main"))
        dataset.add_split("new", ["train"] * 8, {})
    shutil.copy(OLD / "png" / "index.parquet", folder / "index.parquet")


@pytest.mark.parametrize("content", ["[]", "3", "null", "[" * 100_000, '{"a": ' * 100_000, "1" * 5000, "\x00", ""])
def test_what_is_no_description_is_one_message(tmp_path: Path, content: str) -> None:
    folder = Path(shutil.copytree(OLD / "png", tmp_path / "old"))
    (folder / "dataset.json").write_text(content)
    with pytest.raises(UserError, match=r"dataset\.json"):
        PatchDataset.open(folder)


@pytest.mark.parametrize("column", ["class", "patient", "origin", "key", "shard", "split_main", "offset", "site"])
@pytest.mark.parametrize("value", [None, 3.5, ["x"]])
def test_a_column_of_other_values_is_refused_by_name(tmp_path: Path, column: str, value: Any) -> None:
    """A flip once turned every class into nothing, and training taught a model without its class."""
    folder = Path(shutil.copytree(OLD / "png", tmp_path / "old"))
    index = pd.read_parquet(folder / "index.parquet")
    index[column] = index[column].astype(object)
    index.loc[:, column] = pd.Series([value] * 8, dtype=object)
    index.to_parquet(folder / "index.parquet", index=False)
    with pytest.raises(UserError, match=rf"index\.parquet.*{column}"):
        PatchDataset.open(folder)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("shard", "../part-000000.tar"),
        ("shard", "/etc/passwd.tar"),
        ("shard", "data/a\x00.tar"),
        ("key", "../../x"),
        ("key", "/x"),
        ("origin", "other"),
        ("offset", -1),
        ("size", 2**60),
        ("offset", 2**60),
    ],
)
def test_an_index_that_leads_elsewhere_is_refused(tmp_path: Path, column: str, value: Any) -> None:
    folder = Path(shutil.copytree(OLD / "png", tmp_path / "old"))
    index = pd.read_parquet(folder / "index.parquet")
    index.loc[1, column] = value
    put_index(folder, index)
    with pytest.raises(UserError):
        PatchDataset.open(folder)


def test_an_empty_cell_is_no_condition_left_out(schema: Schema) -> None:
    table = pd.DataFrame({"class": ["a", None, "b"], "site": ["NA"] * 3, "age": [1.0, np.nan, 2.0]})
    for absent in ("error", "null"):
        with pytest.raises(UserError, match=r"'class' is .* First in row 1, in 1 of 3 rows"):
            schema.encode(table, absent=absent)
        with pytest.raises(UserError, match="'class' is "):
            schema.encode(table.assign(**{"class": np.nan}), absent=absent)
    with pytest.raises(UserError, match="'class' is "):
        Conditions.from_schema(schema, table)
    codes, _ = schema.encode(table[["site", "age"]], absent="null")
    assert codes[:, 0].tolist() == [0, 0, 0]  # a field that is not there at all
    assert codes[:, 2].tolist() == [2, 1, 2]  # a number that is not known
    requested, _ = schema.encode([{"class": None, "site": "NA"}], absent="null")
    assert requested[0].tolist() == [0, 3, 0]
    with pytest.raises(UserError, match="'class' is nan"):
        schema.encode([{"class": float("nan")}], absent="null")


def test_sums_are_those_of_the_bytes_and_equal_input_gives_equal_bytes(
    dataset: PatchDataset, tmp_path: Path, make_patches: Make, schema: Schema
) -> None:
    assert [tuple(row) for row in dataset.index[["image_crc32", "json_crc32"]].to_numpy()] == _sums(dataset)
    write_dataset(tmp_path / "e", make_patches(), "d", schema, 16, 0.5, patches_per_shard=7)
    for name in ("dataset.json", "index.parquet"):
        assert (tmp_path / "e" / name).read_bytes() == (dataset.folder / name).read_bytes()
