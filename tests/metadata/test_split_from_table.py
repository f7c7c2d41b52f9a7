"""A split of a table brought into a dataset folder, on small tables."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from latent_medi.cli import main
from latent_medi.core.errors import UserError
from latent_medi.metadata.published_splits import every_fourth_patient, every_fourth_site
from latent_medi.metadata.schema import Schema
from latent_medi.metadata.settings import SplitSettings
from latent_medi.metadata.split_from_table import split_from_table
from latent_medi.shards.dataset import PatchDataset
from latent_medi.shards.writing.finish import Description, finish_dataset
from latent_medi.shards.writing.rewrite import reopen_dataset
from latent_medi.shards.writing.writer import Patch, write_dataset

INDEX = pd.DataFrame(
    {
        "slide": ["TCGA-NA-A4QV-01Z-00-DX1", "TCGA-E2-A14V-01Z-00-DX1", "TCGA-E2-A14V-01Z-00-DX2"] * 2,
        "patient": ["TCGA-NA-A4QV", "TCGA-E2-A14V", "TCGA-E2-A14V"] * 2,
    }
)


def folder_of(folder: Path) -> Path:
    """Five patients with two patches of one slide each."""
    draw = np.random.default_rng(0)
    schema = Schema.from_table(pd.DataFrame({"class": ["a", "b"], "site": ["aster", "NA"]}), "class", ["site"])
    patches = [
        Patch(
            f"k{i}",
            draw.integers(0, 256, (16, 16, 3), dtype=np.uint8),
            f"patient{i // 2:02d}",
            f"slide{i // 2:02d}",
            0,
            0,
            0.5,
            {"class": "ab"[i % 2], "site": ("aster", "NA")[i // 5]},
        )
        for i in range(10)
    ]
    return write_dataset(folder, patches, "tiny", schema, 16, 0.5).folder


def put(path: Path, *lines: str) -> str:
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_slides_are_joined_by_name_and_one_that_the_table_lacks_is_in_no_part(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    uuid = "8923A151-A690-40B7-9E5A-FCBEDFC2394F"
    rows = [f"TCGA-E2-A14V-01Z-00-DX1.{uuid}.svs,TCGA-E2-A14V,test", "TCGA-NA-A4QV-01Z-00-DX1,TCGA-NA-A4QV,train"]
    table = put(tmp_path / "t.csv", "slide,patient,split_mine", *rows)
    found = split_from_table(INDEX, SplitSettings(table=table, name="mine"))
    # The second slide of that patient is not in the table, so it takes no part though its patient does.
    assert found.column.tolist() == ["train", "test", ""] * 2
    assert "lacks 1 of 3 slides (2 patches), such as TCGA-E2-A14V-01Z-00-DX2" in caplog.text
    assert (found.recipe["joined_by"], found.recipe["slides_in_no_part"]) == ("slide", 1)


def test_without_slides_patients_are_joined(tmp_path: Path) -> None:
    table = put(tmp_path / "t.csv", "case_submitter_id,split", "TCGA-E2-A14V,val", "TCGA-NA-A4QV,train")
    found = split_from_table(INDEX, SplitSettings(table=table))
    assert found.column.tolist() == ["train", "val", "val"] * 2
    assert found.recipe["joined_by"] == "patient"


@pytest.mark.parametrize(
    ("rows", "more", "message"),
    [
        (["s1,p1,train", "s1,p1,test"], {}, r"slide 's1' is in 'test' and 'train' \(1 such slides\)"),
        (["s1,p1,train", "s2,p1,test"], {}, r"1 patients are in more than one part: 'p1' in \['test', 'train'\]"),
        (["x,q,train"], {}, r"has none of the dataset's slides and patients, such as 's1' of patient 'p1'"),
        (["s1,p1,train"], {"name": "other"}, r"no column 'split_other' or 'split'; known: 'mine'"),
        (["s1,p1,train"], {"sites": ["a"]}, r"sites would have no effect"),
    ],
)
def test_tables_that_give_no_split_are_refused(tmp_path: Path, rows: list[str], more: dict, message: str) -> None:
    index = pd.DataFrame({"slide": ["s1", "s2"], "patient": ["p1", "p1"]})
    table = put(tmp_path / "t.csv", "slide,patient,split_mine", *rows)
    with pytest.raises(UserError, match=message):
        split_from_table(index, SplitSettings(**{"table": table, "name": "mine", **more}))


def test_the_command_writes_the_split_and_a_rewritten_folder_keeps_it(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "data")
    slides = PatchDataset.open(folder).index["slide"].unique()
    lines = [
        f"{slide},{slide.replace('slide', 'patient')},{'test' if i % 3 else 'train'}" for i, slide in enumerate(slides)
    ]
    table = put(tmp_path / "t.csv", "slide,patient,split_mine", *lines[1:])
    out = tmp_path / "split.json"
    assert main(["split", str(folder), f"table={table}", "name=mine", "--json", str(out)]) == 0
    dataset = PatchDataset.open(folder)
    before = dataset.index.set_index("key")["split_mine"]
    by_slide = dict(zip(dataset.index["slide"], before, strict=True))
    assert [by_slide[slide] for slide in slides] == ["", *(line.rpartition(",")[2] for line in lines[1:])]
    assert json.loads(out.read_text())["parts"][""]["slides"] == 1
    assert dataset.info["splits"]["mine"]["recipe"]["table"] == "t.csv"
    # Its patient gets a second slide that is in the split; the first one stays in no part when the folder is rewritten.
    moved = [
        "train" if slide == slides[1] else part for slide, part in zip(dataset.index["slide"], before, strict=True)
    ]
    dataset.index["patient"] = dataset.index["patient"].replace("patient01", "patient00")
    dataset.add_split("mine", moved, {"kind": "of a table"}, replace=True)
    reopen_dataset(folder)
    about = Description("tiny", dataset.schema, 16, 0.5)
    assert finish_dataset(folder, about).index["split_mine"].tolist() == moved


def test_the_order_of_rows_is_the_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_of(tmp_path / "data")
    assert main(["split", str(folder), "name=medi", "scheme=medi", "site_field=site"]) == 2
    assert "depends on the order of rows" in (told := capsys.readouterr()).err + told.out
    table = put(tmp_path / "t.csv", "slide,patient,split", "s,p,train")
    assert main(["split", table, f"table={table}", f"out={tmp_path / 'x.csv'}"]) == 2
    assert "data is a table too" in (told := capsys.readouterr()).err + told.out


def test_every_fourth_by_hand() -> None:
    patients = pd.DataFrame({"patient": list("abbcdefgah")})
    # a and e are the first and fifth patient; a's second row is in the test part with the first.
    assert [p for p, part in zip("abbcdefgah", every_fourth_patient(patients), strict=True) if part == "test"] == list(
        "aea"
    )
    rows = [("x", site) for site in "FeDcBaghI"] + [("y", "q"), ("y", "r"), ("y", "q")]
    table = pd.DataFrame(rows, columns=["class", "site"]).assign(patient=range(len(rows)))
    found = every_fourth_site(table, "class", "site")
    # a B c D e F g h I: the fourth and eighth; of two sites the first.
    assert set(table.loc[found == "test", "site"]) == {"D", "h", "q"}
    shared = pd.DataFrame([*rows, ("y", "h")], columns=["class", "site"]).assign(patient=range(len(rows) + 1))
    found = every_fourth_site(shared, "class", "site")
    assert set(found[shared["site"] == "h"]) == {"test"}  # trained on in class y, tested on in class x


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (["train", "NA"], r"a part 'NA' in split \(1 rows\), a word for no value"),
        (["None", "test"], r"a part 'None' in split"),
        (["Test", "test"], r"upper and lower case alone: 'Test' in 1 rows, 'test' in 1 rows"),
    ],
)
def test_parts_that_are_likely_slips_are_refused(tmp_path: Path, parts: list[str], message: str) -> None:
    table = put(tmp_path / "t.csv", "patient,split", *(f"p{i},{part}" for i, part in enumerate(parts)))
    index = pd.DataFrame({"slide": ["s0", "s1"], "patient": ["p0", "p1"]})
    with pytest.raises(UserError, match=message):
        split_from_table(index, SplitSettings(table=table))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"fractions": {"train": 0.5, "test": 0.5}, "seed": 1}, "fractions, seed would have no effect"),
        ({"medi_share": 0.5}, "medi_share would have no effect"),
        ({"scheme": "medi", "seed": 3}, "scheme=medi has no seed"),
        ({"scheme": "every_fourth_patient", "medi_fields": ["race"]}, "scheme=every_fourth_patient has no medi_fields"),
    ],
)
def test_settings_that_the_table_leaves_without_effect_are_refused(tmp_path: Path, more: dict, said: str) -> None:
    table = put(tmp_path / "t.csv", "patient,split,class,site,gender,race", "p0,train,a,x,m,w", "p1,test,a,y,f,w")
    with pytest.raises(UserError, match=said):
        split_from_table(pd.DataFrame({"slide": ["s"], "patient": ["p0"]}), SplitSettings(table=table, **more))


def test_a_published_split_stays_the_same_for_the_rows_that_a_filter_keeps(tmp_path: Path) -> None:
    """Every fourth of all patients, whether the folder is split by a table or a table is split, filtered or not."""
    folder = folder_of(tmp_path / "data")
    rows = [f"slide{i:02d},patient{i:02d},{'ab'[i % 2]},{i // 3}" for i in range(5)]
    table = put(tmp_path / "t.csv", "slide,patient,kind,batch", *rows)
    fourth = ["scheme=every_fourth_patient"]
    assert main(["split", str(folder), f"table={table}", "name=all", *fourth]) == 0
    assert main(["split", str(folder), f"table={table}", "name=some", "only.site=[aster]", *fourth]) == 0
    index = PatchDataset.open(folder).index
    kept = index["site"] == "aster"
    assert index.loc[kept, "split_some"].tolist() == index.loc[kept, "split_all"].tolist()
    assert set(index.loc[~kept, "split_some"]) == {""}
    out = tmp_path / "split.csv"
    assert main(["split", table, f"out={out}", "only.kind=[a]", *fourth]) == 0
    # Patients 0 and 4 of all five are for testing; of those kept (0, 2, 4) alone it would be 0.
    assert pd.read_csv(out, keep_default_na=False)["split_main"].tolist() == ["test", "", "train", "", "test"]


def test_a_published_split_needs_the_kept_classes_in_both_parts_alone(tmp_path: Path) -> None:
    rows = [f"p{i},{klass},{site}" for i, (klass, site) in enumerate([*zip("aaaa", "wxyz", strict=True), ("b", "q")])]
    table = put(tmp_path / "t.csv", "patient,class,site", *rows)
    words = ["split", table, f"out={tmp_path / 'o.csv'}", "scheme=every_fourth_site"]
    assert main(words) == 2  # class b has one site
    assert main([*words, "only.class=[a]"]) == 0
