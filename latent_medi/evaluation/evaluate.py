"""``evaluate``: datasets in; ``metrics.json``, ``predictions.csv`` and the reference statistics out."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from accelerate import Accelerator
from safetensors.numpy import save_file
from threadpoolctl import threadpool_limits

import latent_medi
from latent_medi.core.agreement import agreed
from latent_medi.core.errors import UserError, nearest
from latent_medi.core.files import atomic_path, read_sealed, refuse_foreign, write_sealed
from latent_medi.core.locks import output_lock
from latent_medi.core.progress import get_logger
from latent_medi.evaluation.adherence import attributes, site_leakage, stain
from latent_medi.evaluation.cohort import comparison_sets
from latent_medi.evaluation.cohort.sample_size import thin_support
from latent_medi.evaluation.cohort.study import Study, open_study
from latent_medi.evaluation.downstream.stage import DownstreamStage, check_downstream
from latent_medi.evaluation.fidelity import distance_to_real, memorisation, projection, real_split_range
from latent_medi.evaluation.provenance import (
    arm_record,
    dataset_record,
    finite,
    git_revision,
    portable,
    recorded_settings,
    run_record,
)
from latent_medi.evaluation.settings import EvaluateSettings
from latent_medi.evaluation.summary import headline, verdict
from latent_medi.features.cache import cached_features, content_hash, dataset_hash
from latent_medi.features.encoders import ImageEncoder, colour_free, load_encoder
from latent_medi.launch import make_accelerator
from latent_medi.metadata.tables import write_for_people
from latent_medi.shards.dataset import PatchDataset
from latent_medi.statistics.distances import FeatureStatistics, pca_basis

log = get_logger(__name__)

METRICS_VERSION = 1
PATHS = ("real", "synthetic", "weights", "cache", "out")
"""Settings that are paths."""
PROTOCOLS = ("default", "paper")


def evaluate(settings: EvaluateSettings, encoders: Sequence[ImageEncoder] | None = None) -> dict[str, Any]:
    """Judge synthetic datasets against real held-out patients.

    Several launched processes share the embedding; the first one does the rest, and all return the same.

    Args:
        settings: What is compared with what.
        encoders: Encoders that are loaded already, instead of ``settings.encoders``; the first gives the headline.

    Returns:
        The content of ``metrics.json``: ``run``, ``settings``, ``dataset``, ``synthetic``, ``stain``, ``encoders``, per
        encoder name ``fidelity``, ``adherence``, ``memorisation`` (not of the colour-free ones), ``projection`` and
        ``downstream``, ``protocols`` if one is asked for, then ``notes``, ``warnings``, ``seconds``, ``headline`` and
        ``verdict``.

    Raises:
        UserError: See :func:`latent_medi.evaluation.cohort.study.open_study` and
            :func:`latent_medi.features.encoders.load_encoder`.
        TooManyCopies: More copies than ``max_copy_rate``, after ``metrics.json`` was written.
    """
    accelerator = make_accelerator(cpu=settings.device == "cpu", patient=True)
    device = settings.device or str(accelerator.device)
    with output_lock(settings.out, accelerator):
        return _judge(settings, encoders, accelerator, device)


def _judge(
    settings: EvaluateSettings, encoders: Sequence[ImageEncoder] | None, accelerator: Accelerator, device: str
) -> dict[str, Any]:
    out = Path(settings.out)
    with agreed(accelerator) as told:
        check_settings(settings)
        signs = {"metrics.json": "metrics_version", "reference": "", "features": ""}
        refuse_foreign(out, signs, ["metrics.json", "predictions.csv"])
        study = open_study(settings)
        chosen = _apart(encoders) if encoders else load_encoders(settings, device)
        if settings.colour_free:
            chosen = [e for encoder in chosen for e in (encoder, colour_free(encoder))]
        told.reads("real", settings.real, lambda: content_hash(study.real))
        for arm in study.synthetic.values():
            dataset = arm.dataset
            told.reads(f"synthetic.{arm.name}", dataset.folder, partial(content_hash, dataset))
        told.does(settings, but=("real", "synthetic", "weights", "device", "cache"))
        told.does({encoder.name: encoder.fingerprint for encoder in chosen}, prefix="encoder")
    if accelerator.num_processes > 1:
        for encoder in chosen:
            _embed(study, encoder, settings, device, accelerator)
    if accelerator.is_main_process:
        # Thousands of small eigenvalue problems: threads of the linear algebra cost more than they bring.
        with threadpool_limits(1, user_api="blas"):
            _evaluate(settings, study, chosen, device)
    accelerator.wait_for_everyone()
    return read_sealed(out / "metrics.json", "Run `latent-medi evaluate` again.")[0]


def check_settings(settings: EvaluateSettings) -> None:
    """Refuse values that cannot be followed.

    Raises:
        UserError: Names the value and what it may be.
    """
    check_downstream(settings)
    if settings.protocol not in PROTOCOLS:
        close = nearest(settings.protocol, PROTOCOLS)
        raise UserError(f"protocol is {settings.protocol!r}; {close}.", f"Choose one of {', '.join(PROTOCOLS)}.")
    if not 0.0 <= settings.max_copy_rate <= 1.0:
        raise UserError(f"max_copy_rate is {settings.max_copy_rate}; it is a share from 0 to 1.")
    if settings.max_copy_rate < 1 and not settings.memorisation:
        raise UserError(
            f"max_copy_rate={settings.max_copy_rate:g} cannot be held: memorisation=false looks for no copies.",
            "Leave memorisation on, or max_copy_rate at 1.",
        )
    if settings.deals and settings.deals < real_split_range.MIN_REAL_SPLITS:
        raise UserError(
            f"deals is {settings.deals}: too few to tell a range from.",
            f"Give {real_split_range.MIN_REAL_SPLITS} or more, or 0.",
        )


def load_encoders(settings: EvaluateSettings, device: str = "cpu") -> list[ImageEncoder]:
    """The encoders that judge, in order.

    Raises:
        UserError: One cannot be loaded, or two are called alike.
    """
    return _apart([load_encoder(name, settings.weights.get(name), device) for name in settings.encoders])


def _apart(chosen: Sequence[ImageEncoder]) -> list[ImageEncoder]:
    if len({encoder.name for encoder in chosen}) < len(chosen):
        raise UserError(
            f"Two of the encoders are called alike: {', '.join(encoder.name for encoder in chosen)}.",
            "Results stand under the name: name the folders apart.",
        )
    return list(chosen)


def _evaluate(settings: EvaluateSettings, study: Study, chosen: Sequence[ImageEncoder], device: str) -> None:
    clock = _Clock()
    out = Path(settings.out)
    stage = DownstreamStage(study, settings)
    unseen = comparison_sets.held_out_comparisons(study, settings.seed)
    classes = comparison_sets.class_comparisons(study, settings.seed)
    sites = comparison_sets.field_comparisons(study, [settings.site_field], settings.seed)
    whole = comparison_sets.comparison_for(study, {}, settings.seed)
    more = {
        " × ".join(fields): comparison_sets.field_comparisons(study, fields, settings.seed) for fields in settings.cells
    }
    clock.lap("prepare")
    copies = memorisation.find_copies(study, device) if settings.memorisation and study.synthetic else None
    clock.lap("memorisation")

    metrics: dict[str, Any] = {
        "metrics_version": METRICS_VERSION,
        "run": run_record(settings.seed, out),
        "settings": recorded_settings(dataclasses.asdict(settings), PATHS, out),
        "dataset": dataset_record(study, settings.split, out),
        "synthetic": {a.name: arm_record(a, settings.selected.get(a.name, ""), out) for a in study.synthetic.values()},
        "encoders": {},
        "fidelity": {},
        "adherence": {},
        "stain": stain.stain(study, settings.resamples, settings.seed) if study.synthetic else {},
        "memorisation": {},
        "downstream": {},
        "projection": {},
        "notes": list(study.notes),
        "warnings": [*study.warnings, *thin_support(study, settings.downstream)],
    }
    for encoder in chosen:
        log.info("Evaluating with %s", encoder.name)
        features = study_features(study, encoder, settings, device)
        _write_reference(out / "reference", study, encoder, features)
        made = stage.embed(encoder)
        clock.lap("embed")
        metrics["encoders"][encoder.name] = {
            "fingerprint": encoder.fingerprint,
            "dim": encoder.dim,
            "preprocessing": encoder.preprocessing.text,
            "license": encoder.license,
        }
        arguments = (settings.resamples, settings.seed)
        metrics["fidelity"][encoder.name] = {
            "fingerprint": encoder.fingerprint,
            "unseen": distance_to_real.summarise(study, features, unseen, *arguments, settings.protocol),
            "per_class": distance_to_real.summarise(study, features, classes, *arguments, settings.protocol),
            "per_site": distance_to_real.summarise(study, features, sites, *arguments, settings.protocol),
            "cells": {
                name: distance_to_real.summarise(study, features, chosen_cells, *arguments, settings.protocol)
                for name, chosen_cells in more.items()
            },
            "whole": distance_to_real.summarise(study, features, [whole], *arguments, settings.protocol),
            "overall": distance_to_real.overall(study, features, whole, settings.seed),
            **(
                {"against_real": real_split_range.against_real(study, features, settings.deals, settings.seed)}
                if settings.deals
                else {}
            ),
        }
        fingerprint = {"fingerprint": encoder.fingerprint}
        metrics["projection"][encoder.name] = fingerprint | projection.project(study, features, settings.seed)
        clock.lap("fidelity")
        verdicts = attributes.look(study, features, settings.regularisation or 1.0, settings.seed)
        metrics["adherence"][encoder.name] = {
            "fingerprint": encoder.fingerprint,
            "fields": attributes.recovery(study, verdicts, *arguments),
            "leakage": site_leakage.leakage(study, verdicts, *arguments),
        }
        clock.lap("adherence")
        if copies is not None and encoder.preprocessing.channel == "rgb":
            metrics["memorisation"][encoder.name] = {
                "fingerprint": encoder.fingerprint,
                **memorisation.memorisation(study, features, copies, *arguments, settings.patient_names, device),
            }
            clock.lap("memorisation")
        stage.judge(encoder, features, made, metrics)
        clock.lap("downstream")
    if stage.tables:
        write_for_people(pd.concat(stage.tables), out / "predictions.csv")
    metrics["seconds"] = clock.seconds
    metrics = finite(metrics)
    metrics["headline"] = headline(metrics)
    metrics["verdict"] = verdict(metrics["headline"])
    folders = [study.real.folder, *(arm.dataset.folder for arm in study.synthetic.values()), Path.home(), Path.cwd()]
    write_sealed(out / "metrics.json", portable(metrics, out, folders))
    memorisation.check_gate(metrics["memorisation"], settings.max_copy_rate)


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + now - self._last, 3)
        self._last = now


def study_features(
    study: Study, encoder: ImageEncoder, settings: EvaluateSettings, device: str
) -> distance_to_real.Features:
    """Features of every patch that takes part, from the cache as far as it has them."""
    used, of_real, arms = _embed(study, encoder, settings, device)
    real = np.zeros((len(study.index), encoder.dim), np.float32)
    real[used] = of_real
    return distance_to_real.Features(real, arms, pca_basis(real[study.train]))


def _embed(
    study: Study, encoder: ImageEncoder, settings: EvaluateSettings, device: str, accelerator: Accelerator | None = None
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Rows of the real index that take part, their features, and those of each arm."""
    cache = Path(settings.cache) if settings.cache else Path(settings.out) / "features"
    used = np.unique(np.concatenate([study.train, study.probe, study.probe_train, study.reference, study.test]))

    def features(dataset: PatchDataset, rows: np.ndarray) -> np.ndarray:
        return cached_features(dataset, rows, encoder, cache, settings.batch, device, accelerator)

    return used, features(study.real, used), {a.name: features(a.dataset, a.rows) for a in study.synthetic.values()}


def _write_reference(folder: Path, study: Study, encoder: ImageEncoder, features: distance_to_real.Features) -> None:
    """Statistics of the test reference and the PCA basis: enough to compare another set without the real patches."""
    statistics = FeatureStatistics.of(features.real[study.reference])
    tensors = {
        "mean": statistics.mean,
        "cov": statistics.cov,
        "n": np.array([statistics.n]),
        "pca_mean": features.basis.mean,
        "pca_components": np.ascontiguousarray(features.basis.components),
    }
    made_from = {
        "encoder": encoder.name, "fingerprint": encoder.fingerprint, "dataset": study.real.info.get("name", ""),
        "dataset_sha256": dataset_hash(study.real), "patches": "test reference", "n_patches": str(statistics.n),
        "n_patients": str(len(set(study.patients[study.reference]))), "latent_medi": latent_medi.__version__,
        "git_revision": git_revision() or "",
    }  # fmt: skip
    with atomic_path(folder / f"{encoder.name.replace(':', '-').replace('@', '-')}.safetensors") as temporary:
        save_file(tensors, temporary, metadata=made_from)
