"""``evaluate``: datasets in; ``metrics.json``, tables and the reference statistics out."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from accelerate import Accelerator
from safetensors.numpy import save_file
from threadpoolctl import threadpool_limits

import latent_medi
from latent_medi.core.agreement import agreed
from latent_medi.core.errors import UserError
from latent_medi.core.files import atomic_path, refuse_foreign, remove
from latent_medi.core.locks import output_lock
from latent_medi.core.progress import get_logger
from latent_medi.evaluation.adherence import attributes, site_leakage, stain
from latent_medi.evaluation.adherence.records import Adherence
from latent_medi.evaluation.class_distances import FILE, class_distances
from latent_medi.evaluation.cohort import comparison_sets
from latent_medi.evaluation.cohort.comparison_sets import Comparison
from latent_medi.evaluation.cohort.open_study import open_study
from latent_medi.evaluation.cohort.sample_size import thin_support
from latent_medi.evaluation.cohort.study import Study, SyntheticSet
from latent_medi.evaluation.downstream.protocol_tables import RESULTS, SUMMARY, medi_tables
from latent_medi.evaluation.downstream.records import Protocols
from latent_medi.evaluation.downstream.stage import DownstreamStage, check_downstream
from latent_medi.evaluation.fidelity import distance_to_real, memorisation, projection, real_split_range, tissue
from latent_medi.evaluation.fidelity.features import Features
from latent_medi.evaluation.fidelity.records import DistanceTable, Fidelity, TrainingDistances
from latent_medi.evaluation.provenance import (
    EncoderRecord,
    dataset_record,
    git_revision,
    recorded_settings,
    run_record,
    synthetic_record,
)
from latent_medi.evaluation.results import Metrics, read_metrics, write_metrics
from latent_medi.evaluation.settings import EvaluateSettings
from latent_medi.evaluation.summary import headline
from latent_medi.features.cache import cached_features, content_hash, dataset_hash
from latent_medi.features.encoders import ImageEncoder, colour_free, load_encoder
from latent_medi.features.needed import check_encoder
from latent_medi.launch import make_accelerator
from latent_medi.metadata.tables import write_for_people
from latent_medi.shards.dataset import PatchDataset
from latent_medi.statistics.distances import FeatureStatistics, pca_basis

log = get_logger(__name__)
_PREDICTIONS = "predictions.csv"
_TABLES = (_PREDICTIONS, FILE, RESULTS, SUMMARY)


def evaluate(settings: EvaluateSettings, encoders: Sequence[ImageEncoder] | None = None) -> Metrics:
    """Compare synthetic datasets with real held-out patients.

    Several launched processes share the embedding; the first one does the rest, and all return the same.

    Args:
        settings: The datasets and what is computed.
        encoders: Encoders that are loaded already, instead of ``settings.encoders``; the first gives the headline.

    Returns:
        The content of ``metrics.json``, as it was written.

    Raises:
        UserError: See :func:`latent_medi.evaluation.cohort.open_study.open_study` and
            :func:`latent_medi.features.encoders.load_encoder`.
        TooManyCopies: More copies than ``max_copy_rate``, after ``metrics.json`` was written.
    """
    accelerator, device = _processes(settings)
    with output_lock(settings.out, accelerator):
        study, chosen = _prepared(settings, encoders, accelerator, device)
        if accelerator.num_processes > 1:
            _embed_all(settings, study, chosen, accelerator, device)
        if accelerator.is_main_process:
            # Thousands of small eigenvalue problems: threads of the linear algebra cost more than they bring.
            with threadpool_limits(1, user_api="blas"):
                _evaluate(settings, study, chosen, device)
        accelerator.wait_for_everyone()
        return read_metrics(Path(settings.out) / "metrics.json")


def embed(settings: EvaluateSettings) -> Path:
    """Put the features of all patches that an evaluation compares into its cache, so that the evaluation finds them.

    Several launched processes share them. Nothing else is written.

    Args:
        settings: As for :func:`evaluate`.

    Returns:
        The folder of the cache.

    Raises:
        UserError: As for :func:`evaluate`.
    """
    accelerator, device = _processes(settings)
    _embed_all(settings, *_prepared(settings, None, accelerator, device), accelerator, device)
    return _cache(settings)


def _processes(settings: EvaluateSettings) -> tuple[Accelerator, str]:
    """All launched processes, and this one's device."""
    accelerator = make_accelerator(cpu=settings.device == "cpu", patient=True)
    return accelerator, settings.device or str(accelerator.device)


def _embed_all(
    settings: EvaluateSettings,
    study: Study,
    chosen: Sequence[ImageEncoder],
    accelerator: Accelerator,
    device: str,
) -> None:
    for encoder in chosen:
        _embed(study, encoder, settings, device, accelerator)
        seed_features(study, encoder, settings, device, accelerator)


def _prepared(
    settings: EvaluateSettings, encoders: Sequence[ImageEncoder] | None, accelerator: Accelerator, device: str
) -> tuple[Study, list[ImageEncoder]]:
    """The opened datasets and the encoders, the same in all processes."""
    out = Path(settings.out)
    with agreed(accelerator) as declared:
        check_settings(settings)
        signs = {"metrics.json": "metrics_version", "reference": "", "features": ""}
        refuse_foreign(out, signs, ["metrics.json", *_TABLES])
        study = open_study(settings)
        chosen = _with_different_names(encoders) if encoders else load_encoders(settings, device)
        if settings.colour_free:
            chosen = [e for encoder in chosen for e in (encoder, colour_free(encoder))]
        declared.add_input("real", settings.real, lambda: content_hash(study.real))
        for name, synthetic in study.synthetic.items():
            for number, samples in enumerate([synthetic, *study.further_seeds.get(name, [])]):
                dataset, place = samples.dataset, f"synthetic.{name}" + (f".{number}" if number else "")
                declared.add_input(place, dataset.folder, partial(content_hash, dataset))
        declared.add_settings(settings, without=("real", "synthetic", "further_seeds", "weights", "device", "cache"))
        declared.add_settings({encoder.name: encoder.fingerprint for encoder in chosen}, prefix="encoder")
    return study, chosen


def check_settings(settings: EvaluateSettings) -> None:
    """Refuse values that cannot be followed.

    Raises:
        UserError: Names the value and what it may be.
    """
    check_downstream(settings)
    if "test" not in settings.references:
        raise UserError(
            f"references is {settings.references}: an evaluation needs the test patients.",
            "Set references='[test, train]' to compare with the training images as well.",
        )
    if settings.test_value in (settings.train_value, settings.probe_value):
        raise UserError(
            f"test_value is {settings.test_value!r}, as another part is: test patients must be others.",
            "To compare samples with the training images set references='[test, train]'.",
        )
    if settings.max_copy_rate < 1 and not settings.memorisation:
        raise UserError(
            f"max_copy_rate={settings.max_copy_rate:g} cannot be checked: memorisation=false finds no copies.",
            "Set memorisation=true, or max_copy_rate=1.",
        )
    if settings.real_splits and settings.real_splits < real_split_range.MIN_REAL_SPLITS:
        raise UserError(
            f"real_splits is {settings.real_splits}: too few for a range.",
            f"Give {real_split_range.MIN_REAL_SPLITS} or more, or 0.",
        )


def load_encoders(settings: EvaluateSettings, device: str = "cpu") -> list[ImageEncoder]:
    """The encoders of the settings, in order.

    Raises:
        UserError: One cannot be loaded, or two have the same name.
    """
    for name in settings.encoders:  # all of them before one is loaded
        check_encoder(name, settings.weights.get(name, ""))
    return _with_different_names([load_encoder(name, settings.weights.get(name), device) for name in settings.encoders])


def _with_different_names(chosen: Sequence[ImageEncoder]) -> list[ImageEncoder]:
    names = [encoder.name for encoder in chosen]
    if len(set(names)) < len(names):
        raise UserError(f"Two encoders have the same name: {', '.join(names)}.", "Rename the folder of one.")
    return list(chosen)


def _evaluate(settings: EvaluateSettings, study: Study, chosen: Sequence[ImageEncoder], device: str) -> None:
    clock = _Clock()
    out = Path(settings.out)
    stage = DownstreamStage(study, settings, device)
    comparisons = _Comparisons.of(study, settings)
    clock.lap("prepare")
    copies = memorisation.find_copies(study, device) if settings.memorisation and study.synthetic else None
    clock.lap("memorisation")
    metrics = _begun(settings, study, chosen)
    for encoder in chosen:
        log.info("Evaluating with %s", encoder.name)
        name, fingerprint = encoder.name, encoder.fingerprint
        features = study_features(study, encoder, settings, device)
        _write_reference(out / "reference", study, encoder, features)
        derived, seeds = stage.embed(encoder), seed_features(study, encoder, settings, device)
        clock.lap("embed")
        metrics.fidelity[name] = _fidelity(settings, study, features, comparisons, fingerprint)
        points = projection.project(study, features, fingerprint, settings.seed, method=settings.projection)
        metrics.projection[name] = points
        clock.lap("fidelity")
        predictions = attributes.predict_fields(study, features, settings.regularisation or 1.0, settings.seed)
        metrics.adherence[name] = Adherence(
            fingerprint,
            attributes.recovery(study, predictions),
            site_leakage.leakage(study, predictions, settings.seed),
        )
        clock.lap("adherence")
        if copies is not None and encoder.preprocessing.channel == "rgb":
            metrics.memorisation[name] = memorisation.memorisation(
                study, features, copies, fingerprint, settings.seed, settings.patient_names, device
            )
            clock.lap("memorisation")
        stage.evaluate(encoder, features, derived, seeds)
        clock.lap("downstream")
    tables = medi_tables(stage.protocols.medi)
    if stage.tables:
        tables[_PREDICTIONS] = pd.concat(stage.tables)
    metrics.seconds.update(clock.seconds)
    metrics = replace(metrics, downstream=stage.results, protocols=stage.protocols)
    metrics = replace(metrics, headline=headline(metrics))
    every = [*study.synthetic.values(), *(s for sets in study.further_seeds.values() for s in sets)]
    folders = [study.real.folder, *(s.dataset.folder for s in every), Path.home(), Path.cwd()]
    if study.synthetic:
        tables[FILE] = class_distances(metrics)
    for name, table in tables.items():
        write_for_people(table, out / name)
    _remove_outdated(out, tables, chosen)
    write_metrics(out / "metrics.json", metrics, folders)
    memorisation.check_copy_rate(metrics.memorisation, settings.max_copy_rate)


def _remove_outdated(out: Path, tables: Collection[str], chosen: Sequence[ImageEncoder]) -> None:
    """Remove what an earlier evaluation in the folder wrote by its own record and this one, by its settings, did not:
    tables, and reference statistics of other encoders. A file that no record names is left.
    """
    try:
        before = read_metrics(out / "metrics.json")
    except UserError:
        return
    made = {FILE} if before.synthetic else set()
    made |= {_PREDICTIONS} if before.downstream else set()
    made |= {*medi_tables(before.protocols.medi)}
    references = {_reference_name(name) for name in before.encoders} - {_reference_name(each.name) for each in chosen}
    for path in [*(out / name for name in made - {*tables}), *(out / "reference" / name for name in references)]:
        remove(path)


@dataclass(frozen=True)
class _Comparisons:
    """The rows that are compared, the same for every encoder."""

    unseen: list[Comparison]
    per_class: list[Comparison]
    per_site: list[Comparison]
    by_fields: dict[str, list[Comparison]]
    whole: Comparison
    training: _TrainingComparisons | None

    @classmethod
    def of(cls, study: Study, settings: EvaluateSettings) -> _Comparisons:
        seed = settings.seed
        return cls(
            comparison_sets.held_out_comparisons(study, seed),
            comparison_sets.class_comparisons(study, seed),
            comparison_sets.field_comparisons(study, [study.site_field], seed),
            {" × ".join(f): comparison_sets.field_comparisons(study, f, seed) for f in settings.by_fields},
            comparison_sets.comparison_for(study, {}, seed),
            _TrainingComparisons.of(study, settings) if "train" in settings.references else None,
        )


@dataclass(frozen=True)
class _TrainingComparisons:
    """The rows that are compared with training images."""

    per_class: list[Comparison]
    by_fields: dict[str, list[Comparison]]

    @classmethod
    def of(cls, study: Study, settings: EvaluateSettings) -> _TrainingComparisons:
        seed = settings.seed
        fields = {tuple(f): None for f in ([study.class_field, study.site_field], *settings.by_fields)}
        return cls(
            comparison_sets.class_comparisons(study, seed, "train"),
            {" × ".join(f): comparison_sets.field_comparisons(study, f, seed, "train") for f in fields},
        )


def _begun(settings: EvaluateSettings, study: Study, chosen: Sequence[ImageEncoder]) -> Metrics:
    """The metrics as far as they do not depend on features; sections by encoder are empty."""
    out = Path(settings.out)
    selected = settings.selected
    return Metrics(
        run=run_record(settings.seed, out),
        settings=recorded_settings(settings, out),
        dataset=dataset_record(study, settings, out),
        synthetic={s.name: synthetic_record(s, selected.get(s.name, ""), out) for s in study.synthetic.values()},
        encoders={e.name: EncoderRecord(e.fingerprint, e.dim, e.preprocessing.text, e.license) for e in chosen},
        fidelity={},
        adherence={},
        stain=stain.stain(study, settings.seed) if study.synthetic else None,
        memorisation={},
        downstream={},
        protocols=Protocols({}, {}),
        projection={},
        notes=list(study.notes),
        warnings=[*study.warnings, *thin_support(study, settings.downstream)],
        seconds={},
        headline=None,
    )


def _fidelity(
    settings: EvaluateSettings, study: Study, features: Features, comparisons: _Comparisons, fingerprint: str
) -> Fidelity:
    def table(chosen: Sequence[Comparison], part: comparison_sets.Part = "test") -> DistanceTable:
        return distance_to_real.distance_table(study, features, chosen, settings.seed, settings.protocol, part)

    training = None
    if chosen := comparisons.training:
        of_fields = {name: table(each, "train") for name, each in chosen.by_fields.items()}
        training = TrainingDistances(table(chosen.per_class, "train"), of_fields)
    ranges = None
    if settings.real_splits:
        ranges = real_split_range.real_split_range(study, features, settings.real_splits, settings.seed)
    return Fidelity(
        fingerprint=fingerprint,
        unseen=table(comparisons.unseen),
        per_class=table(comparisons.per_class),
        per_site=table(comparisons.per_site),
        by_fields={name: table(chosen) for name, chosen in comparisons.by_fields.items()},
        whole=table([comparisons.whole]),
        overall=distance_to_real.overall(study, features, comparisons.whole, settings.seed),
        tissue=tissue.tissue_distances(study, features, comparisons.unseen, settings.seed),
        real_splits=ranges,
        training=training,
    )


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + now - self._last, 3)
        self._last = now


def study_features(study: Study, encoder: ImageEncoder, settings: EvaluateSettings, device: str) -> Features:
    """Features of every patch that takes part, from the cache as far as it has them."""
    used, of_real, synthetic = _embed(study, encoder, settings, device)
    real = np.zeros((len(study.index), encoder.dim), np.float32)
    real[used] = of_real
    return Features(real, synthetic, pca_basis(real[study.train]))


def _embed(
    study: Study, encoder: ImageEncoder, settings: EvaluateSettings, device: str, accelerator: Accelerator | None = None
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Rows of the real index that take part, their features, and those of each synthetic set."""
    cache = _cache(settings)
    used = np.unique(np.concatenate([study.train, study.probe, study.probe_train, study.reference, study.test]))

    def features(dataset: PatchDataset, rows: np.ndarray) -> np.ndarray:
        return cached_features(dataset, rows, encoder, cache, settings.batch, device, accelerator)

    return used, features(study.real, used), {s.name: features(s.dataset, s.rows) for s in study.synthetic.values()}


def seed_features(
    study: Study,
    encoder: ImageEncoder,
    settings: EvaluateSettings,
    device: str,
    accelerator: Accelerator | None = None,
) -> dict[str, list[np.ndarray]]:
    """Features of the further training seeds of each synthetic set, from the cache as far as it has them."""
    cache = _cache(settings)

    def features(samples: SyntheticSet) -> np.ndarray:
        return cached_features(samples.dataset, samples.rows, encoder, cache, settings.batch, device, accelerator)

    return {name: list(map(features, sets)) for name, sets in study.further_seeds.items()}


def _cache(settings: EvaluateSettings) -> Path:
    return Path(settings.cache) if settings.cache else Path(settings.out) / "features"


def _write_reference(folder: Path, study: Study, encoder: ImageEncoder, features: Features) -> None:
    """Statistics of the test reference and the PCA basis: enough to compare another set without the real patches."""
    statistics = FeatureStatistics.of(features.real[study.reference])
    tensors = {
        "mean": statistics.mean,
        "cov": statistics.cov,
        "n": np.array([statistics.n]),
        "pca_mean": features.basis.mean,
        "pca_components": np.ascontiguousarray(features.basis.components),
    }
    metadata = {
        "encoder": encoder.name,
        "fingerprint": encoder.fingerprint,
        "dataset": study.real.info.get("name", ""),
        "dataset_sha256": dataset_hash(study.real),
        "patches": "test reference",
        "n_patches": str(statistics.n),
        "n_patients": str(len(set(study.patients[study.reference]))),
        "latent_medi": latent_medi.__version__,
        "git_revision": git_revision() or "",
    }
    with atomic_path(folder / _reference_name(encoder.name)) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def _reference_name(encoder: str) -> str:
    return f"{encoder.replace(':', '-').replace('@', '-')}.safetensors"
