"""What only a GPU can show; together about a minute on a large one. Run with ``pytest -m gpu``.

``LATENT_MEDI_GPU_TESTS_DEVICE=cpu`` runs them on the CPU, where comparisons of the two devices compare nothing.
"""

from __future__ import annotations

import csv
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import GradScalerKwargs
from card_memory import at_most, needed
from parts import random_images, random_model
from tiny_runs import FORMS, Models, apart, forget_device, furthest, greys, make_models, tensors_in, tiny_run

from latent_medi.cli import main
from latent_medi.core.errors import RESUME
from latent_medi.diffusion.pipeline import MediPipeline
from latent_medi.diffusion.settings import SamplerSettings
from latent_medi.features.encoders import load_encoder
from latent_medi.latents.autoencoder import Autoencoder
from latent_medi.planning.plan import Sample
from latent_medi.sampling.image_sampler import ImageSampler
from latent_medi.sampling.settings import GenerateSettings
from latent_medi.training.checkpoint import newest_checkpoint
from latent_medi.training.data import TrainingData
from latent_medi.training.loop import train
from latent_medi.training.optimizer import build_optimizer
from latent_medi.training.run_folder import plain
from latent_medi.training.settings import EmaSettings, TrainSettings
from latent_medi.training.start import ACCELERATE_PRECISION

pytestmark = pytest.mark.gpu

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def models(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Models:
    return make_models(tiny, tmp_path_factory.mktemp("models"))


def trained(settings: TrainSettings, device: str, **options: Any) -> list[float]:
    """Train, on the device under test, and give the losses that were logged."""
    train(settings, accelerator_on(device, settings.precision, **options))
    return losses(Path(settings.out))


def accelerator_on(device: str, precision: str, **options: Any) -> Accelerator:
    return Accelerator(cpu=device == "cpu", mixed_precision=ACCELERATE_PRECISION[precision], **options)


def losses(out: Path) -> list[float]:
    with (out / "log.csv").open(newline="") as lines:
        return [float(row["loss"]) for row in csv.DictReader(lines)]


def settings_file(settings: TrainSettings, path: Path) -> str:
    path.write_text(yaml.safe_dump(plain(asdict(settings))))
    return str(path)


# ---- training


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_model_trains_in_every_precision(tiny: Path, tmp_path: Path, device: str, precision: str) -> None:
    if precision == "fp16" and device == "cpu":
        pytest.skip("fp16's loss scaling is a GPU's")
    if precision == "bf16" and device != "cpu" and not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("this card has no bf16")
    settings = tiny_run(
        tiny,
        tmp_path / "run",
        max_steps=30,
        precision=precision,
        channels_last=True,
        preview_every_images=240,
        preview_images=4,
        preview_steps=2,
    )
    found = trained(settings, device)
    assert len(found) == 30
    assert all(map(math.isfinite, found))
    assert np.mean(found[-5:]) < np.mean(found[:5])
    assert all(tensor.isfinite().all() for tensor in tensors_in(tmp_path / "run" / "model").values())
    assert list((tmp_path / "run" / "previews").glob("*.png"))


def test_training_is_the_cpus_in_fp32(tiny: Path, tmp_path: Path, device: str) -> None:
    settings = tiny_run(tiny, tmp_path / "there")
    there = trained(settings, device)
    forget_device()
    here = trained(replace(settings, out=str(tmp_path / "here")), "cpu")
    np.testing.assert_allclose(there, here, rtol=1e-2)
    assert apart(tensors_in(tmp_path / "there" / "model"), tensors_in(tmp_path / "here" / "model")) < 1e-2


def test_an_overflow_is_skipped_and_leaves_the_average_alone(tiny: Path, tmp_path: Path, device: str) -> None:
    """After the first update the loss scale grows beyond what any gradient survives."""
    precision = "fp32" if device == "cpu" else "fp16"
    scale = GradScalerKwargs(init_scale=2.0**10, growth_factor=2.0**110, growth_interval=1)
    accelerator: Any = accelerator_on(device, precision, kwargs_handlers=[scale])
    if device == "cpu":  # where Accelerate makes no scaler, and fp32 holds the largest gradients
        accelerator.scaler = torch.amp.GradScaler("cpu", **asdict(scale))

        def overflowing(loss: torch.Tensor) -> None:
            accelerator.scaler.scale(loss).backward()
            for parameter in accelerator._optimizers[0].param_groups[0]["params"]:
                if accelerator.scaler.get_scale() > 2.0**100:
                    parameter.grad.fill_(torch.inf)

        accelerator.backward = overflowing
    average = EmaSettings("constant")  # which is behind the weights from the first update on
    train(tiny_run(tiny, tmp_path, precision=precision, ema=average), accelerator)
    assert accelerator.scaler.get_scale() == 2.0**119
    assert all(map(math.isfinite, losses(tmp_path)))
    first, second = (tensors_in(tmp_path / "checkpoints" / f"images-{n:012d}") for n in (8, 16))
    for part in ("model.safetensors", "ema.safetensors"):
        assert all(torch.equal(second[key], first[key]) for key in first if key.startswith(part))
    names = [key.partition("/")[2] for key in first if key.startswith("model.")]
    pairs = [(first[f"model.safetensors/{name}"], first[f"ema.safetensors/{name}"]) for name in names]
    assert not all(torch.equal(weight, averaged) for weight, averaged in pairs)


def test_latents_on_the_device_are_those_in_ram(tiny: Path, tmp_path: Path, device: str) -> None:
    settings = tiny_run(tiny, tmp_path / "ram", max_steps=5)
    from_ram = trained(settings, device)
    there = trained(replace(settings, resident="device", out=str(tmp_path / "device")), device)
    np.testing.assert_allclose(there, from_ram, rtol=1e-4)
    assert apart(tensors_in(tmp_path / "device" / "model"), tensors_in(tmp_path / "ram" / "model")) < 1e-3


def test_a_run_that_was_cut_off_goes_on(tiny: Path, tmp_path: Path, device: str) -> None:
    settings = tiny_run(tiny, tmp_path / "whole", max_steps=6)
    whole = trained(settings, device)
    torn = replace(settings, out=str(tmp_path / "torn"))
    shutil.copytree(tmp_path / "whole", torn.out)
    shutil.rmtree(tmp_path / "torn" / "model")
    shutil.rmtree(tmp_path / "torn" / "checkpoints" / "images-000000000048")
    np.testing.assert_allclose(trained(torn, device), whole, rtol=1e-4)
    assert apart(tensors_in(tmp_path / "torn" / "model"), tensors_in(tmp_path / "whole" / "model")) < 1e-3


def test_the_fused_optimizer_is_adamw(tiny: Path, tmp_path: Path, device: str) -> None:
    settings = tiny_run(tiny, tmp_path, weight_decay=0.01)
    drawn = torch.Generator().manual_seed(0)
    start, slopes = torch.randn(300, generator=drawn), torch.randn(5, 300, generator=drawn)
    ours, plainly = (torch.nn.Parameter(start.to(where)) for where in (device, "cpu"))
    fused = build_optimizer([ours], settings)
    known = torch.optim.AdamW(
        [plainly], lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay, foreach=False
    )
    for slope in slopes:
        ours.grad, plainly.grad = slope.to(device), slope.clone()
        fused.step()
        known.step()
    torch.testing.assert_close(ours.detach().cpu(), plainly.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_compiled_model_trains_alike(tiny: Path, tmp_path: Path, device: str, precision: str) -> None:
    if device == "cpu":
        pytest.skip("a CPU's compiler takes minutes")
    settings = tiny_run(tiny, tmp_path / "eager", max_steps=3, precision=precision)
    eager = trained(settings, device)
    compiled = trained(replace(settings, compile=True, out=str(tmp_path / "compiled")), device)
    np.testing.assert_allclose(compiled, eager, rtol=1e-2 if precision == "fp32" else 3e-2)


def test_the_next_batch_is_prepared_beside_the_device(
    tiny: Path, tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[threading.Thread] = []
    batch = TrainingData.batch

    def noted(self: TrainingData, *args: Any, **kwargs: Any) -> Any:
        threads.append(threading.current_thread())
        return batch(self, *args, **kwargs)

    monkeypatch.setattr(TrainingData, "batch", noted)
    trained(tiny_run(tiny, tmp_path, max_steps=4), device)
    assert len(threads) >= 4
    beside = [thread is not threading.main_thread() for thread in threads[-4:]]
    assert all(beside) if device != "cpu" else not any(beside)


def test_full_memory_ends_training_with_what_to_do(
    tiny: Path, tmp_path: Path, device: str, capsys: pytest.CaptureFixture[str]
) -> None:
    count = 16 if device == "cpu" else 4096
    settings = tiny_run(tiny, tmp_path / "run", global_batch=count, device_batch=count, max_steps=1)
    words = ["train", "--config", settings_file(settings, tmp_path / "settings.yaml")]
    size = needed(device, lambda: trained(replace(settings, out=str(tmp_path / "measured")), device))
    forget_device()
    with at_most(device, size // 3):
        code = main(words)
    told = capsys.readouterr().err
    assert code == 2
    assert "memory is full" in told
    assert "device_batch" in told
    assert "Traceback" not in told


def test_a_notice_saves_and_ends(tiny: Path, tmp_path: Path, device: str) -> None:
    """On a card as one process of NCCL, through DDP; Accelerate makes no group of one on the CPU."""
    settings = tiny_run(tiny, tmp_path / "run", max_steps=1_000_000, checkpoint_every_images=80)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), **(group if device != "cpu" else {})}
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    words = [sys.executable, "-m", "latent_medi.training", "--config", settings_file(settings, tmp_path / "s.yaml")]
    with (tmp_path / "told").open("w") as told:
        process = subprocess.Popen(words, env=environment, stdout=told, stderr=told, cwd=REPOSITORY)
    try:
        deadline = time.monotonic() + 240
        while not list((tmp_path / "run" / "checkpoints").glob("images-*")):
            assert process.poll() is None, (tmp_path / "told").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == RESUME, (tmp_path / "told").read_text()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    text = (tmp_path / "told").read_text()
    assert "Traceback" not in text
    assert "SIGTERM at" in text
    assert newest_checkpoint(tmp_path / "run" / "checkpoints") is not None


# ---- sampling, autoencoders, features


def pipeline_of(models: Models, device: str) -> MediPipeline:
    return MediPipeline.from_pretrained(models.strong, device=device)


def images_of(pipeline: MediPipeline, count: int = 4, **values: Any) -> np.ndarray:
    """Images of one condition."""
    fields: dict[str, str | float] = {"class": "tumour", "site": "aster", "age": 50.0}
    settings = GenerateSettings(**{"sampler": SamplerSettings(steps=8), "device_batch": 4, **values})
    samples = [Sample(0, i, i, fields) for i in range(count)]
    return np.stack([image for _, image in ImageSampler(pipeline, settings).images(samples)])


@pytest.mark.parametrize("form", FORMS)
def test_images_are_the_cpus_in_fp32(models: Models, device: str, form: str) -> None:
    there, here = (images_of(pipeline_of(models, where), guidance=FORMS[form]) for where in (device, "cpu"))
    share, largest = greys(there, here)
    assert largest <= 2
    assert share > 0.98


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_images_in_half_precision_are_like_those_in_fp32(models: Models, device: str, precision: str) -> None:
    pipeline = pipeline_of(models, device)
    half, whole = (images_of(pipeline, precision=each) for each in (precision, "fp32"))
    assert np.abs(half.astype(int) - whole.astype(int)).mean() < 4


def test_the_same_images_every_time(models: Models, device: str) -> None:
    first, second = (images_of(pipeline_of(models, device), guidance=FORMS["chain"]) for _ in range(2))
    assert np.array_equal(first, second)


def test_full_memory_halves_the_batch_of_sampling(
    models: Models, device: str, caplog: pytest.LogCaptureFixture
) -> None:
    count = 16 if device == "cpu" else 2048
    pipeline, common = pipeline_of(models, device), {"sampler": SamplerSettings(steps=2), "device_batch": count}
    whole = images_of(pipeline, count, **common)
    size = needed(device, lambda: images_of(pipeline, count, **common))
    assert "memory is full" not in caplog.text
    with at_most(device, size // 2):
        halved = images_of(pipeline, count, **common)
    assert "memory is full: going on with batches of" in caplog.text
    assert greys(halved, whole)[1] <= 1


@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderTiny", "AutoencoderTAEF2"])
def test_autoencoders_are_the_cpus_in_fp32(device: str, kind: str) -> None:
    here, there = (Autoencoder(random_model(kind), kind) for _ in range(2))
    there.to(device)
    images = random_images(4, 64)
    for ours, theirs in zip(there.encode(images), here.encode(images), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            assert furthest({"": ours.cpu()}, {"": theirs}) < 1e-4
    latents = here.encode(images)[0]
    assert greys(there.decode(latents.to(device)), here.decode(latents))[1] <= 1


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_autoencoders_are_finite_in_half_precision(device: str, precision: torch.dtype) -> None:
    there = Autoencoder(random_model(), "random").to(device, precision)
    mean, std = there.encode(random_images(4, 64))
    assert std is not None
    assert mean.dtype == std.dtype == torch.float32
    assert mean.isfinite().all()
    assert std.isfinite().all()
    assert there.decode(mean).shape == (4, 64, 64, 3)


def test_features_are_the_cpus(device: str) -> None:
    images = random_images(32, 64)
    here, there = (load_encoder("demo", device=where).features([images[:16], images[16:]]) for where in ("cpu", device))
    assert np.linalg.norm(there - here) / np.linalg.norm(here) < 1e-4
