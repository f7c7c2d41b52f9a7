"""The downstream stage of an evaluation: the classifier and the protocols that the settings ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from latent_medi.core.errors import UserError, nearest
from latent_medi.core.progress import get_logger
from latent_medi.evaluation.cohort.study import Study
from latent_medi.evaluation.downstream.classifiers import Learner, probe_learner
from latent_medi.evaluation.downstream.cnn import CnnLearner, PatchPools, check_network, lesson_count
from latent_medi.evaluation.downstream.compare import compare
from latent_medi.evaluation.downstream.published_protocols import (
    PROTOCOLS,
    check_protocol,
    histodiffusion_protocol,
    medi_protocol,
)
from latent_medi.evaluation.downstream.training_sets import Drawer, Plan, arm_variants, make_plan
from latent_medi.evaluation.fidelity.distance_to_real import Features
from latent_medi.evaluation.settings import EvaluateSettings
from latent_medi.features.encoders import ImageEncoder

log = get_logger(__name__)

CLASSIFIERS = ("probe", "cnn")
Made = dict[str, list[np.ndarray | None]]


class DownstreamStage:
    """Compares classifiers and keeps the predictions.

    Args:
        study: The cohort.
        settings: What is asked for.

    Attributes:
        tables: Predictions of each encoder so far, a row per test patch.
    """

    def __init__(self, study: Study, settings: EvaluateSettings) -> None:
        self.study, self.settings = study, settings
        self.tables: list[pd.DataFrame] = []
        self.plan: Plan | None = None
        if settings.downstream:
            self.plan = make_plan(study, settings.added_per_cell, settings.seed, settings.stain_jitter)
        self.pools = PatchPools(study, self.plan) if settings.classifier == "cnn" else None
        self._trained: set[str] = set()

    def embed(self, encoder: ImageEncoder) -> Made:
        """Features of the patches that rivals made of real ones."""
        size = self.settings.batch

        def features(images: np.ndarray) -> np.ndarray:
            return encoder.features([images[i : i + size] for i in range(0, len(images), size)])

        return self.plan.made(features) if self.plan else {}

    def judge(self, encoder: ImageEncoder, features: Features, made: Made, metrics: dict[str, Any]) -> None:
        """Write the encoder's entries of ``downstream`` and ``protocols`` into metrics.json's content.

        A torchvision network looks at pixels, so it is trained once per colour channel, under the first encoder.
        """
        settings, study = self.settings, self.study
        key = encoder.name if settings.cnn.network == "encoder" else encoder.preprocessing.channel
        if self.pools is not None and key in self._trained:
            log.info("%s: the same network as before, not trained again", encoder.name)
            return
        self._trained.add(key)
        drawer = Drawer(study, self.plan, features.real, features.synthetic, made) if self.plan else None
        learner: Learner
        if self.pools is None:
            learner = probe_learner(study, features.real, settings.regularisation, settings.seed)
        else:
            if self.plan and drawer:
                drawer = self.pools.drawer(study, self.plan, drawer.nearest)
            lessons = lesson_count(drawer, settings.downstream_arms, settings.cnn.seeds) if drawer else 0
            learner = CnnLearner(study, self.pools, encoder, settings.cnn, lessons)
        if drawer:
            repeats = settings.cnn.seeds if learner.random else settings.repeats
            record, table = compare(
                study, drawer, learner, repeats, settings.resamples, settings.seed, settings.downstream_arms
            )
            metrics["downstream"][encoder.name] = {"fingerprint": encoder.fingerprint} | record
            table.insert(0, "encoder", encoder.name)
            self.tables.append(table)
        if settings.downstream_protocol != "default":
            entry = metrics.setdefault("protocols", {}).setdefault(settings.downstream_protocol, {})
            entry[encoder.name] = {"fingerprint": encoder.fingerprint} | self._protocol(features, learner)

    def _protocol(self, features: Features, learner: Learner) -> dict[str, Any]:
        if self.settings.downstream_protocol == "medi":
            return medi_protocol(self.study, features.real, features.synthetic, self.settings.medi_protocol)
        real: np.ndarray = features.real
        arms: Mapping[str, np.ndarray] = features.synthetic
        if self.pools is not None:
            real, arms = self.pools.real, self.pools.arms
        return histodiffusion_protocol(self.study, real, arms, self.settings.histodiffusion_protocol, learner)


def check_downstream(settings: EvaluateSettings) -> None:
    """Refuse settings of the comparison that cannot be followed.

    Raises:
        UserError: Names the value and what it may be.
    """

    def one_of(name: str, known: Sequence[str]) -> None:
        value = getattr(settings, name)
        if value not in known:
            raise UserError(f"{name} is {value!r}; {nearest(value, known)}.", f"Choose one of {', '.join(known)}.")

    one_of("classifier", CLASSIFIERS)
    one_of("downstream_protocol", PROTOCOLS)
    if settings.regularisation < 0:
        raise UserError(f"regularisation is {settings.regularisation}.", "Give C > 0, or 0 to have it chosen.")
    if settings.repeats < 1:
        raise UserError(f"repeats is {settings.repeats}.", "Give 1 or more.")
    if not 0 <= settings.stain_jitter < 1:
        raise UserError(f"stain_jitter is {settings.stain_jitter}.", "Give 0 to below 1.")
    arms = arm_variants(settings.synthetic)
    for name in settings.downstream_arms:
        if name not in arms:
            raise UserError(f"There is no downstream arm {name!r}; {nearest(name, arms)}.")
    if settings.classifier == "cnn":
        check_network(settings.cnn)
    check_protocol(settings)
    if settings.downstream_protocol == "histodiffusion" and settings.selected:
        raise UserError(
            "downstream_protocol histodiffusion compares selected with random patches itself.", "Leave `selected` out."
        )
