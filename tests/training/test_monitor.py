"""What a run tells of itself, how it is told to stop, and averages of other lengths."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from latent_medi.cli import main
from latent_medi.core.errors import RESUME, Preempted, UserError
from latent_medi.diffusion.pipeline import MediPipeline
from latent_medi.training import loop, run_folder, updates
from latent_medi.training.ema import power_exponent
from latent_medi.training.log import read_log
from latent_medi.training.loop import train
from latent_medi.training.posthoc_ema import (
    WARNED_ERROR,
    coefficients,
    list_snapshots,
    profile_product,
    reconstruct,
    save_snapshots,
    widths_within,
)
from latent_medi.training.settings import AverageSettings, EmaSettings, TrainSettings
from latent_medi.training.updates import learning_rate

Make = Callable[..., TrainSettings]


def command(settings: TrainSettings, folder: Path) -> list[str]:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run_folder.plain(asdict(settings))))
    return ["train", "--config", str(path)]


def model_tensors(out: Path) -> dict[str, torch.Tensor]:
    return {
        f"{f.parent.name}/{name}": tensor
        for f in sorted((out / "model").rglob("*.safetensors"))
        for name, tensor in load_file(f).items()
    }


def assert_equal(a: Path, b: Path) -> None:
    ours, theirs = model_tensors(a), model_tensors(b)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for file in ("log.csv", "losses.csv"):
        rows = [read_log(out / file) for out in (a, b)]
        kept = [[{k: v for k, v in row.items() if k != "images_per_s"} for row in part] for part in rows]
        assert kept[0] == kept[1], file


def cut_off(settings: TrainSettings, update: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train until an update, and stop in the middle of it."""
    calls, clip = [0], updates.clip_gradients

    def interrupt(*arguments: object) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == update:
            raise KeyboardInterrupt
        return clip(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(updates, "clip_gradients", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(settings)


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGUSR1])
def test_told_to_stop_it_saves_and_the_same_command_goes_on(
    sent: signal.Signals, run_settings: Make, tmp_path: Path
) -> None:
    torn = run_settings(out=str(tmp_path / "torn"), max_steps=150, checkpoint_every_images=0, log_every_images=400)
    words = [sys.executable, "-m", "latent_medi.training", *command(torn, tmp_path)[1:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not read_log(tmp_path / "torn" / "log.csv") and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(sent)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == RESUME == 75, errors
    assert f"stopped: {sent.name} at" in errors
    (folder,) = (tmp_path / "torn" / "checkpoints").glob("images-*")
    at = int(folder.name.removeprefix("images-"))
    assert 400 <= at < 1200
    assert not (tmp_path / "torn" / "model").exists()
    assert main(command(torn, tmp_path)) == 0
    whole = replace(torn, out=str(tmp_path / "whole"))
    train(whole)
    assert_equal(tmp_path / "whole", tmp_path / "torn")


def test_processes_agree_on_stopping(run_settings: Make, tmp_path: Path) -> None:
    """One that was not told itself stops when another was, at an update that all know."""
    from accelerate import Accelerator

    from latent_medi.core.preemption import Notice

    asked = []

    class OneOfTwo(Accelerator):
        num_processes = 2  # type: ignore[assignment]

        def reduce(self, tensor: torch.Tensor, reduction: str = "sum", scale: float = 1.0) -> torch.Tensor:
            asked.append(float(tensor))
            return tensor + 1  # the other one was told

    accelerator = OneOfTwo()
    assert [Notice().agreed(accelerator, update) for update in range(9, 12)] == [False, True, False]
    assert asked == [0.0]


def test_a_stop_in_this_process_leaves_its_handlers(run_settings: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    clip, calls = updates.clip_gradients, [0]

    def told(*arguments: object) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == 5:
            os.kill(os.getpid(), signal.SIGUSR1)
        return clip(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(updates, "clip_gradients", told)
    with pytest.raises(Preempted, match="SIGUSR1 at 40 of 320 images"):
        train(run_settings())
    assert signal.getsignal(signal.SIGUSR1) is before


def test_losses_by_noise_level_and_field_add_up(run_settings: Make, tmp_path: Path) -> None:
    train(run_settings(max_steps=10))
    log, table = read_log(tmp_path / "run" / "log.csv"), read_log(tmp_path / "run" / "losses.csv")
    assert {row["group"] for row in table} == {"timestep", "class", "site", "age"}
    for row in log:
        for group in ("timestep", "class", "site", "age"):
            mine = [r for r in table if r["images"] == row["images"] and r["group"] == group]
            n = np.array([int(r["n"]) for r in mine])
            assert n.sum() == 40
            mean = (n * np.array([float(r["loss"]) for r in mine])).sum() / 40
            assert mean == pytest.approx(float(row["loss"]), rel=1e-5)
    # Eight stratified timesteps per update: each tenth of the noise levels gets its share.
    counts = {r["value"]: int(r["n"]) for r in table if r["group"] == "timestep" and r["images"] == "40"}
    assert set(counts) == {f"{100 * i}-{100 * i + 99}" for i in range(10)}
    assert "NA" in {r["value"] for r in table if r["group"] == "site"}


def test_previews_leave_the_training_as_it_is(run_settings: Make, tmp_path: Path) -> None:
    plain = run_settings(out=str(tmp_path / "plain"), max_steps=20, model={"dropout": 0.1})
    train(plain)
    watched = replace(plain, out=str(tmp_path / "watched"), preview_every_images=64, preview_images=20, preview_steps=3)
    train(watched)
    assert_equal(tmp_path / "plain", tmp_path / "watched")
    rows = read_log(tmp_path / "watched" / "previews.csv")
    assert [int(row["images"]) for row in rows] == [64, 128, 160]
    assert all(float(row["fd_pooled"]) > 0 and float(row["fd_pooled_real"]) > 0 for row in rows)
    assert {row["n"] for row in rows} == {"20"}
    pictures = sorted(p.name for p in (tmp_path / "watched" / "previews").iterdir())
    assert pictures == [f"images-{images:012d}.png" for images in (64, 128, 160)]


def test_trackers_get_what_log_csv_gets(run_settings: Make, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(run_settings(max_steps=10, trackers=["tensorboard"]))
    (file,) = (tmp_path / "run").rglob("events.out.tfevents*")
    events = EventAccumulator(str(file.parent))
    events.Reload()
    losses = [(event.step, event.value) for event in events.Scalars("loss")]
    rows = read_log(tmp_path / "run" / "log.csv")
    assert losses == [(int(row["images"]), pytest.approx(float(row["loss"]))) for row in rows]


def stored_by_wandb(file: Path) -> Iterator[tuple[int, dict[str, float]]]:
    """(step, numbers) of each row in a file of W&B's offline mode: LevelDB's log format around its own messages."""
    from wandb.proto.wandb_internal_pb2 import Record

    block, whole, data = 32768, (1, 4), file.read_bytes()
    at, message = 7, b""
    while at + 7 <= len(data):
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        message += data[at + 7 : at + 7 + length]
        at += 7 + length
        if block - at % block < 7:
            at += block - at % block
        if kind in whole:
            record = Record.FromString(message)
            message = b""
            if record.WhichOneof("record_type") == "history":
                items = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
                yield record.history.step.num, {name: json.loads(value) for name, value in items.items()}


def test_wandb_gets_what_log_csv_gets_and_a_resumed_or_prolonged_run_keeps_its_page(
    run_settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb", reason="needs wandb, of the extra `track`")
    monkeypatch.setenv("WANDB_MODE", "offline")
    settings = run_settings(
        max_steps=20, trackers=["wandb"], preview_every_images=64, preview_steps=2, schedule="constant"
    )
    try:
        cut_off(settings, 13, monkeypatch)
        wandb.finish()
        train(settings)
        train(replace(settings, max_steps=24))
    finally:
        wandb.teardown()
    files = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len({file.stem for file in files}) == 1  # W&B's name of the run
    sent: list[tuple[int, str, float]] = []
    for number, file in enumerate(files):
        rows = list(stored_by_wandb(file))
        assert [step for step, _ in rows] == ([40, 64, 80], [80, 120, 128, 160], [192])[number]
        sent += [(step, name, row[name]) for step, row in rows for name in ("loss", "lr", "fd_pooled") if name in row]
    told = [
        (file, name)
        for file, names in (("log.csv", ("loss", "lr")), ("previews.csv", ("fd_pooled",)))
        for name in names
    ]
    expected = {
        (int(row["images"]), name, float(row[name])) for file, name in told for row in read_log(tmp_path / "run" / file)
    }
    assert set(sent) == expected  # what is sent again after a resume is the same number


def test_state_of_a_run_that_is_not_finite_is_kept(
    run_settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = loop.diffusion_loss, [0]

    def poisoned(*arguments: object) -> torch.Tensor:
        calls[0] += 1
        return original(*arguments) * (float("nan") if calls[0] == 4 else 1.0)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "diffusion_loss", poisoned)
    with pytest.raises(UserError, match="not_finite holds the state"):
        train(run_settings(max_steps=12))
    told = json.loads((tmp_path / "run" / "not_finite" / "update.json").read_text())
    assert told["update"] == 4
    assert len(told["keys"]) == 8
    assert "nan" in str(told["losses_and_norms_since_the_last_look"])
    assert load_file(tmp_path / "run" / "not_finite" / "model.safetensors")


def test_inverse_square_root(run_settings: Make) -> None:
    settings = run_settings(lr=1.0, warmup_images=100, schedule="inverse_sqrt", decay_images=400)
    rate = [learning_rate(images, settings) for images in (0, 50, 100, 400, 1600)]
    assert rate == [0, 0.5, 1, 1, 0.5]


def test_schedule_needs_its_reference(run_settings: Make) -> None:
    with pytest.raises(UserError, match="inverse_sqrt and decay_images"):
        train(run_settings(schedule="inverse_sqrt"))


def test_profiles_by_numerical_integration() -> None:
    for (a, end_a), (b, end_b) in (((6.9, 1.0), (16.1, 1.0)), ((6.9, 0.5), (16.1, 1.0)), ((3.0, 1.0), (3.0, 0.7))):
        t = (np.arange(200_000) + 0.5) / 200_000
        p, q = ((g + 1) / end * (t / end) ** g * (t <= end) for g, end in ((a, end_a), (b, end_b)))
        found = profile_product(*(np.array(x) for x in (a, end_a, b, end_b)))
        assert found == pytest.approx((p * q).mean(), rel=1e-3)


def test_the_length_of_the_average_is_chosen_afterwards(run_settings: Make, tmp_path: Path) -> None:
    ema = EmaSettings(relative_width=0.10, also=[0.05], snapshot_every_images=80)
    kept = run_settings(out=str(tmp_path / "kept"), max_steps=80, ema=ema)
    train(kept)
    assert len(list_snapshots(tmp_path / "kept")) == 16
    raw = load_file(sorted((tmp_path / "kept" / "checkpoints").iterdir())[-1] / "model.safetensors")
    for width in (0.07, 0.15):
        direct = replace(kept, out=str(tmp_path / f"{width}"), ema=EmaSettings(relative_width=width))
        train(direct)
        wanted = MediPipeline.from_pretrained(tmp_path / f"{width}" / "model").denoiser.state_dict()
        found, made = reconstruct(tmp_path / "kept", width)
        assert made["images"] == 640

        def norm(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
            return float(torch.stack([(a[n].float() - b[n]).norm() for n in b]).norm())

        # Far closer to the average of that length than the averages of the kept lengths or the raw weights are.
        others = [norm(load_file(s.path), wanted) for s in list_snapshots(tmp_path / "kept") if s.images == 640]
        assert norm(found, wanted) < 0.2 * min([norm(raw, wanted), *others])
    # A kept length comes back as it is, and the verb writes it as a model.
    shares, error = coefficients([(320, 0.1), (640, 0.05), (640, 0.1)], 640, 0.1)
    assert np.allclose(shares, [0, 0, 1], atol=1e-9)
    assert error < 1e-6
    assert main(["average", str(tmp_path / "kept"), "width=0.07", f"out={tmp_path / 'other'}"]) == 0
    model = MediPipeline.from_pretrained(tmp_path / "other")
    again = reconstruct(tmp_path / "kept", 0.07)[0]
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.denoiser.state_dict().items())
    assert model.provenance["average"]["relative_width"] == 0.07
    with pytest.raises(UserError, match="exists already"):
        run_folder.write_average(AverageSettings(str(tmp_path / "kept"), 0.07, str(tmp_path / "other")))
    with pytest.raises(UserError, match="kept 0 averages"):
        reconstruct(tmp_path / "0.07", 0.1)
    with pytest.raises(UserError, match="kept no average at 100 images"):
        reconstruct(tmp_path / "kept", 0.1, 100)


def test_the_error_of_a_width_is_that_of_its_profile() -> None:
    time = (np.arange(200_000) + 0.5) / 200_000 * 640

    def profile(width: float, end: float) -> np.ndarray:
        exponent = power_exponent(width)
        return np.where(time <= end, (exponent + 1) / end * (time / end).clip(max=1) ** exponent, 0.0)

    for kept in ([(640, 0.05), (640, 0.1)], [(320, 0.1), (480, 0.1), (640, 0.1)]):
        for width in (0.03, 0.07, 0.2):
            shares, error = coefficients(kept, 640, width)
            wanted = profile(width, 640)
            off = sum(x * profile(w, end) for x, (end, w) in zip(shares, kept, strict=True)) - wanted
            assert error == pytest.approx(np.sqrt((off**2).sum() / (wanted**2).sum()), rel=1e-3)


def test_a_width_that_the_averages_cannot_give_is_warned_of_or_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_snapshots(tmp_path, 640, {width: {"w": torch.ones(2)} for width in (0.05, 0.1)})
    kept = [(640, 0.05), (640, 0.1)]
    assert coefficients(kept, 640, 0.2)[1] == pytest.approx(0.60, abs=0.005)
    with pytest.raises(UserError, match=r"(?s)misses its profile by 60%.*0\.045 to 0\.065, 0\.08 to 0\.11\."):
        reconstruct(tmp_path, 0.2)
    with caplog.at_level("WARNING"):
        assert reconstruct(tmp_path, 0.1)[1]["profile_error"] < 1e-6
        assert not caplog.records
        assert reconstruct(tmp_path, 0.12)[1]["profile_error"] == pytest.approx(0.08, abs=0.005)
    assert "misses its profile by 8 %" in caplog.text
    for low, high in widths_within(kept, 640, WARNED_ERROR):
        for width in np.linspace(low, high, 5):
            assert coefficients(kept, 640, width)[1] <= WARNED_ERROR


def test_several_averages_survive_a_resume(run_settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ema = EmaSettings(also=[0.05])
    whole = run_settings(out=str(tmp_path / "whole"), ema=ema)
    train(whole)
    torn = replace(whole, out=str(tmp_path / "torn"))
    cut_off(torn, 21, monkeypatch)
    train(torn)
    assert_equal(tmp_path / "whole", tmp_path / "torn")
    for snapshot in list_snapshots(tmp_path / "whole"):
        other = load_file(tmp_path / "torn" / "averages" / snapshot.path.name)
        assert all(torch.equal(tensor, other[name]) for name, tensor in load_file(snapshot.path).items())


def test_exponent_of_a_width() -> None:
    for width in (0.05, 0.1, 0.2):
        gamma = power_exponent(width)
        assert (gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)) == pytest.approx(width**2)


def test_eight_bit_moments_survive_a_resume(
    run_settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_settings(out=str(tmp_path / "whole"), max_steps=12, optimizer="adamw8bit")
    train(whole)
    kept = load_file(sorted((tmp_path / "whole" / "checkpoints").iterdir())[-1] / "optimizer.safetensors")
    assert any(tensor.dtype == torch.uint8 for tensor in kept.values())
    torn = replace(whole, out=str(tmp_path / "torn"))
    cut_off(torn, 10, monkeypatch)
    train(torn)
    assert_equal(tmp_path / "whole", tmp_path / "torn")


def test_a_preview_that_cannot_be_made_is_refused_before_the_training(run_settings: Make, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="step"):
        train(run_settings(preview_every_images=64, preview_steps=2000))
    assert not read_log(tmp_path / "run" / "log.csv")


def test_a_tracker_that_is_not_installed_is_named(run_settings: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # how Python marks what is not there
    with pytest.raises(UserError, match="trackers wandb cannot be started") as caught:
        train(run_settings(trackers=["wandb"]))
    assert "latent-medi[track]" in str(caught.value)


def test_shift_and_scale_are_the_checkpoints(
    run_settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device that measures other last digits goes on with those that the run began with."""
    from latent_medi.latents.store import LatentStore

    whole = run_settings(out=str(tmp_path / "whole"), max_steps=12, checkpoint_every_images=64)
    train(whole)
    torn, measure = replace(whole, out=str(tmp_path / "torn")), LatentStore.statistics
    cut_off(torn, 10, monkeypatch)
    monkeypatch.setattr(LatentStore, "statistics", lambda *a: tuple(1.01 * value for value in measure(*a)))
    train(torn)
    assert_equal(tmp_path / "whole", tmp_path / "torn")


def test_snapshots_of_one_average_are_kept_too(run_settings: Make, tmp_path: Path) -> None:
    train(run_settings(max_steps=20, ema=EmaSettings(snapshot_every_images=80)))
    assert [s.images for s in list_snapshots(tmp_path / "run")] == [80, 160]
    assert reconstruct(tmp_path / "run", 0.12)[1]["images"] == 160


def test_a_launcher_that_accumulates_is_refused(run_settings: Make) -> None:
    from accelerate import Accelerator

    with pytest.raises(UserError, match="gradient_accumulation_steps is 4"):
        train(run_settings(), Accelerator(gradient_accumulation_steps=4))


def test_a_damaged_newer_checkpoint_does_not_push_out_the_one_just_written(tmp_path: Path) -> None:
    from latent_medi.training.checkpoint import checkpoint_folders, newest_checkpoint, save_checkpoint

    tensors = {"model": {"a": torch.ones(3)}}
    for images in (10, 20):
        save_checkpoint(tmp_path, images, tensors, {}, keep=2)
    (tmp_path / "images-000000000020" / "model.safetensors").write_bytes(b"")
    assert newest_checkpoint(tmp_path) == tmp_path / "images-000000000010"
    save_checkpoint(tmp_path, 15, tensors, {}, keep=1)
    assert [images for images, _ in checkpoint_folders(tmp_path)] == [15]
