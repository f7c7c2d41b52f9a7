"""Comparison of image classifiers that are trained on real patches alone and on real and synthetic ones.

    latent-medi compare-classifiers --config histodiffusion/vit data=data/crc split=few selection=best \
        synthetic.guided=synthetic/guided out=runs/classifiers

Each training is a run of its own in ``out``, which a repeated command continues or keeps; trainings that a changed
setting does not concern are kept as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from accelerate import Accelerator

from latent_medi.core.errors import UserError
from latent_medi.core.files import remove, write_sealed
from latent_medi.core.locks import output_lock
from latent_medi.core.progress import get_logger
from latent_medi.core.records import encode
from latent_medi.features.classifier_folder import read_facts
from latent_medi.image_classifier.comparison import (
    METRICS,
    RESULT_FILE,
    TABLE_FILE,
    Choice,
    ClassifierComparison,
    ComparedClassifiers,
    TestScores,
    comparison_table,
)
from latent_medi.image_classifier.settings import REAL, CompareClassifiersSettings, ImageClassifierSettings
from latent_medi.image_classifier.train import PREDICTIONS_FILE, PRODUCT, train_image_classifier
from latent_medi.metadata.tables import write_table
from latent_medi.statistics.left_out import Score
from latent_medi.statistics.seeds import MeanOverSeeds
from latent_medi.training.start import training_accelerator

logger = get_logger("training")


@dataclass(frozen=True)
class Kind:
    """One kind of training.

    Args:
        training_set: "real", or the synthetic set that is added.
        choice: Which of its patches.
        percent: How many, per 100 real ones of the same class.
    """

    training_set: str
    choice: Choice = "none"
    percent: float = 0.0

    def folder(self, seed: int) -> str:
        """Folder of its run with a seed, within the comparison's."""
        own = "" if self.training_set == REAL else f"{self.choice}-{self.percent:g}-"
        return f"{self.training_set}/{own}seed{seed}"


def kinds_of(settings: CompareClassifiersSettings) -> Iterator[Kind]:
    """The kinds of training, real patches alone first."""
    yield Kind(REAL)
    for name in settings.synthetic:
        for choice in settings.choices:
            for percent in settings.percents:
                yield Kind(name, choice, percent)


def training_of(settings: CompareClassifiersSettings, kind: Kind, seed: int) -> ImageClassifierSettings:
    """Settings of one training."""
    names = {field.name for field in fields(ImageClassifierSettings)}
    common = ImageClassifierSettings(**{name: value for name, value in vars(settings).items() if name in names})
    own = replace(common, seed=seed, out=str(Path(settings.out) / kind.folder(seed)))
    if kind.training_set == REAL:
        return replace(own, synthetic={}, selection="", percent=0.0, choice="random")
    added = {kind.training_set: settings.synthetic[kind.training_set]}
    return replace(own, synthetic=added, percent=kind.percent, choice=kind.choice)  # type: ignore[arg-type]


def compare_classifiers(
    settings: CompareClassifiersSettings, accelerator: Accelerator | None = None
) -> ClassifierComparison:
    """Train what is not trained yet, and compare the trainings on the test patches.

    Args:
        settings: What to do. All trainings see as many images.
        accelerator: Devices and precision; by default made from the settings and the launcher's environment.

    Returns:
        The comparison, as in ``out/classifiers.json``; ``out/classifiers.csv`` has it as a table.

    Raises:
        UserError: As :func:`train_image_classifier`.
        Preempted: SIGTERM or SIGUSR1 came; the same command continues.
    """
    settings.check()
    accelerator = accelerator or training_accelerator(settings.training())
    out = Path(settings.out)
    scale = accelerator.scaler.state_dict() if accelerator.scaler else {}
    with output_lock(out, accelerator):
        kinds, seeds = list(kinds_of(settings)), range(settings.seed, settings.seed + settings.seeds)
        for number, (kind, seed) in enumerate(((kind, seed) for kind in kinds for seed in seeds), 1):
            logger.info("classifier %d of %d: %s", number, len(kinds) * len(seeds), kind.folder(seed))
            run = training_of(settings, kind, seed)
            if scale:  # fp16: not where the training before, if it was made in this process, left the loss's scale
                accelerator.scaler.load_state_dict(scale)
            _train(Path(run.out), run, accelerator)
        found = compared(settings, kinds, seeds)
        if accelerator.is_main_process:
            write_table(comparison_table(found), out / TABLE_FILE)
            write_sealed(out / RESULT_FILE, encode(found))
        accelerator.wait_for_everyone()
    return found


def _train(folder: Path, run: ImageClassifierSettings, accelerator: Accelerator) -> None:
    """Train one classifier, and free the space of its checkpoints, which are several times as large."""
    if accelerator.is_main_process and not (folder / PREDICTIONS_FILE).is_file():
        remove(folder / PRODUCT)  # it is scored again
    accelerator.wait_for_everyone()
    train_image_classifier(run, accelerator)
    accelerator.free_memory()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        remove(folder / "checkpoints")


def compared(settings: CompareClassifiersSettings, kinds: list[Kind], seeds: range) -> ClassifierComparison:
    """The comparison of finished trainings, from their predictions of the test patches."""
    out = Path(settings.out)
    facts = read_facts(out / kinds[0].folder(seeds[0]) / PRODUCT)
    labels = list(facts.labels)
    first = _predictions(out / kinds[0].folder(seeds[0]))
    test = TestScores(_codes(first["truth"], labels), first["patient"].to_numpy(str), len(labels))
    scores: dict[Kind, dict[str, list[Score]]] = {}
    rows: list[tuple[Kind, Any, Kind | None]] = []
    for kind in kinds:
        found = []
        for seed in seeds:
            table = _predictions(out / kind.folder(seed))
            if not table[["key", "truth"]].equals(first[["key", "truth"]]):
                raise UserError(
                    f"{out / kind.folder(seed)} was scored on other test patches.", "Remove it and repeat the command."
                )
            found.append(_codes(table["predicted"], labels))
        scores[kind] = test.of(found)
        information = read_facts(out / kind.folder(seeds[0]) / PRODUCT).provenance
        random = Kind(kind.training_set, "random", kind.percent)
        against_random = kind.choice == "selected" and random in kinds
        rows.append((kind, information, random if against_random else None))
    added = sum(kind.training_set != REAL for kind in kinds)
    made = [
        ComparedClassifiers(
            kind.training_set,
            kind.choice,
            kind.percent,
            int(information["training_patches"]),
            sum(information["synthetic_patches"].values()),
            **{name: MeanOverSeeds.of([score.value for score in scores[kind][name]]) for name in METRICS},
            minus_real=None if kind.training_set == REAL else test.differences(scores[kind], scores[kinds[0]], added),
            minus_random=test.differences(scores[kind], scores[random]) if random else None,
        )
        for kind, information, random in rows
    ]
    images = settings.training().total_images
    unit = facts.patient_is
    counts = len(seeds), len(first), test.n_patients
    return ClassifierComparison(settings.network, facts.field, labels, images, *counts, unit, made)


def _predictions(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / PREDICTIONS_FILE, dtype=str, keep_default_na=False)


def _codes(values: pd.Series, labels: list[str]) -> np.ndarray:
    return np.array([labels.index(value) for value in values], np.int64)
