"""A device's limits: batches that fit its memory, fp32 that is fp32, bf16 only where it is computed."""

from __future__ import annotations

import importlib.metadata
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parts import random_images, small_model
from torch.nn.modules.module import register_module_forward_pre_hook

from latent_medi import cli
from latent_medi.core.device import HalvedBatch, check_precision, exact_fp32
from latent_medi.core.errors import UserError
from latent_medi.diffusion.denoiser import Denoiser, build_unet
from latent_medi.diffusion.inversion import invert_latents, translate_latents
from latent_medi.diffusion.objective import make_scheduler
from latent_medi.diffusion.pipeline import MediPipeline
from latent_medi.diffusion.samplers import make_sampler
from latent_medi.diffusion.settings import ObjectiveSettings, SamplerSettings
from latent_medi.evaluation.provenance import run_record
from latent_medi.experiment.run import run
from latent_medi.experiment.settings import ExperimentSettings
from latent_medi.features.encoders import load_encoder
from latent_medi.latents.autoencoder import Autoencoder, load_autoencoder
from latent_medi.launch import make_accelerator
from latent_medi.sampling.image_sampler import ImageSampler
from latent_medi.sampling.settings import GenerateSettings
from latent_medi.training.loop import train
from latent_medi.training.settings import TrainSettings


def allocate_too_much() -> None:
    """What the allocator says is torch's own."""
    torch.empty(1 << 60, dtype=torch.uint8)


# ---- memory


@settings(deadline=None)
@given(st.integers(0, 40), st.integers(0, 20), st.integers(0, 20), st.integers(1, 20))
def test_everything_is_done_once_and_in_order_whatever_fits(count: int, size: int, at_most: int, fits: int) -> None:
    def work(part: slice, whole: int) -> list[int]:
        assert part.stop - part.start <= whole
        if whole > fits:
            allocate_too_much()
        return list(range(count))[part]

    batch = HalvedBatch("work", "", size)
    with patch("latent_medi.core.device.release_memory"):  # which takes its time over all that this process holds
        parts = list(batch.over(count, work, at_most))
    assert [i for _, found in parts for i in found] == list(range(count))
    assert [i for part, _ in parts for i in range(count)[part]] == list(range(count))
    assert all(len(found) <= min(fits, at_most or fits, size or fits) for _, found in parts)


def test_a_full_memory_is_told_once_and_remembered(
    caplog: pytest.LogCaptureFixture,
) -> None:
    sizes: list[int] = []

    def work(part: slice, size: int) -> None:
        sizes.append(size)
        if size > 2:
            allocate_too_much()

    batch = HalvedBatch("encoding", "Use less.", 8)
    for _ in range(2):
        list(batch.over(4, work))
    assert sizes == [8, 4, 2, 2, 2, 2]
    assert [record.getMessage() for record in caplog.records] == [
        f"encoding: the device's memory is full: going on with batches of {size}" for size in (4, 2)
    ]
    with pytest.raises(UserError, match=r"too small for one image: .*can't allocate memory(.|\n)*Use less\."):
        list(batch.over(4, lambda part, size: allocate_too_much()))


def test_an_error_that_is_none_of_memorys_passes() -> None:
    def broken(part: slice, size: int) -> None:
        raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        list(HalvedBatch("work", "", 8).over(4, broken))


def test_a_full_memory_anywhere_is_one_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(words: list[str]) -> dict[str, Any]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setitem(cli.VERBS, "translate", (full, ""))
    assert cli.main(["translate"]) == 2
    told = capsys.readouterr().err
    assert "CUDA out of memory. Tried to allocate 2.00 GiB." in told
    assert "Lower device_batch" in told
    assert "Traceback" not in told


# ---- arithmetic


def tf32() -> tuple[bool, str]:
    return torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()


@pytest.fixture
def on() -> Iterator[tuple[bool, str]]:
    """TF32 is on for convolutions, as torch has it, and for matrix products."""
    before = tf32()
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("high")
    yield tf32()
    torch.backends.cudnn.allow_tf32 = before[0]
    torch.set_float32_matmul_precision(before[1])


@contextmanager
def watched() -> Iterator[set[tuple[bool, str]]]:
    """What holds inside every network that is run."""
    seen: set[tuple[bool, str]] = set()
    hook = register_module_forward_pre_hook(lambda module, inputs: seen.add(tf32()))
    yield seen
    hook.remove()


EXACT = (False, "highest")


def pipeline_of(autoencoder: Autoencoder) -> MediPipeline:
    denoiser = Denoiser(build_unet(small_model(), 4, 8, conditional=False), None)
    return MediPipeline.from_parts(denoiser, ObjectiveSettings(), autoencoder, torch.zeros(4), torch.ones(4))


@pytest.mark.parametrize("name", ["encode", "decode", "features", "invert", "translate", "generate"])
def test_fp32_is_fp32_inside_and_what_was_set_comes_back(
    name: str, on: tuple[bool, str], autoencoder: Autoencoder
) -> None:
    pipeline, noise = pipeline_of(autoencoder), torch.randn(2, 4, 8, 8)
    sampler = make_sampler(make_scheduler(ObjectiveSettings()).config, SamplerSettings("ddim", steps=2))
    images = random_images(2, 64)
    calls: dict[str, Callable[[], object]] = {
        "encode": lambda: autoencoder.encode(images),
        "decode": lambda: autoencoder.decode(noise),
        "features": lambda: load_encoder("demo").features([images]),
        "invert": lambda: invert_latents(pipeline.denoiser.eval(), None, noise, sampler),
        "translate": lambda: translate_latents(pipeline.denoiser.eval(), None, None, noise, sampler, 0.5),
        "generate": lambda: pipeline.generate_latents(None, noise, SamplerSettings(steps=2)),
    }
    with watched() as seen:
        calls[name]()
    assert seen == {EXACT}
    assert tf32() == on


def test_training_in_fp32_is_in_fp32(on: tuple[bool, str], tiny: Path, tmp_path: Path) -> None:
    asked = TrainSettings(
        data=str(tiny / "data"),
        latents=str(tiny / "latents"),
        out=str(tmp_path / "run"),
        max_steps=1,
        global_batch=4,
        model=small_model(),
    )
    with watched() as seen:
        train(asked)
    assert seen == {EXACT}


def test_torchs_compiler_does_not_bring_tf32_back(on: tuple[bool, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate turns it on where it is told to compile."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    make_accelerator(cpu=True)
    assert tf32() == EXACT


def test_the_last_thread_puts_back_what_the_first_found(on: tuple[bool, str]) -> None:
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with exact_fp32():
            entered.set()
            leave.wait(60)

    thread = threading.Thread(target=other)
    with exact_fp32():
        thread.start()
        assert entered.wait(60)
    assert tf32() == EXACT
    leave.set()
    thread.join()
    assert tf32() == on


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="torch has the older names alone")
@pytest.mark.parametrize("place", ["cuda.matmul", "cudnn.conv", ""])
def test_tf32_that_was_set_by_torchs_newer_names(place: str) -> None:
    part: Any = torch.backends
    for name in filter(None, place.split(".")):
        part = getattr(part, name)
    before = part.fp32_precision
    part.fp32_precision = "tf32"
    try:
        with exact_fp32():
            assert tf32() == EXACT
            assert torch.backends.cudnn.conv.fp32_precision == "ieee"
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert part.fp32_precision == "tf32"
    finally:
        part.fp32_precision = before


# ---- precision


@pytest.fixture
def turing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that computes in fp16 and fp32, and emulates bf16."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)


@pytest.mark.usefixtures("turing")
def test_emulated_bf16_is_refused_wherever_precision_is_taken(
    autoencoder: Autoencoder, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = pipeline_of(autoencoder)
    monkeypatch.setattr(type(pipeline.unet), "device", torch.device("cuda"))
    last = {"class": "tumour", "site": "NA"}
    values: dict[str, Any] = {"data": str(tiny / "data"), "out": str(tmp_path / "out"), "held_out": [last]}
    values |= {"evaluate": {"unseen": False}}
    for call in (
        lambda: load_autoencoder("demo", "cuda", torch.bfloat16),  # encode, and training from a stream
        lambda: make_accelerator(mixed_precision="bf16"),  # train, classifier
        lambda: ImageSampler(pipeline, GenerateSettings(precision="bf16")),
        lambda: pipeline.generate_latents(None, torch.zeros(1, 4, 8, 8), precision="bf16"),
        lambda: run(ExperimentSettings(**values, encode={"precision": "bf16"})),
        lambda: run(ExperimentSettings(**values, train={"precision": "bf16"})),
        lambda: run(ExperimentSettings(**values, generate=GenerateSettings(precision="bf16"))),
    ):
        with pytest.raises(UserError, match=r"The GPU Tesla T4 does not compute in bf16(.|\n)*fp16 or fp32"):
            call()
    for precision in ("fp32", "fp16", None):
        check_precision(precision, "cuda")
    check_precision("bf16", "cpu")


def test_bf16_is_taken_where_the_gpu_computes_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    check_precision("bf16", "cuda:1")


# ---- packages


def test_a_package_that_is_not_installed_has_no_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = importlib.metadata.distribution

    def lean(name: str) -> Any:
        if name in ("torchmetrics", "torch-fidelity"):
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "distribution", lean)
    versions = run_record(0, tmp_path).versions
    assert (versions["torchmetrics"], versions["torch-fidelity"]) == (None, None)
    assert versions["torch"] == importlib.metadata.version("torch")
    assert versions["python"] == sys.version.split()[0]
