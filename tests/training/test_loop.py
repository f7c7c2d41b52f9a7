"""The promises of the loop: resume, processes, averaged weights, and what it refuses."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from latent_medi.core.errors import UserError
from latent_medi.core.files import sha256_file, write_sealed
from latent_medi.diffusion.pipeline import MediPipeline
from latent_medi.diffusion.settings import ObjectiveSettings
from latent_medi.latents.info import read_info, write_info
from latent_medi.metadata.schema import FIRST_VALUE
from latent_medi.training import loop, start, updates
from latent_medi.training.batch_randomness import batch_generator, draw_batch, stratified_timesteps
from latent_medi.training.checkpoint import checkpoint_folders
from latent_medi.training.ema import ema_decay
from latent_medi.training.finetune.transfer import open_source
from latent_medi.training.log import read_log
from latent_medi.training.loop import train
from latent_medi.training.run_folder import MASKING, RUN_FILE, drops, read_record
from latent_medi.training.settings import EmaSettings, LoraSettings, TrainSettings
from latent_medi.training.updates import crossed, learning_rate

Make = Callable[..., TrainSettings]

# Runs in a process of its own: trains as told and kills itself, without a chance to clean up, at a chosen moment.
SCRIPT = """
import json, os, signal, sys
import torch
torch.set_num_threads(1)
from latent_medi.training import checkpoint, loop, updates
from latent_medi.training.settings import EmaSettings, LoraSettings, StreamSettings, TrainSettings
from latent_medi.diffusion.settings import DropoutSettings, ModelSettings, ObjectiveSettings

values, kill = json.loads(sys.argv[1]), json.loads(sys.argv[2])
parts = {
    "ema": EmaSettings, "model": ModelSettings, "objective": ObjectiveSettings, "dropout": DropoutSettings,
    "stream": StreamSettings, "lora": LoraSettings,
}
settings = TrainSettings(**{k: parts[k](**v) if k in parts and v else v for k, v in values.items()})

def die():
    os.kill(os.getpid(), signal.SIGKILL)

if "step" in kill:
    rate = updates.learning_rate
    def until(images, *rest):
        if images == kill["step"] * settings.global_batch:
            die()
        return rate(images, *rest)
    updates.learning_rate = until
if "saving" in kill:  # after the first file of the checkpoint at these images
    save, count = checkpoint.write_tensors, [0]
    def once(tensors, path):
        save(tensors, path)
        if f"images-{kill['saving']:012d}" in str(path):
            die()
    checkpoint.write_tensors = once
loop.train(settings)
"""


def launch(settings: TrainSettings, kill: dict[str, int] | None = None, **env: str) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **env}
    words = [sys.executable, "-c", SCRIPT, json.dumps(asdict(settings)), json.dumps(kill or {})]
    return subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True)


def finished(process: subprocess.Popen) -> int:
    _, errors = process.communicate(timeout=240)
    assert process.returncode in (0, -signal.SIGKILL), errors
    return process.returncode


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {str(f.relative_to(folder)): load_file(f) for f in sorted(folder.rglob("*.safetensors"))}


def assert_same_bits(a: dict[str, dict[str, torch.Tensor]], b: dict[str, dict[str, torch.Tensor]]) -> None:
    assert a.keys() == b.keys()
    for file in a:
        assert a[file].keys() == b[file].keys()
        for name in a[file]:
            assert torch.equal(a[file][name], b[file][name]), f"{file}: {name}"


def log_columns(out: Path) -> list[tuple[str, ...]]:
    return [tuple(row[c] for c in ("images", "loss", "lr", "grad_norm")) for row in read_log(out / "log.csv")]


def test_killed_and_resumed_equals_unbroken(run_settings: Make, tmp_path: Path) -> None:
    whole = run_settings(out=str(tmp_path / "whole"), model={"dropout": 0.1})
    torch.set_num_threads(1)
    train(whole)
    torn = replace(whole, out=str(tmp_path / "torn"))
    # In the middle of an interval, while a checkpoint is written, and once more: three resumes of the same command.
    assert finished(launch(torn, {"step": 13})) == -signal.SIGKILL
    assert finished(launch(torn, {"saving": 192})) == -signal.SIGKILL
    assert [images for images, _ in checkpoint_folders(tmp_path / "torn" / "checkpoints")] == [64, 128]
    train(torn)  # in this process, where other random numbers were drawn before
    last = "checkpoints/images-000000000320"
    for part in (last, "model"):  # raw weights, averages and optimizer state; the finished model
        assert_same_bits(weights(tmp_path / "whole" / part), weights(tmp_path / "torn" / part))
    assert len(weights(tmp_path / "whole" / last)) == 3
    assert log_columns(tmp_path / "whole") == log_columns(tmp_path / "torn")
    assert len(log_columns(tmp_path / "whole")) == 8
    assert not list((tmp_path / "torn").rglob(".tmp-*"))


def interrupt_at(update: int) -> Callable[..., torch.Tensor]:
    """A stand-in for the loop's ``clip_gradients`` that does its work until an update, then stops the run."""
    calls, clip = [0], updates.clip_gradients

    def interrupt(*arguments: Any) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == update:
            raise KeyboardInterrupt
        return clip(*arguments)

    return interrupt


def test_resume_keeps_the_memory_layout(run_settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run_settings(out=str(tmp_path / "whole"), max_steps=16, channels_last=True)
    train(whole)
    torn = replace(whole, out=str(tmp_path / "torn"))
    with monkeypatch.context() as patch:
        patch.setattr(updates, "clip_gradients", interrupt_at(10))
        with pytest.raises(KeyboardInterrupt):
            train(torn)
    train(torn)
    assert_same_bits(weights(tmp_path / "whole" / "model"), weights(tmp_path / "torn" / "model"))


def test_damaged_newest_checkpoint_goes_back_one(
    run_settings: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = run_settings(max_steps=20)
    train(settings)
    before = weights(tmp_path / "run" / "model")
    newest = checkpoint_folders(tmp_path / "run" / "checkpoints")[-1][1]
    for file in (tmp_path / "run" / "model").rglob("*"):
        if file.is_file():
            file.unlink()
    for folder in sorted((tmp_path / "run" / "model").rglob("*"), reverse=True):
        folder.rmdir()
    (tmp_path / "run" / "model").rmdir()
    data = bytearray((newest / "ema.safetensors").read_bytes())
    data[-5] ^= 1
    (newest / "ema.safetensors").write_bytes(data)
    with caplog.at_level("WARNING", logger="latent_medi"):
        train(settings)
    assert "damaged" in caplog.text
    assert "ema.safetensors" in caplog.text
    assert_same_bits(before, weights(tmp_path / "run" / "model"))


def two_processes(settings: TrainSettings, port: int) -> None:
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    processes = [launch(settings, None, RANK=str(rank), LOCAL_RANK=str(rank), **common) for rank in range(2)]
    assert [finished(process) for process in processes] == [0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("device_batch", [None, 2])
def test_two_processes_train_the_same_model(device_batch: int | None, run_settings: Make, tmp_path: Path) -> None:
    one = run_settings(out=str(tmp_path / "one"), device_batch=device_batch)
    train(one)
    two_processes(replace(one, out=str(tmp_path / "two")), 29511)
    for name in ("model", "checkpoints/images-000000000320"):
        a, b = weights(tmp_path / "one" / name), weights(tmp_path / "two" / name)
        assert a.keys() == b.keys()
        for file in a:
            if file.startswith("optimizer"):
                continue
            before = torch.cat([t.flatten() for t in a[file].values()])
            after = torch.cat([t.flatten() for t in b[file].values()])
            assert float((before - after).norm() / before.norm()) <= 1e-5
    rows = zip(log_columns(tmp_path / "one"), log_columns(tmp_path / "two"), strict=True)
    for ours, theirs in rows:
        assert ours[0] == theirs[0]
        assert ours[2] == theirs[2]
        assert float(ours[1]) == pytest.approx(float(theirs[1]), rel=1e-4)


def test_device_batch_changes_rounding_only(run_settings: Make, tmp_path: Path) -> None:
    train(run_settings(out=str(tmp_path / "a"), max_steps=10))
    train(run_settings(out=str(tmp_path / "b"), max_steps=10, device_batch=3))  # 3 + 3 + 2
    a, b = (weights(tmp_path / n / "model")["unet/diffusion_pytorch_model.safetensors"] for n in "ab")
    before, after = (torch.cat([t.flatten() for t in w.values()]) for w in (a, b))
    assert 0 < float((before - after).norm() / before.norm()) <= 1e-5


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_learning_rate_by_images(schedule: str, run_settings: Make) -> None:
    settings = run_settings(schedule=schedule, max_steps=0, max_images=316, warmup_fraction=0.25)
    assert settings.total_images == 320  # whole batches
    assert learning_rate(0, settings) == 0
    assert learning_rate(40, settings) == pytest.approx(settings.lr / 2)
    assert learning_rate(80, settings) == settings.lr
    assert learning_rate(200, settings) == pytest.approx(settings.lr * (0.5 if schedule == "cosine" else 1))
    assert learning_rate(320, settings) == pytest.approx(0 if schedule == "cosine" else settings.lr)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_learning_rate_ends_where_it_should(processes: int, run_settings: Make, tmp_path: Path) -> None:
    """What the first of several processes applies to its optimizer, update by update."""

    class OneOf(Accelerator):
        num_processes = processes  # type: ignore[assignment]

    applied = []
    step = torch.optim.AdamW.step

    def watched(optimizer: torch.optim.AdamW, *arguments: object) -> None:
        applied.append(optimizer.param_groups[0]["lr"])
        step(optimizer, *arguments)

    settings = run_settings(max_steps=16, warmup_images=32, log_every_images=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", watched)
        train(settings, OneOf())
    assert applied == [learning_rate(seen, settings) for seen in range(0, 128, 8)]
    assert applied[4] == 1e-3
    assert applied[-1] == pytest.approx(0.5e-3 * (1 + math.cos(math.pi * 88 / 96)))
    assert int(read_log(tmp_path / "run" / "log.csv")[-1]["images"]) == 128


def test_logged_learning_rate_is_that_function(run_settings: Make, tmp_path: Path) -> None:
    settings = run_settings(max_steps=10, warmup_images=16)
    train(settings)
    with open(tmp_path / "run" / "log.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["images"]) for row in rows] == [40, 80]
    for row in rows:
        expected = learning_rate(int(row["images"]) - 8, settings)
        assert float(row["lr"]) == expected


def test_model_holds_the_averaged_weights(run_settings: Make, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(run_settings())
    last = checkpoint_folders(out / "checkpoints")[-1][1]
    raw, average = load_file(last / "model.safetensors"), load_file(last / "ema.safetensors")
    pipeline = MediPipeline.from_pretrained(out / "model")
    for name, value in pipeline.denoiser.state_dict().items():
        assert torch.equal(value, average[name])
    assert any(not torch.equal(raw[name], average[name]) for name in raw)


def test_average_is_the_recursion_over_the_run(run_settings: Make) -> None:
    """Weights of the power-function average: (t/T)^γ over updates t, so its relative width is as set."""
    batch, updates, ema = 10, 4000, EmaSettings(relative_width=0.1)
    share, position = 1.0, []
    for update in range(updates, 0, -1):  # what each update's weights still count for at the end
        decay = ema_decay(update * batch, batch, ema)
        position.append((update / updates, share * (1 - decay)))
        share *= decay
    at, weight = np.array(position).T
    assert weight.sum() == pytest.approx(1)
    mean = (at * weight).sum()
    assert np.sqrt(((at - mean) ** 2 * weight).sum()) == pytest.approx(0.1, rel=0.01)
    assert ema_decay(batch, batch, ema) == 0
    fixed = EmaSettings("constant", decay=0.99)
    assert ema_decay(batch, batch, fixed) == 0.1
    assert ema_decay(10**6 * batch, batch, fixed) == 0.99


def test_vocabulary_survives_training_saving_and_loading(run_settings: Make, tmp_path: Path) -> None:
    settings = run_settings(max_steps=2)
    train(settings)
    from latent_medi.shards.dataset import PatchDataset

    dataset = PatchDataset.open(settings.data)
    pipeline = MediPipeline.from_pretrained(tmp_path / "run" / "model")
    for field in dataset.schema.fields:
        assert pipeline.schema.field(field.name) == field
        for position, value in enumerate(field.values):
            codes = pipeline.conditions([{field.name: value}]).codes
            assert codes[0, pipeline.schema.names.index(field.name)] == FIRST_VALUE + position
    assert "NA" in pipeline.schema.field("site").values
    # Every row is trained on under the code that sampling uses for its value.
    trained, _ = dataset.schema.encode(dataset.index)
    asked = pipeline.conditions([{n: row[n] for n in dataset.schema.names} for row in dataset.index.to_dict("records")])
    assert np.array_equal(trained, asked.codes.numpy())
    images = pipeline(class_="tumour", site="NA", age=50, steps=2, output_type="np").images
    assert images.shape == (1, 32, 32, 3)


def test_finished_run_returns_at_once(run_settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = run_settings(max_steps=2)
    folder = train(settings)
    stamp = (folder / "model_index.json").stat().st_mtime_ns
    monkeypatch.setattr(loop, "diffusion_loss", None)  # a single step would fail
    assert train(settings) == folder == tmp_path / "run" / "model"
    assert train(replace(settings, device_batch=2, checkpoint_every_images=8)) == folder
    previews = replace(settings, preview_every_images=8, preview_images=64, preview_encoder="phikon-v2")
    assert train(previews) == folder  # whose weights are not on this machine
    with pytest.raises(UserError, match=r"lr was 0\.001 and is 0\.002"):
        train(replace(settings, lr=2e-3))
    with pytest.raises(UserError, match="training data changed"):
        train(replace(settings, split_value="test"))
    assert (folder / "model_index.json").stat().st_mtime_ns == stamp


@pytest.mark.parametrize(("name", "dropout"), [("compile", 0.1), ("channels_last", 0.1), ("channels_last", 0.0)])
def test_what_changes_the_masks_of_dropout_belongs_to_the_run(
    name: str, dropout: float, run_settings: Make, tmp_path: Path
) -> None:
    settings = run_settings(max_steps=2, model={"dropout": dropout})
    folder, other = train(settings), replace(settings, **{name: True})
    if not dropout:
        assert train(other) == folder  # a matter of speed and rounding
        return
    with pytest.raises(UserError, match=f"{name} was False and is True"):
        train(other)
    assert train(replace(settings, checkpoint_activations=True)) == folder
    # A run of an earlier version does not say, and goes on.
    record = read_record(tmp_path / "run")
    for key in MASKING:
        del record["settings"][key]
    write_sealed(tmp_path / "run" / RUN_FILE, {"run": record})
    assert train(other) == folder


def test_dropout_is_the_sources_where_there_is_one(run_settings: Make, tmp_path: Path) -> None:
    first = run_settings(max_steps=2, model={"dropout": 0.1})
    source = open_source(train(first))
    settings = run_settings(init_from=str(tmp_path / "run" / "model"), model={"dropout": 0.0})
    assert drops(first, None)
    assert drops(settings, source)
    assert not drops(settings, None)
    source.unet.register_to_config(dropout=0.0)
    assert not drops(settings, source)
    assert drops(replace(settings, lora=LoraSettings(dropout=0.2)), source)


def test_unfinished_run_with_other_settings_is_refused(
    run_settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = run_settings(max_steps=30)
    with monkeypatch.context() as patch:
        patch.setattr(updates, "clip_gradients", interrupt_at(12))
        with pytest.raises(KeyboardInterrupt):
            train(settings)
    assert checkpoint_folders(tmp_path / "run" / "checkpoints")
    with pytest.raises(UserError, match="seed was 0 and is 1"):
        train(replace(settings, seed=1))


def test_settings_beside_the_model_repeat_the_run(run_settings: Make, tmp_path: Path) -> None:
    settings = run_settings(max_steps=2)
    train(settings)
    values = yaml.safe_load((tmp_path / "run" / "settings.yaml").read_text())
    assert values["lr"] == settings.lr
    assert values["model"]["block_out_channels"] == [16, 32]
    assert set(values) == set(asdict(settings))


def test_loss_that_is_not_finite_names_step_and_patches(
    run_settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = run_settings(max_steps=12, log_every_images=40, checkpoint_every_images=8)
    original, calls = loop.diffusion_loss, [0]

    def poisoned(*arguments: object) -> torch.Tensor:
        calls[0] += 1
        return original(*arguments) * (float("nan") if calls[0] == 4 else 1.0)

    monkeypatch.setattr(loop, "diffusion_loss", poisoned)
    with pytest.raises(UserError) as caught:
        train(settings)
    message = str(caught.value)
    assert "update 4 " in message
    keys = {word.strip(" .") for word in message.split("Its patches:")[1].split("\n")[0].split(",")}
    assert len(keys) == 8
    assert all(key.startswith("p") for key in keys)
    assert [images for images, _ in checkpoint_folders(tmp_path / "run" / "checkpoints")] == [16, 24]
    monkeypatch.undo()
    train(settings)  # goes on from the last good checkpoint


def test_latents_that_are_not_finite_are_caught(run_settings: Make, tiny: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(tiny / "latents", tmp_path / "latents")
    file = next((tmp_path / "latents" / "data").glob("part-000000*"))
    tensors = load_file(file)
    tensors["std"][3] = float("nan")
    save_file(tensors, file)
    info = read_info(tmp_path / "latents")
    next(shard for shard in info["shards"] if shard["file"] == f"data/{file.name}")["sha256"] = sha256_file(file)
    write_info(tmp_path / "latents", info)
    with pytest.raises(UserError, match=r"not finite|nan|constant"):
        train(run_settings(latents=str(tmp_path / "latents"), max_steps=10))


def test_batch_that_processes_cannot_share_is_refused(run_settings: Make) -> None:
    class Three:
        num_processes = 3
        distributed_type = None
        mixed_precision = "no"
        gradient_accumulation_steps = 1

    with pytest.raises(UserError, match="cannot share"):
        start.check_strategy(Three(), run_settings(global_batch=8))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"max_steps": 0}, "max_images or max_steps"),
        ({"lr": 0.0}, "lr"),
        ({"global_batch": 0}, "global_batch"),
        ({"override": ["schedule"]}, "init_from"),
        ({"split_value": "trian"}, "trian"),
        ({"balance": ["sit"]}, "site"),
        ({"balance": ["age"]}, "age"),
        ({"model": {"fields": ["gender"]}}, "gender"),
    ],
)
def test_settings_that_cannot_be_followed(run_settings: Make, values: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        train(run_settings(**values))


def test_unconditional_and_balanced_runs_train(run_settings: Make, tmp_path: Path) -> None:
    train(run_settings(out=str(tmp_path / "plain"), max_steps=2, model={"fields": []}))
    pipeline = MediPipeline.from_pretrained(tmp_path / "plain" / "model")
    assert pipeline.conditioning is None
    train(run_settings(out=str(tmp_path / "cls"), max_steps=2, model={"fields": ["class"]}, balance=["class", "site"]))
    assert MediPipeline.from_pretrained(tmp_path / "cls" / "model").schema.names == ("class",)


def test_loss_falls(run_settings: Make, tmp_path: Path) -> None:
    # ε can be seen in the noisy latent, so there is much to learn even from latents that are close to noise.
    objective = ObjectiveSettings(prediction="epsilon", zero_terminal_snr=False, weighting="uniform")
    train(run_settings(max_steps=60, lr=3e-3, log_every_images=80, objective=objective))
    losses = [float(row["loss"]) for row in read_log(tmp_path / "run" / "log.csv")]
    assert losses[-1] < 0.8 * losses[0]


def test_draws_do_not_depend_on_the_share() -> None:
    whole = draw_batch(batch_generator(5, 7), (12, 4, 2, 2), 1000, posterior=True)
    shares = [draw_batch(batch_generator(5, 7), (12, 4, 2, 2), 1000, True).share(slice(r, None, 3)) for r in range(3)]
    for rank, share in enumerate(shares):
        assert torch.equal(share.noise, whole.noise[rank::3])
        assert torch.equal(share.timesteps, whole.timesteps[rank::3])
        assert share.posterior is not None
        assert whole.posterior is not None
        assert torch.equal(share.posterior, whole.posterior[rank::3])
    other = draw_batch(batch_generator(5, 8), (12, 4, 2, 2), 1000, posterior=True)
    assert not torch.equal(other.noise, whole.noise)
    assert whole.posterior is not None
    assert not torch.equal(whole.noise, whole.posterior)


def test_timesteps_are_stratified() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([stratified_timesteps(50, 1000, generator) for _ in range(400)])
    assert torch.equal(drawn // 20, torch.arange(50).expand(400, -1))  # one in each fiftieth
    assert drawn.min() == 0
    assert drawn.max() == 999
    assert torch.bincount(drawn.flatten(), minlength=1000).float().std() < 6  # uniform: 20 each, √20 apart


def test_crossed() -> None:
    assert [crossed(images, 8, 20) for images in (8, 16, 24, 32, 40)] == [False, False, True, False, True]
    assert not crossed(8, 8, 0)
