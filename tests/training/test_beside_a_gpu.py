"""What training does for a GPU, told without one: copies that wait for nothing, batches ahead, sums in one order."""

from __future__ import annotations

import gc
import importlib.util
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from parts import small_model
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from latent_medi.core.errors import UserError
from latent_medi.diffusion.conditioning import Conditions
from latent_medi.diffusion.pipeline import MediPipeline
from latent_medi.latents.autoencoder import Autoencoder
from latent_medi.latents.store import LatentStore
from latent_medi.training import loop, prefetch, preview, updates
from latent_medi.training.data import Batch, open_data
from latent_medi.training.ema import Ema
from latent_medi.training.estimate import report
from latent_medi.training.losses import LossTable, sums_by_label
from latent_medi.training.prefetch import made_ahead, threads_for
from latent_medi.training.settings import EstimateSettings, TrainSettings

Make = Callable[..., TrainSettings]
REPOSITORY = Path(__file__).resolve().parents[2]
GPU, CPU = torch.device("cuda"), torch.device("cpu")


class SecondDevice(TorchDispatchMode):
    """What a GPU would be asked to copy: the tensors on "cuda" are fake, all others are real.

    Attributes:
        copies: For every copy between the CPU and the GPU: the direction, and whether anybody would wait for it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[tuple[str, bool]] = []
        self._pinned: dict[int, torch.Tensor] = {}
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __enter__(self) -> SecondDevice:
        self._fake.__enter__()
        return super().__enter__()

    def __exit__(self, *told: Any) -> None:
        super().__exit__(*told)
        self._fake.__exit__(*told)

    def _ready(self, tensor: torch.Tensor) -> bool:
        return tensor.is_contiguous() and tensor.untyped_storage().data_ptr() in self._pinned

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func._schema.name
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        onto = torch.device(kwargs.get("device") or "cpu")
        if name == "aten::is_pinned":
            return self._ready(args[0])
        if name == "aten::_pin_memory":
            source = args[0]
            with unset_fake_temporarily():  # gaps are kept, as torch keeps them
                held = torch.empty_strided(source.size(), source.stride(), dtype=source.dtype).copy_(source)
            self._pinned[held.untyped_storage().data_ptr()] = held
            return held
        if name == "aten::_to_copy" and not isinstance(args[0], FakeTensor) and onto.type == "cuda":
            self.copies.append(("onto", not (kwargs.get("non_blocking") and self._ready(args[0]))))
            return self.on_gpu(torch.empty_like, args[0], kwargs.get("dtype"))
        if name == "aten::copy_" and isinstance(args[0], FakeTensor) and not isinstance(args[1], FakeTensor):
            self.copies.append(("onto", not self._ready(args[1])))
            return args[0]
        if any(isinstance(leaf, FakeTensor) for leaf in given) or onto.type == "cuda":
            if name in ("aten::_to_copy", "aten::_local_scalar_dense") and onto.type == "cpu" and "device" in kwargs:
                self.copies.append(("from", True))
            with self._fake:
                return func(*args, **kwargs)
        with unset_fake_temporarily():
            return func(*args, **kwargs)

    def on_gpu(self, make: Any, like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A fake tensor on the GPU of the shape of a real one."""
        with self._fake:
            return torch.empty(like.shape, dtype=dtype or like.dtype, device="cuda")


@pytest.mark.parametrize("processes", [1, 2])
def test_resident_latents_become_batches_by_copies_that_wait_for_nothing(
    processes: int, run_settings: Make, tiny: Path
) -> None:
    settings = run_settings(resident="ram")
    data = open_data(settings, None)
    data.whiten(None, [])
    with SecondDevice() as second:
        store = LatentStore(tiny / "latents", "device", "cuda")
        data.store = store
        second.copies.clear()
        counts = []
        for number in range(3):
            batch = data.batch(number, 8, 0, 1000, settings.dropout, 0, processes)
            assert batch.latents.device.type == "cuda"
            counts.append(len(second.copies))
            parts = batch.pinned().parts(2, GPU)
            assert len(parts) == 8 // processes / 2
            counts.append(len(second.copies))
        assert {p.noise.device.type for p in parts} == {"cuda"}
    # Row numbers and the posterior's noise; shift and scale once; noise, timesteps, codes and values, in no more
    # copies for several parts than for one.
    assert np.diff([0, *counts]).tolist() == [4, 4, 2, 4, 2, 4]
    assert not any(waits for _, waits in second.copies)


def test_a_copy_that_waits_would_be_seen() -> None:
    with SecondDevice() as second:
        torch.zeros(3).to("cuda")
        torch.zeros(3).pin_memory().to("cuda")
        torch.zeros(4, 4).pin_memory()[:, 1].to("cuda", non_blocking=True)
        torch.zeros(3).pin_memory().to("cuda", non_blocking=True)
    assert [waits for _, waits in second.copies] == [True, True, True, False]


def flat(batch: Batch) -> list[torch.Tensor]:
    known = [] if batch.conditions is None else [batch.conditions.codes, batch.conditions.values]
    return [batch.latents, batch.noise, batch.timesteps, *known]


@pytest.mark.parametrize("resident", ["mmap", "ram"])
def test_batches_made_in_threads_are_those_made_one_by_one(resident: Any, run_settings: Make) -> None:
    settings = run_settings(resident=resident, balance=["site"])

    def batches(threads: int) -> list[list[torch.Tensor]]:
        data = open_data(settings, None)
        data.whiten(None, [])

        def make(step: int) -> Batch:
            return data.batch(step, 16, 3, 1000, settings.dropout, 1, 2)

        with made_ahead(make, range(2, 30), threads, CPU) as coming:
            return [flat(batch) for batch in coming]

    one, several = batches(0), batches(4)
    assert len(one) == len(several) == 28
    assert all(torch.equal(a, b) for x, y in zip(one, several, strict=True) for a, b in zip(x, y, strict=True))


def test_batches_come_in_order_a_few_ahead_and_an_error_at_its_own() -> None:
    begun, at_once, lock = [], [0, 0], threading.Lock()

    def make(step: int) -> Any:
        with lock:
            begun.append(step)
            at_once[0] += 1
            at_once[1] = max(at_once)
        time.sleep(0.03 if step % 3 == 0 else 0.001)
        with lock:
            at_once[0] -= 1
        if step == 12:
            raise UserError("the twelfth")
        return step

    taken: list[int] = []

    def take() -> None:
        with made_ahead(make, range(5, 40), 3, CPU) as coming:
            steps: Iterator[Any] = coming
            for step in steps:
                taken.append(step)
                assert max(begun) <= step + 4  # one more than threads

    with pytest.raises(UserError, match="the twelfth"):
        take()
    assert taken == [5, 6, 7, 8, 9, 10, 11]
    assert at_once[1] > 1
    assert max(begun) <= 16  # what was not begun never is


def test_threads_are_for_devices_and_follow_the_cores(run_settings: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    data = open_data(run_settings(), None)
    monkeypatch.setattr(prefetch, "cpu_count", lambda: 16)
    assert threads_for(data, CPU) == 0
    assert threads_for(data, GPU) == prefetch.MOST_THREADS
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert threads_for(data, GPU) == 1


def told_by(table: LossTable) -> list[tuple[Any, ...]]:
    table.fold(Accelerator())
    return table.rows(0)


def test_loss_sums_have_one_order_on_a_gpu_and_are_the_cpus(run_settings: Make) -> None:
    schema = open_data(run_settings(), None).schema
    assert schema is not None
    draw = torch.Generator().manual_seed(0)
    table = LossTable(schema, 1000, CPU)
    codes = torch.stack(
        [torch.randint(0, 3 if field.continuous else field.n_codes, (500,), generator=draw) for field in schema.fields],
        1,
    )
    each, timesteps = torch.rand(500, generator=draw) ** 4, torch.randint(0, 1000, (500,), generator=draw)
    table.add(each, timesteps, Conditions(codes, torch.zeros(codes.shape)))

    def labels_of(i: int) -> set[tuple[str, str]]:
        low = int(timesteps[i]) // 100 * 100
        found = {("timestep", f"{low}-{low + 99}")}
        for field, code in zip(schema.fields, codes[i].tolist(), strict=True):
            values = ("null", "unknown", *(("value",) if field.continuous else field.values))
            found.add((field.name, values[code]))
        return found

    labels = [labels_of(i) for i in range(500)]
    sums = sums_by_label(each.double(), torch.tensor([[label in own for label in table.labels] for own in labels]))
    rows = {(group, value): (float(loss) * n, n) for _, group, value, loss, n in told_by(table)}
    for label, (total, count) in zip(table.labels, sums.tolist(), strict=True):
        # One after the other, as the CPU adds.
        expected = sum(float(each[i]) for i, own in enumerate(labels) if label in own)
        assert total == pytest.approx(expected, rel=1e-14, abs=0)
        assert rows.get(label, (0.0, 0)) == (pytest.approx(expected, rel=1e-14, abs=0), count)
    # On a GPU nothing adds by index, and nothing is fetched.
    with SecondDevice() as second:
        other = LossTable(schema, 1000, GPU)
        second.copies.clear()
        used = []

        class Used(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                used.append(func._schema.name)
                return func(*args, **(kwargs or {}))

        on_gpu = [second.on_gpu(None, tensor) for tensor in (each, timesteps, codes, torch.zeros(codes.shape))]
        with Used():
            other.add(on_gpu[0], on_gpu[1], Conditions(on_gpu[2], on_gpu[3]))
    assert not second.copies
    assert not {name for name in used if "index_add" in name or "scatter" in name or "put" in name}


def test_a_skipped_update_leaves_the_average_alone_without_being_looked_at() -> None:
    torch.manual_seed(0)
    module = torch.nn.Linear(40, 30)
    plain, told = Ema(module), Ema(module)
    for made in (True, False, True):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter))
        before = [p.clone() for p in told.module.parameters()]
        told.update(module, 0.9, torch.tensor(made))
        if made:
            plain.update(module, 0.9)
        else:
            assert all(torch.equal(a, b) for a, b in zip(told.module.parameters(), before, strict=True))
        for a, b in zip(told.module.parameters(), plain.module.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    with SecondDevice() as second:
        fake = torch.nn.Linear(4, 3, device="cuda")
        average = Ema(fake)
        average.update(fake, 0.9, torch.ones((), device="cuda").isfinite())  # an item() would raise here
    assert not second.copies


class Scaled(Accelerator):
    """With fp16's scaler, on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)


def test_the_loop_leaves_averages_alone_where_the_scaler_skips(
    run_settings: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    update, clip = Ema.update, updates.clip_gradients
    seen: list[tuple[bool, bool]] = []  # by update: whether weights and averages stayed as they were
    last: list[torch.Tensor] = []
    count = [0]

    def state(average: Ema, module: torch.nn.Module) -> list[torch.Tensor]:
        return [torch.cat([p.detach().flatten() for p in each.parameters()]) for each in (module, average.module)]

    def watched(self: Ema, module: torch.nn.Module, *words: Any) -> None:
        update(self, module, *words)
        now = state(self, module)
        seen.append(tuple(torch.equal(a, b) for a, b in zip(last, now, strict=True)))  # type: ignore[arg-type]
        last[:] = now

    def overflowing(accelerator: Accelerator, parameters: list[torch.nn.Parameter], limit: float) -> torch.Tensor:
        count[0] += 1
        if not last:
            last[:] = [torch.zeros(1), torch.zeros(1)]
        if count[0] in (3, 6):
            assert parameters[5].grad is not None
            parameters[5].grad.view(-1)[0] = float("inf" if count[0] == 3 else "nan")
        return clip(accelerator, parameters, limit)

    monkeypatch.setattr(Ema, "update", watched)
    monkeypatch.setattr(updates, "clip_gradients", overflowing)
    loop.train(run_settings(max_steps=8, log_every_images=64), Scaled())
    assert seen == [(number in (3, 6),) * 2 for number in range(1, 9)]


@contextmanager
def watched_device(autoencoder: Autoencoder, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Notes where an autoencoder is moved; it stays on the CPU."""
    moves: list[Any] = []

    def to(device: Any = None, dtype: Any = None) -> Autoencoder:
        moves.append(torch.device(device).type)
        return autoencoder

    with monkeypatch.context() as patch:
        patch.setattr(autoencoder, "to", to)
        yield moves


def test_previews_are_decoded_in_the_trainings_precision_and_leave_nothing_behind(
    autoencoder: Autoencoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = MediPipeline.__new__(MediPipeline)
    object.__setattr__(pipeline, "__dict__", {"autoencoder": autoencoder, "shift": torch.zeros(4)})
    pipeline.scale = torch.ones(4)
    types: list[torch.dtype] = []
    hook = autoencoder.model.decoder.conv_in.register_forward_hook(lambda _, __, out: types.append(out.dtype))
    latents = torch.randn(11, 4, 8, 8)
    try:
        with watched_device(autoencoder, monkeypatch) as moves:
            plain = preview.decode_on(CPU, pipeline, latents, "fp32")
            half = preview.decode_on(CPU, pipeline, latents, "bf16")
        assert plain is not None
        assert half is not None
        assert types == [torch.float32] * 2 + [torch.bfloat16] * 2  # eight at a time
        assert plain.shape == half.shape == (11, 32, 32, 3)
        assert np.abs(plain.astype(int) - half.astype(int)).mean() < 4
        assert moves == ["cpu"] * 4  # there and back

        def short(_: Any) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory")

        with watched_device(autoencoder, monkeypatch) as moves, monkeypatch.context() as patch:
            patch.setattr(autoencoder, "decode", short)
            assert preview.decode_on(torch.device("meta"), pipeline, latents, "fp32") is None
        assert moves == ["meta", "cpu"]
    finally:
        hook.remove()


def benchmark(name: str) -> ModuleType:
    """A script of benchmarks/ as a module."""
    sys.path.insert(0, str(REPOSITORY / "benchmarks"))
    try:
        spec = importlib.util.spec_from_file_location(f"benchmark_{name}", REPOSITORY / "benchmarks" / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(REPOSITORY / "benchmarks"))


def test_the_benchmark_trains_in_one_precision_after_another(run_settings: Make) -> None:
    script = benchmark("training")
    settings = run_settings(max_steps=3, log_every_images=8)
    assert len(script.loop_rates(settings)) == 2
    assert len(script.plain_rates(replace(settings, precision="bf16"))) == 2
    assert len(script.loop_rates(replace(settings, precision="bf16"))) == 2


def test_what_was_compiled_is_gone_before_memory_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiled network is part of a cycle, and would lie beside the next one."""
    made: list[weakref.ref[torch.nn.Module]] = []

    def in_a_cycle(module: torch.nn.Module) -> None:
        made.append(weakref.ref(module))
        object.__setattr__(module, "again", [module])

    monkeypatch.setattr(torch.nn.Module, "compile", in_a_cycle)
    settings = EstimateSettings(max_steps=1, model=small_model(), global_batch=2, measure_steps=1, compile=True)
    gc.disable()
    try:
        report.measure(settings, (4, 8, 8), None, 2, device="cpu")
        assert [ref() for ref in made] == [None]
    finally:
        gc.enable()
