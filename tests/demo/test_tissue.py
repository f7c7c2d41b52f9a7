"""Procedural tissue: what is drawn is what the parameters say, and the frozen networks see shape."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from latent_medi.demo.cohort import CLASSES, HELD_OUT, SITES, is_held_out, patches, patients
from latent_medi.demo.settings import CohortSettings
from latent_medi.demo.tissue import Shape, Stain, random_shape, random_stain, render


def test_same_seed_same_pixels() -> None:
    first, second = (
        render(random_shape(r), random_stain(r), r) for r in (np.random.default_rng(3), np.random.default_rng(3))
    )
    assert first.dtype == np.uint8
    assert first.shape == (64, 64, 3)
    assert np.array_equal(first, second)


def test_pixels_follow_beer_lambert() -> None:
    """Doubling both dyes' strength doubles the optical density where nothing clips."""
    stain = Stain(blur=0.0, haematoxylin_strength=0.5, eosin_strength=0.3)
    double = replace(stain, haematoxylin_strength=1.0, eosin_strength=0.6)
    thin, thick = (render(Shape(), s, np.random.default_rng(0)).astype(float) / 255 for s in (stain, double))
    density = [-np.log(image / np.array(stain.background)).mean() for image in (thin, thick)]
    assert density[1] / density[0] == pytest.approx(2.0, rel=0.03)


def test_glands_have_bright_lumina_and_blur_softens() -> None:
    rng = np.random.default_rng
    plain = render(Shape(), Stain(), rng(1))
    glands = render(Shape(gland_radius=9), Stain(), rng(1))
    assert (glands.min(2) > 220).mean() > (plain.min(2) > 220).mean() + 0.05
    sharp, soft = render(Shape(), Stain(blur=0.2), rng(2)), render(Shape(), Stain(blur=1.3), rng(2))
    steepest = [np.quantile(np.abs(np.diff(image.astype(int), axis=0)), 0.99) for image in (soft, sharp)]
    assert steepest[0] < 0.6 * steepest[1]


def test_cohort_is_skewed_disjoint_and_holds_out_what_it_says() -> None:
    settings = CohortSettings()
    cohort = patients(settings)
    assert len({p.name for p in cohort}) == len(cohort)
    counts: dict[tuple[str, str], int] = {}
    for p in cohort:
        counts[p.tumour, p.site] = counts.get((p.tumour, p.site), 0) + 1
        if p.split == "train":
            assert not is_held_out({"class": p.tumour, "site": p.site, "fixation": p.fixation})
    assert set(counts) == {(c, s) for c in CLASSES for s in SITES}
    assert min(counts.values()) >= 40
    train = [p for p in cohort if p.split == "train"]
    sizes = [sum(p.tumour == c and p.site == s for p in train) for c in CLASSES for s in SITES]
    assert max(sizes) >= 2 * min(s for s in sizes if s)
    for split in ("probe", "test"):
        for combination in HELD_OUT:
            match = {"class": "tumour", "site": "site", "fixation": "fixation"}
            found = [
                p for p in cohort if p.split == split and all(getattr(p, match[k]) == v for k, v in combination.items())
            ]
            assert len(found) >= 10
    ages = [p.age for p in cohort]
    assert 0.08 < sum(a is None for a in ages) / len(ages) < 0.25


def test_shape_does_not_depend_on_site() -> None:
    """The same patient drawn at another hospital differs in stain alone: the ground truth that makes combinations
    possible.
    """
    settings = CohortSettings()
    cohort = [p for p in patients(settings) if p.split == "test" and p.tumour == "solid"]
    by_site = {s: np.mean([p.shape.nucleus_aspect for p in cohort if p.site == s]) for s in SITES}
    assert max(by_site.values()) - min(by_site.values()) < 0.25
    first = next(patches(cohort[0], settings))
    again = next(patches(cohort[0], settings))
    assert np.array_equal(first.image, again.image)
