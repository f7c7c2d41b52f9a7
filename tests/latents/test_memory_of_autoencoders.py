"""What an autoencoder takes of a device's memory, and what happens when it is full."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from latents_parts import make_dataset
from parts import random_images, random_model
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from latent_medi.latents import autoencoder as module
from latent_medi.latents.autoencoder import Autoencoder
from latent_medi.latents.encode import encode_dataset
from latent_medi.latents.settings import ReconstructionSettings
from latent_medi.latents.store import LatentStore
from latent_medi.latents.stream import StreamedLatents

GIB = 1 << 30


def limited(autoencoder: Autoencoder, encoder: int = 0, decoder: int = 0) -> list[tuple[str, int]]:
    """Have the parts of a network ask for more memory than there is at more patches than these; returns what passed."""
    sizes: list[tuple[str, int]] = []

    def watch(name: str, most: int) -> Callable[[Any, Any], None]:
        def look(_: Any, inputs: Any) -> None:
            sizes.append((name, len(inputs[0])))
            if most and len(inputs[0]) > most:
                torch.empty(1 << 60, dtype=torch.uint8)

        return look

    autoencoder.model.encoder.register_forward_pre_hook(watch("encoder", encoder))
    autoencoder.model.decoder.register_forward_pre_hook(watch("decoder", decoder))
    return sizes


def whole() -> Autoencoder:
    return Autoencoder(random_model(), "random")


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    """Equal up to a rounding to fp16 here and there."""
    torch.testing.assert_close(a, b, rtol=2**-9, atol=2**-10)


def test_encoding_and_the_reconstruction_error_go_on_in_halves_and_give_the_same(tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "data", count=14, per_shard=7)
    error = ReconstructionSettings(patches=12)
    plain = encode_dataset(data.folder, whole(), tmp_path / "plain", 6, reconstruction=error)
    small = whole()
    sizes = limited(small, encoder=2, decoder=1)
    halved = encode_dataset(data.folder, small, tmp_path / "halved", 6, reconstruction=error)
    assert [size for name, size in sizes if name == "encoder"] == [6, 3, 1, 1, 1, 1, 1, 1, 1] + [1] * 7
    assert [size for name, size in sizes if name == "decoder"] == [6, 3] + [1] * 12
    for a, b in zip(LatentStore(plain).moments(range(14)), LatentStore(halved).moments(range(14)), strict=True):
        assert a is not None
        assert b is not None
        close(a, b)
    told = [LatentStore(folder).info["floor"]["psnr"]["mean"] for folder in (plain, halved)]
    assert told[0] == pytest.approx(told[1], abs=0.01)


def test_streamed_latents_go_on_in_halves_and_give_the_same(tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "data")
    small = whole()
    sizes = limited(small, encoder=4)
    rows = [3, 1, 9, 0, 2, 5]
    for a, b in zip(
        StreamedLatents(data, whole()).moments(rows), StreamedLatents(data, small).moments(rows), strict=True
    ):
        assert a is not None
        assert b is not None
        close(a, b)
    assert [size for _, size in sizes] == [6, 3, 3]


def test_decoding_in_parts_gives_the_same_pixels() -> None:
    latents = torch.randn(7, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    small = whole()
    sizes = limited(small, decoder=3)
    difference = np.abs(small.decode(latents).astype(int) - whole().decode(latents))
    assert [size for _, size in sizes] == [7, 3, 3, 3]  # the last part is filled up: one kernel for all
    assert difference.max() <= 1
    assert small.decode(latents[:0]).shape == (0, 32, 32, 3)


def test_a_cpu_decodes_whole_batches_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DECODED_PIXELS", 1)
    autoencoder = whole()
    sizes = limited(autoencoder)
    autoencoder.decode(torch.zeros(5, 4, 8, 8))
    assert sizes == [("decoder", 5)]


class Peak(TorchDispatchMode):
    """Bytes of fake tensors that live on a GPU at once; what is read from one is taken for true."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def watch(self, values: Any) -> None:
        for value in tree_leaves(values):
            if not isinstance(value, FakeTensor) or value.device.type != "cuda":
                continue
            storage = value.untyped_storage()
            if storage._cdata not in self._known:
                self._known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return True
        result = func(*args, **(kwargs or {}))
        self.watch(result)
        return result


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)


@contextmanager
def stable_diffusion_on_a_gpu(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Autoencoder, Peak]]:
    """The autoencoder's architecture on a GPU that is not there."""
    monkeypatch.setattr(module, "weight_hash", lambda model: "of no weights")
    monkeypatch.setattr(FakeTensor, "numpy", lambda self: np.zeros(self.shape, np.uint8), raising=False)
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"), default_dtype(dtype):
            model = AutoencoderKL(
                block_out_channels=(128, 256, 512, 512),
                down_block_types=("DownEncoderBlock2D",) * 4,
                latent_channels=4,
                layers_per_block=2,
                norm_num_groups=32,
                sample_size=256,
                up_block_types=("UpDecoderBlock2D",) * 4,
            )
        autoencoder = Autoencoder(model, "fake")
        with Peak() as peak:
            peak.watch(list(model.parameters()))
            yield autoencoder, peak


def test_a_run_encodes_and_decodes_within_the_memory_of_a_small_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patches of 256 px by Stable Diffusion's autoencoder: 16 in bf16 to encode, and fp32 to decode a batch of 64."""
    with stable_diffusion_on_a_gpu(torch.bfloat16, monkeypatch) as (autoencoder, peak):
        mean, _ = autoencoder.encode(random_images(16, 256))
        assert mean.device.type == "cuda"
        assert tuple(mean.shape) == (16, 4, 32, 32)
        assert 0.5 * GIB < peak.most < 4 * GIB
    with stable_diffusion_on_a_gpu(torch.float32, monkeypatch) as (autoencoder, peak):
        sizes = limited(autoencoder)
        images = autoencoder.decode(torch.zeros(20, 4, 32, 32, device="cuda"))
        assert images.shape == (20, 256, 256, 3)
        assert [size for _, size in sizes] == [8, 8, 8]
        assert 1 * GIB < peak.most < 4 * GIB
        sizes.clear()
        autoencoder.decode(torch.zeros(40, 4, 8, 8, device="cuda"))  # as many pixels of smaller patches
        autoencoder.decode(torch.zeros(2, 4, 64, 64, device="cuda"))
        autoencoder.decode(torch.zeros(3, 4, 64, 64, device="cuda"))
        assert [size for _, size in sizes] == [40, 2, 2, 2]
