"""Selection finds what was planted, chooses the best of each cell, and takes nothing away."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from latent_medi import cli
from latent_medi.core.errors import UserError
from latent_medi.features.encoders import ImageEncoder
from latent_medi.features.networks import Network, Preprocessing
from latent_medi.metadata.schema import Field, Schema
from latent_medi.selection import select as module
from latent_medi.selection.filters import class_centroids
from latent_medi.selection.select import select
from latent_medi.selection.settings import SelectSettings
from latent_medi.shards.dataset import PatchDataset
from latent_medi.shards.writing.writer import Patch, write_dataset

SIZE = 16
COLOURS = {"aster": (210, 150, 190), "birch": (170, 150, 210), "cedar": (190, 190, 140)}
SCHEMA = Schema((Field("class", "class", ("benign", "tumour")), Field("site", "categorical", tuple(COLOURS))))
CELLS = [(c, s) for c in ("benign", "tumour") for s in COLOURS]
UNSEEN = ("tumour", "cedar")
GOOD = 12  # flawless synthetic patches per cell


class Pooled(torch.nn.Module):
    """The mean colour of 4×4 squares: knows the class (where it is dark) and the site (the colour)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, 3, H, W] to [N, 48]."""
        return torch.nn.functional.adaptive_avg_pool2d(x, 4).flatten(1)


def pooled() -> ImageEncoder:
    return ImageEncoder(Network("pooled", Pooled(), 48, Preprocessing(0, (0.5,) * 3, (0.25,) * 3), "none"))


def draw(kind: str, site: str, rng: np.random.Generator) -> np.ndarray:
    """Dark at the left (benign) or at the top (tumour), in the site's colour; patients differ, pixels are noisy."""
    shade = np.linspace(0.55, 1.0, SIZE)[:, None] ** rng.uniform(0.7, 1.4)
    shade = shade.T if kind == "benign" else shade
    image = np.broadcast_to(shade, (SIZE, SIZE))[..., None] * np.array(COLOURS[site]) * rng.normal(1, 0.03, 3)
    return np.clip(image + rng.normal(0, 9, image.shape), 0, 255).astype(np.uint8)


def as_patch(key: str, image: np.ndarray, kind: str, site: str, patient: str, origin: str = "synthetic") -> Patch:
    return Patch(key, image, patient, patient, 0, 0, 0.5, {"class": kind, "site": site}, origin)


def write_real(folder: Path, patients: int = 6, cells: Sequence[tuple[str, str]] = CELLS) -> PatchDataset:
    """Three patches a patient; the last patient of each cell tests, and only test patients show the unseen cell."""
    rng = np.random.default_rng(0)
    patches, parts = [], {}
    for kind, site in cells:
        for number in range(patients):
            who = f"{kind}-{site}-{number}"
            parts[who] = "test" if number == patients - 1 or (kind, site) == UNSEEN else "train"
            patches += [as_patch(f"{who}-{i}", draw(kind, site, rng), kind, site, who, "real") for i in range(3)]
    return write_dataset(folder, patches, "real", SCHEMA, SIZE, 0.5, splits={"main": (parts, {})})


def planted(real: PatchDataset) -> list[Patch]:
    """Flawless patches of every cell, called ``good``, and some of every fault. Of ``twin`` (the same pixels, turned or
    mirrored) and ``near`` (almost the same), one in a cell is flawless."""
    rng = np.random.default_rng(1)
    images: list[tuple[str, np.ndarray, str, str]] = []
    for kind, site in CELLS:
        images += [("good", draw(kind, site, rng), kind, site) for _ in range(GOOD)]
        other = "tumour" if kind == "benign" else "benign"
        elsewhere = "birch" if site == "aster" else "aster"
        images += [("wrong", draw(other, site, rng), kind, site), ("wrong", draw(kind, elsewhere, rng), kind, site)]
        noise = rng.integers(0, 256, (SIZE // 4, SIZE // 4, 3), dtype=np.uint8)
        images.append(("outlier", noise.repeat(4, 0).repeat(4, 1), kind, site))
        twins, near = draw(kind, site, rng), draw(kind, site, rng)
        images += [("twin", view, kind, site) for view in (twins, twins.copy(), twins[:, ::-1], np.rot90(twins))]
        slightly = np.clip(near.astype(int) + rng.integers(-1, 2, near.shape), 0, 255).astype(np.uint8)
        images += [("near", near, kind, site), ("near", slightly, kind, site)]
        rows = real.rows({"split_main": "train", "class": kind, "site": site})
        if len(rows):
            image = real.read(rows[:1])[0]
            slightly = np.clip(image.astype(int) + rng.integers(-1, 2, image.shape), 0, 255).astype(np.uint8)
            images += [("copy", view, kind, site) for view in (image, np.rot90(image)[::-1], slightly)]
    return [
        as_patch(
            f"{what}-{i:03d}", np.ascontiguousarray(image), kind, site, f"synthetic:abc:{CELLS.index((kind, site))}"
        )
        for i, (what, image, kind, site) in enumerate(images)
    ]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> PatchDataset:
    return write_real(tmp_path_factory.mktemp("select") / "real")


@pytest.fixture
def synthetic(real: PatchDataset, tmp_path: Path) -> PatchDataset:
    return write_dataset(tmp_path / "synthetic", planted(real), "synthetic", SCHEMA, SIZE, 0.5, patches_per_shard=40)


def options(synthetic: PatchDataset, teacher: PatchDataset, **changes: Any) -> SelectSettings:
    base: dict[str, Any] = {"data": str(synthetic.folder), "real": str(teacher.folder), "workers": 0, "share": 1.0}
    return SelectSettings(**base | {"cache": str(teacher.folder.parent / "f")} | changes)


def chosen(synthetic: PatchDataset, column: str = "selected_best") -> set[str]:
    reopened = PatchDataset.open(synthetic.folder)
    return set(reopened.index["key"].iloc[reopened.rows({column: True})])


def kinds(keys: set[str]) -> dict[str, int]:
    names = [key.partition("-")[0] for key in keys]
    return {name: names.count(name) for name in sorted(set(names))}


def files(folder: Path) -> dict[str, str]:
    return {
        str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in sorted(folder.rglob("*"))
        if f.is_file()
    }


@pytest.mark.parametrize(
    ("name", "faults", "left"),
    [
        ("confidence", ["wrong"], 0),
        ("centroid", ["wrong"], 0),
        ("outliers", ["outlier"], 0),
        ("copies", ["copy"], 0),
        ("duplicates", ["twin", "near"], len(CELLS)),
    ],
)
def test_each_filter_finds_what_was_planted_for_it(
    synthetic: PatchDataset, real: PatchDataset, name: Any, faults: list[str], left: int
) -> None:
    how: dict[str, Any] = {"filters": [name], "fields": ["class", "site"], "outliers": 1.0, "confidence": 0.5}
    selection = select(options(synthetic, real, **how), pooled())
    found = kinds(chosen(synthetic))
    for fault in faults:  # a flawless patch may fall under a quantile by chance
        assert max(0, left - 1) <= found.get(fault, 0) <= left
    assert found["good"] >= 0.9 * GOOD * len(CELLS)
    assert getattr(selection.result.total, f"passed_{name}") == sum(found.values())


def test_all_filters_together_leave_the_good_ones(synthetic: PatchDataset, real: PatchDataset) -> None:
    names = ["centroid", "confidence", "outliers", "copies", "duplicates"]
    selection = select(options(synthetic, real, filters=names, fields=["class", "site"], outliers=1.0), pooled())
    found = kinds(chosen(synthetic))
    assert set(found) == {"good", "twin", "near"}
    assert max(found["twin"], found["near"]) <= len(CELLS)
    assert found["good"] >= 0.9 * GOOD * len(CELLS)
    total = selection.result.total
    assert total.asked == len(synthetic)
    assert all(getattr(total, f"passed_{name}") < total.asked for name in names)
    assert total.chosen == total.control == total.accepted == sum(found.values())
    assert total.acceptance == pytest.approx(sum(found.values()) / len(synthetic))
    assert selection.result.exact_copies == 2 * (len(CELLS) - 1)
    assert {tuple(c.cell.values()) for c in selection.result.cells if c.unseen} == {UNSEEN}
    assert selection.result.probes["class"].accuracy > 0.9


def test_the_class_alone_is_judged_unasked(synthetic: PatchDataset, real: PatchDataset) -> None:
    """What ranks by class: a field that real patches hardly show would drown it."""
    selection = select(options(synthetic, real, share=0.5), pooled())
    assert selection.recipe["fields"] == ["class"]
    assert set(selection.result.probes) == {"class"}
    assert selection.recipe["cells"] == ["class", "site"]
    by_site = select(options(synthetic, real, share=0.5, cells=["site"], name="by_site"), pooled())
    assert by_site.recipe["fields"] == ["site"]


def test_a_duplicate_of_a_bad_patch_does_not_drive_out_a_good_one(real: PatchDataset, tmp_path: Path) -> None:
    """The same pixels, once labelled wrongly: the rightly labelled one stays."""
    rng = np.random.default_rng(2)
    image = draw("benign", "aster", rng)
    patches = [as_patch("a", image, "tumour", "aster", "synthetic:a:0"), as_patch("b", image, "benign", "aster", "s")]
    data = write_dataset(tmp_path / "s", patches, "s", SCHEMA, SIZE, 0.5)
    select(options(data, real, filters=["confidence", "duplicates"]), pooled())
    assert chosen(data) == {"b"}


def test_the_best_of_each_cell_and_as_many_at_random(synthetic: PatchDataset, real: PatchDataset) -> None:
    how: dict[str, Any] = {"per_cell": 5, "filters": [], "rank": "centroid"}
    selection = select(options(synthetic, real, **how, seed=3), pooled())
    index = PatchDataset.open(synthetic.folder).index
    for _, cell in index.groupby(["class", "site"]):
        best = cell[cell["selected_best"]]
        assert len(best) == cell["selected_best_control"].sum() == 5
        assert best["selected_best_score"].max() <= cell["selected_best_score"][~cell["selected_best"]].min()
    assert kinds(chosen(synthetic, "selected_best_control")).keys() > {"good"}  # random takes faults too
    diversity = selection.result.diversity
    assert diversity["chosen"].n == diversity["control"].n == 5 * len(CELLS)
    assert min(diversity["control"].pairwise or 0, diversity["control"].nearest or 0) > 0
    select(options(synthetic, real, name="again", **how, seed=4), pooled())
    assert chosen(synthetic, "selected_again") == chosen(synthetic)
    assert chosen(synthetic, "selected_again_control") != chosen(synthetic, "selected_best_control")


def test_rows_in_another_order_give_the_same_choice(real: PatchDataset, tmp_path: Path) -> None:
    patches = planted(real)
    found = []
    for name, order in (("a", patches), ("b", patches[::-1])):
        data = write_dataset(tmp_path / name, order, name, SCHEMA, SIZE, 0.5)
        select(options(data, real, per_cell=6), pooled())
        found.append((chosen(data), chosen(data, "selected_best_control")))
    assert found[0] == found[1]


def test_share_of_each_cell(synthetic: PatchDataset, real: PatchDataset) -> None:
    selection = select(options(synthetic, real, share=0.25, control=False, filters=[]), pooled())
    assert "selected_best_control" not in PatchDataset.open(synthetic.folder).index
    for counts in selection.result.cells:
        assert counts.chosen == -(-counts.asked // 4)
    assert selection.result.warnings == []


def test_nothing_is_deleted_and_a_second_run_does_nothing(
    synthetic: PatchDataset, real: PatchDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, pixels = files(synthetic.folder), synthetic.read(np.arange(len(synthetic)))
    first = select(options(synthetic, real, per_cell=5), pooled())
    reopened = PatchDataset.open(synthetic.folder)
    assert reopened.verify(images=True) == []
    assert (reopened.read(np.arange(len(reopened))) == pixels).all()
    after = files(synthetic.folder)
    assert {name for name in after if after[name] != before.get(name)} == {"dataset.json", "index.parquet"}
    assert reopened.info["selections"]["best"]["columns"]["selected_best"]["patches"] == first.result.total.chosen
    assert reopened.info["selections"]["best"]["recipe"]["encoder"]["fingerprint"] == pooled().fingerprint

    monkeypatch.setattr(module, "cached_features", lambda *_: pytest.fail("a finished selection was computed again"))
    second = select(options(synthetic, real, per_cell=5, batch=7), pooled())
    assert (first.finished, second.finished) == (False, True)
    assert replace(second, finished=False) == first
    assert files(synthetic.folder) == after
    monkeypatch.undo()

    with pytest.raises(UserError, match=r"'best'.*other settings"):
        select(options(synthetic, real, per_cell=4), pooled())
    select(options(synthetic, real, per_cell=4, replace=True), pooled())
    assert len(chosen(synthetic)) == 4 * len(CELLS)
    assert PatchDataset.open(synthetic.folder).verify() == []


def test_two_runs_give_the_same_bytes(real: PatchDataset, tmp_path: Path) -> None:
    found = []
    for name in ("a", "b"):
        data = write_dataset(tmp_path / name / "s", planted(real), "s", SCHEMA, SIZE, 0.5)
        select(options(data, real, per_cell=5, cache=str(tmp_path / name / "f")), pooled())
        found.append(files(data.folder))
    assert found[0] == found[1]


def test_a_cell_that_training_lacks_is_judged_field_by_field(synthetic: PatchDataset, real: PatchDataset) -> None:
    with pytest.raises(UserError, match=r"(?s)centroid cannot score class × site 'tumour × cedar'.*one by one"):
        select(options(synthetic, real, filters=["centroid"], centroids=[["class", "site"]]), pooled())
    assert "selected_best" not in PatchDataset.open(synthetic.folder).index
    selection = select(options(synthetic, real, filters=["centroid", "confidence", "outliers"]), pooled())
    unseen = next(counts for counts in selection.result.cells if counts.unseen)
    assert unseen.chosen >= 0.8 * GOOD
    # Patches of a cell that training lacks are farther from training patches by nature.
    thresholds = selection.result.thresholds
    assert (thresholds["outliers_unseen_cells"] or 0) > (thresholds["outliers"] or 0)


def test_noise_is_not_selected(real: PatchDataset, tmp_path: Path) -> None:
    """Bright noise, which has no gradient and no site's colour, is refused; a single good combination is not."""
    rng = np.random.default_rng(7)

    def noise(kind: str, site: str) -> np.ndarray:
        return np.clip(rng.normal(235, 30, (SIZE, SIZE, 3)), 0, 255).astype(np.uint8)

    def dataset(name: str, make: Any, cells: Sequence[tuple[str, str]], n: int) -> PatchDataset:
        patches = [
            as_patch(f"{i}-{k}-{s}", make(k, s), k, s, f"synthetic:x:{k}{s}") for k, s in cells for i in range(n)
        ]
        return write_dataset(tmp_path / name, patches, name, SCHEMA, SIZE, 0.5)

    bad = dataset("noise", noise, CELLS, 8)
    with pytest.raises(UserError, match=r"(?s)far from tissue.*KID.* times .*up to 1\.3 .*Nothing was written"):
        select(options(bad, real, filters=[]), pooled())
    assert "selections" not in PatchDataset.open(bad.folder).info
    assert select(options(bad, real, filters=[], farthest=0.0), pooled()).result.distance_ratio > 1.3
    for cell in CELLS[:2]:  # right in colour and shade, but most patches are far from every real one
        mixed = dataset(
            f"mixed-{cell[1]}",
            lambda kind, site: draw(kind, site, rng) if rng.random() < 0.3 else noise(kind, site),
            [cell],
            40,
        )
        with pytest.raises(UserError, match=r"(?s)far from tissue"):
            select(options(mixed, real, filters=["outliers"]), pooled())
    for cell in CELLS:
        good = dataset("-".join(cell), lambda kind, site: draw(kind, site, rng), [cell], 24)
        found = select(options(good, real, filters=[]), pooled()).result
        assert found.total.chosen == 24
        assert found.distance_ratio is not None


@pytest.mark.parametrize("cells", [CELLS, [("benign", "aster"), ("tumour", "aster")]])
def test_one_patient_of_each_class_is_enough_for_centroids(
    synthetic: PatchDataset, tmp_path: Path, cells: list[tuple[str, str]]
) -> None:
    few = write_real(tmp_path / "few", 2, cells)  # one of each class and site trains
    assert few.index.query("split_main == 'train'")["patient"].nunique() in (5, 2)
    how: dict[str, Any] = {"filters": ["centroid"], "rank": "centroid", "fields": ["class"], "cells": ["class"]}
    select(options(synthetic, few, **how), pooled())
    assert kinds(chosen(synthetic))["good"] >= 0.8 * GOOD * len(CELLS)
    with pytest.raises(UserError, match=r"(?s)distances between patients need 10.*Leave copies out"):
        select(options(synthetic, few, name="b", filters=["copies", "centroid"], rank="centroid"), pooled())


def test_bad_input_is_named(synthetic: PatchDataset, real: PatchDataset, tmp_path: Path) -> None:
    def refuse(match: str, **changes: Any) -> None:
        with pytest.raises(UserError, match=f"(?s){match}"):
            select(options(synthetic, real, **changes), pooled())

    refuse("needs real", real="")
    refuse("given as data.*not synthetic.*swapped", data=str(real.folder), real=str(synthetic.folder))
    refuse("given as real.*not real", real=str(synthetic.folder))
    refuse("'mian'.*'main'", split="mian")
    refuse("not from 'test'.*split_value=train", split_value="test")
    refuse("no value 'train2'|no 'train2'", split_value="train2")
    refuse("cells names 'sight'.*'site'", cells=["sight"])
    refuse("fields names 'klass'.*'class'", fields=["klass"])
    refuse("centroids names 'x'", centroids=[["x"]])
    refuse("twice", cells=["site", "site"])
    refuse("confidence is 1.5", confidence=1.5)
    refuse("per_cell is -1", per_cell=-1)
    refuse("share is 0", share=0.0)
    refuse("'best_control'", name="best_control")
    refuse("letters", name="a b")
    refuse("No patch of .* is left.*confidence 0", confidence=1.0, filters=["confidence"])
    with pytest.raises(UserError, match="no encoder 'unni'"):
        select(options(synthetic, real, encoder="unni"))
    assert "selections" not in PatchDataset.open(synthetic.folder).info

    few = write_real(tmp_path / "few", patients=2)
    refuse("5 training patients", real=str(few.folder))
    one_site = write_real(tmp_path / "one_site", 12, [(c, "aster") for c in ("benign", "tumour")])
    both = ["class", "site"]
    refuse("confidence cannot score site 'birch': 0 training patients", real=str(one_site.folder), fields=both)
    refuse(
        "centroid cannot score site 'birch'.*Leave site out",
        real=str(one_site.folder),
        filters=["centroid"],
        rank="centroid",
        fields=both,
    )
    small = write_dataset(
        tmp_path / "small", [replace(p, image=p.image[:8, :8]) for p in planted(real)][:9], "small", SCHEMA, 8, 0.5
    )
    refuse("8 px", data=str(small.folder))


def test_more_than_there_are_is_a_warning_with_counts(synthetic: PatchDataset, real: PatchDataset) -> None:
    selection = select(options(synthetic, real, per_cell=40), pooled())
    assert len(selection.result.warnings) == 1
    for word in ("6 of 6", "benign × aster: ", " of 40"):
        assert word in selection.result.warnings[0]


def test_a_probe_that_cannot_judge_is_named(synthetic: PatchDataset, real: PatchDataset) -> None:
    class Blind(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.zeros(len(x), 7)

    blind = ImageEncoder(Network("blind", Blind(), 7, Preprocessing(0, (0.5,) * 3, (0.25,) * 3), "none"))
    selection = select(options(synthetic, real, filters=[], fields=["site"], share=0.5), blind)
    assert any("probe of site" in warning for warning in selection.result.warnings)


def test_test_patients_teach_nothing(real: PatchDataset, tmp_path: Path) -> None:
    """Other pixels and labels of the test patients change nothing but the hash of the real dataset."""
    rng = np.random.default_rng(5)
    patches, parts = [], {}
    images = real.read(np.arange(len(real)))
    for (_, row), image in zip(real.index.iterrows(), images, strict=True):
        parts[row["patient"]] = row["split_main"]
        test = row["split_main"] == "test"
        pixels = rng.integers(0, 256, image.shape, dtype=np.uint8) if test else image
        patches.append(as_patch(row["key"], pixels, row["class"], row["site"], row["patient"], "real"))
    other = write_dataset(tmp_path / "other", patches, "real", SCHEMA, SIZE, 0.5, splits={"main": (parts, {})})
    found = []
    for name, teacher in (("a", real), ("b", other)):
        data = write_dataset(tmp_path / name, planted(real), "s", SCHEMA, SIZE, 0.5)
        selection = select(options(data, teacher, per_cell=5, filters=["centroid", "confidence", "copies"]), pooled())
        found.append(
            (chosen(data), PatchDataset.open(data.folder).index["selected_best_score"].tolist(), selection.result.cells)
        )
    assert found[0] == found[1]


def test_the_command_prints_one_screen(
    synthetic: PatchDataset, real: PatchDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "select",
        str(synthetic.folder),
        f"real={real.folder}",
        "per_cell=3",
        "--json",
        str(tmp_path / "out.json"),
        "workers=0",
        "encoder=demo",
        "filters=[confidence]",
        "confidence=0",
    ]
    assert cli.main(words) == 0
    text = capsys.readouterr().out
    assert "tumour × cedar (unseen)" in text
    assert "all cells" in text
    assert "diversity, control" in text
    assert max(map(len, text.splitlines()[: len(CELLS) + 2])) <= 140
    result = json.loads((tmp_path / "out.json").read_text())
    assert {"acceptance", "passed_confidence", "chosen", "control"} <= result["cells"][0].keys()
    assert (synthetic.folder.parent / "features").is_dir()
    assert cli.main(words) == 0
    assert "earlier run" in capsys.readouterr().out


# What the selection is made of.


@given(
    rows=st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0.0, 1.0, 1.5, 2.0, np.inf])), min_size=1, max_size=40),
    most=st.lists(st.integers(0, 6), min_size=4, max_size=4),
    order=st.randoms(use_true_random=False),
)
@hypothesis_settings(max_examples=200, deadline=None)
def test_best_per_cell(rows: list[tuple[int, float]], most: list[int], order: Any) -> None:
    cells, scores = np.array([r[0] for r in rows]), np.array([r[1] for r in rows])
    keys, bound = np.array([f"k{i:02d}" for i in range(len(rows))]), np.array(most)
    mask = module.best_per_combination(scores, keys, cells, bound)
    for code in range(4):
        mine = cells == code
        usable = mine & np.isfinite(scores)
        assert (mask & mine).sum() == min(most[code], usable.sum())  # never more, never fewer
        ranked = sorted(zip(scores[usable], keys[usable], strict=True))
        assert set(keys[mask & mine]) == {key for _, key in ranked[: most[code]]}  # always the best
    shuffled = list(range(len(rows)))
    order.shuffle(shuffled)
    again = module.best_per_combination(scores[shuffled], keys[shuffled], cells[shuffled], bound)
    assert set(keys[shuffled][again]) == set(keys[mask])


def test_a_class_is_found_where_training_never_saw_it(tmp_path: Path) -> None:
    """Dark patches are tumour, and all training patches of cedar are dark benign ones: without adjustment, cedar speaks
    against tumour."""
    rng = np.random.default_rng(0)
    shade = {("benign", "aster"): 150, ("tumour", "aster"): 130, ("benign", "cedar"): 230, ("tumour", "cedar"): 210}
    shade |= {("benign", "birch"): 170, ("tumour", "birch"): 150}

    def flat(kind: str, site: str) -> np.ndarray:
        value = shade[kind, site] + rng.normal(0, 4)
        return np.clip(value + rng.normal(0, 4, (SIZE, SIZE, 3)), 0, 255).astype(np.uint8)

    patches, parts = [], {}
    for cell in sorted(shade):
        for number in range(8):
            who = "-".join(cell) + f"-{number}"
            parts[who] = "test" if cell == UNSEEN else "train"
            patches += [as_patch(f"{who}-{i}", flat(*cell), *cell, who, "real") for i in range(3)]
    teacher = write_dataset(tmp_path / "real", patches, "real", SCHEMA, SIZE, 0.5, splits={"main": (parts, {})})
    made = [as_patch(f"right-{i}", flat(*UNSEEN), *UNSEEN, "s") for i in range(15)]
    made += [as_patch(f"wrong-{i}", flat("benign", "cedar"), *UNSEEN, "s") for i in range(15)]
    data = write_dataset(tmp_path / "synthetic", made, "s", SCHEMA, SIZE, 0.5)
    right = {}
    for adjust in (True, False):
        how: dict[str, Any] = {
            "name": f"a{adjust:d}",
            "adjust": adjust,
            "filters": ["confidence"],
            "fields": ["class"],
        }
        try:
            select(options(data, teacher, **how), pooled())
            right[adjust] = kinds(chosen(data, f"selected_a{adjust:d}"))
        except UserError:
            right[adjust] = {}
    assert right[True].get("right", 0) >= 13
    assert right[True].get("wrong", 0) <= 2
    assert right[False].get("right", 0) <= 5


def test_centroids_of_patients_that_weigh_the_same() -> None:
    labels = np.array(["a", "a", "a", "a", "b"])
    patients = np.array(["p", "p", "p", "q", "p"])
    features = np.array([[1.0, 0], [1, 0], [1, 0], [0, 1], [0.5, 0.5]], np.float32)
    names, centroids = class_centroids(features, labels, patients)
    assert names == ["a", "b"]
    assert centroids == pytest.approx(np.array([[0.5, 0.5], [0.5, 0.5]]))
