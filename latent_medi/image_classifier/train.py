"""Training of an image classifier, to be read from top to bottom.

    latent-medi image-classifier --config histodiffusion/vit data=runs/crc/data out=runs/crc/vit
    accelerate launch --num_processes 8 -m latent_medi.cli image-classifier --config …      (same result, faster)

The updates are those of `training/updates.py`: the same command continues a run that was cut off, and gives the numbers
of an unbroken run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import nn
from torch.nn import functional as F

from latent_medi.core.agreement import agreed
from latent_medi.core.errors import UserError
from latent_medi.core.files import read_sealed, write_sealed
from latent_medi.core.locks import output_lock
from latent_medi.core.progress import get_logger
from latent_medi.core.records import decode, encode
from latent_medi.features.classifier_folder import ClassifierFacts, build_network, write_classifier
from latent_medi.image_classifier.augment import MixedImages
from latent_medi.image_classifier.data import Parts, default_workers, open_parts
from latent_medi.image_classifier.monitor import ImageClassifierMonitor
from latent_medi.image_classifier.scores import ClassifierScores, classifier_scores, logits_of
from latent_medi.image_classifier.settings import ImageClassifierSettings
from latent_medi.metadata.tables import write_table
from latent_medi.training import run_folder
from latent_medi.training.checkpoint import load_tensors
from latent_medi.training.start import check_strategy, find_start, training_accelerator
from latent_medi.training.updates import Run

logger = get_logger("training")

PRODUCT, SCORES_FILE, PREDICTIONS_FILE = "model", "scores.json", "test_predictions.csv"

# What does not identify a run; data and weights are compared by their content.
FREE = run_folder.FREE | {"synthetic", "weights", "workers"}


def train_image_classifier(
    settings: ImageClassifierSettings, accelerator: Accelerator | None = None
) -> tuple[Path, ClassifierScores | None]:
    """Train an image classifier, or continue a run that was cut off, or return at once if it is finished.

    Args:
        settings: What to do; the result does not depend on the number of processes, but for rounding.
        accelerator: Devices and precision; by default made from the settings and the launcher's environment.

    Returns:
        Its folder, ``out/model``, and its scores on the test patches, as in ``out/scores.json`` (none without a test
        part).

    Raises:
        UserError: Settings that cannot be followed, data or weights that do not fit, a folder with another run or that
            another job writes, or a loss that is not finite.
        Preempted: SIGTERM or SIGUSR1 came; a checkpoint was saved first.
    """
    accelerator = accelerator or training_accelerator(settings.training())
    with output_lock(settings.out, accelerator):
        return _train(settings, accelerator)


def _train(settings: ImageClassifierSettings, accelerator: Accelerator) -> tuple[Path, ClassifierScores | None]:
    out, main, device = Path(settings.out), accelerator.is_main_process, accelerator.device

    with agreed(accelerator) as declared:
        settings.check()
        common = settings.training()
        check_strategy(accelerator, common)
        parts = open_parts(settings)
        network = _network(settings, len(parts.labels))
        _check_pairs(settings, network, accelerator)
        record = describe(settings, parts, network, accelerator.num_processes)
        finished = run_folder.finished(out, record, (PRODUCT,))
        declared.add_input("data", settings.data, lambda: record["data"])
        declared.add_input("data's validation part", settings.data, lambda: record["validation_data"])
        declared.add_input("data's test part", settings.data, lambda: record["test_data"])
        own = {"data", "synthetic", "weights", "device_batch", "workers"}
        declared.add_settings(run_folder.plain(asdict(settings)), without=own)
        declared.add_settings({"finished": finished, "weights": record["weights"]})
    if finished:
        logger.info("%s is finished.", out / PRODUCT)
        return out / PRODUCT, _read_scores(out)
    if main:
        run_folder.begin(out, record, settings, products=(PRODUCT,))
    accelerator.wait_for_everyone()
    if _normalises_batches(network) and accelerator.num_processes > 1:
        from timm.layers import convert_sync_batchnorm

        network = convert_sync_batchnorm(network)

    parts.data.workers = default_workers(device) if settings.workers is None else settings.workers
    parts.data.updates = common.total_images // common.global_batch
    start = find_start(out, record, common, accelerator)
    best = load_tensors(start.files["best"]) if "best" in start.files else {}
    drops, widths = bool(settings.drop_path or settings.dropout), [common.ema.relative_width] if settings.ema else []
    run = Run(network, common, parts.data, 0, start, record, accelerator, drops, widths, undecayed(network))
    module = run.averages[widths[0]].module if widths else network
    monitor = ImageClassifierMonitor(run, settings, parts, module, best)

    def losses(part: MixedImages) -> tuple[torch.Tensor, torch.Tensor]:
        logits = run.model(part.images).float()
        right = (logits.detach().argmax(1) == part.targets.argmax(1)).sum() / run.share
        return -(part.targets * F.log_softmax(logits, dim=1)).sum() / run.share, right

    try:
        run.train(losses, monitor, "image classifier")
    finally:
        parts.data.close()

    # The best weights, in every process: the test patches are scored by all of them, once.
    if main and monitor.best:
        module.load_state_dict(monitor.best)
    if accelerator.num_processes > 1:
        for tensor in module.state_dict().values():
            tensor.copy_(broadcast(tensor))
    module.eval()
    scored = score_test(module, parts, settings, accelerator)
    if main:
        # Before the model: where that is, the run is finished.
        if scored is not None:
            write_sealed(out / SCORES_FILE, encode(scored[0]))
            write_table(scored[1], out / PREDICTIONS_FILE)
        facts = _facts(settings, parts, {**record, "images_seen": common.total_images, "best": monitor.facts})
        write_classifier(out / PRODUCT, module.state_dict(), facts)
    accelerator.wait_for_everyone()
    return out / PRODUCT, scored[0] if scored else None


def _network(settings: ImageClassifierSettings, classes: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        kept = settings.network, settings.image_size, classes, settings.drop_path, settings.dropout, settings.weights
        network = build_network(*kept)
    try:
        with torch.inference_mode():
            network.eval()(torch.zeros(1, 3, settings.image_size, settings.image_size))
    except (AssertionError, RuntimeError) as error:  # such as a size that tokens do not divide
        raise UserError(
            f"The network {settings.network} does not take images of {settings.image_size} px: {error}",
            "Choose another image_size.",
        ) from None
    return network.train()


def _normalises_batches(network: nn.Module) -> bool:
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())


def _check_pairs(settings: ImageClassifierSettings, network: nn.Module, accelerator: Accelerator) -> None:
    """Refuse a number of processes that cannot train this network or share its pairs.

    Raises:
        UserError: Says which number, and what to do.
    """
    processes = accelerator.num_processes
    if settings.augment.mixes and settings.global_batch % (2 * processes):
        raise UserError(
            f"{processes} processes cannot share the pairs of mixup and cutmix in a global_batch of "
            f"{settings.global_batch}.",
            f"Choose a multiple of {2 * processes}, or set augment.mixup=0 augment.cutmix=0.",
        )
    if processes > 1 and accelerator.device.type == "cpu" and _normalises_batches(network):
        raise UserError(
            f"The network {settings.network} has batch normalisation, whose statistics {processes} processes without a "
            "GPU cannot share.",
            "Use one process, or a network without it, such as vit_small_patch16_224 or convnext_tiny.",
        )


def undecayed(network: nn.Module) -> set[str]:
    """Parameters without weight decay: biases, normalisations, and what timm names, such as position embeddings."""
    named: Any = getattr(network, "no_weight_decay", set)
    return {name for name, p in network.named_parameters() if p.ndim <= 1} | set(named())


def describe(settings: ImageClassifierSettings, parts: Parts, network: nn.Module, processes: int) -> dict[str, Any]:
    """What identifies a run: its settings, but for paths and speed, and the content of its data and weights."""
    effective = replace(settings, values=list(parts.labels))
    kept = {key: value for key, value in run_folder.plain(asdict(effective)).items() if key not in FREE}
    record: dict[str, Any] = {"settings": kept, "data": parts.data.fingerprint()}
    record |= {"validation_data": parts.validation.fingerprint(), "test_data": parts.test.fingerprint()}
    record["weights"] = _state_hash(network.state_dict()) if settings.weights else ""
    if _normalises_batches(network):  # over so many images at once, which makes them part of the result
        share = settings.global_batch // processes
        record["normalised_over"] = min(settings.device_batch or share, share) * processes
    return record


def _state_hash(state: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def score_test(
    module: nn.Module, parts: Parts, settings: ImageClassifierSettings, accelerator: Accelerator
) -> tuple[ClassifierScores, pd.DataFrame] | None:
    """Scores over the whole test part, and a table with key, patient, truth and predicted; none without such a part.

    Every process must call.
    """
    test = parts.test
    if not len(test):
        return None
    how = (parts.data.augmentation.preprocessing, test.dataset, test.rows, len(parts.labels))
    logits = logits_of(
        module, *how, settings.device_batch or 256, accelerator, settings.precision, "scoring test patches"
    )
    found = logits.argmax(axis=1)
    scores = classifier_scores(test.labels, found, test.patients, parts.labels, test.dataset.patient_is)
    names, keys = np.array(parts.labels), test.dataset.index["key"].to_numpy(str)[test.rows]
    table = {"key": keys, "patient": test.patients, "truth": names[test.labels], "predicted": names[found]}
    return scores, pd.DataFrame(table)


def _facts(settings: ImageClassifierSettings, parts: Parts, provenance: dict[str, Any]) -> ClassifierFacts:
    dataset = parts.dataset
    return ClassifierFacts(
        settings.network,
        list(parts.labels),
        parts.field.name,
        parts.data.augmentation.preprocessing,
        dataset.patch_size,
        float(dataset.info["mpp"]),
        dataset.patient_is,
        {**parts.info, **provenance},
    )


def _read_scores(out: Path) -> ClassifierScores | None:
    if not (out / SCORES_FILE).is_file():
        return None
    remedy = "Remove the folder's model and repeat the command, which scores it again."
    content, _ = read_sealed(out / SCORES_FILE, remedy)
    return decode(ClassifierScores, content)
