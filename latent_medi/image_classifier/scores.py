"""Logits of real patches, and the scores of a classification with intervals over patients."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from latent_medi.core.device import exact_fp32
from latent_medi.core.progress import progress
from latent_medi.features.encoders import PRECISIONS, ImageEncoder
from latent_medi.features.networks import Network
from latent_medi.features.registry import Preprocessing
from latent_medi.shards.dataset import PatchDataset
from latent_medi.shards.reading.read_ahead import ReadAhead, read_ahead_threads
from latent_medi.statistics.confusion import RATES, confusion_scores
from latent_medi.statistics.intervals import SHARE, Estimate, estimate, jackknife, strata_of
from latent_medi.statistics.left_out import Score
from latent_medi.statistics.patient_means import PatientTable


@dataclass(frozen=True)
class ClassScores:
    """One class against the rest.

    Args:
        label: The class.
        n_patches: Its patches.
        n_patients: Its patients.
        sensitivity: Share of its patches that are found.
        specificity: Share of the other patches that are not taken for it.
        precision: Share of the patches taken for it that are of it.
        f1: Harmonic mean of sensitivity and precision.
    """

    label: str
    n_patches: int
    n_patients: int
    sensitivity: Estimate
    specificity: Estimate
    precision: Estimate
    f1: Estimate


@dataclass(frozen=True)
class ClassifierScores:
    """Scores over a whole test set at once. Intervals are over patients.

    Args:
        n_patches: Patches.
        n_patients: Patients, or what counts as one.
        patient_is: What counts as a patient: "patient", or where patients are not known "slide", "image" or "group".
        accuracy: Share of patches that are right.
        balanced_accuracy: Mean over classes of the mean over a class's patients of the share of patches that are right.
        sensitivity, specificity, precision, f1: Mean over classes of these rates over patches.
        classes: The same by class.
    """

    n_patches: int
    n_patients: int
    patient_is: str
    accuracy: Estimate
    balanced_accuracy: Estimate
    sensitivity: Estimate
    specificity: Estimate
    precision: Estimate
    f1: Estimate
    classes: list[ClassScores]


def classifier_scores(
    truth: np.ndarray, found: np.ndarray, patients: np.ndarray, labels: Sequence[str], patient_is: str
) -> ClassifierScores:
    """Every score of a classification.

    Args:
        truth: Class code of each patch, [N], at least one.
        found: Predicted code of each, [N].
        patients: Patient of each, [N].
        labels: The classes, K.
        patient_is: What counts as a patient.
    """
    who = np.unique(patients, return_inverse=True)[1].reshape(-1)
    n_patients, n_classes = int(who.max()) + 1, len(labels)
    scores = confusion_scores(truth, found, n_classes, who)
    present = np.zeros((n_classes, n_patients), bool)
    present[truth, who] = True
    of_class = present.sum(axis=1)
    there = of_class > 0
    strata, smallest = strata_of(present[there]), int(of_class[there].min())

    def over_patients(score: Score, fewest: int | None = smallest) -> Estimate:
        # Where all patients agree, Wilson's interval is that of a share; the mean over classes is none.
        limits = SHARE if fewest is None or score.value not in SHARE else None
        return estimate(score.value, len(truth), n_patients, jackknife(score.left_out, strata), limits, fewest)

    table = PatientTable(truth, who, np.ones(len(truth), bool), n_classes, n_patients)
    classes = [
        ClassScores(
            label,
            int((truth == code).sum()),
            int(of_class[code]),
            **{name: over_patients(scores.classes[name][code], fewest=int(of_class[code])) for name in RATES},
        )
        for code, label in enumerate(labels)
    ]
    return ClassifierScores(
        len(truth),
        n_patients,
        patient_is,
        over_patients(scores.accuracy, fewest=None),
        table.estimate((truth == found).astype(float), share=True),
        **{name: over_patients(scores.macro[name]) for name in RATES},
        classes=classes,
    )


def scores_text(scores: ClassifierScores) -> str:
    """A table of the scores."""
    unit = "patients" if scores.patient_is == "patient" else f"{scores.patient_is}s"
    names = ("accuracy", "balanced_accuracy", "f1", "sensitivity", "specificity")
    lines = [f"scores on {scores.n_patches:,} real patches of {scores.n_patients:,} {unit} (intervals over {unit}):"]
    lines += [f"  {name.replace('_', ' '):<18}{_shown(getattr(scores, name))}" for name in names]
    for entry in scores.classes:
        rates = ", ".join(f"{name} {_shown(getattr(entry, name))}" for name in ("sensitivity", "specificity", "f1"))
        lines.append(f"  {entry.label}: {rates}; {entry.n_patches:,} patches of {entry.n_patients:,} {unit}")
    return "\n".join(lines)


def _shown(value: Estimate) -> str:
    if value.value is None:
        return "none"
    bounds = value.interval
    return f"{value.value:.3f}" + (f" ({bounds[0]:.3f} to {bounds[1]:.3f})" if isinstance(bounds, tuple) else "")


@torch.inference_mode()
@exact_fp32()
def logits_of(
    module: nn.Module,
    preprocessing: Preprocessing,
    dataset: PatchDataset,
    rows: np.ndarray,
    classes: int,
    batch: int,
    accelerator: Accelerator,
    precision: str = "fp32",
    shown: str = "",
) -> np.ndarray:
    """Logits of some patches, fp32 [n, classes]; every process must call, and gets all of them.

    Args:
        module: In evaluation mode, on the accelerator's device.
        preprocessing: From patches to its input.
        dataset: The patches.
        rows: Their rows, [n].
        classes: Number of logits.
        batch: Patches per forward pass.
        accelerator: The processes, which share the batches.
        precision: Arithmetic inside the network.
        shown: Words of the progress bar; empty for none.
    """
    device = accelerator.device
    prepare = ImageEncoder(Network("", nn.Identity(), 0, preprocessing, ""), device).prepare
    dtype = PRECISIONS[precision]
    starts = range(accelerator.process_index * batch, len(rows), accelerator.num_processes * batch)
    found = torch.zeros(len(rows), classes, device=device)  # the others' stay 0, so that the sum has all
    mine = np.concatenate([rows[start : start + batch] for start in starts]) if len(starts) else rows[:0]
    with closing(ReadAhead(dataset, read_ahead_threads(device, dataset))) as reader:
        batches = zip(starts, reader.batches(mine, batch), strict=True)
        for start, (_, images) in progress(batches, len(mine), shown, "patches", batch) if shown else batches:
            with torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
                logits = module(prepare(images))
            found[start : start + len(images)] = logits.float()
    if accelerator.num_processes > 1:
        found = accelerator.reduce(found, "sum")
    return found.cpu().numpy()
