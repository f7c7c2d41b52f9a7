"""Training of a denoiser, to be read from top to bottom; `updates.py` makes the updates.

    accelerate launch train.py --config demo/medi data=runs/demo/data latents=runs/demo/latents out=runs/demo/medi
    accelerate launch --num_processes 8 -m latent_medi.training --config …      (same result, faster)

Was the run killed? Run the same command again: it continues from the newest checkpoint, and gives the numbers of an
unbroken run.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import cast

import torch
from accelerate import Accelerator

from latent_medi.core.agreement import agreed
from latent_medi.core.locks import output_lock
from latent_medi.core.progress import get_logger
from latent_medi.diffusion.denoiser import Denoiser
from latent_medi.diffusion.objective import Objective, diffusion_loss
from latent_medi.features.needed import check_encoder
from latent_medi.training import run_folder
from latent_medi.training.data import Batch, open_data
from latent_medi.training.finetune.parameter_groups import tables_of_new_fields
from latent_medi.training.finetune.transfer import inherited_objective, open_source
from latent_medi.training.monitor import DenoiserMonitor
from latent_medi.training.settings import TrainSettings
from latent_medi.training.start import check_strategy, find_start, training_accelerator
from latent_medi.training.updates import Run

logger = get_logger("training")


def train(settings: TrainSettings, accelerator: Accelerator | None = None) -> Path:
    """Train a model, or continue a run that was cut off, or return at once if it is finished.

    Args:
        settings: What to do; the result does not depend on the number of processes or on ``device_batch``, but for
            rounding.
        accelerator: Devices and precision; by default made from the settings and the launcher's environment.

    Returns:
        The model folder, ``out/model``: a :class:`latent_medi.diffusion.pipeline.MediPipeline` with the averaged
        weights; or, with ``lora``, the adapter's folder, ``out/adapter``.

    Raises:
        UserError: Settings that cannot be followed, data that do not fit, a folder with another run or that another
            job writes, or a loss that is not finite.
        Preempted: SIGTERM or SIGUSR1 came; a checkpoint was saved first.
    """
    accelerator = accelerator or training_accelerator(settings)
    with output_lock(settings.out, accelerator):
        return _train(settings, accelerator)


def _train(settings: TrainSettings, accelerator: Accelerator) -> Path:
    out, main, device = Path(settings.out), accelerator.is_main_process, accelerator.device

    # The data, the model and the objective; inherited where the run starts from another model.
    with agreed(accelerator) as declared:
        settings.check()
        check_strategy(accelerator, settings)
        source = open_source(settings.init_from) if settings.init_from else None
        data = open_data(settings, source, device)
        record = run_folder.describe(settings, data, source)
        finished = run_folder.finished(out, record)
        if settings.preview_encoder and not finished:  # it is loaded later
            check_encoder(settings.preview_encoder, settings.preview_weights)
        run_folder.declare(declared, settings, data)
        declared.add_input("init_from", settings.init_from, lambda: record["source"])
        declared.add_settings({"finished": finished})
    if finished:
        logger.info("%s is finished.", out)
        return out / run_folder.product(settings)
    objective = Objective(inherited_objective(source, settings) if source else settings.objective)
    denoiser, table = run_folder.build(settings, data, source)
    autoencoder = run_folder.find_autoencoder(settings, data, source)
    if main:
        run_folder.begin(out, record, settings, table)
    accelerator.wait_for_everyone()

    # Where to begin. The whitening is measured once: another device or batch would measure other last digits.
    start = find_start(out, record, settings, accelerator)
    data.whiten(source, settings.override, start.state.get("whitening"), accelerator)
    drops, widths = run_folder.drops(settings, source), settings.ema.widths()
    run = Run(denoiser, settings, data, objective.timesteps, start, record, accelerator, drops, widths)
    if source is not None:
        run.learn_faster(tables_of_new_fields(source, denoiser), settings.new_fields_lr)
    averaged = cast(Denoiser, run.averages[settings.ema.relative_width].module)
    write = partial(
        run_folder.write_product,
        settings=settings,
        record=record,
        data=data,
        autoencoder=autoencoder,
        objective=objective.settings,
        averaged=averaged,
        source=source,
    )
    monitor = DenoiserMonitor(run, averaged, autoencoder, objective, write)

    def losses(part: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        each = diffusion_loss(run.model, part.latents, part.noise, part.timesteps, part.conditions, objective)
        return each.sum() / run.share, each

    run.train(losses, monitor, "training")

    made = out / run_folder.product(settings)
    if main:
        write(made, settings.total_images, {})
    accelerator.wait_for_everyone()
    monitor.finish()
    return made
