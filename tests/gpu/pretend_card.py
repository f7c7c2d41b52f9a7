"""A graphics card in name: what is moved to it stays in RAM with its values, but counts as lying on "cuda:7".

Fake tensors know a device that is not there, but no values, and autograd cannot go backward on one. Here whole commands
run, files and all, and fail as they would on a card where one of their tensors was left on the CPU.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CARD, CPU = torch.device("cuda", 7), torch.device("cpu")

_DEVICE, _IS_CUDA, _IS_CPU = (getattr(torch.Tensor, name).__get__ for name in ("device", "is_cuda", "is_cpu"))
_AS_THEY_ARE = (torch.as_tensor, torch.asarray)
_CROSSES = (torch.ops.aten.copy_, torch.ops.aten._to_copy, torch.ops.aten._has_compatible_shallow_copy_type)
_ON_CPU_ONLY = (torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.pin_memory)


class Places:
    """Which storages lie on the card.

    Attributes:
        most: The largest number of them at once.
        pinned: Those in memory from which a card copies by itself.
    """

    def __init__(self) -> None:
        self.most = 0
        self._there: set[int] = set()
        self.pinned: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def has(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is on the card."""
        return tensor.untyped_storage()._cdata in self._there

    def put(self, tensor: torch.Tensor, there: bool) -> None:
        """Note where a tensor's storage lies."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        if there and address not in self._there:
            self._there.add(address)
            self.most = max(self.most, len(self._there))
            weakref.finalize(storage, self._there.discard, address)
        elif not there:
            self._there.discard(address)


# For as long as the process lives, as constants do that the program keeps for each device.
_PLACES = Places()


class _Operations(TorchDispatchMode):
    """Refuses an operation on tensors of two places, and notes where its results lie."""

    def __init__(self, places: Places) -> None:
        super().__init__()
        self._places = places

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        there = any(self._places.has(t) for t in given)
        if there and func.overloadpacket not in _CROSSES:
            written = [id(v) for a, v in zip(func._schema.arguments, args, strict=False) if a.is_write]
            for tensor in given:
                # A single number of the CPU goes into a kernel as an argument, unless it is to be written.
                number = tensor.ndim == 0 and torch.Tag.pointwise in func.tags and id(tensor) not in written
                if not (self._places.has(tensor) or number):
                    raise RuntimeError(
                        f"Expected all tensors to be on the same device, but found {CARD} and cpu: {func} of "
                        f"{[(tuple(t.shape), str(t.dtype), self._places.has(t)) for t in given]}"
                    )
        result = func(*args, **kwargs)
        if func.overloadpacket is torch.ops.aten.copy_:
            there = self._places.has(args[0])
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and there:
                self._places.put(tensor, True)
        return result


class _Calls(TorchFunctionMode):
    """Answers what device a tensor is on, and makes copies of what is moved."""

    def __init__(self, places: Places) -> None:
        super().__init__()
        self._places = places

    def _moved(self, tensor: torch.Tensor, device: torch.device, **options: Any) -> torch.Tensor:
        there = device.type == "cuda"
        if there == self._places.has(tensor):
            return tensor.to(**options)
        moved = tensor.to(**{"memory_format": torch.preserve_format, **options, "copy": True})
        self._places.put(moved, there)
        return moved

    def _to(self, tensor: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        other = kwargs.get("other", args[0] if args else None)
        copy = bool(kwargs.get("copy"))
        if isinstance(other, torch.Tensor):
            there = self._places.has(other)
            return self._moved(tensor, CARD if there else CPU, dtype=other.dtype, copy=copy)
        words = {k: v for k, v in kwargs.items() if k != "copy"}
        device, dtype, _, layout = torch._C._nn._parse_to(*args, **words)
        options = {k: v for k, v in (("dtype", dtype), ("memory_format", layout)) if v is not None}
        if device is None:
            return tensor.to(**options, copy=copy) if options or copy else tensor
        return self._moved(tensor, device, copy=copy, **options)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        first = args[0] if args and isinstance(args[0], torch.Tensor) else None
        there = first is not None and self._places.has(first)
        if func == _DEVICE:
            return CARD if there else func(*args)
        if func in (_IS_CUDA, _IS_CPU):
            return there == (func == _IS_CUDA)
        if func is torch.Tensor.to:
            return self._to(args[0], args[1:], kwargs)
        if func in (torch.Tensor.cuda, torch.Tensor.cpu):
            return self._moved(args[0], CARD if func is torch.Tensor.cuda else CPU)
        if func in _ON_CPU_ONLY and there:
            raise TypeError(f"cannot {func.__name__} a tensor of {CARD}: use Tensor.cpu() first")
        if func is torch.Tensor.pin_memory:
            pinned = args[0].clone()
            self._places.pinned.add(pinned.untyped_storage())
            return pinned
        if func is torch.Tensor.is_pinned:
            return args[0].untyped_storage() in self._places.pinned
        if kwargs.get("device") is not None and func is not torch._C._nn._parse_to:
            wanted = torch.device(kwargs.pop("device"))
            if wanted.type == "cuda" and kwargs.get("generator") is not None:
                raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
            if func in _AS_THEY_ARE and first is not None:
                return self._moved(first, wanted, **kwargs)
            made = func(*args, **kwargs, device=CPU)
            self._places.put(made, wanted.type == "cuda")
            return made
        result = func(*args, **kwargs)
        if func is torch.Tensor.__deepcopy__ or getattr(func, "__name__", "").startswith("new_"):
            self._places.put(result, there)  # made without an operation
        return result


@contextlib.contextmanager
def _pretending(places: Places) -> Iterator[None]:
    with _Operations(places), _Calls(places):
        yield


@contextlib.contextmanager
def pretend_card() -> Iterator[Places]:
    """Pretend, in this thread and in those of executors, that there is a card and that Accelerate has chosen it."""
    places = _PLACES
    places.most = 0
    submit, autocast, grouped = (
        ThreadPoolExecutor.submit,
        torch.autocast.__init__,
        torch._C._group_tensors_by_device_and_dtype,
    )

    def submit_pretending(self: Any, work: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        def pretending() -> Any:
            with _pretending(places):
                return work(*args, **kwargs)

        return submit(self, pretending)

    def autocast_on_cpu(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        autocast(self, "cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    def grouped_by_place(lists: list[list[torch.Tensor]], *args: Any) -> dict[Any, Any]:
        groups = grouped(lists, *args)
        return {(CARD if places.has(g[0][0][0]) else k[0], k[1]): g for k, g in groups.items()}

    def on_card_only(meeting: Callable[..., Any]) -> Callable[..., Any]:
        def among_processes(self: Accelerator, tensors: Any, *args: Any, **kwargs: Any) -> Any:
            if not all(places.has(t) for t in tree_leaves(tensors) if isinstance(t, torch.Tensor)):
                raise RuntimeError("No backend type associated with device type cpu")  # NCCL's, of several processes
            return meeting(self, tensors, *args, **kwargs)

        return among_processes

    with pytest.MonkeyPatch.context() as patch:
        for name in ("reduce", "gather"):
            patch.setattr(Accelerator, name, on_card_only(getattr(Accelerator, name)))
        patch.setattr(ThreadPoolExecutor, "submit", submit_pretending)
        patch.setattr(torch.autocast, "__init__", autocast_on_cpu)
        patch.setattr(torch._C, "_group_tensors_by_device_and_dtype", grouped_by_place)
        patch.setattr(torch.cuda, "mem_get_info", lambda device=None: (8 << 30, 8 << 30))
        patch.setattr(torch.cuda, "set_device", lambda device: None)
        # As Accelerate finds itself in a process with a card; what it knew before comes back afterwards.
        patch.setattr(PartialState, "_shared_state", {})
        patch.setattr(AcceleratorState, "_shared_state", {})
        PartialState(cpu=True)
        PartialState._shared_state["device"] = CARD
        with _pretending(places):
            yield places
