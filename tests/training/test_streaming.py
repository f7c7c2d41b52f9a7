"""Training straight from image shards: the batches of the stored latents, and an autoencoder that stays as it is."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from parts import random_model
from safetensors.torch import load_file

from latent_medi.core.errors import UserError
from latent_medi.diffusion.pipeline import MediPipeline
from latent_medi.latents.autoencoder import Autoencoder
from latent_medi.latents.encode import encode_dataset
from latent_medi.latents.networks import weight_hash
from latent_medi.latents.store import LatentStore
from latent_medi.latents.stream import StreamedLatents
from latent_medi.shards.dataset import PatchDataset
from latent_medi.shards.reading.read_ahead import ReadAhead
from latent_medi.training import data as module
from latent_medi.training import loop
from latent_medi.training.batch_randomness import batch_generator, draw_batch
from latent_medi.training.data import Batch, TrainingData, combination_weights, open_data
from latent_medi.training.log import read_log
from latent_medi.training.loop import train
from latent_medi.training.sample_order import rows_at
from latent_medi.training.settings import StreamSettings, TrainSettings

Make = Callable[..., TrainSettings]


def opened(settings: TrainSettings) -> TrainingData:
    settings.check()
    data = open_data(settings, None)
    data.whiten(None, [])
    return data


def same_latents(a: torch.Tensor, b: torch.Tensor) -> None:
    """Up to a rounding to fp16 here and there: matrix products of one patch may round unlike those of several."""
    torch.testing.assert_close(a, b, rtol=2**-9, atol=2**-10)
    assert (a != b).sum() <= 0.05 * a.numel()


def same_batch(a: Batch, b: Batch) -> None:
    """The latents up to a rounding, all else bit for bit."""
    same_latents(a.latents, b.latents)
    for name in ("noise", "timesteps"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert torch.equal(a.conditions.codes, b.conditions.codes)
    assert torch.equal(a.conditions.values, b.conditions.values)


@pytest.fixture
def streaming(run_settings: Make, autoencoder: Autoencoder) -> Make:
    """Settings of a run without latents."""

    def make(**values):
        return run_settings(**{"latents": "", "autoencoder": autoencoder.source, **values})

    return make


@pytest.mark.parametrize("processes", [1, 2])
def test_batches_are_those_of_the_stored_latents(run_settings: Make, streaming: Make, processes: int) -> None:
    stored, streamed = opened(run_settings()), opened(streaming(stream=StreamSettings(device_batch=3)))
    assert isinstance(streamed.store, StreamedLatents)
    torch.testing.assert_close(stored.shift, streamed.shift)  # the sample is larger than the data
    torch.testing.assert_close(stored.scale, streamed.scale)
    for number in (0, 1, 2, 9, 5):  # across an epoch, and out of order as after a resume
        for rank in range(processes):
            a, b = (d.batch(number, 8, 0, 1000, run_settings().dropout, rank, processes) for d in (stored, streamed))
            same_batch(a, b)


def test_moments_are_the_stored_ones(tiny: Path, autoencoder: Autoencoder) -> None:
    data, stored = PatchDataset.open(tiny / "data"), LatentStore(tiny / "latents")
    streamed = StreamedLatents(data, autoencoder, device_batch=5)
    assert (len(streamed), streamed.shape, streamed.deterministic) == (len(stored), stored.shape, False)
    assert streamed.info["autoencoder"] == stored.info["autoencoder"]
    for rows in (np.arange(len(data)), [51, 0, 7, 7], []):
        for a, b in zip(stored.moments(rows), streamed.moments(rows), strict=True):
            assert a.dtype == b.dtype
            same_latents(a, b)
    with pytest.raises(UserError, match="from 0 to 51"):
        streamed.moments([52])


def test_views_are_drawn_per_image_and_are_those_of_stored_views(
    run_settings: Make, streaming: Make, tiny: Path, autoencoder: Autoencoder, tmp_path: Path
) -> None:
    encode_dataset(tiny / "data", autoencoder, tmp_path / "views", views=8)
    stored = opened(run_settings(latents=str(tmp_path / "views")))
    streamed = opened(streaming(stream=StreamSettings(views=8)))
    one = opened(run_settings())
    assert len({d.fingerprint() for d in (stored, streamed, one)}) == 3
    seen: list[np.ndarray] = []
    moments = stored.store.moments
    stored.store.moments = lambda rows, views=None: (seen.append(views), moments(rows, views))[1]  # type: ignore
    streamed.shift, streamed.scale = stored.shift, stored.scale  # measured over one drawn view per patch
    dropout = run_settings().dropout
    for number in range(20):
        a, b = (d.batch(number, 16, 0, 1000, dropout, 0, 2) for d in (stored, streamed))
        same_batch(a, b)
        # Everything but the view is drawn as without views.
        plain = one.batch(number, 16, 0, 1000, dropout, 0, 2)
        assert torch.equal(a.noise, plain.noise)
        assert torch.equal(a.timesteps, plain.timesteps)
        assert torch.equal(a.conditions.codes, plain.conditions.codes)
    counts = np.bincount(np.concatenate(seen), minlength=8)
    assert counts.sum() == 160
    assert counts.min() >= 8


def test_without_views_nothing_is_drawn_beyond_what_always_was(run_settings: Make) -> None:
    data, dropout = opened(run_settings()), run_settings().dropout
    batch = data.batch(3, 8, 5, 1000, dropout, 0, 1)
    draws = draw_batch(batch_generator(5, 3), (8, *data.store.shape), 1000, posterior=True)
    mean, std = data.store.moments(data.rows[data.at(3, 8, 5)])
    raw = torch.addcmul(mean, std, draws.posterior)
    expected = (raw - data.shift.view(-1, 1, 1)) / data.scale.view(-1, 1, 1)
    assert torch.equal(batch.latents, expected)
    assert torch.equal(batch.noise, draws.noise)


def test_statistics_are_of_a_fixed_sample(tiny: Path, autoencoder: Autoencoder) -> None:
    data, rows = PatchDataset.open(tiny / "data"), np.arange(40)
    whole = LatentStore(tiny / "latents").statistics(rows)
    few = StreamedLatents(data, autoencoder, sample=20, device_batch=8)
    counts: list[int] = []
    encode = few._encode
    few._encode = lambda images: (counts.append(len(images)), encode(images))[1]  # type: ignore
    shift, scale = few.statistics(rows)
    assert sum(counts) == 20  # each patch once, though the arithmetic passes twice
    again = StreamedLatents(data, autoencoder, sample=20, device_batch=3).statistics(rows[::-1])
    assert torch.equal(shift, again[0])
    assert torch.equal(scale, again[1])
    assert not torch.equal(shift, whole[0])
    torch.testing.assert_close(shift, whole[0], atol=float(0.3 * whole[1].max()), rtol=0)
    torch.testing.assert_close(scale, whole[1], atol=0, rtol=0.3)
    with pytest.raises(UserError, match="no row"):
        few.statistics([])


def test_a_latent_beyond_fp16_is_named(tiny: Path) -> None:
    model = random_model("AutoencoderTiny")
    with torch.no_grad():
        list(model.encoder.modules())[-1].bias += 1e5
    streamed = StreamedLatents(PatchDataset.open(tiny / "data"), Autoencoder(model, "x"))
    with pytest.raises(UserError, match="'p003' is not finite in fp16"):
        streamed.statistics([3, 9])


def test_a_streamed_run_is_the_stored_run(run_settings: Make, streaming: Make, tmp_path: Path) -> None:
    train(run_settings(out=str(tmp_path / "stored"), max_steps=6, log_every_images=8))
    train(streaming(out=str(tmp_path / "streamed"), max_steps=6, log_every_images=8))
    losses = [[row["loss"] for row in read_log(tmp_path / n / "log.csv")] for n in ("stored", "streamed")]
    assert len(losses[0]) == 6
    np.testing.assert_allclose(*np.array(losses, dtype=float), rtol=1e-5)
    for file in ("unet/diffusion_pytorch_model.safetensors", "autoencoder/diffusion_pytorch_model.safetensors"):
        a, b = (load_file(tmp_path / n / "model" / file) for n in ("stored", "streamed"))
        # Adam's step does not shrink with the gradient: a bias without one (of keys) walks on roundings alone.
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    assert len(MediPipeline.from_pretrained(tmp_path / "streamed" / "model")(class_="tumour", num_images=1)) == 1


def test_the_autoencoder_in_the_loop_is_frozen(
    streaming: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[TrainingData] = []
    optimized: list[torch.Tensor] = []
    real_open, real_optimizer = loop.open_data, torch.optim.AdamW

    def keep(*arguments) -> TrainingData:
        kept.append(real_open(*arguments))
        return kept[0]

    def optimizer(parameters, **settings):
        groups = list(parameters)
        optimized.extend(parameter for group in groups for parameter in group["params"])
        return real_optimizer(groups, **settings)

    monkeypatch.setattr(loop, "open_data", keep)
    monkeypatch.setattr(torch.optim, "AdamW", optimizer)
    settings = streaming(max_steps=6)
    train(settings)
    store = kept[0].store
    assert isinstance(store, StreamedLatents)
    model = store.autoencoder.model
    assert weight_hash(model) == store.autoencoder.hash  # taken when it was loaded
    assert not model.training
    parameters = list(model.parameters())
    assert not any(p.requires_grad or p.grad is not None for p in parameters)
    assert optimized
    assert not {id(p) for p in parameters} & {id(p) for p in optimized}
    mean, std = store.moments([0, 1])
    assert not mean.requires_grad
    assert not std.requires_grad
    trained = sum(p.numel() for p in optimized)
    checkpoint = max((Path(settings.out) / "checkpoints").iterdir())
    for file in checkpoint.rglob("*.safetensors"):
        tensors = load_file(file)
        assert not [name for name in tensors if "coder" in name or "quant_conv" in name]
        assert sum(t.numel() for t in tensors.values()) <= 2 * trained + len(tensors)


def test_patches_are_decoded_ahead_by_threads(streaming: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    data = opened(streaming(stream=StreamSettings(workers=2)))
    read: list[tuple[str, tuple[int, ...]]] = []
    real = PatchDataset.read

    def note(self, rows, workers=0):
        read.append((threading.current_thread().name, tuple(rows)))
        return real(self, rows, workers)

    monkeypatch.setattr(PatchDataset, "read", note)
    for number in range(4):
        data.batch(number, 8, 0, 1000, streaming().dropout, 0, 1)
    data.store._reader.close()
    assert all(name.startswith("read-ahead") for name, _ in read)
    wanted = [row for number in range(4) for row in data.rows[data.at(number, 8, 0)]]
    got = [row for _, rows in read for row in rows]
    assert not set(wanted) - set(got)
    assert len(got) <= 8 * (4 + module.AHEAD)  # each patch once, and a little beyond


def test_what_nobody_asks_for_is_dropped(tiny: Path) -> None:
    data = PatchDataset.open(tiny / "data")
    reader = ReadAhead(data, workers=1, keep=2)
    for first in range(5):
        reader.expect(np.arange(first, first + 3))
    assert len(reader._coming) == 2
    assert np.array_equal(reader.read(np.arange(3)), data.read(np.arange(3)))
    assert np.array_equal(reader.read(np.arange(4, 7)), data.read(np.arange(4, 7)))
    reader.close()


def test_data_behind_a_url_stream_alike(streaming: Make, tiny: Path) -> None:
    fsspec.filesystem("memory").put(str(tiny / "data"), "/streamed-from-here", recursive=True)
    here, there = opened(streaming()), opened(streaming(data="memory://streamed-from-here"))
    assert here.fingerprint() == there.fingerprint()
    for number in range(2):
        same_batch(*(d.batch(number, 8, 0, 1000, streaming().dropout, 0, 1) for d in (here, there)))


def test_a_run_does_not_change_between_stored_and_streamed(run_settings: Make, streaming: Make, tmp_path: Path) -> None:
    settings = run_settings(max_steps=8)
    train(settings)
    assert json.loads((Path(settings.out) / "run.json").read_text())
    with pytest.raises(UserError, match="the training data changed"):
        train(streaming(max_steps=9))
    # Where latents are held, and how patches are read, belongs to speed.
    train(replace(settings, resident="mmap", stream=StreamSettings(workers=1, device_batch=2)))


@pytest.mark.parametrize("resident", ["mmap", "ram", "device"])
def test_where_latents_are_held_changes_nothing(run_settings: Make, resident: str) -> None:
    a, b = opened(run_settings()), opened(run_settings(resident=resident))
    assert isinstance(b.store, LatentStore)
    assert b.store.resident == resident
    same_batch(*(d.batch(1, 8, 0, 1000, run_settings().dropout, 0, 1) for d in (a, b)))


def test_settings_that_cannot_be_followed(run_settings: Make, streaming: Make) -> None:
    with pytest.raises(UserError, match=r"give latents .* or an autoencoder"):
        run_settings(latents="").check()
    with pytest.raises(UserError, match=r"stream\.views .* 1 or 8, not 2"):
        streaming(stream=StreamSettings(views=2)).check()
    with pytest.raises(UserError, match="statistics_patches"):
        streaming(stream=StreamSettings(statistics_patches=0)).check()
    with pytest.raises(UserError, match="no such folder"):
        open_data(streaming(autoencoder="nowhere"), None)


def test_the_class_balanced_sampler_of_medi_is_one_setting(tiny: Path) -> None:
    dataset = PatchDataset.open(tiny / "data")
    rows = np.concatenate([dataset.rows({"class": "tumour"}), dataset.rows({"class": "benign"})[:5]])
    weights = combination_weights(dataset, rows, ["class"], 1.0)
    classes = dataset.index["class"].iloc[rows].to_numpy()
    # MeDi draws with replacement by a WeightedRandomSampler with weight 1/count(class).
    expected = np.array([1.0 / np.sum(classes == name) for name in classes])
    np.testing.assert_allclose(weights, expected / expected.sum())
    drawn = classes[rows_at(0, 8000, len(rows), 0, weights)]
    assert abs(np.mean(drawn == "tumour") - 0.5) < 0.02
    assert np.mean(classes == "tumour") > 0.8
    # Halfway between: the root of the ratio is left.
    halfway = combination_weights(dataset, rows, ["class"], 0.5)
    share = halfway[classes == "tumour"].sum() / halfway[classes == "benign"].sum()
    assert share == pytest.approx(np.sqrt(np.sum(classes == "tumour") / 5))
