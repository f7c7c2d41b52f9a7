"""The paper's split: test patients of sites that training lacks, no probe patients, no held-out combination."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from evaluation_world import filters
from new_sites import CLASSES, PATCHES, PATIENTS, TRAIN_SITES, build, train_sites

from latent_medi.core.errors import UserError
from latent_medi.evaluation.cohort.comparison_sets import REAL, class_comparisons, comparison_for, field_comparisons
from latent_medi.evaluation.cohort.open_study import open_study
from latent_medi.evaluation.cohort.study import Study
from latent_medi.evaluation.evaluate import check_settings, evaluate
from latent_medi.evaluation.fidelity.records import DistanceTable
from latent_medi.evaluation.results import Metrics, metrics_json, metrics_of
from latent_medi.evaluation.settings import EvaluateSettings
from latent_medi.evaluation.summary import headline_json, headline_text
from latent_medi.metadata.schema import Field, Schema
from latent_medi.report.render import render_report
from latent_medi.shards.writing.writer import Patch, write_dataset
from latent_medi.statistics.distances import frechet_distance

PER_CLASS = TRAIN_SITES * PATIENTS * PATCHES


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> EvaluateSettings:
    return build(tmp_path_factory.mktemp("new_sites"))


@pytest.fixture(scope="module")
def study(given: EvaluateSettings) -> Study:
    return open_study(given)


@pytest.fixture(scope="module")
def found(given: EvaluateSettings) -> Metrics:
    return evaluate(replace(given, references=["test", "train"], protocol="paper"), [filters()])


def test_samples_of_a_class_follow_the_training_images_of_that_class(study: Study) -> None:
    """As many of each site as there; none of the sites that were added from another class."""
    for tumour, comparison in zip(CLASSES, class_comparisons(study, 0, "train"), strict=True):
        assert comparison.skipped == {}
        assert len(comparison.reference) == PER_CLASS
        assert set(comparison.reference) <= set(study.train)
        made = study.synthetic["medi"].index.iloc[comparison.rows["medi"]]
        assert made.groupby(["class", "tss"]).size().to_dict() == {
            (tumour, site): PATIENTS * PATCHES for site in train_sites(tumour)
        }
        assert len(comparison.rows["cls"]) == PER_CLASS
        assert set(comparison.rows[REAL]) <= set(study.test)
        assert comparison.unmatched == {REAL: ["tss"]}


def test_no_sample_can_be_of_a_site_that_training_lacks(study: Study) -> None:
    """So those of training's classes and sites are compared, and the record says in what they do not follow."""
    for tumour, comparison in zip(CLASSES, class_comparisons(study, 0), strict=True):
        assert comparison.skipped == {}
        assert comparison.unmatched == {"medi": ["tss"]}
        made = study.synthetic["medi"].index.iloc[comparison.rows["medi"]]
        assert set(made["class"]) == {tumour}
        assert set(made["tss"]) == set(train_sites(tumour))


def test_a_combination_of_a_new_site_has_no_sample_and_says_so(study: Study) -> None:
    cells = field_comparisons(study, ["class", "tss"], 0)
    assert all(not cell.rows for cell in cells)
    cells = field_comparisons(study, ["class", "tss"], 0, "train")
    assert [len(cell.rows["medi"]) for cell in cells] == [PATIENTS * PATCHES] * len(CLASSES) * TRAIN_SITES
    assert all(cell.skipped == {} for cell in cells)


def test_samples_of_a_held_out_hospital_have_codes_of_their_class(tmp_path: Path) -> None:
    """Of TCGA's hospitals each has a code per class: where A at h2 is held out, no sample can have A's code there."""
    classes, hospitals = ("A", "B"), ("h0", "h1", "h2")
    codes = Field("tss", "categorical", tuple(c + h for c in classes for h in hospitals))
    schema = Schema((Field("class", "class", classes), Field("site", "categorical", hospitals), codes))
    image = np.random.default_rng(0).integers(0, 256, (600, 32, 32, 3), dtype=np.uint8)

    def patches(rows: list[tuple[str, str, str, str]], origin: str) -> list[Patch]:
        return [
            Patch(f"{o}{i}", image[i], o, o, i, 0, 0.5, {"class": c, "site": h, "tss": t}, origin=origin)
            for i, (o, c, h, t) in enumerate(rows)
        ]

    cells = [(part, c, h) for part in ("train", "test") for c in classes for h in hospitals]
    cells.remove(("train", "A", "h2"))
    real = [(f"{part}-{c}-{h}-{i % 12}", c, h, c + h) for part, c, h in cells for i in range(48)]
    made = [(f"synthetic:a:{c}{h}{k}", c, h, c + k) for c in classes for h in hospitals for k in ("h0", "h1")]
    splits = {"main": ({name: name.split("-")[0] for name, *_ in real}, {"kind": "planted"})}
    write_dataset(tmp_path / "real", patches(real, "real"), "r", schema, 32, 0.5, splits=splits)
    write_dataset(tmp_path / "medi", patches(made * 20, "synthetic"), "medi", schema, 32, 0.5)
    held_out = [{"class": "A", "site": "h2"}]
    settings = EvaluateSettings(real=str(tmp_path / "real"), held_out=held_out, downstream=False)
    study = open_study(replace(settings, synthetic={"medi": str(tmp_path / "medi")}))
    comparison = comparison_for(study, held_out[0], 0)
    assert comparison.skipped == {}
    chosen = study.synthetic["medi"].index.iloc[comparison.rows["medi"]]
    assert comparison.unmatched == {"medi": ["tss"]}
    assert set(chosen["site"]) == {"h2"}
    assert set(chosen["tss"]) == {"Ah0", "Ah1"}


def _finite(table: DistanceTable) -> list[str]:
    return [
        c.name
        for c in table.combinations
        if all(name in c.sources and np.isfinite(c.sources[name].value or np.nan) for name in ("medi", "cls"))
    ]


def test_every_class_has_a_distance_to_both_references(found: Metrics) -> None:
    fidelity = found.fidelity["filters"]
    assert fidelity.training is not None
    for table in (fidelity.per_class, fidelity.training.per_class):
        assert _finite(table) == list(CLASSES)
        assert table.means["medi"].n_combinations == len(CLASSES)
        assert table.ratio.value is not None
        assert table.ratio.value < 0.3  # MeDi's samples are the renderer's own, CLS's are darker
        assert isinstance(table.means["cls"].interval, tuple)
        assert all(d.unmatched_fields == [] for c in table.combinations for n, d in c.sources.items() if n == "cls")
    assert [len(t.combinations) for t in fidelity.training.by_fields.values()] == [len(CLASSES) * TRAIN_SITES]
    assert "copies them is best" in fidelity.training.label
    assert fidelity.training.per_class.frechet_ratio.value is None
    assert metrics_of(metrics_json(found)) == found


def test_the_raw_distance_is_that_of_all_training_images(found: Metrics, study: Study) -> None:
    """Computed anew: every training image of the class, every sample of its class and sites."""
    fidelity = found.fidelity["filters"]
    assert fidelity.training is not None
    encoder = filters()
    for comparison, record in zip(
        class_comparisons(study, 0, "train"), fidelity.training.per_class.combinations, strict=True
    ):
        real = encoder.features([study.real.read(comparison.reference)])
        made = encoder.features([study.synthetic["medi"].dataset.read(comparison.rows["medi"])])
        distance = record.sources["medi"]
        raw = distance.fd if distance.fd is not None else distance.fd_raw
        assert raw == pytest.approx(frechet_distance(real, made), rel=1e-4)
    means = fidelity.training.per_class.means["medi"]
    values = [c.sources["medi"] for c in fidelity.training.per_class.combinations]
    assert means.value == pytest.approx(np.mean([v.value for v in values]))
    assert (means.fd if means.fd is not None else means.fd_raw) == pytest.approx(
        np.mean([v.fd if v.fd is not None else v.fd_raw for v in values])
    )


def test_the_summary_shows_each_class_and_what_training_images_are(found: Metrics) -> None:
    assert found.headline is not None
    text = headline_text(found, found.headline)
    assert "Kernel distance (KID × 10³) by class" in text
    assert "training images" in text
    assert "a generator that copies them is best" in " ".join(text.split())
    assert all(f"  {name} " in text for name in CLASSES)
    content = headline_json(found.headline)
    assert [row["name"] for row in content["classes"]] == list(CLASSES)
    assert content["distance_per_class_training"]["medi"] is not None
    assert content["distance_unseen"]["medi"] is None


def test_the_table_by_class_has_a_row_per_class_and_reference(found: Metrics, given: EvaluateSettings) -> None:
    table = pd.read_csv(Path(given.out) / "per_class_distance.csv")
    for reference in ("training images", "held-out patients"):
        rows = table[table["reference"] == reference]
        assert list(rows["class"]) == [*CLASSES, "mean"]
        assert rows["medi_kid"].iloc[-1] == pytest.approx(rows["medi_kid"].iloc[:-1].mean())
        assert (rows["cls_kid"] > rows["medi_kid"]).all()
        assert (rows["medi_kid_low"] < rows["medi_kid"]).all()
        assert set(rows["n_reference"].iloc[:-1]) == {PER_CLASS if reference == "training images" else PER_CLASS // 2}
    assert table["medi_fd"].notna().all()


def test_the_page_has_both_references(found: Metrics, given: EvaluateSettings, tmp_path: Path) -> None:
    page = render_report(found, tmp_path / "report.html", sections=["headline", "fidelity"]).read_text()
    assert "per class, to training images" in page
    assert "a generator that copies them is best" in page
    assert "each class, training images" in page
    assert "class × tss, training images" in page
    assert "Training lacks the test patches’ tss" in page


def test_test_patients_alone_are_the_reference_by_default(given: EvaluateSettings) -> None:
    assert EvaluateSettings().references == ["test"]
    with pytest.raises(UserError, match="an evaluation needs the test patients"):
        check_settings(replace(given, references=["train"]))
    with pytest.raises(UserError, match=r"test_value is 'train'.*\n.*references='\[test, train\]'"):
        check_settings(replace(given, test_value="train"))
