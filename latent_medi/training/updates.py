"""The updates of a run, one after the other: what the trainings of all networks share.

Order, noise, learning rate and averages are pure functions of (settings, images seen), and a checkpoint holds the
rest. A run that was cut off therefore continues with the numbers of an unbroken run.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import nn

from latent_medi.core.errors import Preempted, UserError
from latent_medi.core.files import atomic_path, write_json
from latent_medi.core.preemption import listening
from latent_medi.core.progress import get_logger, progress
from latent_medi.training import checkpoint, ddp, posthoc_ema, run_folder
from latent_medi.training.ema import Ema, ema_decay
from latent_medi.training.log import CsvLog
from latent_medi.training.optimizer import build_optimizer, learning_rate
from latent_medi.training.prefetch import RunData, made_ahead, threads_for
from latent_medi.training.settings import TrainSettings
from latent_medi.training.start import Start

logger = get_logger("training")

_MULTIPLE = "multiple_of_rate"  # in a group of the optimizer
_FETCH_EVERY = 100  # updates after which losses are fetched from the device at the latest

D = TypeVar("D", bound=RunData)

Losses = Callable[[Any], tuple[torch.Tensor, torch.Tensor]]
"""From part of a process's batch: its share of the update's loss, [], and what the monitor notes of the part."""


class Run(Generic[D]):
    """A network in training: its optimizer, its averages, and its updates.

    Args:
        network: The network at its start, on the CPU. Parameters that require no gradient stay as they are.
        settings: How to train. Fields of the model are not used.
        data: The training rows; latents are whitened.
        timesteps: Length of the noise schedule; 0 for a network without one.
        start: Where to begin; one file is in memory at a time.
        record: What identifies the run; stored in every checkpoint.
        accelerator: Devices and processes.
        drops: Whether the network drops activations while it trains.
        widths: Relative widths of the averages of the weights.
        undecayed: Names of parameters without weight decay.

    Attributes:
        model: The network as it is called in training: wrapped for several processes and for autocast.
        averages: Average of the weights by relative width.
        share: Images per update of one process.
        state: State of the checkpoint that it continues from.
    """

    def __init__(
        self,
        network: nn.Module,
        settings: TrainSettings,
        data: D,
        timesteps: int,
        start: Start,
        record: Mapping[str, Any],
        accelerator: Accelerator,
        drops: bool,
        widths: Sequence[float] = (),
        undecayed: Collection[str] = (),
    ) -> None:
        self.network, self.settings, self.data, self.timesteps = network, settings, data, timesteps
        self.accelerator, self.record, self.drops = accelerator, record, drops
        self.out, self.device = Path(settings.out), accelerator.device
        self.share = settings.global_batch // accelerator.num_processes
        self.largest = min(settings.device_batch or self.share, self.share)
        self.steps = range(start.images // settings.global_batch, settings.total_images // settings.global_batch)
        self.state, self.resumed = start.state, bool(start.files)
        self._clips_apart = False
        names = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
        # In the optimizer's order.
        self._names = [n for n in names if n not in undecayed] + [n for n in names if n in undecayed]

        if self.resumed:
            checkpoint.load_trained(network, checkpoint.load_tensors(start.files["model"]), self._names)
        network.to(self.device)
        if settings.channels_last:
            network.to(memory_format=torch.channels_last)
        self.averages: dict[float, Ema[nn.Module]] = {width: Ema(network) for width in widths}
        trained = [network.get_parameter(name) for name in self._names]
        optimizer = build_optimizer(trained, settings, sum(name in undecayed for name in self._names))
        if self.resumed:
            for width, average in self.averages.items():
                tensors = checkpoint.load_tensors(start.files[average_file(width, settings)])
                checkpoint.load_trained(average.module, tensors, self._names)
                del tensors  # a mapped file, for the optimizer's to take its place
            checkpoint.load_optimizer(optimizer, start.files["optimizer"], self._names)
        if settings.compile:
            ddp.compile_whole(settings.checkpoint_activations, accelerator.num_processes)
            network.get_submodule("unet").compile()
        self.model, self.optimizer = accelerator.prepare(network, optimizer)
        self.model.train()
        if accelerator.scaler is not None and start.state.get("scaler"):
            accelerator.scaler.load_state_dict(start.state["scaler"])

    def train(self, losses: Losses, monitor: Monitor, description: str) -> None:
        """Make all updates that are left.

        Args:
            losses: The loss of part of a batch, from :attr:`model`.
            monitor: Logs and measures.
            description: What the progress bar says.

        Raises:
            UserError: A loss is not finite.
            Preempted: SIGTERM or SIGUSR1 came; a checkpoint was saved first.
        """
        accelerator, settings = self.accelerator, self.settings
        batch, total, main = settings.global_batch, settings.total_images, accelerator.is_main_process
        self._settle(losses)
        monitor.started()
        # The next batches are prepared while the device works on this one.
        threads = threads_for(self.data, self.device)
        with listening() as notice, made_ahead(self._batch, self.steps, threads, self.device) as batches:
            for step in progress(self.steps, total, description, "images", batch, self.steps.start * batch):
                rate = self._update(step, batches, losses, monitor)
                images = (step + 1) * batch
                last = images == total
                stopping = not last and notice.agreed(accelerator, step)
                logging = last or crossed(images, batch, settings.log_every_images)
                saving = last or stopping or crossed(images, batch, settings.checkpoint_every_images)
                # Nothing is saved before its losses were seen to be finite.
                if logging or saving or monitor.waiting >= _FETCH_EVERY:
                    monitor.fetch(step)
                if logging:
                    monitor.report(images, rate)
                monitor.before_saving(step, last)
                if main:
                    self._snapshot(images, last)
                if main and saving:
                    self._save(images, monitor)
                monitor.after_saving(images, last)
                if stopping:
                    accelerator.wait_for_everyone()
                    raise Preempted(
                        f"{notice.given or 'another process received a signal'} at {images:,} of {total:,} images; "
                        "saved, the same command continues"
                    )

    def _update(self, step: int, batches: Iterator[Any], losses: Losses, monitor: Monitor) -> float:
        """One update of the weights and of their averages; returns its learning rate."""
        accelerator, settings = self.accelerator, self.settings
        batch = settings.global_batch
        seen, images = step * batch, (step + 1) * batch
        rate = learning_rate(seen, settings)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get(_MULTIPLE, 1.0)
        if self.drops:  # the masks must not depend on what ran before
            torch.manual_seed(run_folder.dropout_seed(settings.seed, step, accelerator.process_index))

        # Forward and backward, in parts that fit the device. Processes average their gradients in the last part.
        parts = next(batches).parts(self.largest, self.device)
        for i, part in enumerate(parts):
            with accelerator.no_sync(self.model) if i + 1 < len(parts) else nullcontext():
                loss, noted = losses(part)
                accelerator.backward(loss)
            monitor.add(part, loss.detach(), noted.detach())
        norm = self._clip()
        self.optimizer.step()
        ddp.clear(self.model, self.optimizer, len(parts))

        # The scaler skips exactly the updates whose gradients are not finite. Nobody waits for the device to say so.
        made = None if accelerator.scaler is None else norm.isfinite()
        for width, average in self.averages.items():
            average.update(self.network, ema_decay(images, batch, settings.ema, width), made)
        monitor.end_update(norm)
        return rate

    def learn_apart(self, rates: Mapping[str, float]) -> None:
        """Give submodules learning rates of their own, and clip the gradients of each apart; before the first update.

        Args:
            rates: Multiple of the run's learning rate by submodule, in the order of the network; each trained parameter
                is in one of them.
        """
        self._divide(lambda name: next(own for own in rates if name.startswith(f"{own}.")), rates)
        self._clips_apart = True

    def learn_faster(self, names: Collection[str], multiple: float) -> None:
        """Multiply the learning rate of some parameters; before the first update."""
        self._divide(lambda name: name in names, {True: multiple, False: 1.0})

    def _divide(self, own: Callable[[str], Any], rates: Mapping[Any, float]) -> None:
        """Divide the optimizer's group, in its order, into those of neighbours that learn alike."""
        (group,) = self.optimizer.param_groups
        named = zip(self._names, group["params"], strict=True)
        parts = [(key, [p for _, p in found]) for key, found in itertools.groupby(named, lambda pair: own(pair[0]))]
        self.optimizer.param_groups[:] = [{**group, "params": ps, _MULTIPLE: rates[key]} for key, ps in parts]

    def _clip(self) -> torch.Tensor:
        """Clip the gradients, of submodules that learn apart each by itself; returns the norm of all before."""
        limit, groups = self.settings.grad_clip, self.optimizer.param_groups
        if not self._clips_apart:
            return clip_gradients(self.accelerator, list(self.model.parameters()), limit)
        norms = [clip_gradients(self.accelerator, group["params"], limit) for group in groups]
        return torch.linalg.vector_norm(torch.stack(norms))

    def _batch(self, step: int) -> Any:
        size, seed, dropout = self.settings.global_batch, self.settings.seed, self.settings.dropout
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        made = self.data.batch(step, size, seed, self.timesteps, dropout, rank, processes)
        return made.pinned() if self.device.type == "cuda" else made

    def _settle(self, losses: Losses) -> None:
        def idle_pass() -> None:
            losses(self._batch(self.steps[0]).parts(self.largest, self.device)[0])[0].backward()

        if self.steps:
            ddp.settle(self.model, self.optimizer, idle_pass, self.resumed, -(-self.share // self.largest))

    def _snapshot(self, images: int, last: bool) -> None:
        """Keep the averages, where their length is to be chosen afterwards."""
        ema = self.settings.ema
        keeping = bool(self.averages) and (ema.also or ema.snapshot_every_images)
        if keeping and (last or crossed(images, self.settings.global_batch, ema.snapshot_every_images)):
            tensors = {width: average.module.state_dict() for width, average in self.averages.items()}
            posthoc_ema.save_snapshots(self.out, images, tensors)

    def _save(self, images: int, monitor: Monitor) -> None:
        """Write a checkpoint, with the state of the monitor; the main process alone calls."""
        tensors = {
            **monitor.tensors(),
            "model": checkpoint.trained_tensors(self.network, self._names),
            "optimizer": checkpoint.optimizer_tensors(self.optimizer, self._names),
        }
        for width, average in self.averages.items():
            name = average_file(width, self.settings)
            tensors[name] = checkpoint.trained_tensors(average.module, self._names)
        state = {
            "run": self.record,
            **monitor.state(),
            **self.data.state(),
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else {},
        }
        checkpoint.save_checkpoint(self.out / "checkpoints", images, tensors, state, self.settings.keep_checkpoints)


class Monitor:
    """The log of a run, and its stop at a loss that is not finite.

    Every process must make the same calls; only the main one writes. Measures stay on the device until
    :meth:`fetch`, so that no update waits for them.

    Args:
        run: The run, at its start.
        measures: Names of what is measured at each update, the loss first.
    """

    def __init__(self, run: Run[Any], measures: Sequence[str] = ("loss",)) -> None:
        self._run, self._accelerator = run, run.accelerator
        self._images = int(run.state["images"])
        # Of each update since the last row: its measures, and its gradient norm unless fp16's loss scaler skipped it.
        self._window: list[list[float | None]] = [list(row) for row in run.state.get("window", [])]
        self._pending: list[torch.Tensor] = []  # the same, still on the device
        self._parts: list[torch.Tensor] = []  # measures of the parts of the current update
        self._columns = ("images", *measures, "lr", "grad_norm", "images_per_s")
        self._log = self._csv("log.csv", self._columns)
        self._time = time.monotonic()

    def _csv(self, name: str, columns: Sequence[str]) -> CsvLog | None:
        """A CSV log in the folder of the run, in the main process."""
        return CsvLog(self._run.out / name, columns, self._images) if self._accelerator.is_main_process else None

    @property
    def waiting(self) -> int:
        """Updates whose measures are still on the device."""
        return len(self._pending)

    def add(self, part: Any, loss: torch.Tensor, noted: torch.Tensor) -> None:
        """Note part of an update without fetching anything from the device.

        Args:
            part: What was trained on.
            loss: Its share of the update's loss, [].
            noted: What else the training measured of it.
        """
        self._parts.append(loss[None])

    def end_update(self, norm: torch.Tensor) -> None:
        """Note the gradient norm of an update whose parts were added."""
        total = sum(self._parts[1:], self._parts[0])
        self._pending.append(torch.cat([total, norm.detach().reshape(1).to(total)]))
        self._parts.clear()

    def fetch(self, step: int) -> None:
        """Fetch the measures up to update ``step`` from the device.

        Raises:
            UserError: A loss was not finite; see :meth:`_check_finite`.
        """
        values = self._accelerator.reduce(torch.stack(self._pending), "mean").tolist()
        self._check_finite(values, step)
        self._window += [[*row[:-1], row[-1] if math.isfinite(row[-1]) else None] for row in values]
        self._pending.clear()

    def report(self, images: int, rate: float) -> None:
        """Write a row of the log about the updates since the last row.

        Args:
            images: Images seen.
            rate: Learning rate of the last update.
        """
        now = time.monotonic()
        columns = zip(*self._window, strict=True)
        *measures, norm = (self.average([value for value in column if value is not None]) for column in columns)
        row = (*measures, rate, norm, round((images - self._images) / (now - self._time), 1))
        self._accelerator.log(dict(zip(self._columns[1:], row, strict=True)), step=images)
        if self._log is not None:
            self._log.write([(images, *map(repr, row))])
        self._time, self._images = now, images
        self._window.clear()

    @staticmethod
    def average(values: Sequence[float]) -> float:
        """Mean of some numbers, NaN of none."""
        return sum(values) / len(values) if values else float("nan")

    def started(self) -> None:
        """Called before the first update."""

    def before_saving(self, step: int, last: bool) -> None:
        """Called after every update, before its checkpoint; ``last`` is true for the run's last one."""

    def after_saving(self, images: int, last: bool) -> None:
        """Called after every update, once all that matters is safe."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, JSON-able."""
        return {"window": self._window}

    def tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        """What a checkpoint keeps of it as tensors, by file and name."""
        return {}

    def _check_finite(self, values: list[list[float]], step: int) -> None:
        """Stop at the first update whose loss or gradient is not finite.

        ``out/not_finite`` then holds the update's numbers and keys, and the weights as they are now, a few updates
        later.

        Raises:
            UserError: Names the update and its patches.
        """
        settings, scaled = self._run.settings, self._accelerator.scaler is not None
        for update, (loss, *_, norm) in enumerate(values, step + 2 - len(values)):
            # Under fp16 a gradient beyond its range is normal: the scaler skips that update.
            if math.isfinite(loss) and (scaled or math.isfinite(norm)):
                continue
            images = (update - 1) * settings.global_batch
            rows = self._run.data.at(update - 1, settings.global_batch, settings.seed)
            keys = self._run.data.keys[rows].astype(str).tolist()
            folder = self._run.out / "not_finite"
            if self._accelerator.is_main_process:
                with atomic_path(folder) as temporary:
                    temporary.mkdir()
                    numbers = [[repr(x) for x in value] for value in values]  # JSON cannot hold what is not finite
                    record = {"update": update, "images": images, "keys": keys}
                    record |= {"losses_and_norms_since_the_last_look": numbers}
                    record |= {"settings": run_folder.plain(asdict(settings))}
                    write_json(temporary / "update.json", record)
                    weights = {name: tensor.contiguous() for name, tensor in self._run.network.state_dict().items()}
                    save_file(weights, temporary / "model.safetensors")
            raise UserError(
                f"The loss of update {update} (from {images:,} images on) is {loss}, its gradient norm {norm}. Its "
                f"patches: {', '.join(keys)}. {folder} holds the state.",
                "No checkpoint was written since. Check the latents of these patches; else lower lr, lengthen the "
                "warm-up, or use bf16 instead of fp16.",
            )


def crossed(images: int, batch: int, every: int) -> bool:
    """Whether the update that brought the run to ``images`` passed a multiple of ``every`` images; never for 0."""
    return every > 0 and images // every > (images - batch) // every


def average_file(width: float, settings: TrainSettings) -> str:
    """Name of an average's file in a checkpoint, without its ending."""
    return "ema" if width == settings.ema.relative_width else f"ema-{width:.4f}"


def clip_gradients(accelerator: Accelerator, parameters: list[nn.Parameter], limit: float) -> torch.Tensor:
    """Scale the gradients down to a norm of at most ``limit`` (0: any); returns their norm before."""
    accelerator.unscale_gradients()
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    # On the CPU reading the norm costs nothing, and most updates then need no pass over the gradients.
    if limit and (norm.device.type != "cpu" or norm > limit):
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm
