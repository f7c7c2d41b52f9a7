"""A synthetic dataset folder: written shard by shard by all processes, and completed by a second run after a kill."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from latent_medi.core.errors import Preempted, UserError
from latent_medi.core.preemption import listening
from latent_medi.core.progress import Progress, get_logger
from latent_medi.diffusion.pipeline import MediPipeline
from latent_medi.sampling.settings import GenerateSettings, TranslateSettings
from latent_medi.shards.dataset import INFO_FILE, PatchDataset
from latent_medi.shards.writing.background_writer import write_behind
from latent_medi.shards.writing.finish import Description, finish_dataset
from latent_medi.shards.writing.records import kept_shards, write_record
from latent_medi.shards.writing.rewrite import reopen_dataset, shard_records
from latent_medi.shards.writing.writer import Patch, write_shard

logger = get_logger("sampling")


@dataclass(frozen=True)
class SyntheticDataset:
    """A dataset folder to write.

    Args:
        folder: The folder.
        about: The dataset. Its provenance is everything that the patches depend on: shards with another provenance are
            written again.
        patches: Number of patches.
        settings: Sizes of batch and shard.
    """

    folder: Path
    about: Description
    patches: int
    settings: GenerateSettings | TranslateSettings

    def finished(self) -> PatchDataset | None:
        """The dataset if an earlier run has finished it; ``None`` if there is none, or one of a shorter plan.

        Raises:
            UserError: The folder holds another dataset.
        """
        if not (self.folder / INFO_FILE).exists():
            return None
        done = PatchDataset.open(self.folder)
        if self.grows(done):
            return None
        if done.info["provenance"] != self.about.provenance or done.name != self.about.name:
            raise UserError(f"{self.folder} holds another dataset.", "Choose another folder, or remove this one first.")
        logger.info("%s is finished.", self.folder)
        return done

    def grows(self, done: PatchDataset) -> bool:
        """Whether a finished dataset has the patches of the first rows of this one's plan, and no others."""
        before, now = done.info["provenance"], self.about.provenance
        if "plan" not in now or "plan" not in before or done.name != self.about.name:
            return False
        rows = before["plan"]["rows"]
        longer = len(rows) < len(now["plan"]["rows"]) and rows == now["plan"]["rows"][: len(rows)]
        return longer and {**before, "plan": now["plan"]} == now

    def reopen(self) -> None:
        """Continue a finished dataset of a shorter plan: its whole shards stay, the last one is made again."""
        if not (self.folder / INFO_FILE).exists():
            return
        done, size = PatchDataset.open(self.folder), self.settings.patches_per_shard
        whole = [record for record in shard_records(done) if record.count == size]
        reopen_dataset(self.folder)
        for record in whole:
            write_record(self.folder, replace(record, token=digest(self.about.provenance)))
        logger.info("%s: the plan is longer now; %d of %d patches are kept.", self.folder, len(whole) * size, len(done))

    def write(self, patches: Callable[[range], Iterator[Patch]], accelerator: Accelerator, desc: str) -> PatchDataset:
        """Write the shards that are not finished, and then the index.

        Args:
            patches: Makes the patches of a range of positions, from 0 to the number of patches.
            accelerator: Its processes share the shards; the first one writes the index.
            desc: Name of the progress display.

        Raises:
            Preempted: SIGTERM or SIGUSR1 came; finished shards are kept.
        """
        token, size = digest(self.about.provenance), self.settings.patches_per_shard
        shards = range(-(-self.patches // size))
        finished = kept_shards(self.folder, [token] * len(shards))
        own = [n for n in shards if n not in finished and n % accelerator.num_processes == accelerator.process_index]
        positions = {n: range(n * size, min((n + 1) * size, self.patches)) for n in own}
        count, start = sum(map(len, positions.values())), time.monotonic()
        shown = accelerator.is_main_process
        with listening() as notice, Progress(count, desc, "images") as counter:

            def counted(part: range) -> Iterator[Patch]:
                for patch in patches(part):
                    if notice.given:
                        raise Preempted(f"{notice.given}: finished shards are kept. The same command makes the others.")
                    counter.add()
                    yield patch

            def write(number: int, made: Iterator[Patch]) -> None:
                write_shard(self.folder, number, made, self.about.codec, token)

            write_behind(
                ((number, counted(part)) for number, part in positions.items()), write, 2 * self.settings.device_batch
            )
        if shown and count:
            logger.info("%.3g images/s in each process", count / (time.monotonic() - start))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            finish_dataset(self.folder, self.about, shards)
        accelerator.wait_for_everyone()
        return PatchDataset.open(self.folder)


def digest(value: Any) -> str:
    """Hex SHA-256 of a JSON-able value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def model_provenance(pipeline: MediPipeline, model_hash: str, seen: Any) -> dict[str, Any]:
    """What a dataset's provenance records of the model.

    Args:
        pipeline: The model.
        model_hash: Its hash, adapters included.
        seen: Record of the combinations that the model was trained on, see
            :mod:`latent_medi.metadata.training_record`; left out if empty.
    """
    adapters = [{"hash": digest, "scale": scale} for digest, scale in pipeline.adapters]
    return {
        "model": model_hash,
        **({"adapters": adapters} if adapters else {}),
        "autoencoder": pipeline.autoencoder.hash,
        "trained_on": pipeline.provenance.get("name", ""),
        **({"seen": seen} if seen else {}),
    }


def load_adapters(pipeline: MediPipeline, folders: list[str], scales: list[float], is_loaded: bool) -> None:
    """Stack adapters on a model that was just read.

    Args:
        pipeline: The model.
        folders: Adapter folders, in order.
        scales: Scale of each; none means 1 for each.
        is_loaded: Whether the caller gave the pipeline, which then is not changed.

    Raises:
        UserError: Another number of scales, adapters for a pipeline of the caller, or an adapter that does not fit.
    """
    scales = scales or [1.0] * len(folders)
    if len(scales) != len(folders):
        raise UserError(f"There are {len(folders)} adapters and {len(scales)} adapter_scales.", "Give one for each.")
    if folders and is_loaded:
        raise UserError(
            "Adapters are loaded onto a model folder, and a pipeline is given.", "Call its load_adapter() instead."
        )
    for folder, scale in zip(folders, scales, strict=True):
        pipeline.load_adapter(folder, scale)
