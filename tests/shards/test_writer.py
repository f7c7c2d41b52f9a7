from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from latent_medi.core.errors import UserError
from latent_medi.core.files import read_json, sha256_file
from latent_medi.metadata.schema import Schema
from latent_medi.shards.dataset import PatchDataset
from latent_medi.shards.format import software
from latent_medi.shards.writing.finish import Description, finish_dataset
from latent_medi.shards.writing.records import finished_shards
from latent_medi.shards.writing.rewrite import reopen_dataset
from latent_medi.shards.writing.writer import Patch, write_dataset, write_shard

Make = Callable[..., list[Patch]]


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def write(folder: Path, patches: object, schema: Schema, **changes: object) -> PatchDataset:
    arguments = {"name": "d", "schema": schema, "patch_size": 16, "mpp": 0.5, "patches_per_shard": 7} | changes
    return write_dataset(folder, patches, **arguments)  # type: ignore[arg-type]


def test_rewriting_gives_the_same_bytes(tmp_path: Path, make_patches: Make, schema: Schema) -> None:
    write(tmp_path / "a", make_patches(), schema)
    write(tmp_path / "b", iter(make_patches()), schema)
    a, b = content(tmp_path / "a"), content(tmp_path / "b")
    assert set(a) == {"dataset.json", "index.parquet", *(f"data/part-{n:06d}.tar" for n in range(4))}
    assert {k: v for k, v in a.items() if k != "dataset.json"} == {k: v for k, v in b.items() if k != "dataset.json"}
    write(tmp_path / "b", make_patches(), schema)
    assert content(tmp_path / "b") == a


def test_members_are_adjacent_fixed_and_never_null(tmp_path: Path, make_patches: Make, schema: Schema) -> None:
    write(tmp_path, make_patches(), schema)
    with tarfile.open(tmp_path / "data/part-000000.tar") as tar:
        members = tar.getmembers()
        assert [m.name for m in members[:2]] == ["p0/000.png", "p0/000.json"]
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}
        records = [json.load(tar.extractfile(m)) for m in members if m.name.endswith(".json")]  # type: ignore[arg-type]
    assert len({tuple(sorted(r)) for r in records}) == 1
    assert all(value is not None for r in records for value in r.values())
    assert records[0]["age"] == "unknown"
    assert records[0]["site"] == "NA"
    assert all(isinstance(r[name], str) for r in records for name in ("age", "class", "site"))
    assert len(members) == 14


def test_dataset_json_describes_the_folder(tmp_path: Path, make_patches: Make, schema: Schema) -> None:
    recipe = {"seed": 1}
    parts = {f"p{i}": "train" if i < 4 else "test" for i in range(6)}
    dataset = write(tmp_path, make_patches(), schema, provenance={"source": "s"}, splits={"main": (parts, recipe)})
    info = read_json(tmp_path / "dataset.json")
    assert info["schema_version"] == 1
    assert Schema.from_dict(info["schema"]) == schema == dataset.schema
    assert info["counts"] == {"patches": 24, "patients": 6, "slides": 12, "shards": 4, "real": 24, "synthetic": 0}
    assert [s["count"] for s in info["shards"]] == [7, 7, 7, 3]
    assert all(sha256_file(tmp_path / s["file"]) == s["sha256"] for s in info["shards"])
    assert info["splits"]["main"]["recipe"] == recipe
    assert info["splits"]["main"]["counts"]["test"] == {"patches": 8, "patients": 2, "slides": 4}
    assert info["provenance"] == {"source": "s"}
    assert (info["patch_size"], info["mpp"], info["codec"]) == (16, 0.5, "png")


CHILD = """
import os, pickle, signal, sys
from pathlib import Path
from latent_medi.shards.format import folder as dataset_folder
from latent_medi.shards.writing import finish, writer
where, count, folder, arguments = sys.argv[1], int(sys.argv[2]), sys.argv[3], pickle.load(open(sys.argv[4], "rb"))
def die_after(module, name, before):
    original, calls = getattr(module, name), [0]
    def wrapped(*a, **k):
        calls[0] += 1
        if before and calls[0] == count:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*a, **k)
        if not before and calls[0] == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(module, name, wrapped)
module, name, before = {
    "between shards": (writer, "write_shard", False), "within a shard": (writer, "encode_image", True),
    "before the record": (writer, "write_record", True), "before dataset.json": (dataset_folder, "write_sealed", True),
    "before clearing": (finish, "_clear", True)}[where]
die_after(module, name, before)
writer.write_dataset(folder, **arguments)
"""


@pytest.mark.parametrize(
    ("where", "count", "kept"),
    [
        ("between shards", 2, 2),
        ("within a shard", 10, 1),
        ("before the record", 2, 1),
        ("before dataset.json", 1, 4),
        ("before clearing", 1, 4),
    ],
)
def test_a_killed_writer_is_completed_byte_for_byte(
    tmp_path: Path,
    make_patches: Make,
    schema: Schema,
    where: str,
    count: int,
    kept: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import pickle

    arguments = {
        "patches": make_patches(),
        "name": "d",
        "schema": schema,
        "patch_size": 16,
        "mpp": 0.5,
        "patches_per_shard": 7,
    }
    (tmp_path / "arguments").write_bytes(pickle.dumps(arguments))
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    child = [sys.executable, "-c", CHILD, where, str(count), str(broken), str(tmp_path / "arguments")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    killed = subprocess.run(child, env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert (broken / "dataset.json").exists() == (where == "before clearing")
    assert len(finished_shards(broken)) == kept

    written: list[int] = []
    from latent_medi.shards.writing import writer

    original = writer.write_shard
    monkeypatch.setattr(
        writer,
        "write_shard",
        lambda folder, number, *a, **k: (written.append(number), original(folder, number, *a, **k))[1],
    )
    write_dataset(broken, **arguments)  # type: ignore[arg-type]
    assert written == list(range(kept, 4))
    monkeypatch.undo()
    write_dataset(whole, **arguments)  # type: ignore[arg-type]
    assert content(broken) == content(whole)


def test_a_damaged_or_changed_shard_is_written_again(
    tmp_path: Path, make_patches: Make, schema: Schema, caplog: pytest.LogCaptureFixture
) -> None:
    patches = make_patches()
    for number in range(3):
        write_shard(tmp_path / "d", number, patches[8 * number : 8 * number + 8])
    assert list(finished_shards(tmp_path / "d")) == [0, 1, 2]
    tar = tmp_path / "d/data/part-000001.tar"
    data = bytearray(tar.read_bytes())
    data[700] ^= 1
    tar.write_bytes(bytes(data))
    (tmp_path / "d/data/part-000002.tar").unlink()
    assert list(finished_shards(tmp_path / "d")) == [0]
    assert "part-000001.tar is missing or damaged" in caplog.text
    with pytest.raises(UserError, match=r"lacks 2 of 3 shards: \[1, 2\]"):
        finish_dataset(tmp_path / "d", Description("d", schema, 16, 0.5), range(3))
    changed = make_patches()
    changed[0].image = 255 - changed[0].image
    first = write(tmp_path / "e", patches, schema)
    second = write(tmp_path / "e", changed, schema)
    assert np.array_equal(second.read([0])[0], changed[0].image)
    assert first.info["shards"][1:] == second.info["shards"][1:]


def test_a_shard_that_is_written_again_by_other_software_is_told(
    tmp_path: Path,
    make_patches: Make,
    schema: Schema,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    write(tmp_path, make_patches(), schema)
    here = {shard["written_with"] for shard in read_json(tmp_path / "dataset.json")["shards"]}
    assert here == {software.codec_software("png")}
    (tmp_path / "data" / "part-000001.tar").write_bytes(b"damaged")
    reopen_dataset(tmp_path)
    assert len(finished_shards(tmp_path)) == 3
    assert "written again" in caplog.text
    assert "install what" not in caplog.text
    monkeypatch.setattr(software, "codec_software", lambda _: "another 1.0")
    assert set(finished_shards(tmp_path)) == {0, 2, 3}
    assert f"It was written with {here.pop()}, and here is another 1.0: its checksum will be another" in caplog.text
    assert "install what it was written with" in caplog.text


@pytest.mark.parametrize("fast", [True, False])
def test_patches_of_slides_name_the_resizer(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    before = software.written_with("png", "cykooz.resizer 4.0.1")
    monkeypatch.setattr(software, "resizer_software", lambda: "cykooz.resizer 4.0.1" if fast else "pillow 12.0")
    assert ("pixels can differ" in software.other_software(before, "png")) is not fast
    assert software.other_software("", "png") == ""  # of an earlier version


def test_an_unfinished_shard_of_other_patches_is_not_kept(
    tmp_path: Path, make_patches: Make, schema: Schema, monkeypatch: pytest.MonkeyPatch
) -> None:
    from latent_medi.shards.writing import writer

    def stop(*arguments: object, **named: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(writer, "finish_dataset", stop)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "d", make_patches(), schema)
    monkeypatch.undo()
    assert len(finished_shards(tmp_path / "d")) == 4
    changed = make_patches()
    changed[8].image = 255 - changed[8].image
    write(tmp_path / "d", changed, schema)
    write(tmp_path / "fresh", changed, schema)
    assert content(tmp_path / "d") == content(tmp_path / "fresh")


def test_fewer_patches_than_before_leave_no_old_shard(tmp_path: Path, make_patches: Make, schema: Schema) -> None:
    write(tmp_path, make_patches(), schema)
    assert len(write(tmp_path, make_patches(9), schema)) == 9
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == ["part-000000.tar", "part-000001.tar"]


def test_a_finished_dataset_is_not_written_into(tmp_path: Path, make_patches: Make, schema: Schema) -> None:
    write(tmp_path, make_patches(), schema)
    with pytest.raises(UserError, match="finished dataset"):
        write_shard(tmp_path, 0, make_patches(2))


@pytest.mark.parametrize("key", ["a.b", "", "/a", "a/", "a//b", "a\\b", "a\nb", " a"])
def test_keys_that_webdataset_would_misread_are_refused(tmp_path: Path, make_patches: Make, key: str) -> None:
    with pytest.raises(UserError, match="key"):
        write_shard(tmp_path, 0, [replace(make_patches(1)[0], key=key)])
    assert not list(tmp_path.rglob("*.tar"))


def test_bad_patches_are_refused_and_named(tmp_path: Path, make_patches: Make) -> None:
    good, other = make_patches(2)
    cases = [
        ({"patient": ""}, "p0/000.*no patient"),
        ({"origin": "fake"}, "'fake'"),
        ({"source_mpp": 0.0}, "source_mpp"),
        ({"fields": {"class": None}}, "'class' is None"),
        ({"fields": {"slide": "x"}}, "'slide'"),
        ({"fields": {"split_main": "x"}}, "'split_main'"),
        ({"extra": {"n": float("nan")}}, "'n'"),
        ({"extra": {"n": 2**63}}, "64 bits"),
        ({"extra": {"class": "x"}}, "both"),
        ({"image": np.zeros((16, 8, 3), np.uint8)}, "8×16"),
        ({"image": np.zeros((16, 16), np.uint8)}, "uint8"),
        ({"key": "k" * 300}, "fit"),
    ]
    for changes, message in cases:
        with pytest.raises(UserError, match=message):
            write_shard(tmp_path, 0, [replace(good, **changes)])
    for second, message in [
        (good, "Two patches"),
        (replace(other, fields={"class": "a"}), "differ"),
        (replace(other, extra={**other.extra, "score": 1}), "differ"),
        (replace(other, image=np.zeros((8, 8, 3), np.uint8)), "not 16×16"),
    ]:
        with pytest.raises(UserError, match=message):
            write_shard(tmp_path, 0, [good, second])
    with pytest.raises(UserError, match="empty"):
        write_shard(tmp_path, 0, [])
    assert not list(tmp_path.rglob("part-*"))


def test_finishing_refuses_what_does_not_fit(tmp_path: Path, make_patches: Make, schema: Schema) -> None:
    patches = make_patches(8)
    write_shard(tmp_path, 0, patches[:4])
    with pytest.raises(UserError, match="codec png, not jpg"):
        finish_dataset(tmp_path, Description("d", schema, 16, 0.5, "jpg", {}))
    with pytest.raises(UserError, match="patch size 16, not 32"):
        finish_dataset(tmp_path, Description("d", schema, 32, 0.5))
    with pytest.raises(UserError, match="fields"):
        finish_dataset(tmp_path, Description("d", schema.subset(["class"]), 16, 0.5))
    about = Description("d", schema, 16, 0.5, "png", {"a": 1}, {"main": ({"nobody": "train"}, {})})
    with pytest.raises(UserError, match="lacks"):
        finish_dataset(tmp_path, about)
    write_shard(tmp_path, 1, [replace(p, fields={**p.fields, "site": "02"}) for p in patches[4:]])
    with pytest.raises(UserError, match=r"'site' has no value '02'"):
        finish_dataset(tmp_path, Description("d", schema, 16, 0.5))
    write_shard(tmp_path, 1, patches[:4])
    with pytest.raises(UserError, match="Two patches have the key 'p0/000'"):
        finish_dataset(tmp_path, Description("d", schema, 16, 0.5))
    write_shard(tmp_path, 1, [replace(p, extra={}) for p in patches[4:]])
    with pytest.raises(UserError, match="in some shards but not in all"):
        finish_dataset(tmp_path, Description("d", schema, 16, 0.5))
    assert not (tmp_path / "dataset.json").exists()
