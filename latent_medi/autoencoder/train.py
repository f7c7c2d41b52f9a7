"""Training of an autoencoder, to be read from top to bottom.

    latent-medi autoencoder data=runs/own/data init=sd-vae-ft-mse out=runs/own/autoencoder max_images=100000
    accelerate launch --num_processes 8 -m latent_medi.cli autoencoder …      (same result, faster)

The updates are those of `training/updates.py`: the same command continues a run that was cut off, and gives the numbers
of an unbroken run.
"""

from __future__ import annotations

import copy
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import nn

from latent_medi.autoencoder.data import (
    PixelBatch,
    PixelData,
    measured_fingerprint,
    measured_parts,
    open_pixels,
)
from latent_medi.autoencoder.losses import TrainedAutoencoder
from latent_medi.autoencoder.measure import AutoencoderMonitor, Reconstructions, last_rows
from latent_medi.autoencoder.networks import TrainedClassifier, new_autoencoder
from latent_medi.autoencoder.perceptual import PerceptualDistance, load_perceptual
from latent_medi.autoencoder.settings import AutoencoderSettings
from latent_medi.core.agreement import agreed
from latent_medi.core.errors import UserError
from latent_medi.core.locks import output_lock
from latent_medi.core.progress import get_logger
from latent_medi.features.needed import check_encoder
from latent_medi.latents.autoencoder import Autoencoder, load_autoencoder, save_autoencoder
from latent_medi.latents.networks import deterministic, factor_of, weight_hash
from latent_medi.training import run_folder
from latent_medi.training.start import check_strategy, find_start, training_accelerator
from latent_medi.training.updates import Run

logger = get_logger("training")

PRODUCT = "autoencoder"

# What does not identify a run; the data, the start and the perceptual network are compared by their content.
FREE = run_folder.FREE | {"init", "encoders", "weights", "others", "measure"}
FREE |= {"measure_patches", "measure_every_images"}


def train_autoencoder(settings: AutoencoderSettings, accelerator: Accelerator | None = None) -> dict[str, Any]:
    """Train an autoencoder, or continue a run that was cut off, or return at once if it is finished.

    Args:
        settings: What to do; the result does not depend on the number of processes or on ``device_batch``, but for
            rounding.
        accelerator: Devices and precision; by default made from the settings and the launcher's environment.

    Returns:
        "autoencoder": its folder, ``out/autoencoder``, which :func:`~latent_medi.latents.autoencoder.load_autoencoder`
        reads; "patches" and "patients" trained on; "measured": the rows of evaluation.csv at the beginning and end.

    Raises:
        UserError: Settings that cannot be followed, data that do not fit, a folder with another run or that another
            job writes, or a loss that is not finite.
        Preempted: SIGTERM or SIGUSR1 came; a checkpoint was saved first.
    """
    accelerator = accelerator or training_accelerator(settings.training())
    with output_lock(settings.out, accelerator):
        return _train_autoencoder(settings, accelerator)


def _train_autoencoder(settings: AutoencoderSettings, accelerator: Accelerator) -> dict[str, Any]:
    out, main = Path(settings.out), accelerator.is_main_process

    # The start, the data and the networks that are trained along.
    with agreed(accelerator) as declared:
        settings.check()
        common = settings.training()
        check_strategy(accelerator, common)
        start_model, source, latents_of = open_start(settings)
        channels = 0 if deterministic(start_model) else int(start_model.config["latent_channels"])
        data = open_pixels(settings, factor_of(start_model), channels)
        parts = measured_parts(settings, data, factor_of(start_model))
        distance = load_perceptual(settings.perceptual) if settings.perceptual.weight else None
        record = describe(settings, data, weight_hash(start_model), distance)
        finished = run_folder.finished(out, record, (PRODUCT,))
        for name in [] if finished else settings.encoders:  # they are loaded later
            check_encoder(name, settings.weights.get(name, ""))
        declared.add_input("data", settings.data, data.fingerprint)
        declared.add_input("init", settings.init, lambda: record["source"])
        declared.add_input("measured patches", settings.data, lambda: measured_fingerprint(parts))
        own = {"data", "init", "weights", "others", "device_batch"}
        declared.add_input("classifier.model", settings.classifier.model, lambda: record.get("classifier", ""))
        declared.add_settings({**run_folder.plain(asdict(settings)), "finished": finished}, without=own)
    if finished:
        logger.info("%s is finished.", out / PRODUCT)
        return result(out, data)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        network = TrainedAutoencoder(copy.deepcopy(start_model), settings, len(data.values), data.crop)
        check_size(network, distance, data.crop)
    if main:
        run_folder.begin(out, record, settings, products=(PRODUCT,))
    accelerator.wait_for_everyone()

    reconstructions = Reconstructions(settings, parts, start_model, accelerator)
    start = find_start(out, record, common, accelerator)
    widths = [common.ema.relative_width] if settings.average_width else []
    drops = any(isinstance(module, nn.Dropout) and module.p for module in network.modules())
    run = Run(network, common, data, 0, start, record, accelerator, drops, widths)
    run.learn_apart(network.rates)
    if distance is not None:
        distance.to(accelerator.device)
    averaged = cast(TrainedAutoencoder, run.averages[widths[0]].module) if widths else network
    monitor = AutoencoderMonitor(run, settings, network, averaged, reconstructions)

    def losses(part: PixelBatch) -> tuple[torch.Tensor, torch.Tensor]:
        total, each = run.model(part, distance)
        return total / run.share, each / run.share

    run.train(losses, monitor, "autoencoder")

    if main:
        made = Autoencoder(averaged.autoencoder.to("cpu"), source, latents_of)
        facts = {"images_seen": common.total_images, "measured": last_rows(out)}
        save_autoencoder(made, out / PRODUCT, {**data.info, **facts, **record})
    accelerator.wait_for_everyone()
    return result(out, data)


def open_start(settings: AutoencoderSettings) -> tuple[Any, str, list[str]]:
    """The autoencoder to start from, fp32 on the CPU; its name; and hashes of those whose latents the result decodes.

    Without init, its weights are drawn from the seed.

    Raises:
        UserError: It is absent or damaged, or its numbers do not fit.
    """
    if settings.init:
        loaded = load_autoencoder(settings.init)
        kept = [loaded.hash, *loaded.latents_of] if settings.train == "decoder" else []
        return loaded.model, loaded.source, kept
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return new_autoencoder(settings.network), "", []


def check_size(network: TrainedAutoencoder, distance: PerceptualDistance | None, crop: int) -> None:
    """Try the networks that see reconstructions on an image of the training's size.

    Raises:
        UserError: One does not take such an image; names its setting.
    """
    image = torch.zeros(1, 3, crop, crop)
    parts = {"classifier": network.classifier, "adversarial": network.discriminator}
    calls: dict[str, Any] = {name: part for name, part in parts.items() if part is not None}
    if distance is not None:
        calls["perceptual"] = lambda x: distance(x, x)
    for name, call in calls.items():
        try:
            with torch.no_grad():
                call(image)
        except (AssertionError, RuntimeError) as error:  # each network has its own
            raise UserError(
                f"The network of {name} does not take images of {crop} px: {error}", f"Change {name}, or crop."
            ) from None


def describe(
    settings: AutoencoderSettings, data: PixelData, start: str, distance: PerceptualDistance | None
) -> dict[str, Any]:
    """What identifies a run: its settings, but for paths and speed, and the content of data and networks."""
    kept = {key: value for key, value in run_folder.plain(asdict(settings)).items() if key not in FREE}
    del kept["perceptual"]["weights"], kept["classifier"]["model"]
    if settings.init:
        del kept["network"]
    perceptual = distance.identity if distance is not None else ""
    content = {"data": data.fingerprint(), "source": start, "perceptual": perceptual}
    if settings.classifier.weight and settings.classifier.model:
        content["classifier"] = weight_hash(TrainedClassifier(settings.classifier.model))
    return {"settings": kept, **content}


def result(out: Path, data: PixelData) -> dict[str, Any]:
    """What :func:`train_autoencoder` returns."""
    patients = int(data.dataset.index["patient"].iloc[data.rows].nunique())
    counts = {"patches": len(data), "patients": patients}
    return {"autoencoder": str(out / PRODUCT), **counts, "measured": last_rows(out)}
