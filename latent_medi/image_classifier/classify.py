"""Application of an image classifier: a table with the probability of each class for patches, slides or patients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from torch import nn

from latent_medi.core.device import exact_fp32
from latent_medi.core.errors import UserError
from latent_medi.core.files import check_output
from latent_medi.core.progress import get_logger, progress
from latent_medi.features.classifier_folder import read_classifier
from latent_medi.features.encoders import PRECISIONS, ImageEncoder
from latent_medi.features.networks import Network
from latent_medi.image_classifier.data import warn_of_scale
from latent_medi.image_classifier.scores import ClassifierScores, classifier_scores, logits_of
from latent_medi.image_classifier.settings import ClassifySettings
from latent_medi.launch import make_accelerator
from latent_medi.metadata.row_filter import only_mask
from latent_medi.metadata.tables import write_table
from latent_medi.shards.dataset import INFO_FILE, SPLIT_PREFIX, PatchDataset
from latent_medi.shards.format.codec import decode_image
from latent_medi.shards.importing.find_files import find_files
from latent_medi.shards.importing.image_table import IMAGE_ENDINGS

logger = get_logger("classify")

PREFIX = "p_"
"""Beginning of the columns with probabilities; a label follows."""


class ImageClassifier:
    """A trained classifier of patches.

    Args:
        folder: ``out/model`` of `latent-medi image-classifier`.
        device: Torch device.
        precision: Arithmetic inside the network.

    Attributes:
        facts: Labels in the order of the probabilities, field and preprocessing.

    Raises:
        UserError: It is no image classifier, or damaged.
    """

    def __init__(self, folder: str | Path, device: str | torch.device = "cpu", precision: str = "fp32") -> None:
        self.facts, module = read_classifier(folder)
        self.module = module.to(device)
        self.precision = precision
        self._encoder = ImageEncoder(Network("", nn.Identity(), 0, self.facts.preprocessing, ""), device, precision)

    @torch.inference_mode()
    @exact_fp32()
    def probabilities(self, patches: np.ndarray) -> np.ndarray:
        """float64 [n, classes], whose rows sum to 1, of square patches uint8 [n, H, W, 3]."""
        dtype, device = PRECISIONS[self.precision], self._encoder.device
        with torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            logits = self.module(self._encoder.prepare(patches))
        return _softmax(logits.float().cpu().numpy())


def _softmax(logits: np.ndarray) -> np.ndarray:
    return torch.from_numpy(logits).double().softmax(1).numpy()


@dataclass(frozen=True)
class Classified:
    """What :func:`classify` returns.

    Args:
        table: A row per patch, slide or patient.
        patches: Patches that were classified.
        scores: Scores of the patches with a known label, where the data have the field and are real.
    """

    table: pd.DataFrame
    patches: int
    scores: ClassifierScores | None


def classify(settings: ClassifySettings, accelerator: Accelerator | None = None) -> Classified:
    """Classify patches and write the table.

    Args:
        settings: What to do.
        accelerator: The processes, which share the patches of a dataset folder.

    Returns:
        The table: key, patient, slide (or of the slide or patient, with its number of patches), a column
        ``p_<label>`` per class, and predicted.

    Raises:
        UserError: No such classifier or data, an image that is not readable, or a table that cannot be written.
    """
    accelerator = accelerator or make_accelerator()
    out = check_output(settings.out, folder=False)
    if not (Path(settings.data) / INFO_FILE).is_file():
        return _classify_images(settings, out, accelerator)
    dataset = PatchDataset.open(settings.data)
    rows = dataset.rows({f"{SPLIT_PREFIX}{settings.split}": settings.split_value} if settings.split else None)
    rows = rows[only_mask(dataset.index, settings.only, str(dataset.folder))[rows]]
    if not len(rows):
        raise UserError(f"{dataset.folder} has no patch that these settings choose.", "Change split, or only.")
    facts, module = read_classifier(settings.model)
    warn_of_scale(dataset, facts.patch_size, facts.mpp)
    how = (facts.preprocessing, dataset, rows, len(facts.labels), settings.device_batch, accelerator)
    logits = logits_of(module.to(accelerator.device), *how, settings.precision, "classifying")
    probabilities = _softmax(logits)
    table = dataset.index.iloc[rows]
    names = table[["key", "patient", "slide"]].reset_index(drop=True)
    made = _table(names, probabilities, facts.labels, settings.by)
    if accelerator.is_main_process:
        write_table(made, out)
    scores = None
    if facts.field in table and (table["origin"] == "real").all():
        values = table[facts.field].astype(str).to_numpy()
        known = np.isin(values, facts.labels)
        if known.any():
            truth = np.array([facts.labels.index(value) for value in values[known].tolist()])
            patients = table["patient"].to_numpy(str)[known]
            found = probabilities[known].argmax(axis=1)
            scores = classifier_scores(truth, found, patients, facts.labels, dataset.patient_is)
    return Classified(made, len(rows), scores)


def _table(names: pd.DataFrame, probabilities: np.ndarray, labels: list[str], by: str) -> pd.DataFrame:
    """Names and probabilities of each patch, or their mean over those of a slide or patient."""
    columns = [f"{PREFIX}{label}" for label in labels]
    table = pd.concat([names, pd.DataFrame(probabilities, columns=columns)], axis=1)
    if by != "patch":
        keys = ["patient", "slide"] if by == "slide" else ["patient"]
        groups = table.groupby(keys, sort=True)
        table = groups[columns].mean().reset_index()
        table.insert(len(keys), "patches", groups.size().to_numpy())
    table["predicted"] = np.array(labels)[table[columns].to_numpy().argmax(axis=1)]
    return table


def _classify_images(settings: ClassifySettings, out: Path, accelerator: Accelerator) -> Classified:
    """Classify the images below a folder, whose scale and patients are not known."""
    folder = Path(settings.data)
    if settings.split or settings.only or settings.by != "patch":
        raise UserError(
            f"{folder} is a folder of images, which have no split, fields, slides or patients.",
            "Leave out split, only and by, or make a dataset folder with `latent-medi shards images`.",
        )
    if accelerator.num_processes > 1:
        raise UserError(f"{folder} is a folder of images, which one process classifies.", "Launch a single process.")
    found = find_files(folder, IMAGE_ENDINGS)
    if found.left_out:
        path, why = found.left_out[0]
        raise UserError(f"{path} cannot be used: {why}", "Repair or remove it.")
    if not found.files:
        raise UserError(f"{folder} holds no dataset and no image ({', '.join(IMAGE_ENDINGS)}).", "Check the path.")
    classifier = ImageClassifier(settings.model, accelerator.device, settings.precision)
    parts, keys, others = [], [], 0
    for images, names in _equal_batches(found.files, folder, settings.device_batch):
        edge = classifier.facts.patch_size
        others += len(names) * (images.shape[1] != edge)
        parts.append(classifier.probabilities(images))
        keys += names
    if others:
        logger.warning("%d images do not have the %d px of the training patches; they are resized.", others, edge)
    names = pd.DataFrame({"key": keys, "patient": "", "slide": ""})
    made = _table(names, np.concatenate(parts), classifier.facts.labels, "patch")
    write_table(made, out)
    return Classified(made, len(keys), None)


def _equal_batches(files: list[Path], folder: Path, most: int) -> Iterator[tuple[np.ndarray, list[str]]]:
    """Images in the order of their paths, in batches of one size, and their paths.

    Raises:
        UserError: An image is not readable, or not square.
    """
    batch: list[np.ndarray] = []
    names: list[str] = []
    for path in progress(files, desc="classifying", unit="images"):
        try:
            image = decode_image(path.read_bytes())
        except UserError as error:
            raise UserError(f"{path}: {error.message}", error.hint or "Repair or remove it.") from None
        if image.shape[0] != image.shape[1]:
            raise UserError(
                f"{path} has {image.shape[1]}×{image.shape[0]} px; patches are square.",
                "Cut it into patches with `latent-medi shards images`.",
            )
        if batch and (len(batch) == most or image.shape != batch[0].shape):
            yield np.stack(batch), names
            batch, names = [], []
        batch.append(image)
        names.append(path.relative_to(folder).as_posix())
    yield np.stack(batch), names
