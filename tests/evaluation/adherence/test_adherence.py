"""Whether samples show what was asked for, beyond the share that a probe finds: site leaking into class, and stain."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from evaluation_world import CLASSES, SCHEMA, SITES, SIZE, World, filters, render, synthetic_patches

from latent_medi.core.records import encode
from latent_medi.evaluation.adherence import attributes, site_leakage, stain
from latent_medi.evaluation.cohort.open_study import open_study
from latent_medi.evaluation.cohort.study import Study
from latent_medi.evaluation.evaluate import study_features
from latent_medi.evaluation.settings import EvaluateSettings
from latent_medi.features.stain import fit_stain, stain_angles, tissue_density
from latent_medi.metadata.schema import Field, Schema
from latent_medi.shards.writing.writer import Patch, write_dataset
from latent_medi.statistics import intervals


def leaking(count: int) -> Iterator[Patch]:
    """A generator that draws blobs whatever class is asked for at the site that training shows blobs of most."""
    rng = np.random.default_rng(5)
    for tumour in CLASSES:
        for site in SITES:
            for i in range(count):
                drawn = "blobs" if site == "east" and i % 4 else tumour
                name = f"synthetic:leak:{tumour}-{site}"
                fields = {"class": tumour, "site": site, "preparation": "formalin", "age": "unknown"}
                image = render(drawn, site, "formalin", rng)
                yield Patch(f"{tumour}-{site}/{i}", image, name, name, 0, 0, 0.5, fields, origin="synthetic")


@pytest.fixture(scope="module")
def study(world: World, tmp_path_factory: pytest.TempPathFactory) -> Study:
    folder = tmp_path_factory.mktemp("adherence")
    swapped = synthetic_patches(20, {"south": "north"}, False)
    write_dataset(folder / "leak", list(leaking(40)), "leak", SCHEMA, SIZE, 0.5)
    write_dataset(folder / "swapped", list(swapped), "swapped", SCHEMA, SIZE, 0.5)
    own = {name: str(folder / name) for name in ("leak", "swapped")}
    synthetic = {"medi": str(world.medi), "cls": str(world.cls), **own}
    return open_study(world.settings("adherence", synthetic=synthetic))


@pytest.fixture(scope="module")
def sources(study: Study, world: World) -> dict[str, Any]:
    settings = world.settings("adherence")
    predictions = attributes.predict_fields(study, study_features(study, filters(), settings, "cpu"), 1.0, 0)
    result = site_leakage.leakage(study, predictions, 0)
    assert result.training_association is not None
    assert result.training_association > 0.1  # one combination is held out
    return encode(result.sources)


def test_a_class_that_the_site_decides_is_seen(sources: dict[str, Any]) -> None:
    assert sources["leak"]["class_shift"]["beyond"]
    assert sources["leak"]["class_shift"]["value"] > 2 * sources["leak"]["class_shift"]["limit"]
    assert not sources["medi"]["class_shift"]["beyond"]
    assert not sources["real"]["class_shift"]["beyond"]
    assert sources["leak"]["requested_association"] == pytest.approx(0, abs=1e-9)
    assert sources["leak"]["association"] > 2 * sources["medi"]["association"]


def test_an_arm_without_the_site_shows_its_verdicts_tie_alone(sources: dict[str, Any]) -> None:
    assert not {"requested_association", "class_shift"} & sources["cls"].keys()
    # Stripes are never drawn at the south, as training has none there: class and site of its samples are tied.
    assert sources["cls"]["association"] > sources["medi"]["association"]


def test_class_where_the_site_is_right_and_where_it_is_wrong(sources: dict[str, Any]) -> None:
    swapped = sources["swapped"]
    asked_south = swapped["n"] / 3
    assert swapped["site_missed"]["n_patches"] == pytest.approx(asked_south, rel=0.3)
    total = swapped["site_found"]["n_patches"] + swapped["site_missed"]["n_patches"]
    assert total == swapped["n"]
    low, high = swapped["site_found"]["interval"]
    assert low <= swapped["site_found"]["value"] <= high


def test_sites_are_reassigned_by_patient() -> None:
    """Patients who differ, at sites that do not: patches of one patient are no independent evidence."""
    rng = np.random.default_rng(0)
    beyond = 0
    for _ in range(30):
        kind = rng.integers(0, 2, 40)  # a patient's patches all get one verdict
        site = np.repeat(np.where(np.arange(40) % 2, "x", "y"), 10)
        seen, units = np.repeat(np.where(kind, "a", "b"), 10), np.repeat(np.arange(40).astype(str), 10)
        asked = np.full(400, "a")
        beyond += site_leakage._class_shift(asked, site, seen, units, 0).beyond
    assert beyond <= 4


def test_stain_asked_for_and_obtained(study: Study) -> None:
    cells = {cell["name"]: cell for cell in encode(stain.stain(study, 0).combinations)}
    assert set(cells) == {*SITES, "stripes × south", "south × frozen"}
    for site in SITES:
        sources = cells[site]["sources"]
        low, high = sources["real"]["nearest"]["interval"]
        assert low <= sources["real"]["nearest"]["value"] <= high
        assert sources["real"]["nearest"]["value"] > 0.9
        assert sources["medi"]["nearest"]["value"] > 0.9
        assert sources["medi"]["distance"] < 0.02
        assert sources["medi"]["conditioned"]
        assert not sources["cls"]["conditioned"]
    south = cells["south"]["sources"]
    assert south["swapped"]["nearest"]["value"] < 0.1
    assert south["swapped"]["distance"] > 5 * south["medi"]["distance"]
    # The class-only arm draws no stripes there, and stripes are what is compared.
    assert cells["stripes × south"]["sources"]["cls"]["nearest"]["value"] < 0.1


def test_density_is_that_of_the_tissue() -> None:
    images = np.full((3, 8, 8, 3), 255, np.uint8)
    images[0, :4] = (128, 64, 200)
    images[1] = (128, 64, 200)
    density = tissue_density(images)
    wanted = -np.log10(np.array([128, 64, 200]) / 255)
    assert density[0] == pytest.approx(wanted)
    assert density[1] == pytest.approx(wanted)
    assert np.isnan(density[2]).all()
    stats = fit_stain(images)
    assert stain_angles(stats, stats) == pytest.approx((0, 0), abs=1e-4)


def test_pictures_of_every_training_site_are_not_held_at_once(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 398 sites of TCGA-UT they are 12 GB."""
    held: list[int] = []
    compare = stain._SiteDensities.__init__

    def watched(self: Any, sites: list[str], training: list[Any]) -> None:
        held.extend((p.images if p.images.base is None else p.images.base).nbytes for p in training)
        assert all(len(p.density) for p in training)
        compare(self, sites, training)

    monkeypatch.setattr(stain._SiteDensities, "__init__", watched)
    stain.stain(study, 0)
    assert held == [0] * len(SITES)


def test_no_picture_is_read_where_test_patients_are_of_other_sites(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in MeDi's split: there is no stain of the same site to compare with."""
    south = study.site_labels == "south"
    apart = replace(
        study,
        train=study.train[~south[study.train]],
        reference=study.reference[south[study.reference]],
        held_out=[],
    )
    monkeypatch.setattr(type(study.real), "read", lambda *_: pytest.fail("a picture is read"))
    found = stain.stain(apart, 0)
    assert not found.combinations
    assert "training" in str(found.reason)


def test_an_unequal_mix_of_classes_is_no_other_stain(tmp_path: Path) -> None:
    """A dark class that one side has more of moves no density, and what one side lacks is not compared."""
    rng = np.random.default_rng(0)
    dark = {"a": 60, "b": 150}
    amounts = {"train": {"a": 8, "b": 8}, "probe": {"a": 2, "b": 14}, "test": {"a": 14, "b": 2}}
    patches, split = [], {}
    for part, counts in amounts.items():
        for tumour, count in counts.items():
            for site, tint in (("x", (1, 1, 1)), ("y", (1, 1.2, 1))):
                for number in range(count):
                    patient = f"{part}{tumour}{site}{number}"
                    split[patient] = part
                    image = np.clip(np.array(tint) * dark[tumour] + rng.normal(0, 3, (16, 16, 3)), 0, 255)
                    fields = {"class": tumour, "site": site}
                    pixels = image.astype(np.uint8)
                    patches.append(Patch(f"{patient}/0", pixels, patient, patient, 0, 0, 0.5, fields))
    schema = Schema((Field("class", "class", ("a", "b")), Field("site", "categorical", ("x", "y"))))
    write_dataset(tmp_path / "real", patches, "mix", schema, 16, 0.5, splits={"main": (split, {})})
    samples = [
        replace(p, key=f"s/{p.key}", patient="s", origin="synthetic") for p in patches if p.fields["class"] == "b"
    ]
    write_dataset(tmp_path / "b", samples, "b", schema, 16, 0.5)
    held_out = [{"class": "b", "site": "y"}]
    arms = {"medi": str(tmp_path / "b")}
    settings = EvaluateSettings(real=str(tmp_path / "real"), synthetic=arms, held_out=held_out, unseen=False)
    for cell in encode(stain.stain(open_study(settings), 0).combinations):
        for source in ("real", "medi"):
            assert cell["sources"][source]["distance"] < 0.01, (cell["name"], source)
            assert cell["sources"][source]["nearest"]["value"] > 0.95


def test_what_no_probe_can_tell_is_left_out(study: Study) -> None:
    """Perfect probes, and a fifth of the sites and of the classes unknown: what is left is right throughout."""
    rows = study.reference
    names = (study.class_field, study.site_field)
    truth = [study.index[name].to_numpy(str).astype(object) for name in names]
    predictions = {
        name: attributes.FieldPredictions(sorted(set(values)), values[rows].astype(str), {}, True, 9)
        for name, values in zip(names, truth, strict=True)
    }
    index = study.index.copy()
    for name, first in zip(names, (0, 1), strict=True):
        column = index[name].astype(str).to_numpy(object)
        column[rows[first::5]] = "unknown"
        index[name] = column
    partly = replace(study, real=SimpleNamespace(index=index))  # type: ignore[arg-type]
    found = encode(site_leakage.leakage(partly, predictions, 0).sources["real"])
    assert found["n"] == len(rows) - len(rows[0::5]) - len(rows[1::5])
    assert found["site_found"]["value"] == 1
    assert found["site_missed"]["n_patches"] == 0


def test_test_patients_of_a_site_that_no_probe_knows(study: Study) -> None:
    """An external hospital: there is nothing to hold the samples against, and that is said."""
    rows = study.reference
    classes = study.index[study.class_field].to_numpy(str)
    predictions = {
        study.class_field: attributes.FieldPredictions(sorted(set(classes)), classes[rows], {}, True, 9),
        study.site_field: attributes.FieldPredictions(
            ["elsewhere", "far away"], np.full(len(rows), "elsewhere"), {}, True, 9
        ),
    }
    assert "no real test patch" in str(site_leakage.leakage(study, predictions, 0).reason)


def test_accuracy_on_real_patches_is_as_sure_as_the_smallest_combination() -> None:
    """The second combination is part of the first: its patients count in both, and they are left out of both."""
    right = np.array([1, 0, 1, 1, 0, 1] * 4, float)
    patients = np.repeat(np.arange(12), 2)
    first, second = np.arange(24), np.arange(4, 24)
    found = attributes._accuracy(right, patients, [first, second])
    assert found.value == pytest.approx((right.mean() + right[4:].mean()) / 2)
    assert (found.n_patches, found.n_patients, found.smallest_group) == (24, 12, 10)
    means = right.reshape(12, 2).mean(axis=1)
    rest = (means.sum() - means) / 11
    part = np.concatenate([np.full(2, means[2:].mean()), (means[2:].sum() - means[2:]) / 9])
    strata = np.zeros(12, int)  # some are of both, so all are one sample
    wanted = intervals.t_interval(found.value, intervals.jackknife((rest + part) / 2, strata), (0.0, 1.0))
    assert found.interval == pytest.approx(wanted)
    assert attributes._accuracy(right, patients, [first, second[2:]]).interval == "not estimable"
    assert attributes._accuracy(right, patients, []).value is None
