"""The cost of one forward and backward pass, traced with fake tensors: saved bytes, temporary bytes, operations."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from latent_medi.core.errors import UserError
from latent_medi.core.files import read_json
from latent_medi.core.hub import is_hub_id
from latent_medi.diffusion.conditioning import Conditions, MetadataConditioner
from latent_medi.diffusion.denoiser import Denoiser, build_unet
from latent_medi.diffusion.model_folder import local_folder
from latent_medi.diffusion.objective import Objective, diffusion_loss
from latent_medi.metadata.schema import Schema
from latent_medi.training.settings import TrainSettings

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Type of autocast by precision."""


@dataclass(frozen=True)
class StepCost:
    """The cost of one forward and backward pass of one device's batch.

    Args:
        saved: Bytes that autograd saves: every storage once, without parameters, with autocast's copies of them.
        passing: Bytes beyond ``saved`` at the peak of the pass: gradients of activations, copies in another type,
            recomputed blocks.
        forward_flops: Floating-point operations of the forward pass, a multiplication and an addition being two.
        flops: Of forward and backward pass, recomputation included.
    """

    saved: int
    passing: int
    forward_flops: int
    flops: int


class SavedBytes:
    """Counts the bytes that autograd saves for the backward pass, inside the context :meth:`hooks`.

    Args:
        module: Its parameters and buffers are not counted.
    """

    def __init__(self, module: nn.Module) -> None:
        self._own = {t.untyped_storage()._cdata for t in [*module.parameters(), *module.buffers()]}
        self._kept: dict[int, torch.UntypedStorage] = {}  # references, so that no address is used twice

    def hooks(self) -> Any:
        """The context in which to run the forward pass."""

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._own:
                self._kept[storage._cdata] = storage
            return tensor

        return torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)

    @property
    def total(self) -> int:
        """Bytes saved so far."""
        return sum(storage.nbytes() for storage in self._kept.values())

    def release(self) -> None:
        """Drop the references to the storages, so that they can be freed."""
        self._kept.clear()


@contextmanager
def _earlier_objects_frozen() -> Iterator[None]:
    """Leave the objects of before out of garbage collection, so that a collection takes no time."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class LiveBytes(TorchDispatchMode):
    """Tracks the bytes of all storages created inside the context, and their peak.

    Fake tensors form reference cycles, which real ones do not. What Python has not collected yet is collected before
    it counts as a peak.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def _free(self, address: int, size: int) -> None:
        self._seen.discard(address)
        self.now -= size

    def ignore(self, tensors: Iterable[torch.Tensor]) -> None:
        """Exclude the storages of tensors that are counted elsewhere; in-place operations return them again."""
        self._seen |= {t.untyped_storage()._cdata for t in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                address, size = storage._cdata, storage.nbytes()
                if address not in self._seen:
                    self._seen.add(address)
                    self.now += size
                    if self.now > self.peak:
                        gc.collect()
                        self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._free, address, size)
        return result


def normalise_as_on_gpu(module: nn.Module) -> None:
    """Cast the inputs of group normalisations to fp32, as autocast does on a GPU and not on a CPU.

    It is the only operation of these networks that differs, and its inputs and outputs are the largest saved tensors.
    Without a GPU, no backward pass can be traced with fake tensors of a GPU.
    """
    for part in module.modules():
        if isinstance(part, nn.GroupNorm):
            part.register_forward_pre_hook(lambda _, inputs: tuple(tensor.float() for tensor in inputs))


def build_denoiser(settings: TrainSettings, shape: tuple[int, int, int], schema: Schema | None) -> Denoiser:
    """The denoiser of these settings with random weights; with ``init_from``, of the source's architecture.

    Raises:
        UserError: It cannot be built.
    """
    channels, height, width = shape
    if height != width:
        raise UserError(f"Latents are square; these are {height}×{width}.")
    unet: Any
    if settings.init_from:
        unet = _source_unet(settings.init_from, schema is not None)
        if unet.config["in_channels"] != channels:
            raise UserError(
                f"The network in {settings.init_from} takes latents of {unet.config['in_channels']} channels, not "
                f"{channels}."
            )
    else:
        unet = build_unet(settings.model, channels, height, conditional=schema is not None)
    conditioner = None
    if schema is not None:
        width, model = 4 * unet.config["block_out_channels"][0], settings.model
        patterns = asdict(settings.dropout)
        conditioner = MetadataConditioner(schema.to_dict(), width, None, model.fusion, model.widths, patterns)
    if settings.checkpoint_activations:
        unet.enable_gradient_checkpointing()
    return Denoiser(unet, conditioner)


def _source_unet(folder: str, conditional: bool) -> Any:
    from diffusers import UNet2DModel

    place = Path(folder)
    if is_hub_id(folder) and not place.is_dir():  # its configuration alone, which has a few hundred bytes
        place = local_folder(folder, {"allow_patterns": ["unet/config.json", "config.json"]})
    found = [f for f in (place / "unet" / "config.json", place / "config.json") if f.is_file()]
    if not found:
        raise UserError(f"There is no network in {folder} to estimate.", "Give a model folder, or leave out init_from.")
    values = {key: value for key, value in read_json(found[0]).items() if not key.startswith("_")}
    return UNet2DModel(**{**values, "class_embed_type": "identity" if conditional else None})


def example(
    denoiser: Denoiser, shape: tuple[int, int, int], count: int, timesteps: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Conditions | None]:
    """Latents, noise, timesteps and conditions of ``count`` images, drawn on the default device."""
    conditions = None
    if denoiser.conditioner is not None:
        fields = len(denoiser.conditioner.schema.fields)
        conditions = Conditions(torch.zeros(count, fields, dtype=torch.int64), torch.zeros(count, fields))
    return torch.randn(count, *shape), torch.randn(count, *shape), torch.randint(0, timesteps, (count,)), conditions


def step_cost(
    settings: TrainSettings, shape: tuple[int, int, int], schema: Schema | None, batch: int, device: str = "cuda"
) -> tuple[StepCost, Denoiser]:
    """Trace one forward and backward pass with fake tensors.

    Args:
        settings: Model, objective, precision and checkpointing.
        shape: (C, h, w) of a latent.
        schema: The model's fields, or ``None``.
        batch: Images in the pass.
        device: "cuda" for the types that autocast uses on a GPU, "cpu" for those on the CPU.

    Returns:
        The cost, and the denoiser, of fake tensors.

    Raises:
        UserError: The network cannot be built.
    """
    dtype = AUTOCAST[settings.precision]
    with FakeTensorMode():
        denoiser = build_denoiser(settings, shape, schema).train()
        objective = Objective(settings.objective)
        inputs = example(denoiser, shape, batch, objective.timesteps)
        # Gradients are kept between the parts of a batch, and always under DDP, so they exist during the whole pass.
        for parameter in denoiser.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        own = [*denoiser.parameters(), *denoiser.buffers(), objective.alphas_cumprod, objective.weights]
        own += [p.grad for p in denoiser.parameters() if p.grad is not None]
        saved, live, flops = SavedBytes(denoiser), LiveBytes(), FlopCounterMode(display=False)
        live.ignore([*own, *(t for t in inputs if isinstance(t, torch.Tensor))])
        if device != "cpu":
            normalise_as_on_gpu(denoiser)
        with _earlier_objects_frozen(), flops, live:
            with saved.hooks(), torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                loss = diffusion_loss(denoiser, *inputs, objective).sum() / batch
            forward, kept = flops.get_total_flops(), saved.total
            saved.release()
            loss.backward()
    return StepCost(kept, max(live.peak - kept, 0), forward, flops.get_total_flops()), denoiser


def state_bytes(denoiser: nn.Module, ema_count: int, eight_bit: bool = False) -> dict[str, int]:
    """Exact bytes of what a device holds throughout a run, fp32 except for 8-bit moments.

    AdamW keeps two tensors per trained parameter and a step count of 4 bytes. In 8 bits, tensors of at least 4,096
    entries have two bytes per entry and two fp32 scales per 256 of them, and two maps are shared. DDP's buckets are the
    gradients themselves (``gradient_as_bucket_view``, see :mod:`latent_medi.training.ddp`) and take no more memory.

    Args:
        denoiser: The model.
        ema_count: Running averages, each a whole copy of the model.
        eight_bit: Whether the optimizer is adamw8bit.
    """
    everything = sum(t.untyped_storage().nbytes() for t in [*denoiser.parameters(), *denoiser.buffers()])
    trained = [p for p in denoiser.parameters() if p.requires_grad]
    gradients = sum(p.numel() * p.element_size() for p in trained)
    if eight_bit:
        large = [p.numel() for p in trained if p.numel() >= 4096]
        moments = 8 * sum(p.numel() for p in trained if p.numel() < 4096)
        moments += sum(2 * n + 8 * -(-n // 256) for n in large) + 2 * 256 * 4
    else:
        moments = 2 * gradients + 4 * len(trained)
    return {
        "weights": everything,
        "gradients": gradients,
        "optimizer": moments,
        "averages": ema_count * everything,
        "ddp_buckets": 0,
    }
