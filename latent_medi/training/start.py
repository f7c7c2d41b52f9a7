"""The start of a run: its processes and precision, and the checkpoint that it continues from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DistributedType, broadcast_object_list

from latent_medi.core.errors import UserError
from latent_medi.core.progress import get_logger
from latent_medi.launch import make_accelerator
from latent_medi.training import checkpoint, prolonged, run_folder
from latent_medi.training.settings import TrainSettings

logger = get_logger("training")

ACCELERATE_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
"""Accelerate's word for each precision; ours avoids "no", which YAML reads as false."""


def training_accelerator(settings: TrainSettings) -> Accelerator:
    """The accelerator of a run: precision and trackers from the settings, processes from the launcher."""
    return make_accelerator(
        mixed_precision=ACCELERATE_PRECISION[settings.precision],
        log_with=list(settings.trackers) or None,
        project_dir=settings.out,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )


def check_strategy(accelerator: Accelerator, settings: TrainSettings) -> None:
    """Refuse a way of distributing that is not supported, and a batch that the processes cannot share equally.

    Raises:
        UserError: Names the strategy, or the setting of the launcher or of the run that does not fit.
    """
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise UserError(
            f"Training under {accelerator.distributed_type.value} is not supported.",
            "These networks (up to 450 M parameters) and their optimizer fit on one device, so sharding would only add "
            "traffic. Launch plain multi-GPU, with a smaller device_batch if memory is short.",
        )
    if accelerator.mixed_precision != ACCELERATE_PRECISION[settings.precision]:
        raise UserError(
            f"The launcher's precision is {accelerator.mixed_precision}, and the settings say {settings.precision}.",
            "Set precision, which belongs to the run, and leave it out of the launcher's configuration.",
        )
    if accelerator.gradient_accumulation_steps != 1:
        raise UserError(
            f"The launcher's gradient_accumulation_steps is {accelerator.gradient_accumulation_steps}, which would "
            "scale the gradients.",
            "Leave it out: accumulation follows from global_batch, device_batch and the number of processes.",
        )
    if settings.global_batch % accelerator.num_processes:
        raise UserError(
            f"{accelerator.num_processes} processes cannot share a global_batch of {settings.global_batch} equally.",
            "Choose a multiple; the number of processes must not change what is trained.",
        )


@dataclass(frozen=True)
class Start:
    """Where a run begins or continues.

    Args:
        files: Files with the tensors of the checkpoint, by name; none at the beginning.
        state: The rest of the checkpoint; ``images`` alone at the beginning.
    """

    files: dict[str, Path]
    state: dict[str, Any]

    @property
    def images(self) -> int:
        """Images seen."""
        return int(self.state["images"])


def find_start(out: Path, record: Mapping[str, Any], settings: TrainSettings, accelerator: Accelerator) -> Start:
    """The newest whole checkpoint of a run, or its beginning; every process must call.

    Args:
        out: Folder of the run.
        record: What identifies the run.
        settings: The run, which may be longer than it was.
        accelerator: The processes. The main one chooses, so that all agree.

    Raises:
        UserError: The checkpoint is of another run.
    """
    main = accelerator.is_main_process
    found = [checkpoint.newest_checkpoint(out / "checkpoints") if main else None]
    newest: Path | None = (broadcast_object_list(found) if accelerator.num_processes > 1 else found)[0]
    if newest is None:
        return Start({}, {"images": 0})
    state = checkpoint.load_state(newest)
    start = Start(checkpoint.tensor_files(newest, state), state)
    run_folder.check_same(out, record, start.state["run"])
    if main:
        logger.info("Continuing at %s images.", f"{start.images:,}")
        prolonged.explain(settings, start.state["run"], start.images)
    return start
