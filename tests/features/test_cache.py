"""The cache returns what the encoder would, embeds nothing twice, and never trusts a damaged file."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from latent_medi.core.checksums import save_tensors
from latent_medi.features import cache as cache_module
from latent_medi.features.cache import cache_file, cached_features
from latent_medi.features.encoders import ImageEncoder, load_encoder
from latent_medi.features.networks import Network, Preprocessing
from latent_medi.metadata.schema import Field, Schema
from latent_medi.shards.dataset import PatchDataset
from latent_medi.shards.writing.writer import Patch, write_dataset


class Means(nn.Module):
    """Channel means times a factor."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(dim=(2, 3)) * self.factor


class Counting(ImageEncoder):
    """Counts the patches that it embeds."""

    seen = 0

    def features(self, batches: Iterable[np.ndarray], device: object = None) -> np.ndarray:
        kept = list(batches)
        self.seen += sum(len(b) for b in kept)
        return super().features(kept)


def _encoder(factor: float = 1.0) -> Counting:
    return Counting(Network("means", Means(factor), 3, Preprocessing(0, (0.0,) * 3, (1.0,) * 3), ""))


def _dataset(folder: Path, seed: int = 0) -> PatchDataset:
    rng = np.random.default_rng(seed)
    patches = [
        Patch(f"p{i}", rng.integers(0, 256, (8, 8, 3), dtype=np.uint8), f"q{i}", f"q{i}", 0, 0, 0.5, {"class": "a"})
        for i in range(11)
    ]
    return write_dataset(
        folder, patches, "tiny", Schema((Field("class", "class", ("a",)),)), 8, 0.5, patches_per_shard=4
    )


@pytest.fixture
def dataset(tmp_path: Path) -> PatchDataset:
    return _dataset(tmp_path / "data")


def test_only_missing_rows_are_embedded(dataset: PatchDataset, tmp_path: Path) -> None:
    encoder, cache = _encoder(), tmp_path / "cache"
    expected = _encoder().features([dataset.read(np.arange(11))])
    first = cached_features(dataset, np.array([7, 2, 7]), encoder, cache, batch=2)
    assert encoder.seen == 2
    np.testing.assert_allclose(first, expected[[7, 2, 7]], atol=1e-6)
    everything = cached_features(dataset, np.arange(11), encoder, cache, batch=4)
    assert encoder.seen == 11
    np.testing.assert_allclose(everything, expected, atol=1e-6)
    again = _encoder()
    np.testing.assert_array_equal(cached_features(dataset, np.arange(11), again, cache), everything)
    assert again.seen == 0


def test_features_of_another_program_are_taken_from_the_file_of_the_cache(
    dataset: PatchDataset, tmp_path: Path
) -> None:
    encoder, mine = _encoder(), np.random.default_rng(0).normal(size=(11, 3)).astype(np.float32)
    tensors = {"features": mine, "known": np.array([1] * 10 + [0], np.uint8)}
    save_tensors(tensors, cache_file(dataset, encoder, tmp_path / "cache"))
    assert np.array_equal(cached_features(dataset, np.array([9, 0]), encoder, tmp_path / "cache"), mine[[9, 0]])
    assert encoder.seen == 0
    cached_features(dataset, np.array([10]), encoder, tmp_path / "cache")
    assert encoder.seen == 1


def test_other_weights_or_other_pixels_are_another_entry(dataset: PatchDataset, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    a = cached_features(dataset, np.arange(11), _encoder(), cache)
    b = cached_features(dataset, np.arange(11), _encoder(2.0), cache)
    np.testing.assert_allclose(b, 2 * a, rtol=1e-6)
    other = cached_features(_dataset(tmp_path / "other", 1), np.arange(11), _encoder(), cache)
    assert not np.allclose(other, a)


def test_a_damaged_cache_is_made_again(dataset: PatchDataset, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    a = cached_features(dataset, np.arange(11), _encoder(), cache)
    (file,) = cache.iterdir()
    file.write_bytes(file.read_bytes()[:50])
    encoder = _encoder()
    np.testing.assert_array_equal(cached_features(dataset, np.arange(11), encoder, cache), a)
    assert encoder.seen == 11


def test_an_interrupted_run_keeps_what_it_wrote(
    dataset: PatchDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "_LEAST", 4)
    monkeypatch.setattr(cache_module, "_WRITES", 3)
    cache = tmp_path / "cache"
    read, calls = PatchDataset.read, [0]

    def broken(self: PatchDataset, rows: np.ndarray, workers: int = 0) -> np.ndarray:
        calls[0] += 1
        if calls[0] == 6:
            raise KeyboardInterrupt
        return read(self, rows, workers)

    with monkeypatch.context() as patch:
        patch.setattr(PatchDataset, "read", broken)
        with pytest.raises(KeyboardInterrupt):
            cached_features(dataset, np.arange(11), _encoder(), cache, batch=2)
    encoder = _encoder()
    found = cached_features(dataset, np.arange(11), encoder, cache, batch=2)
    assert encoder.seen == 3  # of 11; 8 were written in two parts before the sixth batch failed
    np.testing.assert_allclose(found, _encoder().features([dataset.read(np.arange(11))]), atol=1e-6)


def test_a_precision_below_fp32_is_another_entry_and_fp32_is_the_one_that_it_was(
    dataset: PatchDataset, tmp_path: Path
) -> None:
    cache, network = tmp_path / "cache", Network("means", Means(1.01), 3, Preprocessing(0, (0.0,) * 3, (1.0,) * 3), "")
    plain = ImageEncoder(network)
    weights = hashlib.sha256(b"Means" + b"factor torch.float32 ()" + np.float32(1.01).tobytes()).hexdigest()
    assert plain.fingerprint == hashlib.sha256(f"{weights} {network.preprocessing.text}".encode()).hexdigest()
    full = cached_features(dataset, np.arange(11), plain, cache)
    low = ImageEncoder(network, precision="bf16")
    assert len({e.fingerprint for e in (plain, low, ImageEncoder(network, precision="fp16"))}) == 3
    cached_features(dataset, np.arange(11), low, cache)
    assert len(list(cache.iterdir())) == 2
    np.testing.assert_array_equal(cached_features(dataset, np.arange(11), ImageEncoder(network), cache), full)


@pytest.mark.parametrize("threads", [0, 3])
def test_patches_are_read_ahead_beside_a_gpu_and_features_are_the_same(
    dataset: PatchDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    asked: list[str] = []
    readers: set[str] = set()
    read = PatchDataset.read

    def noting(self: PatchDataset, rows: np.ndarray, workers: int = 0) -> np.ndarray:
        readers.add(threading.current_thread().name.rpartition("_")[0])
        return read(self, rows, workers)

    def beside(device: torch.device, data: PatchDataset) -> int:
        asked.append(device.type)
        return threads

    expected = _encoder().features([dataset.read(np.arange(11))])
    monkeypatch.setattr(PatchDataset, "read", noting)
    monkeypatch.setattr(cache_module, "read_ahead_threads", beside)
    found = cached_features(dataset, np.arange(11), _encoder(), tmp_path / "cache", 2, "cpu")
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert asked == ["cpu"]
    assert (readers == {"read-ahead"}) is bool(threads)
    assert not [t for t in threading.enumerate() if t.name.startswith("read-ahead")]


def test_the_demo_s_encoder_says_that_it_has_seen_no_tissue(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    cache_module._warn.cache_clear()  # another test of this process may have been warned
    monkeypatch.setattr(cache_module.log, "warning", lambda text, *values: said.append(text % values))
    real = PatchDataset.open(tiny / "data")
    for _ in range(2):
        cached_features(real, np.arange(2), load_encoder("demo"), tmp_path)
    assert len(said) == 1
    assert "procedural tissue alone" in said[0]
    cache_module._warn.cache_clear()
    procedural = PatchDataset.open(tiny / "data")
    procedural.info["provenance"] = {"generator": "latent_medi.demo.cohort"}
    cached_features(procedural, np.arange(4), load_encoder("demo"), tmp_path)
    assert len(said) == 1
