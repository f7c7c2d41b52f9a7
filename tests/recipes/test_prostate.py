from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from latent_medi.core.errors import UserError
from latent_medi.metadata.audit import audit
from latent_medi.metadata.splits import assert_patient_disjoint
from latent_medi.recipes.registry import load_recipe
from latent_medi.shards.dataset import PatchDataset


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    return load_recipe("prostate")


CELLS = {
    ("benign", "karolinska"): 12,
    ("gleason3", "karolinska"): 10,
    ("gleason3", "radboud"): 6,
    ("gleason4", "karolinska"): 3,
    ("gleason4", "radboud"): 3,
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    rows = []
    for (tumour, site), patients in CELLS.items():
        for p in range(patients):
            for number in range(2):
                patient = f"{tumour}{site}{p}"
                image = f"images/{patient}_{number}.jpeg"
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / image)
                rows.append({"image": image, "patient": patient, "class": tumour, "site": site, "isup_grade": "1"})
    pd.DataFrame(rows).to_csv(folder / "manifest.csv", index=False)
    return folder


def check(dataset: PatchDataset) -> None:
    index = dataset.index
    assert_patient_disjoint(index, "split_main")
    held = index[(index["class"] == "gleason4") & (index["site"] == "radboud")]
    assert set(held["split_main"]) == {"test"}
    patients = index.drop_duplicates("patient").groupby(["class", "site", "split_main"]).size()
    for (tumour, site), cell in patients.groupby(level=[0, 1]):
        if (tumour, site) == ("gleason4", "radboud"):
            continue
        parts = {part: count for (_, _, part), count in cell.items()}
        assert parts["train"] >= 1
        assert parts["test"] == max(1, round(0.3 * sum(parts.values())))
    assert set(index["split_main"]) == {"train", "val", "test"}
    assert dataset.info["splits"]["main"]["recipe"]["held_out"] == [{"class": "gleason4", "site": "radboud"}]


def test_small_copy_of_the_layout(
    recipe: ModuleType, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    printed = recipe.main([str(source), str(tmp_path / "out"), "--patch-size", "16"])
    dataset = PatchDataset.open(tmp_path / "out")
    assert printed["patches"] == len(dataset) == 68
    assert "gleason4" in capsys.readouterr().out
    check(dataset)
    assert dataset.index["isup_grade"].tolist() == ["1"] * 68
    assert dataset.schema.names == ("class", "site")
    assert dataset.info["mpp"] == 2.0
    assert "nominal" in dataset.info["provenance"]["resolution"]


def test_the_split_depends_on_the_seed_but_not_on_the_order_of_rows(recipe: ModuleType, source: Path) -> None:
    table = pd.read_csv(source / "manifest.csv", dtype=str)
    split = recipe.split_patients(table)
    assert split == recipe.split_patients(table.sample(frac=1, random_state=3))
    assert split != recipe.split_patients(table, seed=1)
    with pytest.raises(UserError, match="too few"):
        recipe.split_patients(table[table["patient"].isin({"benignkarolinska0", "gleason4radboud0"})])


def test_what_will_be_imported_is_listed_before(recipe: ModuleType, source: Path, tmp_path: Path) -> None:
    told, made = recipe.listing(source, seed=4), recipe.build(source, tmp_path / "listed", patch_size=32, seed=4)
    assert told.schema == made.schema
    assert told.counts == [shard["count"] for shard in made.info["shards"]]
    columns = ["key", "patient", "slide", "class", "site", "split_main"]
    assert told.index[columns].astype(str).to_numpy().tolist() == made.index[columns].astype(str).to_numpy().tolist()


@pytest.fixture(scope="module")
def real(recipe: ModuleType, shared: Path, tmp_path_factory: pytest.TempPathFactory) -> PatchDataset:
    return recipe.build(shared / "data/prostate", tmp_path_factory.mktemp("prostate") / "out")


@pytest.mark.slow
def test_the_real_folder(real: PatchDataset, shared: Path) -> None:
    assert len(real) == 3154
    assert real.info["counts"]["patients"] == 81
    assert real.verify() == []
    check(real)
    counts = real.counts("class", "site", "patients")
    assert counts.to_dict() == {
        "karolinska": {"benign": 59, "gleason3": 10, "gleason4": 3},
        "radboud": {"benign": 0, "gleason3": 6, "gleason4": 3},
    }
    row = 1000
    patient, number = real.index["key"][row].split("/")
    with Image.open(shared / f"data/prostate/images/{patient}_{number}.jpeg") as image:
        expected = np.asarray(image.resize((64, 64), Image.Resampling.LANCZOS))
    assert np.array_equal(real.read([row])[0], expected)


@pytest.mark.slow
def test_the_audit_of_the_real_folder(real: PatchDataset) -> None:
    result = audit(real.index, real.schema, split=("main", "train"), thin_patients=2)
    found = {tuple(v["combination"].values()): v["verdict"] for v in result["verdicts"]}
    assert found["gleason4", "radboud"] == "thin"  # of two patients at the other hospital: 1.09 effective ones
    assert found["benign", "radboud"] == "both margins seen"
    assert found["gleason3", "radboud"] == "seen"
    assert result["components"] == 1
