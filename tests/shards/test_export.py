from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import pytest
import webdataset
from huggingface_hub import DatasetCard
from PIL import Image

from latent_medi.cli import main
from latent_medi.core.errors import UserError
from latent_medi.metadata.schema import Schema
from latent_medi.shards.dataset import PatchDataset
from latent_medi.shards.export import export
from latent_medi.shards.settings import ExportSettings, InfoSettings
from latent_medi.shards.writing.writer import Patch, write_dataset


@pytest.fixture(scope="module")
def dataset(
    tmp_path_factory: pytest.TempPathFactory, make_patches: Callable[..., list[Patch]], schema: Schema
) -> PatchDataset:
    """Every third patient tests, one is in no part."""
    patches = make_patches()
    patients = sorted({p.patient for p in patches})
    parts = {patient: ("test" if i % 3 == 0 else "train") for i, patient in enumerate(patients)}
    del parts[patients[-1]]
    folder = tmp_path_factory.mktemp("d") / "set"
    return write_dataset(folder, patches, "d", schema, 16, 0.5, splits={"main": (parts, {})}, patches_per_shard=7)


def test_tars_hold_one_part_each_and_every_byte(dataset: PatchDataset, tmp_path: Path) -> None:
    result = export(ExportSettings(str(dataset.folder), str(tmp_path / "out"), "main", patches_per_shard=5))
    column = dataset.index["split_main"]
    assert result["parts"] == {part: int((column == part).sum()) for part in ("train", "test")}
    for part in ("train", "test"):
        tars = sorted(str(p) for p in (tmp_path / "out" / "data" / part).glob("*.tar"))
        assert len(tars) == -(-result["parts"][part] // 5)
        found = list(webdataset.WebDataset(tars, shardshuffle=False))
        mine = dataset.index[column == part]
        assert [s["__key__"] for s in found] == mine["key"].tolist()
        rows = np.flatnonzero(column == part)
        for sample, row in zip(found, rows, strict=True):
            with open(dataset.folder / dataset.index["shard"].iloc[row], "rb") as file:
                file.seek(int(dataset.index["offset"].iloc[row]))
                assert sample["png"] == file.read(int(dataset.index["size"].iloc[row]))
            assert json.loads(sample["json"])["key"] == sample["__key__"]


@pytest.mark.parametrize("form", ["webdataset", "folder"])
def test_the_hubs_loader_finds_the_parts(
    dataset: PatchDataset, tmp_path: Path, form: Literal["webdataset", "folder"]
) -> None:
    datasets = pytest.importorskip("datasets")
    export(ExportSettings(str(dataset.folder), str(tmp_path / "out"), "main", format=form))
    card = DatasetCard.load(tmp_path / "out" / "README.md")
    assert card.data.pretty_name == "d"
    assert card.data.size_categories == ["n<1K"]
    assert ("synthetic" in card.data.tags) == ("synthetic" in set(dataset.index["origin"]))
    loaded = datasets.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    counts = dataset.index["split_main"].value_counts()
    assert {name: len(part) for name, part in loaded.items()} == {"train": counts["train"], "test": counts["test"]}


def test_folders_of_images_with_a_csv(dataset: PatchDataset, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["export", str(dataset.folder), f"out={out}", "split=main", "format=folder", "parts=[test]"]) == 0
    assert not (out / "train").exists()
    table = pd.read_csv(out / "test" / "metadata.csv", dtype=str, keep_default_na=False)
    rows = np.flatnonzero(dataset.index["split_main"] == "test")
    assert table["key"].tolist() == dataset.index["key"].iloc[rows].tolist()
    for name, row in zip(table["file_name"], rows, strict=True):
        assert name.startswith(dataset.index["class"].iloc[row])
        assert np.array_equal(np.asarray(Image.open(out / "test" / name)), dataset.read([row])[0])


def test_only_what_a_selection_chose(tmp_path: Path, make_patches: Callable[..., list[Patch]], schema: Schema) -> None:
    made = write_dataset(tmp_path / "set", make_patches(), "d", schema, 16, 0.5, patches_per_shard=7)
    made.add_selection("best", {"": np.arange(24) % 3 == 0}, {}, {})
    out = tmp_path / "out"
    result = export(ExportSettings(str(made.folder), str(out), selected="selected_best"))
    assert result["parts"] == {"all": 8}
    found = webdataset.WebDataset([str(p) for p in (out / "data" / "all").glob("*.tar")], shardshuffle=False)
    assert [s["__key__"] for s in found] == made.index["key"].iloc[::3].tolist()
    assert json.loads((out / "export.json").read_text())["selected"] == "selected_best"
    with pytest.raises(UserError, match="no selection 'selected_bets'; closest: 'selected_best'"):
        export(ExportSettings(str(made.folder), str(tmp_path / "a"), selected="selected_bets"))
    made.add_selection("none", {"": np.zeros(24, bool)}, {}, {})
    with pytest.raises(UserError, match="chose no patch"):
        export(ExportSettings(str(made.folder), str(tmp_path / "a"), selected="selected_none"))


def test_what_cannot_be_exported_is_said(dataset: PatchDataset, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="closest: 'main'"):
        export(ExportSettings(str(dataset.folder), str(tmp_path / "a"), "mian"))
    with pytest.raises(UserError, match="no part 'tset'; closest: 'test'"):
        export(ExportSettings(str(dataset.folder), str(tmp_path / "a"), "main", parts=["tset"]))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="is not empty"):
        export(ExportSettings(str(dataset.folder), str(tmp_path / "full")))
    assert (tmp_path / "full" / "mine.txt").read_text() == "precious"


@pytest.mark.parametrize("form", ["webdataset", "folder"])
def test_a_damaged_shard_stops_the_export_and_nothing_is_left(
    tmp_path: Path, make_patches: Callable[..., list[Patch]], schema: Schema, form: Literal["webdataset", "folder"]
) -> None:
    damaged = write_dataset(tmp_path / "set", make_patches(), "d", schema, 16, 0.5, patches_per_shard=7)
    path = damaged.folder / "data" / "part-000001.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(damaged.index["offset"].iloc[9]) - 512])  # between two members
    with pytest.raises(UserError, match=r"part-000001\.tar cannot be read"):
        export(ExportSettings(str(damaged.folder), str(tmp_path / "out"), format=form))
    assert not (tmp_path / "out").exists()
    path.write_bytes(whole)
    assert export(ExportSettings(str(damaged.folder), str(tmp_path / "out"), format=form))["parts"] == {"all": 24}


def test_counts_of_every_pair_and_their_heat_maps(dataset: PatchDataset, tmp_path: Path) -> None:
    from latent_medi.shards.field_counts import info

    found = info(InfoSettings(str(dataset.folder), "patients", str(tmp_path / "maps")))
    assert found["counts"]["class x site"] == dataset.counts("class", "site", "patients").to_dict()
    assert all(Path(p).read_bytes().startswith(b"\x89PNG") for p in found["figures"])
    assert len(found["figures"]) >= 1


def test_what_a_folder_holds_and_how_it_is_split(
    tmp_path: Path, make_patches: Callable[..., list[Patch]], schema: Schema, capsys: pytest.CaptureFixture[str]
) -> None:
    patches = make_patches()
    parts = {patch.patient: "test" if number % 2 else "train" for number, patch in enumerate(patches)}
    splits = {"main": (parts, {}), "half": (dict(list(parts.items())[::2]), {})}
    made = write_dataset(tmp_path / "set", patches, "d", schema, 16, 0.5, splits=splits)
    made.add_selection("best", {"": np.arange(24) % 3 == 0}, {}, {})
    assert main(["shards", "info", str(made.folder), "--json", str(tmp_path / "info.json")]) == 0
    found, shown = json.loads((tmp_path / "info.json").read_text()), capsys.readouterr().out
    index = PatchDataset.open(made.folder).index
    test = index[index["split_main"] == "test"]
    assert found["splits"]["main"]["test"] == {"patches": len(test), "patients": test["patient"].nunique()}
    assert sum(part["patches"] for part in found["splits"]["half"].values()) == 24
    assert (found["patients"], found["selections"]) == (index["patient"].nunique(), {"best": 8})
    assert f"test {len(test)} ({test['patient'].nunique()} patients)" in shown
    assert "no part" in shown


@pytest.mark.parametrize("form", ["webdataset", "folder"])
def test_names_from_elsewhere_never_collide_or_lead_out(
    tmp_path: Path, make_patches: Callable[..., list[Patch]], form: Literal["webdataset", "folder"]
) -> None:
    keys = ["p1/x", "p1__x", "P1__x", "a", "b", "con", "nul", "c"]
    classes = ["n/t", "n_t", "..", ".", "CON", "Tumor", "tumor", "n/t"]
    table = pd.DataFrame({"class": classes})
    patches = make_patches()[: len(keys)]
    for patch, key, value, number in zip(patches, keys, classes, range(len(keys)), strict=True):
        patch.key, patch.patient, patch.fields = key, f"p{number}", {"class": value}
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "metadata.csv").write_text("mine")
    parts = ["train", "a b", "a_b", str(victim), "../../x", "..", "[x]", "x*"]
    splits = {"main": ({f"p{number}": part for number, part in enumerate(parts)}, {})}
    made = write_dataset(tmp_path / "set", patches, "d", Schema.from_table(table, "class"), 16, 0.5, splits=splits)
    before = set(tmp_path.rglob("*"))
    out = tmp_path / "deep" / "er" / "out"
    result = export(ExportSettings(str(made.folder), str(out), "main", format=form))
    assert result["parts"] == dict.fromkeys(parts, 1)
    assert {p for p in tmp_path.rglob("*") if not p.is_relative_to(tmp_path / "deep")} == before
    assert (victim / "metadata.csv").read_text() == "mine"
    if form == "folder":
        assert len(list(out.rglob("*.png"))) == len(keys)
    else:
        tars = [str(p) for p in out.rglob("*.tar")]
        assert len(tars) == len(parts)
        assert sorted(s["__key__"] for s in webdataset.WebDataset(tars, shardshuffle=False)) == sorted(keys)
        datasets = pytest.importorskip("datasets")
        loaded = datasets.load_dataset(str(out), cache_dir=str(tmp_path / "cache"))
        assert {len(part) for part in loaded.values()} == {1}
        assert len(loaded) == len(parts)
    together = export(ExportSettings(str(made.folder), str(tmp_path / "together"), format="folder"))
    assert together["parts"] == {"all": len(keys)}
    listed = pd.read_csv(tmp_path / "together" / "all" / "metadata.csv", dtype=str)
    assert len({name.lower() for name in listed["file_name"]}) == len(keys)
    assert listed.groupby("class")["file_name"].apply(lambda names: len({Path(n).parent for n in names})).eq(1).all()
    assert listed["file_name"].map(lambda name: str(Path(name).parent)).nunique() == len(set(classes))
    assert sorted(listed["key"]) == sorted(keys)


def test_a_file_that_is_there_stays(dataset: PatchDataset, tmp_path: Path) -> None:
    (tmp_path / "plan.csv").write_text("my only copy")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name, why in (("plan.csv", "is a file; a folder is written there"), ("dangling", "does not exist")):
        with pytest.raises(UserError, match=f"{name}.*{why}"):
            export(ExportSettings(str(dataset.folder), str(tmp_path / name)))
    assert (tmp_path / "plan.csv").read_text() == "my only copy"
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    export(ExportSettings(str(dataset.folder), str(tmp_path / "link")))
    assert (tmp_path / "disk" / "export.json").is_file()
