"""Names of fields: those that a plan, a call or the index uses itself are refused when a dataset is made."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from latent_medi.cli import main
from latent_medi.core.errors import UserError
from latent_medi.metadata.audit import audit
from latent_medi.metadata.field_names import ON_REAL, PLAN_COLUMNS, RESERVED, check_new_names
from latent_medi.metadata.schema import Schema
from latent_medi.metadata.splits import random_split
from latent_medi.metadata.table_index import read_table_index
from latent_medi.planning.plan import OWN_COLUMNS, QUANTILES_OF, UNKNOWN_OF
from latent_medi.planning.planner import plan_from
from latent_medi.planning.settings import PlanSettings
from latent_medi.sampling.settings import GenerateSettings, GridSettings
from latent_medi.shards.dataset import FIXED_COLUMNS, PatchDataset
from latent_medi.shards.writing.writer import Patch, write_dataset


def test_every_name_of_ours_is_reserved() -> None:
    settings = [field.name for kind in (GenerateSettings, GridSettings) for field in dataclasses.fields(kind)]
    assert {*settings, *FIXED_COLUMNS, *OWN_COLUMNS, "class_", "file_name"} <= set(RESERVED)
    assert PLAN_COLUMNS == OWN_COLUMNS
    assert ON_REAL == (QUANTILES_OF, UNKNOWN_OF)


@pytest.mark.parametrize("name", ["count", "seed", "steps", "verdict", "n", "model", "patches", "split_x", "file_name"])
def test_a_reserved_name_is_refused_with_what_to_do(name: str) -> None:
    with pytest.raises(UserError, match=f"cannot be called '{name}'[\\s\\S]*Rename the column"):
        check_new_names(["class", name])


def test_names_that_would_be_mixed_up_are_refused() -> None:
    for names, words in (
        (["Site", "site"], "'Site' and 'site' differ only in case"),
        (["K\u00f6rper", "Ko\u0308rper"], "differ only in case"),
        ([""], "cannot be called ''"),
        ([" "], "cannot be called ' '"),
        (["a\nb"], "control character"),
    ):
        with pytest.raises(UserError, match=words):
            check_new_names(names)
    with pytest.raises(UserError, match=r"'age_quantiles'.*'age'"):
        check_new_names(["age", "age_quantiles"], continuous=["age"])
    check_new_names(
        ["class", "site", "demographic.race", "age_quantiles", "index", "patch", "split", "batch"], ["steps", "n"]
    )
    with pytest.raises(UserError, match="'Site' and 'site'"):
        check_new_names(["Site"], ["site"])
    with pytest.raises(UserError, match="'key'"):
        check_new_names(["Site"], ["key"])


def table(folder: Path) -> Path:
    rows = []
    for i in range(8):
        Image.fromarray(np.full((16, 16, 3), 20 * i, np.uint8)).save(folder / f"i{i}.png")
        rows.append({"image": f"i{i}.png", "patient": f"p{i}", "class": "ab"[i % 2], "count": "xy"[i // 4], "B": "1"})
    pd.DataFrame(rows).to_csv(folder / "table.csv", index=False)
    return folder / "table.csv"


def test_an_import_refuses_them_before_it_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["shards", "images", f"table={table(tmp_path)}", f"out={tmp_path / 'out'}", "patch_size=16"]
    words.append("source_mpp=0.5")
    assert main([*words, "categorical=[count]"]) == 2
    assert "'count': that is a plan's own column" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*words, "extra=[count]"]) == 0
    with pytest.raises(UserError, match="cannot be called 'patient'"):
        read_table_index(tmp_path / "table.csv", "class", fields=["patient"])


def old_dataset(folder: Path, field: str) -> PatchDataset:
    """A dataset as earlier versions wrote it, with a field of a name that is refused now."""
    rows = [{"class": "ab"[i % 2], field: "xy"[i // 4]} for i in range(8)]
    schema = Schema.from_table(pd.DataFrame(rows), "class", [field])
    image = np.zeros((16, 16, 3), np.uint8)
    patches = [Patch(f"k{i}", image, f"p{i}", f"p{i}", -1, -1, 0.5, row) for i, row in enumerate(rows)]
    return write_dataset(folder, patches, "old", schema, 16, 0.5)


@pytest.mark.parametrize("field", ["count", "n", "patches"])
def test_folders_that_have_such_fields_open(tmp_path: Path, field: str) -> None:
    dataset = old_dataset(tmp_path / "old", field)
    assert PatchDataset.open(tmp_path / "old").schema.names == ("class", field)
    parts = random_split(dataset.index, {"train": 0.5, "test": 0.5}, 0, ["class", field])
    dataset.add_split("main", parts, {})
    settings = PlanSettings(data=str(tmp_path / "old"), out=str(tmp_path / "plan.csv"), goal="each", per_cell=1)
    settings.fields, settings.split = ["class", field], ""
    if field in ("count", "patches"):
        with pytest.raises(UserError, match=f"'{field}' cannot be"):
            plan_from(settings)
    else:
        assert plan_from(settings).table["count"].sum() == 4
    if field == "patches":
        with pytest.raises(UserError, match="'patches' cannot be audited"):
            audit(dataset.index, dataset.schema)


def test_slides_refuse_them_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "slides.csv").write_text("slide,patient,model\na.svs,p0,b1\n")
    words = [f"source={tmp_path}", f"table={tmp_path / 'slides.csv'}", f"out={tmp_path / 'out'}", "categorical=[model]"]
    assert main(["shards", "slides", *words]) == 2
    assert "cannot be called 'model': that is a setting of `latent-medi sample`" in capsys.readouterr().err
