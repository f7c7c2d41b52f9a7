"""DDP's buckets: gradients of an update in several parts lie in them, and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.torch_version import TorchVersion

from latent_medi.training import ddp
from latent_medi.training.settings import TrainSettings
from latent_medi.training.start import training_accelerator


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A group of this process alone."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=timedelta(seconds=30))
    yield
    torch.distributed.destroy_process_group()


def make(wrapped: bool = True) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(50, 200), nn.SiLU(), nn.Linear(200, 50))
    model: nn.Module = plain
    if wrapped:
        model = DistributedDataParallel(plain, gradient_as_bucket_view=True)
    return model, torch.optim.AdamW(plain.parameters())


def held(model: nn.Module) -> set[tuple[int, int]]:
    """Address and bytes of the memory that the gradients lie in."""
    found = [p.grad.untyped_storage() for p in model.parameters() if p.grad is not None]
    return {(storage.data_ptr(), storage.nbytes()) for storage in found}


def update(model: nn.Module, optimizer: torch.optim.Optimizer, parts: int, seed: int) -> list[set[tuple[int, int]]]:
    """One update; where the gradients lie after each part."""
    x = torch.randn(parts, 8, 50, generator=torch.Generator().manual_seed(seed))
    seen = []
    for i, part in enumerate(x):
        alone = model.no_sync() if i + 1 < parts and isinstance(model, DistributedDataParallel) else nullcontext()
        with alone:
            (model(part).square().sum() / 8 / parts).backward()
        seen.append(held(model))
    optimizer.step()
    ddp.clear(model, optimizer, parts)
    return seen


def test_a_run_asks_ddp_for_nothing_that_torch_warns_of() -> None:
    accelerator = training_accelerator(TrainSettings(data="data", out="run"))
    assert accelerator.ddp_handler is not None
    options = accelerator.ddp_handler.to_kwargs()
    assert options == {"gradient_as_bucket_view": True}  # torch deprecates broadcast_buffers


@pytest.mark.parametrize("resumed", [False, True])
def test_gradients_of_every_part_lie_in_the_buckets(group: None, resumed: bool) -> None:
    model, optimizer = make()
    size = 4 * sum(p.numel() for p in model.parameters())
    ddp.settle(model, optimizer, lambda: model(torch.randn(8, 50)).sum().backward(), resumed, 3)
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)
    places = [place for number in range(3) for place in update(model, optimizer, 3, number)]
    assert len({frozenset(place) for place in places}) == 1  # from the first part of the first update on
    assert sum(nbytes for _, nbytes in places[0]) == size


@pytest.mark.parametrize("parts", [1, 3])
def test_passes_before_the_first_update_leave_statistics_of_batches_as_they_were(group: None, parts: int) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    model = DistributedDataParallel(network, gradient_as_bucket_view=True)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    optimizer = torch.optim.AdamW(network.parameters())
    ddp.settle(model, optimizer, lambda: model(torch.randn(8, 3, 4, 4)).sum().backward(), True, parts)
    assert [name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])] == []


@pytest.mark.parametrize("parts", [1, 3])
def test_a_group_of_one_trains_as_one_process(group: None, parts: int) -> None:
    model, optimizer = make()
    alone, other = make(wrapped=False)
    ddp.settle(model, optimizer, lambda: model(torch.randn(8, 50)).sum().backward(), True, parts)
    ddp.settle(alone, other, lambda: pytest.fail("one process has no buckets"), True, parts)
    for number in range(3):
        update(model, optimizer, parts, number)
        update(alone, other, parts, number)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), alone.parameters(), strict=True))
    assert all((p.grad is None) == (parts == 1) for p in model.parameters())
    assert all(p.grad is None for p in alone.parameters())


@pytest.mark.parametrize(
    ("version", "checkpointing", "processes", "cut"),
    [("2.11.0", True, 2, False), ("2.11.0", True, 1, True), ("2.11.0", False, 2, True), ("2.15.0", True, 2, True)],
)
def test_older_torch_compiles_recomputed_blocks_under_ddp_in_one_piece(
    version: str, checkpointing: bool, processes: int, cut: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    with torch._dynamo.config.patch(optimize_ddp=True):
        ddp.compile_whole(checkpointing, processes)
        assert bool(torch._dynamo.config.optimize_ddp) == cut
