"""The downstream stage of an evaluation: the classifier and the protocols that the settings choose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from latent_medi.core.errors import UserError, nearest
from latent_medi.core.progress import get_logger
from latent_medi.evaluation.cohort.study import Study
from latent_medi.evaluation.downstream.baselines import nearest_sites
from latent_medi.evaluation.downstream.classifiers import Classifier, linear_probe_classifier
from latent_medi.evaluation.downstream.cnn import NetworkClassifier, PatchPools, check_network
from latent_medi.evaluation.downstream.compare import choose, compare, jobs
from latent_medi.evaluation.downstream.histodiffusion_protocol import histodiffusion_protocol
from latent_medi.evaluation.downstream.medi_protocol import medi_protocol, medi_tasks
from latent_medi.evaluation.downstream.records import Downstream, Protocols
from latent_medi.evaluation.downstream.registry import entries, plan_additions
from latent_medi.evaluation.downstream.training_sets import DerivedFeatures, ProtocolSources, Sources
from latent_medi.evaluation.fidelity.features import Features
from latent_medi.evaluation.settings import EvaluateSettings
from latent_medi.features.encoders import ImageEncoder

log = get_logger(__name__)


class DownstreamStage:
    """Compares training sets in one encoder's features after another.

    Args:
        study: The cohort.
        settings: The evaluation's settings.
        device: Torch device of the linear probes.

    Attributes:
        results: Results by encoder, so far.
        protocols: Results of published protocols, so far.
        tables: Predictions of each encoder so far, a row per test patch.
    """

    def __init__(self, study: Study, settings: EvaluateSettings, device: str = "cpu") -> None:
        self.study, self.settings, self.device = study, settings, device
        if settings.downstream_protocol == "medi":
            medi_tasks(study, settings.medi_protocol)  # refuses before anything is computed what would fail later
        self.results: dict[str, Downstream] = {}
        self.protocols = Protocols({}, {})
        self.tables: list[pd.DataFrame] = []
        self.additions = (
            plan_additions(study, settings.added_per_combination, settings.seed, settings.stain_jitter)
            if settings.downstream
            else None
        )
        self.pools = PatchPools(study, self.additions) if settings.classifier == "cnn" else None
        self._trained: set[str] = set()

    def embed(self, encoder: ImageEncoder) -> DerivedFeatures:
        """Features of the derived patches."""
        size = self.settings.batch

        def features(images: np.ndarray) -> np.ndarray:
            return encoder.features([images[i : i + size] for i in range(0, len(images), size)])

        return self.additions.derived_features(features) if self.additions else {}

    def evaluate(
        self,
        encoder: ImageEncoder,
        features: Features,
        derived: DerivedFeatures,
        further_seeds: Mapping[str, Sequence[np.ndarray]],
    ) -> None:
        """Add the encoder's results.

        A torchvision network sees pixels instead of features, so it is trained once per colour channel, under the
        first encoder.
        """
        settings, study = self.settings, self.study
        key = encoder.name if settings.cnn.network == "encoder" else encoder.preprocessing.channel
        if self.pools is not None and key in self._trained:
            log.info("%s: the same network as before, not trained again", encoder.name)
            return
        self._trained.add(key)
        sources = None
        if self.additions:
            sites = nearest_sites(study, self.additions.combinations, features.real)
            sources = Sources(study, self.additions, features.real, features.synthetic, derived, sites, further_seeds)
            if self.pools is not None:
                sources = self.pools.sources(study, self.additions, sites)
        classifier = self._classifier(encoder, features, sources)
        if sources:
            repeats = settings.cnn.seeds if classifier.random else settings.repeats
            record, table = compare(
                sources,
                classifier,
                encoder.fingerprint,
                repeats,
                settings.seed,
                settings.training_sets,
            )
            self.results[encoder.name] = record
            table.insert(0, "encoder", encoder.name)
            self.tables.append(table)
        self._run_protocol(encoder, features, classifier)

    def _classifier(self, encoder: ImageEncoder, features: Features, sources: Sources | None) -> Classifier:
        settings = self.settings
        if self.pools is None:
            return linear_probe_classifier(
                self.study, features.real, settings.regularisation, settings.seed, self.device
            )
        n_networks = 0
        if sources:
            n_networks = len(jobs(choose(sources, settings.training_sets)[0], sources, True, settings.cnn.seeds))
        return NetworkClassifier(self.study, self.pools, encoder, settings.cnn, n_networks)

    def _run_protocol(self, encoder: ImageEncoder, features: Features, classifier: Classifier) -> None:
        study, settings = self.study, self.settings
        if settings.downstream_protocol == "medi":
            sources = ProtocolSources(study, encoder.fingerprint, features.real, features.synthetic)
            self.protocols.medi[encoder.name] = medi_protocol(sources, settings.medi_protocol, self.device)
        elif settings.downstream_protocol == "histodiffusion":
            patches = self.pools or features
            sources = ProtocolSources(study, encoder.fingerprint, patches.real, patches.synthetic)
            self.protocols.histodiffusion[encoder.name] = histodiffusion_protocol(
                sources, settings.histodiffusion_protocol, classifier
            )


def check_downstream(settings: EvaluateSettings) -> None:
    """Refuse settings of the comparison that are impossible.

    Raises:
        UserError: Names the value and what it may be.
    """
    known = entries(settings.synthetic)
    for name in settings.training_sets:
        if name not in known:
            raise UserError(f"There is no training set {name!r}; {nearest(name, known)}.")
    if settings.classifier == "cnn":
        check_network(settings.cnn)
    if settings.downstream_protocol == "histodiffusion" and settings.selected:
        raise UserError(
            "downstream_protocol histodiffusion compares selected with random patches itself.", "Leave `selected` out."
        )
