"""Comparison of latent folders, models, adapters, classifiers, autoencoders and training runs with their checksums."""

from __future__ import annotations

from pathlib import Path

from latent_medi.core.checksums import compare, load_tensors, save_tensors, verify_checksums, write_checksums
from latent_medi.core.files import read_object, write_sealed
from latent_medi.diffusion.adapters import ADAPTER_FILE, open_adapter, seal_adapter
from latent_medi.diffusion.model_folder import REMEDY, seal_model
from latent_medi.features.classifier_folder import CLASSIFIER_FILE, read_facts
from latent_medi.latent_classifier.network import KIND, LatentClassifier, seal_classifier
from latent_medi.latents.info import INFO_FILE, read_info, seal_latents
from latent_medi.latents.info import REMEDY as ENCODE_AGAIN
from latent_medi.latents.networks import KINDS
from latent_medi.training.checkpoint import checked_checkpoints, seal_checkpoints
from latent_medi.training.posthoc_ema import list_snapshots
from latent_medi.training.run_folder import RUN_FILE, read_record

IMAGES = ("image classifier", CLASSIFIER_FILE)


def kind_of(folder: Path) -> str:
    """Kind: "latents", "model", "adapter", "classifier", "autoencoder", "image classifier", "run", or "" for none."""
    for kind, file in (("latents", INFO_FILE), ("model", "model_index.json"), ("adapter", ADAPTER_FILE), IMAGES):
        if (folder / file).is_file():
            return kind
    if (folder / "config.json").is_file():
        described = read_object(folder / "config.json")
        if described.get("kind") == KIND:
            return "classifier"
        if described.get("_class_name") in KINDS:
            return "autoencoder"
    return "run" if (folder / RUN_FILE).is_file() else ""


def verify_artefact(folder: Path, seal: bool = False) -> str:
    """Compare everything in a folder with its checksums.

    Args:
        folder: A folder of any kind.
        seal: Also add the checksums that a folder of an earlier version lacks.

    Returns:
        Its kind, see :func:`kind_of`.

    Raises:
        UserError: Something is damaged.
    """
    kind = kind_of(folder)
    if kind == "latents":
        info = read_info(folder)
        compare(folder, {s["file"]: s["sha256"] for s in info["shards"]}, folder / INFO_FILE, ENCODE_AGAIN)
        if seal:
            seal_latents(folder)
    elif kind == "model":
        verify_checksums(folder, REMEDY)
        if seal:
            seal_model(folder)
    elif kind == "adapter":
        open_adapter(folder)
        if seal:
            seal_adapter(folder)
    elif kind == "classifier":
        LatentClassifier.from_pretrained(folder)
        if seal:
            seal_classifier(folder)
    elif kind == "image classifier":
        read_facts(folder)
    elif kind == "autoencoder":
        verify_checksums(folder, "Copy the whole folder again.")
        if seal:
            write_checksums(folder)
    elif kind == "run":
        _verify_run(folder, seal)
    return kind


def _verify_run(folder: Path, seal: bool) -> None:
    record = read_record(folder)
    checked_checkpoints(folder / "checkpoints")
    for snapshot in list_snapshots(folder):
        tensors, sealed = load_tensors(snapshot.path, "Restore it from a copy, or train again.", "pt")
        if seal and not sealed:
            save_tensors(tensors, snapshot.path)
    for product in ("model", "adapter", "classifier", "autoencoder"):
        if (folder / product).is_dir():
            verify_artefact(folder / product, seal)
    if seal:
        seal_checkpoints(folder / "checkpoints")
        write_sealed(folder / RUN_FILE, {"run": record})
