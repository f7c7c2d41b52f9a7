"""What real patients alone say: floors between their groups, ceilings of probes that never saw the patient."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from evaluation_world import World, filters

from latent_medi.cli import main
from latent_medi.core.errors import UserError
from latent_medi.core.files import read_sealed
from latent_medi.evaluation import real_baseline as floors_module
from latent_medi.evaluation.real_baseline import floors, floors_text
from latent_medi.evaluation.settings import FloorsSettings
from latent_medi.metadata.schema import Schema
from latent_medi.shards.writing.writer import Patch, write_dataset


def test_planted_cohort_has_small_floors_and_high_ceilings(world: World, tmp_path: Path) -> None:
    settings = FloorsSettings(data=str(world.real), out=str(tmp_path), colour_free=False, real_splits=20)
    result = floors(settings, [filters()])
    assert (result, True) == read_sealed(tmp_path / "floors.json", "")
    [found] = result["encoders"].values()
    assert len(found["cells"]) == 9
    for cell in found["cells"]:
        low, high = cell["kid"]["range"]
        assert low < cell["kid"]["value"] < high
        assert low < 0 < high
        # Sites differ in their stain, which no deal of patients within one imitates.
        assert cell["other_site"]["kid"] > high
        assert cell["n"] > 20
    for field, least in (("class", 0.65), ("site", 0.9)):
        ceiling = found["ceilings"][field]
        assert ceiling["value"] > least
        assert ceiling["chance"] == pytest.approx(1 / 3)
        assert set(ceiling["cells"]) == {cell["name"] for cell in found["cells"]}
    table = pd.read_csv(tmp_path / "floors.csv")
    assert list(table["kid"]) == [cell["kid"]["value"] for cell in found["cells"]]
    text = floors_text(result)
    assert all(cell["name"] in text for cell in found["cells"])


def coloured_patients(folder: Path, per_cell: int, one: str = "") -> Path:
    """Patients whose patches share a colour of their own, and nothing that class or site could be told by."""
    rng = np.random.default_rng(0)
    patches, rows = [], []
    for tumour in ("a", "b"):
        for site in ("x", "y"):
            for number in range(1 if f"{tumour}{site}" == one else per_cell):
                colour = rng.uniform(60, 220, 3)
                for i in range(6):
                    image = np.clip(colour + rng.normal(0, 3, (16, 16, 3)), 0, 255).astype(np.uint8)
                    patient = f"{tumour}{site}{number}"
                    rows.append({"class": tumour, "site": site})
                    patches.append(Patch(f"{patient}/{i}", image, patient, patient, i, 0, 0.5, rows[-1]))
    schema = Schema.from_table(pd.DataFrame(rows), "class", ["site"])
    write_dataset(folder, patches, "coloured", schema, 16, 0.5)
    return folder


def test_a_patient_who_is_recognised_raises_no_ceiling(tmp_path: Path) -> None:
    data = coloured_patients(tmp_path / "data", 12)
    settings = FloorsSettings(data=str(data), out=str(tmp_path / "out"), colour_free=False, real_splits=20)
    [found] = floors(settings, [filters()])["encoders"].values()
    for field in ("class", "site"):
        low, high = found["ceilings"][field]["range"]
        assert low < 0.5 < high
        assert found["ceilings"][field]["value"] < 0.65
    # Twelve patients a cell, so groups of six differ by chance about as much as sites do.
    inside = [cell["kid"]["range"][0] < cell["other_site"]["kid"] < cell["kid"]["range"][1] for cell in found["cells"]]
    assert sum(inside) >= 3


def test_a_combination_of_one_patient_says_so(tmp_path: Path) -> None:
    data = coloured_patients(tmp_path / "data", 4, one="bx")
    settings = FloorsSettings(data=str(data), out=str(tmp_path / "out"), colour_free=False, real_splits=20)
    result = floors(settings, [filters()])
    [found] = result["encoders"].values()
    alone = {cell["name"]: cell for cell in found["cells"]}["b × x"]
    assert alone["reason"] == "one patient, 4 are needed"
    assert "kid" not in alone
    assert "b × x" in floors_text(result)
    # Fewer than ten patients: a median, and no range to be mistaken for certainty.
    assert {cell["kid"]["range"] for cell in found["cells"] if "kid" in cell} == {"not estimable"}
    assert pd.read_csv(tmp_path / "out" / "floors.csv")["kid_low"].isna().all()


def test_a_value_of_one_patient_lowers_no_ceiling(tmp_path: Path) -> None:
    """It cannot be learned and judged; the others are told apart without fail."""
    rng = np.random.default_rng(0)
    patches, rows = [], []
    for site, people, level in (("x", 12, 60), ("y", 12, 200), ("z", 1, 130), ("w", 1, 20)):
        for number in range(people):
            for i, tumour in enumerate(("a", "b")):
                image = np.clip(level + 20 * i + rng.normal(0, 4, (16, 16, 3)), 0, 255).astype(np.uint8)
                rows.append({"class": tumour, "site": site})
                patches.append(
                    Patch(f"{site}{number}/{i}", image, f"{site}{number}", f"{site}{number}", i, 0, 0.5, rows[-1])
                )
    write_dataset(
        tmp_path / "data", patches, "lonely", Schema.from_table(pd.DataFrame(rows), "class", ["site"]), 16, 0.5
    )
    settings = FloorsSettings(data=str(tmp_path / "data"), out=str(tmp_path / "out"), colour_free=False, real_splits=20)
    [found] = floors(settings, [filters()])["encoders"].values()
    ceiling = found["ceilings"]["site"]
    assert ceiling["value"] > 0.95
    assert ceiling["chance"] == 0.5
    assert not [name for name in ceiling["cells"] if name[-1] in "zw"]


def test_bad_settings_are_explained(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="real_splits"):
        floors(FloorsSettings(data=str(world.real), out=str(tmp_path), real_splits=3))
    with pytest.raises(UserError, match=r"holds \d+ synthetic patches"):
        floors(FloorsSettings(data=str(world.medi), out=str(tmp_path)))
    with pytest.raises(UserError, match="no categorical field 'age'"):
        floors(FloorsSettings(data=str(world.real), out=str(tmp_path), fields=["age"]))
    assert main(["floors", str(world.real), f"out={tmp_path}", "site_field=sitte"]) == 2
    error = capsys.readouterr().err
    assert "'sitte'" in error
    assert "site" in error
    assert not list(tmp_path.iterdir())


def test_what_is_thinned_says_how_many_are_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of directions that a distance is taken in goes by the patches that it really looks at."""
    data = coloured_patients(tmp_path / "data", 12)
    monkeypatch.setattr(floors_module, "_MOST", 8)
    settings = FloorsSettings(data=str(data), out=str(tmp_path / "out"), colour_free=False, real_splits=20)
    [found] = floors(settings, [filters()])["encoders"].values()
    assert {cell["n"] for cell in found["cells"]} == {8}
    assert {cell["pca_dims"] for cell in found["cells"]} == {2}
