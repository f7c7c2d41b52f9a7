"""Previews during training: a grid of samples, and distances between samples and data.

Every process generates an equal share, so that none waits for another. A GPU decodes the grid between two updates; a
CPU decodes it in a thread during training. A thread writes it. With an encoder every process decodes its whole share
between two updates. Previews use random numbers of their own and leave those of the training unchanged.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from latent_medi.core.errors import UserError
from latent_medi.core.files import atomic_path
from latent_medi.core.progress import get_logger
from latent_medi.diffusion.conditioning import Conditions
from latent_medi.diffusion.denoiser import Denoiser
from latent_medi.diffusion.objective import make_scheduler
from latent_medi.diffusion.pipeline import MediPipeline
from latent_medi.diffusion.samplers import draw_noise, make_sampler
from latent_medi.diffusion.settings import ObjectiveSettings, SamplerSettings
from latent_medi.latents.autoencoder import Autoencoder
from latent_medi.statistics.distances import frechet_distance
from latent_medi.training.data import TrainingData
from latent_medi.training.estimate.step_cost import AUTOCAST
from latent_medi.training.preview_distance import PatchDistance, gathered
from latent_medi.training.settings import TrainSettings

logger = get_logger("training")

FOLDER = "previews"
_STREAM = 7  # different from the streams of sample_order.py and batch_randomness.py
_DECODED_AT_ONCE = 8
_MOST_SHOWN = 64


class Measured(NamedTuple):
    """What was measured of a preview: a row of previews.csv, or its empty cells for what was not measured.

    Args:
        images: Images seen.
        fd_pooled: Fréchet distance of :func:`pooled` latents of samples and training patches.
        fd_pooled_real: The same of two sets of training patches.
        encoder: Name of the encoder of ``kid``, "" without one.
        kid: Kernel distance of samples to training patches in the encoder's features.
        n: Samples.
    """

    images: int
    fd_pooled: float
    fd_pooled_real: float
    encoder: str
    kid: float | None
    n: int

    @property
    def numbers(self) -> dict[str, float]:
        """What trackers show, by name."""
        values = self._asdict()
        return {name: values[name] for name in ("fd_pooled", "fd_pooled_real", "kid", "n") if values[name] is not None}


COLUMNS = Measured._fields


def pooled(latents: torch.Tensor) -> np.ndarray:
    """Mean and standard deviation of each channel over a latent, float64 [n, 2C] of latents [n, C, h, w]."""
    flat = latents.double().flatten(2)
    return torch.cat([flat.mean(2), flat.std(2)], 1).cpu().numpy()


class Previews:
    """Samples of the averaged model during a run.

    The conditions are those of a random choice of training patches, drawn once, so that samples and the real latents of
    these patches should have the same distribution. The Fréchet distance is that of :func:`pooled` latents: it is cheap
    and ignores structure, but shows a run that diverges. The distance between two sets of real patches of the same size
    is reported with it. With an encoder, the kernel distance of the decoded samples to the images of these patches is
    measured as well.

    Args:
        settings: The run's.
        data: Its rows, whitened.
        autoencoder: Decodes the grid.
        objective: The run's.
        accelerator: Its processes.
    """

    def __init__(
        self,
        settings: TrainSettings,
        data: TrainingData,
        autoencoder: Autoencoder,
        objective: ObjectiveSettings,
        accelerator: Accelerator,
    ) -> None:
        self.out = Path(settings.out)
        self._autoencoder, self._objective, self._accelerator = autoencoder, objective, accelerator
        self._shift, self._scale, self._precision = data.shift, data.scale, settings.precision
        self._sampler = SamplerSettings(steps=settings.preview_steps)
        self._batch = settings.device_batch or settings.global_batch
        rank, processes = accelerator.process_index, accelerator.num_processes
        # As many for every process; at least two samples per dimension of the pooled latents.
        wanted = max(settings.preview_images, 4 * data.store.shape[0])
        count = -(-wanted // processes) * processes
        draw = np.random.default_rng([_STREAM, settings.seed])
        chosen = np.sort(draw.choice(len(data), count, replace=len(data) < count))
        others = np.sort(draw.choice(len(data), count, replace=len(data) < count))
        conditions = None if data.conditions is None else data.conditions.rows(torch.from_numpy(chosen))
        if conditions is not None:  # equal combinations next to each other
            order = np.lexsort(conditions.codes.numpy().T[::-1])
            chosen, conditions = chosen[order], conditions.rows(torch.from_numpy(order))
        self.count, mine = count, slice(rank, None, processes)
        self._conditions: Conditions | None = None if conditions is None else conditions.rows(mine)
        self._noise = draw_noise(range(count), data.store.shape)[0][mine]
        self._real, self._other = (pooled(self._latents(data, rows)) for rows in (chosen, others))
        self._floor = frechet_distance(self._real, self._other)
        self._distance = PatchDistance(settings, data.rows[chosen], accelerator) if settings.preview_encoder else None
        make_sampler(make_scheduler(objective).config, self._sampler)  # refuses settings now rather than after hours
        self._thread = ThreadPoolExecutor(1)
        self._last: Future[None] | None = None

    def _latents(self, data: TrainingData, rows: np.ndarray) -> torch.Tensor:
        mean, std = data.store.moments(data.rows[rows])
        raw = mean.cpu() if std is None else mean.cpu() + std.cpu() * draw_noise(range(len(rows)), mean.shape[1:])[0]
        return (raw - self._shift.view(-1, 1, 1)) / self._scale.view(-1, 1, 1)

    def make(self, images: int, averaged: Denoiser) -> Measured:
        """Generate samples, measure their distance, and start writing the grid; every process must call.

        Args:
            images: Images seen.
            averaged: The averaged denoiser, on the training device.
        """
        pipeline = MediPipeline.from_parts(averaged, self._objective, self._autoencoder, self._shift, self._scale)
        mine = pipeline.generate_latents(
            self._conditions, self._noise, self._sampler, batch=self._batch, precision=self._precision, keep_layout=True
        )
        share = gathered(self._accelerator, mine)
        finite = bool(share.isfinite().all())
        distance = frechet_distance(pooled(share), self._real) if finite else float("nan")
        encoder, kid, tiles = "", None, None
        if self._distance is not None:
            self.finish()  # the autoencoder may still draw the picture before
            encoder, kid = self._distance.name, float("nan")
            if finite:
                decoded = self._decode(pipeline, mine)
                kid = self._distance.measure(decoded)
                tiles = gathered(self._accelerator, torch.from_numpy(decoded))[self._shown].numpy()
        if self._accelerator.is_main_process and self._last is not None and not self._last.done():
            # Decoding is slower than training here, and the other processes must not wait for a picture.
            logger.warning("No picture at %s images: the previous one is still being drawn.", f"{images:,}")
        elif self._accelerator.is_main_process:
            self.finish()
            shown = share[self._shown]
            if tiles is None and self._accelerator.device.type != "cpu":
                tiles = decode_on(self._accelerator.device, pipeline, shown, self._precision)
            self._last = self._thread.submit(self._draw, pipeline, shown, tiles, images)
        return Measured(images, distance, self._floor, encoder, kid, self.count)

    @property
    def _shown(self) -> slice:
        """The samples of the grid."""
        return slice(None, None, -(-self.count // _MOST_SHOWN))

    def _decode(self, pipeline: MediPipeline, latents: torch.Tensor) -> np.ndarray:
        """Images of latents, decoded on the training's device if they fit there."""
        device, tiles = self._accelerator.device, None
        if device.type != "cpu":
            tiles = decode_on(device, pipeline, latents, self._precision)
        return _decoded(pipeline, latents) if tiles is None else tiles

    def finish(self) -> None:
        """Wait for the last grid; a failure is logged and does not end the training."""
        if self._last is None:
            return
        error = self._last.exception()
        if error is not None:
            logger.warning("A preview could not be drawn: %s: %s", type(error).__name__, error)
        self._last = None

    def _draw(self, pipeline: MediPipeline, latents: torch.Tensor, tiles: np.ndarray | None, images: int) -> None:
        tiles = _decoded(pipeline, latents) if tiles is None else tiles
        columns = int(np.ceil(np.sqrt(len(tiles))))
        rows, edge = -(-len(tiles) // columns), tiles.shape[1]
        grid = np.full((rows * columns, edge, edge, 3), 255, np.uint8)
        grid[: len(tiles)] = tiles
        whole = grid.reshape(rows, columns, edge, edge, 3).transpose(0, 2, 1, 3, 4).reshape(rows * edge, -1, 3)
        with atomic_path(self.out / FOLDER / f"images-{images:012d}.png") as path:
            Image.fromarray(whole).save(path, "PNG")


def _decoded(pipeline: MediPipeline, latents: torch.Tensor) -> np.ndarray:
    return np.concatenate([pipeline.decode(part) for part in latents.split(_DECODED_AT_ONCE)])


def decode_on(device: torch.device, pipeline: MediPipeline, latents: torch.Tensor, precision: str) -> np.ndarray | None:
    """Images of latents, decoded on the training's device in its precision; the memory is released afterwards.

    Args:
        device: Where to decode.
        pipeline: Its autoencoder is moved there, and back afterwards.
        latents: fp32 [n, C, h, w], whitened.
        precision: "fp32", "bf16" or "fp16".

    Returns:
        uint8 [n, H, W, 3]; ``None`` if the memory is too small or a pixel is beyond the range of the precision.
    """
    autoencoder, dtype = pipeline.autoencoder, AUTOCAST[precision]
    before = autoencoder.device
    try:
        autoencoder.to(device)
        with nullcontext() if dtype is None else torch.autocast(device.type, dtype):
            return _decoded(pipeline, latents)
    except (torch.OutOfMemoryError, UserError) as error:
        logger.warning("A preview is decoded on the CPU: %s", str(error).partition("\n")[0])
        return None
    finally:
        autoencoder.to(before)
        if device.type == "cuda":
            torch.cuda.empty_cache()
