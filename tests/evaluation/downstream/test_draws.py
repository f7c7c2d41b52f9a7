"""Repeats draw other samples, also the candidate's; training seeds take turns; what is not known gives no interval."""

from __future__ import annotations

import shutil
import zlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from evaluation_world import World

from latent_medi.core.errors import UserError
from latent_medi.evaluation.cohort.combinations import describe, matches
from latent_medi.evaluation.cohort.open_study import open_study
from latent_medi.evaluation.cohort.study import Study, SyntheticSet, held_out_with_class
from latent_medi.evaluation.downstream import baselines
from latent_medi.evaluation.downstream.classifiers import Prediction
from latent_medi.evaluation.downstream.compare import compare
from latent_medi.evaluation.downstream.records import ClassifierRecord, Downstream
from latent_medi.evaluation.downstream.registry import plan_additions
from latent_medi.evaluation.downstream.training_sets import Sources, TrainingSet, synthetic_alone, with_synthetic
from latent_medi.statistics.differences import DRAWS_UNKNOWN
from latent_medi.statistics.intervals import NOT_ESTIMABLE

SETS = ["real", "stain_transfer", "medi", "cls"]


class Chance:
    """A classifier that is right by chance, and keeps the features that were added to the real ones.

    Args:
        study: The cohort.
    """

    random = False
    record = ClassifierRecord("linear")

    def __init__(self, study: Study) -> None:
        self.classes, self.truth = study.classes, study.class_labels[study.test]
        self.n_real = len(study.train)
        self.added: list[np.ndarray] = []

    def fit_predict(self, training_set: TrainingSet, seed: int) -> Prediction:
        added = training_set.features[self.n_real :]
        self.added.append(added[:, 0])
        rng = np.random.default_rng(zlib.crc32(added.tobytes()))
        codes = np.array([self.classes.index(value) for value in self.truth])
        wrong = rng.random(len(codes)) < 0.3
        probabilities = np.eye(len(self.classes))[(codes + wrong) % len(self.classes)]
        return Prediction(np.array(self.classes)[probabilities.argmax(axis=1)], probabilities, True)


def sources_of(study: Study, per_combination: int = 0) -> Sources:
    """Sources whose feature says where each patch is from: real ones are numbered from 0, synthetic ones from 10,000,
    those of further seeds from 20,000 and so on, derived ones are negative.
    """
    additions = plan_additions(study, per_combination, 0, 0.2)
    derived = additions.derived_features(lambda images: -1.0 - np.arange(len(images), dtype=float)[:, None])
    real = np.arange(len(study.index), dtype=float)[:, None]

    def numbers(rows: int, start: int) -> np.ndarray:
        return start + np.arange(rows, dtype=float)[:, None]

    synthetic = {name: numbers(len(s.rows), 10_000) for name, s in study.synthetic.items()}
    further = {
        name: [numbers(len(s.rows), 10_000 * (i + 2)) for i, s in enumerate(sets)]
        for name, sets in study.further_seeds.items()
    }
    sites = baselines.nearest_sites(study, additions.combinations, real)
    return Sources(study, additions, real, synthetic, derived, sites, further)


def compared(sources: Sources, repeats: int, only: Sequence[str] = SETS) -> tuple[Downstream, Chance]:
    classifier = Chance(sources.study)
    return compare(sources, classifier, "f", repeats, 0, only)[0], classifier


def test_every_repeat_of_a_generator_adds_another_half_of_its_samples(world: World) -> None:
    sources = sources_of(open_study(world.settings("halves")))
    record, classifier = compared(sources, 4, ["real", "medi"])
    assert record.training_sets["real"].repeats == 1
    medi = record.training_sets["medi"]
    assert medi.repeats == 4
    assert medi.training_seeds == 1
    assert len(set(medi.by_repeat)) > 1
    drawn = [added for added in classifier.added if len(added)]
    for n in (len(added) for added in drawn):
        assert n == sum(sources.additions.counts)
    assert len({tuple(sorted(added)) for added in drawn}) == 4
    for combination, n in zip(sources.additions.combinations, sources.additions.counts, strict=True):
        samples = sources.study.synthetic["medi"].index
        pool = np.logical_and.reduce([samples[k] == v for k, v in combination.items()]).sum()
        assert 2 * n <= pool


def test_differences_say_what_they_rest_on(world: World) -> None:
    record, _ = compared(sources_of(open_study(world.settings("rests"))), 4)
    found = record.differences["medi"]["stain_transfer"].accuracy_shift
    assert isinstance(found.interval, tuple)
    assert isinstance(found.likely, tuple)
    assert found.interval[0] < found.likely[0] < (found.value or 0.0) < found.likely[1] < found.interval[1]
    assert found.error_patients is not None
    assert found.error_draws is not None
    assert found.over == "trained models"
    # The interval of an accuracy is wider by its draws too: that of the real patches alone has none.
    assert record.training_sets["real"].accuracy_shift.interval is not None
    assert record.training_sets["stain_transfer"].folds.keys() == {"reinhard", "macenko"}
    assert sum(record.training_sets["stain_transfer"].folds.values()) == 5


@pytest.mark.parametrize(("per_combination", "repeats"), [(200, 4), (0, 1)])
def test_unknown_draws_give_no_interval(world: World, per_combination: int, repeats: int) -> None:
    record, _ = compared(sources_of(open_study(world.settings("whole")), per_combination), repeats)
    result = record.training_sets["medi"].accuracy_shift
    assert result.value is not None
    for found in (result, record.differences["medi"]["real"].accuracy_shift):
        assert found.interval == NOT_ESTIMABLE
        assert found.reason is not None
        assert "the noise of the samples drawn is unknown" in found.reason
        assert (found.reason == DRAWS_UNKNOWN) == (per_combination > 0)
    assert isinstance(record.training_sets["real"].accuracy_shift.interval, tuple)


def test_training_seeds_take_turns_and_three_speak_of_the_method(world: World) -> None:
    folders = [str(shutil.copytree(world.medi, world.root / f"medi-{i}", dirs_exist_ok=True)) for i in (1, 2)]
    study = open_study(world.settings("seeds", further_seeds={"medi": folders}))
    record, classifier = compared(sources_of(study), 4, ["real", "medi", "cls"])
    medi = record.training_sets["medi"]
    assert (medi.repeats, medi.training_seeds) == (6, 3)  # every seed equally often
    origins = [{int(x) // 10_000 for x in added} for added in classifier.added if len(added)]
    assert origins[:6] == [{1}, {2}, {3}] * 2
    assert record.training_sets["cls"].repeats == 4
    assert record.differences["medi"]["real"].accuracy_shift.over == "method"
    assert record.differences["cls"]["real"].accuracy_shift.over == "trained models"
    assert record.differences["medi"]["cls"].accuracy_shift.over == "trained models"  # cls has one seed
    two = replace(study, further_seeds={"medi": study.further_seeds["medi"][:1]})
    again, _ = compared(sources_of(two), 4, ["real", "medi"])
    assert again.training_sets["medi"].training_seeds == 2
    assert again.differences["medi"]["real"].accuracy_shift.over == "trained models"


def test_further_seeds_that_are_none_are_refused(world: World) -> None:
    with pytest.raises(UserError, match="further_seeds names 'meddi'"):
        open_study(world.settings("wrong", further_seeds={"meddi": [str(world.cls)]}))
    with pytest.raises(UserError, match="names a folder of medi twice"):
        open_study(world.settings("wrong", further_seeds={"medi": [str(world.medi)]}))
    with pytest.raises(UserError, match="has the fields class, medi itself"):
        open_study(world.settings("wrong", further_seeds={"medi": [str(world.cls)]}))


def kept(samples: SyntheticSet, rows: np.ndarray) -> SyntheticSet:
    """Some of a set's samples, at these positions of its index."""
    return replace(samples, rows=samples.rows[rows])


def test_every_training_seed_has_samples_of_each_combination(world: World) -> None:
    folder = shutil.copytree(world.medi, world.root / "medi-lacking", dirs_exist_ok=True)
    study = open_study(world.settings("lacking-seed", further_seeds={"medi": [str(folder)]}))
    (further,) = study.further_seeds["medi"]
    combination = held_out_with_class(study)[-1]
    without = kept(further, np.flatnonzero(~matches(further.index, combination)))
    record, _ = compared(sources_of(replace(study, further_seeds={"medi": [without]})), 2, [])
    reason = f"in {folder}: it has no sample for {describe(combination)}"
    for name in ("medi", "synthetic_only_medi", "pretrain_finetune_medi"):
        assert record.unavailable[name] == reason
    assert "cls" in record.training_sets


def test_the_smallest_pool_of_all_training_seeds_counts(world: World) -> None:
    """The first seed has twice what is added, the second no more than that."""
    folder = shutil.copytree(world.medi, world.root / "medi-small", dirs_exist_ok=True)
    study = open_study(world.settings("small-seed", further_seeds={"medi": [str(folder)]}))
    (further,) = study.further_seeds["medi"]
    n = min(int(matches(study.synthetic["medi"].index, c).sum()) for c in held_out_with_class(study)) // 2
    combination = held_out_with_class(study)[0]
    rest = matches(further.index, combination)
    few = np.sort(np.concatenate([np.flatnonzero(~rest), np.flatnonzero(rest)[:n]]))
    for sets, known in (([further], True), ([kept(further, few)], False)):
        record, _ = compared(sources_of(replace(study, further_seeds={"medi": sets}), n), 4, ["real", "medi"])
        found = record.training_sets["medi"].accuracy_shift
        assert (found.reason == DRAWS_UNKNOWN) is not known
        assert isinstance(found.interval, tuple) is known


def test_what_is_taken_from_one_pool_is_summed(world: World) -> None:
    """Samples of a class serve the cells of all sites and the combinations, each once."""
    study = open_study(world.settings("one-pool"))
    sources = sources_of(study)
    samples = study.synthetic["cls"]
    classes, counts = np.unique(sources.labels, return_counts=True)
    pool = {value: int((samples.index["class"] == value).sum()) for value in classes}
    added = dict.fromkeys(classes, 0)
    for combination, n in zip(sources.additions.combinations, sources.additions.counts, strict=True):
        added[combination["class"]] += n
    # As many rows as a third of the pool, of several sites.
    rng = np.random.default_rng(0)
    train = np.concatenate(
        [
            rng.permutation(study.train[sources.labels == value])[: min(n, pool[value] // 3)]
            for value, n in zip(classes, counts, strict=True)
        ]
    )
    small = replace(sources, study=replace(study, train=np.sort(train)))
    small.additions.counts[:] = [max(1, n // 4) for n in small.additions.counts]
    found = synthetic_alone(small, "cls", 0)
    taken = {value: int((found.labels == value).sum()) for value in classes}
    assert max(taken[v] / pool[v] for v in classes) < 0.8
    assert found.pool == pytest.approx(max(taken[v] / (pool[v] - taken[v]) for v in classes))
    assert len(np.unique(found.features)) == len(found.features)  # nothing is drawn twice


def test_features_keep_their_precision(world: World) -> None:
    """Twice the memory would be taken for nothing."""
    sources = sources_of(open_study(world.settings("precision")))
    small = replace(
        sources,
        real=sources.real.astype(np.float32),
        synthetic={name: x.astype(np.float32) for name, x in sources.synthetic.items()},
    )
    for build in (with_synthetic, synthetic_alone):
        assert build(small, "medi", 0).features.dtype == np.float32
        np.testing.assert_array_equal(build(small, "medi", 0).features, build(sources, "medi", 0).features)
