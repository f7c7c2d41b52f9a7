"""How often an evaluation raises a false alarm on real patients, and how surely it finds what was planted.

Procedural tissue, 40 patients a side with five patches each: patches of a patient are alike, so an evaluation that took
patches for independent would raise alarms all the time.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import pytest
from joblib import Parallel, delayed
from PIL import Image

from latent_medi.demo.cohort import Patient, patches, patients
from latent_medi.demo.settings import CohortSettings
from latent_medi.evaluation.fidelity.memorisation import CopyFinder
from latent_medi.evaluation.fidelity.real_split_range import Patches, compare_with_splits, real_splits
from latent_medi.features.encoders import ImageEncoder, load_encoder
from latent_medi.features.pixel_copies import small_patches
from latent_medi.features.stain import fit_stain, transfer
from latent_medi.statistics.linear_probe import LinearProbe, fit_linear_probe

COHORT = CohortSettings(seed=11, probe_patients=20, test_patients=60)
SIDE = 40
EACH = COHORT.patches_per_patient
pytestmark = pytest.mark.slow


@dataclass
class Pool:
    """720 patients with five patches each, in this order, and a probe that knows none of them."""

    encoder: ImageEncoder
    images: np.ndarray
    features: np.ndarray
    patient: np.ndarray
    tumour: np.ndarray
    site: np.ndarray
    probe: LinearProbe

    def seen(self, features: np.ndarray) -> np.ndarray:
        """The class that the probe sees."""
        return self.probe.predict(features)

    @property
    def cell(self) -> np.ndarray:
        """Class and hospital of each patch."""
        return np.char.add(np.char.add(self.tumour, " × "), self.site)

    def rows(self, chosen: np.ndarray) -> np.ndarray:
        """Rows of some patients."""
        return (chosen[:, None] * EACH + np.arange(EACH)).reshape(-1)


@pytest.fixture(scope="module")
def pool() -> Pool:
    people = [p for p in patients(COHORT) if p.split == "test"]
    teachers = [p for p in patients(COHORT) if p.split == "probe"]

    def of(patient: Patient) -> list[np.ndarray]:
        return [patch.image for patch in patches(patient, COHORT)]

    drawn = Parallel(n_jobs=2, batch_size=16)(delayed(of)(p) for p in people + teachers)
    images = np.stack([image for images in drawn for image in images])
    encoder = load_encoder("demo")
    features, n = embed(encoder, images), len(people) * EACH
    probe = fit_linear_probe(features[n:], np.repeat([p.tumour for p in teachers], EACH))
    named = {key: np.repeat([getattr(p, key) for p in people], EACH) for key in ("name", "tumour", "site")}
    return Pool(encoder, images[:n], features[:n], named["name"], named["tumour"], named["site"], probe)


def embed(encoder: ImageEncoder, images: np.ndarray) -> np.ndarray:
    return encoder.features(images[i : i + 128] for i in range(0, len(images), 128)).astype(np.float64)


@dataclass
class Trial:
    """Three times 40 patients, three or four of each class and hospital: the reference, who plays the generator, and
    other real ones."""

    reference: np.ndarray
    sample: np.ndarray
    other: np.ndarray


def trial(pool: Pool, number: int) -> Trial:
    rng = np.random.default_rng([5, number])
    sides: list[list[np.ndarray]] = [[], [], []]
    for number, cell in enumerate(np.unique(pool.cell)):
        count = 4 if number % 3 == 0 else 3
        drawn = rng.permutation(np.flatnonzero(pool.cell[::EACH] == cell))
        for i, side in enumerate(sides):
            side.append(drawn[i * count : (i + 1) * count])
    assert len(np.concatenate(sides[0])) == SIDE
    return Trial(*(pool.rows(np.concatenate(side)) for side in sides))


def alarms(pool: Pool, t: Trial, sample: np.ndarray, number: int) -> dict[str, bool]:
    """Which measures call the sample worse than real patients."""
    real = np.concatenate([t.reference, t.other])
    splits = real_splits(pool.patient[real], pool.cell[real], 0.5, 100, number)
    reference, both = (
        Patches(pool.features[r], pool.tumour[r], pool.seen(pool.features[r])) for r in (t.reference, real)
    )
    record = compare_with_splits(reference, Patches(sample, None, pool.seen(sample)), both, splits)
    return {name: entry.worse for name, entry in record.items()}


def test_real_patients_raise_few_alarms(pool: Pool) -> None:
    """At most 15 in 200 trials for any measure, at an interval of 95 %."""
    found: dict[str, int] = {}
    for number in range(200):
        t = trial(pool, number)
        for name, alarm in alarms(pool, t, pool.features[t.sample], number).items():
            found[name] = found.get(name, 0) + alarm
    print(found)
    assert set(found) == {"fd", "kid", "precision", "recall", "density", "coverage", "coverage_lowest", "class_mix"}
    assert max(found.values()) <= 15, found


def test_a_stain_shift_is_found(pool: Pool) -> None:
    """A third of the way from one hospital's stain to another's, in every patch."""
    aster, birch = (fit_stain(pool.images[pool.site == site][::7]) for site in ("aster", "birch"))
    found = 0
    for number in range(50):
        t = trial(pool, number)
        images = pool.images[t.sample]
        mapped = transfer(images, aster, birch, "macenko").astype(float)
        shifted = np.rint((2 * images + mapped) / 3).astype(np.uint8)
        result = alarms(pool, t, embed(pool.encoder, shifted), number)
        found += result["fd"] or result["kid"]
    print(found)
    assert found >= 45


def test_a_dropped_mode_is_found(pool: Pool) -> None:
    """One class of three is never drawn; its patients' place is taken by others."""
    found = 0
    for number in range(50):
        t = trial(pool, number)
        rng = np.random.default_rng([6, number])
        used = np.unique(np.concatenate([t.reference, t.other]) // EACH)
        free = np.setdiff1d(np.flatnonzero(pool.tumour[::EACH] != "spindle"), used)
        site = pool.site[::EACH][free]
        sample = pool.rows(np.concatenate([rng.permutation(free[site == s])[: SIDE // 4] for s in np.unique(site)]))
        result = alarms(pool, t, pool.features[sample], number)
        found += result["class_mix"]
    print(found)
    assert found >= 45


def encoded_again(image: np.ndarray) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=75)
    return np.asarray(Image.open(file))


def shifted(image: np.ndarray) -> np.ndarray:
    """Four pixels down and to the left; what comes in at the edges is mirrored tissue."""
    return np.pad(image, ((4, 0), (0, 4), (0, 0)), mode="reflect")[:-4, 4:]


def test_planted_copies_are_found_and_listed(pool: Pool) -> None:
    """One in twenty is a training patch, encoded again, mirrored, turned or shifted."""
    ways = (encoded_again, lambda image: image[:, ::-1], np.rot90, shifted)
    small = small_patches(pool.images)
    trials, listed, planted, flagged, held_out, wrongly = 0, 0, 0, 0, 0, 0
    for number in range(50):
        rng = np.random.default_rng([7, number])
        train, probe, test, made = (pool.rows(part) for part in np.split(rng.permutation(720)[: 4 * SIDE], 4))
        finder = CopyFinder(small[train], small[probe])
        sample = small[made].copy()
        places = rng.permutation(len(made))[: len(made) // 20]
        originals = rng.permutation(len(train))[: len(places)]
        copies = np.stack([ways[i % 4](pool.images[train[o]]) for i, o in enumerate(originals)])
        sample[places] = small_patches(copies)
        score, partner, _ = finder.likeness(sample)
        found = np.flatnonzero(score > finder.threshold)
        right = [
            place in found and partner[place] == original for place, original in zip(places, originals, strict=True)
        ]
        trials += len(found) > 0.01 * len(made)
        listed, planted = listed + sum(right), planted + len(places)
        wrongly += len(set(found) - set(places))
        flagged += int((finder.likeness(small[test])[0] > finder.threshold).sum())
        held_out += len(test)
    print(trials, listed, planted, wrongly, flagged, held_out)
    assert trials >= 45
    assert listed >= 0.9 * planted
    assert flagged <= 0.01 * held_out
    assert wrongly <= 0.01 * 50 * SIDE * EACH
