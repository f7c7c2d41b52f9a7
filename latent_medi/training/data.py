"""The training rows of a dataset: latents, conditions, and their batches."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from latent_medi.core.errors import UserError, nearest
from latent_medi.diffusion.conditioning import Conditions, draw_dropout
from latent_medi.diffusion.settings import DropoutSettings
from latent_medi.latents.autoencoder import PRECISIONS, load_autoencoder
from latent_medi.latents.info import made_from
from latent_medi.latents.networks import latents_fit
from latent_medi.latents.store import LatentStore, Residence, moved, pinned
from latent_medi.latents.stream import StreamedLatents
from latent_medi.metadata.row_filter import Only, only_mask, only_text
from latent_medi.metadata.schema import UNKNOWN_WORD, Schema
from latent_medi.metadata.training_record import training_record
from latent_medi.shards.dataset import SPLIT_PREFIX, PatchDataset
from latent_medi.shards.reading.remote import open_dataset
from latent_medi.training.batch_randomness import batch_generator, draw_batch
from latent_medi.training.finetune.transfer import Source, transferred_schema
from latent_medi.training.sample_order import balance_weights, rank_slice, rows_at
from latent_medi.training.settings import StreamSettings, TrainSettings

AHEAD = 2
"""Updates whose patches are read and decoded in advance, when streaming."""


@dataclass(frozen=True)
class Batch:
    """The part of a global batch that one process trains on: n images.

    Args:
        latents: fp32 [n, C, h, w]; whitened sample of the autoencoder's posterior.
        noise: fp32 [n, C, h, w].
        timesteps: int64 [n].
        conditions: Of n images, dropout applied; ``None`` for an unconditional model.
    """

    latents: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    conditions: Conditions | None

    def pinned(self) -> Batch:
        """The same, with tensors of the CPU in pinned memory."""
        return self._each(pinned)

    def to(self, device: torch.device) -> Batch:
        """The same on a device; see :func:`latent_medi.latents.store.moved`."""
        return self._each(lambda tensor: moved(tensor, device))

    def parts(self, size: int, device: torch.device) -> list[Batch]:
        """The batch, moved to a device as a whole and split into parts of at most ``size`` images."""
        whole = self.to(device)
        parts = [slice(i, i + size) for i in range(0, len(self), size)]
        return [whole._each(lambda tensor, part=part: tensor[part]) for part in parts]  # type: ignore[misc]

    def _each(self, do: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        known = self.conditions
        conditions = None if known is None else Conditions(do(known.codes), do(known.values))
        return Batch(do(self.latents), do(self.noise), do(self.timesteps), conditions)

    def __len__(self) -> int:
        return len(self.latents)


@dataclass
class TrainingData:
    """The rows to train on.

    Args:
        store: The latents of the whole dataset, stored or encoded on demand.
        rows: int64 [n]; row numbers of the dataset's index.
        keys: Keys of these rows.
        schema: Fields of the model, or ``None`` for an unconditional one.
        conditions: Conditions of these rows, or ``None``.
        weights: float64 [n] for weighted draws, or ``None`` for each row once per epoch.
        info: Name of the dataset, its patch size in pixels, µm per pixel, and the combinations that occur in the rows.
        shift: fp32 [C]; subtracted from raw latents; set by :meth:`whiten`.
        scale: fp32 [C]; then divided by.
    """

    store: LatentStore | StreamedLatents
    rows: np.ndarray
    keys: np.ndarray
    schema: Schema | None
    conditions: Conditions | None
    weights: np.ndarray | None
    info: dict[str, Any]
    shift: torch.Tensor = field(default_factory=lambda: torch.zeros(1))
    scale: torch.Tensor = field(default_factory=lambda: torch.ones(1))
    # Both as given, and on the device of the latents.
    _placed: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.rows)

    def whiten(
        self,
        source: Source | None,
        override: Sequence[str],
        known: list[list[float]] | None = None,
        accelerator: Accelerator | None = None,
    ) -> None:
        """Set the whitening of the run: that of its checkpoint, else that of the source, else measured over these rows.

        The main process measures for all.

        Args:
            source: The model to start from.
            override: Parts that are not inherited from it.
            known: Shift and scale of a checkpoint.
            accelerator: The processes; every one must call.
        """
        if known is not None:
            self.shift, self.scale = (torch.tensor(values, dtype=torch.float32) for values in known)
        elif source is not None and source.autoencoder is not None and "scaling" not in override:
            self.shift = torch.tensor(source.autoencoder["shift"], dtype=torch.float32)
            self.scale = torch.tensor(source.autoencoder["scale"], dtype=torch.float32)
        else:
            several = accelerator is not None and accelerator.num_processes > 1
            found: list[Any] = [None]
            if accelerator is None or accelerator.is_main_process:
                found = [[torch.as_tensor(v, dtype=torch.float32).cpu() for v in self.store.statistics(self.rows)]]
            self.shift, self.scale = broadcast_object_list(found)[0] if several else found[0]

    @property
    def in_order(self) -> bool:
        """Whether batches are to be requested one after the other, since patches are read ahead."""
        return isinstance(self.store, StreamedLatents)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: the whitening."""
        return {"whitening": [self.shift.tolist(), self.scale.tolist()]}

    def at(self, number: int, batch: int, seed: int) -> np.ndarray:
        """Positions in :attr:`rows` of the ``number``-th global batch, int64 [batch]."""
        return rows_at(number * batch, batch, len(self), seed, self.weights)

    def batch(
        self, number: int, batch: int, seed: int, timesteps: int, dropout: DropoutSettings, rank: int, processes: int
    ) -> Batch:
        """A process's share of the ``number``-th global batch: latents on the store's device, the rest on the CPU.

        Random numbers are drawn for the whole global batch, so they do not depend on the number of processes.
        """
        generator = batch_generator(seed, number)
        mine = rank_slice(rank, processes)
        if isinstance(self.store, StreamedLatents):
            for later in range(number, number + AHEAD + 1):
                self.store.expect(self.rows[self.at(later, batch, seed)[mine]])
        members = self.at(number, batch, seed)
        draws = draw_batch(generator, (batch, *self.store.shape), timesteps, posterior=not self.store.deterministic)
        conditions = None
        if self.conditions is not None and self.schema is not None:
            everyone = self.conditions.rows(torch.from_numpy(members))
            conditions = draw_dropout(everyone, dropout, generator, self.schema).rows(mine)
        # Drawn last, and only for several views, so that everything else about a batch does not depend on views.
        views = None
        if self.store.views > 1:
            views = torch.randint(self.store.views, (batch,), generator=generator).numpy()[mine]
        draws = draws.share(mine)
        mean, std = self.store.moments(self.rows[members[mine]], views)
        place = mean.device
        raw = mean
        if std is not None and draws.posterior is not None:
            raw = torch.addcmul(mean, std, moved(draws.posterior, place))
        shift, scale = self._whitening_on(place)
        return Batch((raw - shift) / scale, draws.noise, draws.timesteps, conditions)

    def _whitening_on(self, place: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Shift and scale, fp32 [C, 1, 1] each, on a device, moved there once."""
        if self._placed is None or self._placed[0] is not self.shift or self._placed[1] is not self.scale:
            shift, scale = (moved(values.view(-1, 1, 1), place) for values in (self.shift, self.scale))
            self._placed = (self.shift, self.scale, shift, scale)
        return self._placed[2:]

    def table_hash(self) -> str:
        """SHA-256 over the rows and their conditions and weights."""
        digest = hashlib.sha256("\n".join(self.keys).encode())
        self._add_known(digest)
        return digest.hexdigest()

    def latents_hash(self) -> str:
        """SHA-256 over the record of the latents with the hashes of their patches, without the autoencoder's path."""
        info = {key: value for key, value in self.store.info.items() if key != "floor"}
        info["autoencoder"] = {key: value for key, value in info["autoencoder"].items() if key != "source"}
        shards = self.store.data.info["shards"] if isinstance(self.store, StreamedLatents) else []
        record = [info, self.store.identity, [shard["sha256"] for shard in shards]]
        return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()

    def fingerprint(self) -> str:
        """SHA-256 over the rows, their conditions and weights, the autoencoder, and the views of their latents."""
        digest = hashlib.sha256("\n".join(self.keys).encode())
        digest.update(str(self.store.info["autoencoder"]["hash"]).encode())
        digest.update(self.store.identity.encode())
        self._add_known(digest)
        return digest.hexdigest()

    def _add_known(self, digest: Any) -> None:
        if self.conditions is not None and self.schema is not None:
            digest.update(repr(self.schema.to_dict()).encode())
            digest.update(self.conditions.codes.numpy().tobytes())
            digest.update(self.conditions.values.numpy().tobytes())
        if self.weights is not None:
            digest.update(self.weights.tobytes())


def open_data(settings: TrainSettings, source: Source | None, device: torch.device | str = "cpu") -> TrainingData:
    """The rows that the settings select, with their conditions.

    Args:
        settings: The run.
        source: The model to start from, whose fields keep their codes, or ``None``.
        device: Device of the training, which also runs an autoencoder in the loop and may hold the latents.

    Raises:
        UserError: Data, split or field are absent; the latents belong to other images, or to another autoencoder than
            the source's; or the source cannot be conditioned on these fields.
    """
    dataset = open_dataset(settings.data)
    rows = training_rows(dataset, settings.split, settings.split_value, settings.only)
    store: LatentStore | StreamedLatents
    if settings.latents:
        store = open_latents(dataset, settings.latents, settings.resident, device, rows)
    else:
        store = stream_latents(dataset, settings.autoencoder, settings.stream, device)
    if (
        source is not None
        and source.autoencoder is not None
        and not latents_fit(source.autoencoder, store.info["autoencoder"]["hash"])
    ):
        made = f"latents in {settings.latents} were encoded" if settings.latents else "patches are encoded"
        raise UserError(
            f"The {made} by another autoencoder than that of {source.folder}.",
            "Encode the data with the source's autoencoder.",
        )
    if dataset.schema.class_field is not None:
        refuse_null(dataset, dataset.schema.class_field.name, rows)
    names = settings.model.fields
    own = dataset.schema if names is None else dataset.schema.subset(names)
    schema = transferred_schema(source, own if own.fields else None)
    table = dataset.index.iloc[rows]
    conditions = None
    if schema is not None:
        # Only the requested fields: a further field of the source stays null, which the source was trained with.
        conditions = Conditions.from_schema(schema, table[list(own.names)], absent="null")
    weights = combination_weights(dataset, rows, settings.balance, settings.balance_temperature)
    weights = mixture_weights(dataset, rows, settings.mixture, weights)
    info = {"name": dataset.name, "patch_size": dataset.patch_size, "mpp": dataset.info["mpp"]}
    info["seen"] = training_record(table, dataset.schema)
    return TrainingData(store, rows, table["key"].to_numpy(), schema, conditions, weights, info)


def training_rows(dataset: PatchDataset, split: str, value: str, only: Only) -> np.ndarray:
    """Row numbers of one value of a split, or of all rows if ``split`` is empty, that a filter keeps.

    Raises:
        UserError: There is no such split, field or value of a field, or no row has that value of the split.
    """
    kept = only_mask(dataset.index, only, str(dataset.folder))
    if not split:
        return np.flatnonzero(kept)
    rows = dataset.rows({f"{SPLIT_PREFIX}{split}": value})
    rows = rows[kept[rows]]
    if not len(rows):
        raise UserError(
            f"The split {split!r} of {dataset.folder} has no row in {value!r}"
            + (f" with {only_text(only)}." if only else "."),
            "Choose another split or value.",
        )
    return rows


def refuse_null(dataset: PatchDataset, field: str, rows: np.ndarray) -> None:
    """Refuse rows without a value of a field, which would be trained as "no condition" without notice.

    Raises:
        UserError: Gives their number and the first; "unknown" is a value.
    """
    column = dataset.index[field].iloc[rows]
    if missing := int(column.isna().sum()):
        first = dataset.index["key"].iloc[rows[int(np.flatnonzero(column.isna())[0])]]
        raise UserError(
            f"{missing:,} of {len(rows):,} training patches of {dataset.folder} have no {field}, such as {first}.",
            f"Import the data again, with {UNKNOWN_WORD!r} where the {field} is not known.",
        )


def stream_latents(
    dataset: PatchDataset, autoencoder: str, settings: StreamSettings, device: torch.device | str
) -> StreamedLatents:
    """Latents that a frozen autoencoder encodes during training.

    Raises:
        UserError: The autoencoder is absent, or does not take these patches.
    """
    frozen = load_autoencoder(autoencoder, device, PRECISIONS[settings.precision])
    if settings.slicing:
        frozen.enable_slicing()
    return StreamedLatents(
        dataset, frozen, settings.views, settings.device_batch, settings.workers, settings.statistics_patches
    )


def open_latents(
    dataset: PatchDataset,
    folder: str,
    resident: Residence = "auto",
    device: torch.device | str = "cpu",
    rows: np.ndarray | None = None,
) -> LatentStore:
    """The latents of a dataset.

    Args:
        dataset: The dataset.
        folder: Its latent folder.
        resident: Where they are held.
        device: Device on which they are needed.
        rows: Row numbers that are needed; ``None`` for none in particular.

    Raises:
        UserError: They were encoded from other images than the dataset's, or some of the rows were not encoded.
    """
    store = LatentStore(folder, resident, device)
    if store.info.get("of", len(store)) != len(dataset) or not made_from(store.info, dataset.info["shards"]):
        raise UserError(
            f"The latents in {folder} were not encoded from the dataset in {dataset.folder}.",
            "Encode the dataset (again).",
        )
    if rows is not None:
        store.check_held(rows)
    return store


def combination_weights(
    dataset: PatchDataset, rows: np.ndarray, fields: list[str], temperature: float
) -> np.ndarray | None:
    """Sampling weights that balance the combinations of some fields; ``None`` without fields.

    Raises:
        UserError: A field is unknown or continuous.
    """
    if not fields:
        return None
    known = dataset.schema.subset(fields)
    if continuous := [f.name for f in known.fields if f.continuous]:
        raise UserError(f"Only class and categorical fields can be balanced, not {', '.join(continuous)}.")
    codes, _ = known.encode(dataset.index.iloc[rows])
    return balance_weights(codes, temperature)


def mixture_weights(
    dataset: PatchDataset, rows: np.ndarray, shares: Mapping[str, float], weights: np.ndarray | None
) -> np.ndarray | None:
    """Sampling weights that give each folder of a joined dataset a share of the images.

    Args:
        dataset: The joined dataset.
        rows: The training rows.
        shares: Share by name of a joined dataset, in any unit; empty changes nothing.
        weights: Weights of the rows within a folder; ``None`` for equal ones.

    Returns:
        float64 [n]: the rows of a folder sum up to its share; or ``weights``, without shares.

    Raises:
        UserError: The dataset is not joined, a name is unknown or ambiguous, a named folder has no training row, or all
            shares are 0.
    """
    if not shares:
        return weights
    joined = dataset.info["provenance"].get("joined")
    if not joined:
        raise UserError(
            f"mixture names {next(iter(shares))!r}, and {dataset.folder} is not joined of several folders.",
            "Join them with `latent-medi shards join`, or leave mixture out.",
        )
    names = [part.get("folder", part["name"]) for part in joined]
    of_row = np.repeat(np.arange(len(names)), [part["patches"] for part in joined])[rows]
    result = np.zeros(len(rows))
    for name, share in shares.items():
        if names.count(name) != 1:
            number = "several joined folders are" if name in names else "no joined folder is"
            raise UserError(
                f"mixture: {number} called {name!r}; {nearest(name, names)}.",
                f"Joined are {', '.join(names)}; `shards join` takes other names for them with names=[…].",
            )
        here = of_row == names.index(name)
        if share and not here.any():
            raise UserError(f"mixture gives {name!r} a share, and it has no training row.", "Check split and only.")
        inside = np.ones(int(here.sum())) if weights is None else weights[here]
        result[here] = share * inside / inside.sum() if share else 0.0
    if not result.any():
        raise UserError("All shares of mixture are 0.", "Give at least one joined folder a share.")
    return result
