"""Damaged, edited and foreign latents, checkpoints, models and adapters: named, never used, or done without."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from earlier import FOLDER, earlier, run_settings
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mistyped import changes, with_change
from safetensors.torch import load_file

from latent_medi.core.errors import UserError
from latent_medi.diffusion.pipeline import MediPipeline
from latent_medi.latents.store import LatentStore
from latent_medi.shards.dataset import PatchDataset
from latent_medi.training.checkpoint import checkpoint_folders, newest_checkpoint, save_checkpoint, verify_checkpoint
from latent_medi.training.data import open_data, refuse_null
from latent_medi.training.finetune.transfer import open_source
from latent_medi.training.loop import train
from latent_medi.training.posthoc_ema import reconstruct
from latent_medi.training.settings import AverageSettings, EmaSettings

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    with earlier(tmp_path / "w") as here:
        yield here


def flip(path: Path, at: int = -3) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 2
    path.write_bytes(data)


def weights(run: Path) -> dict[str, torch.Tensor]:
    # Copied: what is loaded stays mapped to the file, which these tests damage in place.
    tensors = load_file(run / "model/unet/diffusion_pytorch_model.safetensors")
    return {name: tensor.clone() for name, tensor in tensors.items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def cut_off(folder: Path) -> tuple[dict[str, torch.Tensor], Path]:
    """The weights of an unbroken run, and a run that was cut off after its second checkpoint of three."""
    torch.set_num_threads(1)
    train(run_settings(out="whole", max_steps=6, keep_checkpoints=3))
    shutil.copytree("whole", "torn")
    shutil.rmtree("torn/model")
    shutil.rmtree(checkpoint_folders(Path("torn/checkpoints"))[-1][1])
    return weights(folder / "whole"), folder / "torn"


def digit_of(text: str, key: str) -> str:
    """The text with the first digit after a key changed."""
    at = text.index(f'"{key}"') + len(key) + 2
    at += next(i for i, letter in enumerate(text[at:]) if letter.isdigit())
    return text[:at] + str(int(text[at]) ^ 1) + text[at + 1 :]


EDITS: dict[str, Callable[[str], str]] = {
    "images": lambda text: digit_of(text, "images"),
    "whitening": lambda text: digit_of(text, "whitening"),
    "window": lambda text: text.replace('"whitening"', '"whitenimg"'),
    "run": lambda text: text.replace('"run"', '"rum"'),
    "no JSON": lambda text: text[:-3],
    "a list": lambda text: "[]",
}


def test_a_changed_state_goes_back_to_the_checkpoint_before(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole, torn = cut_off(folder)
    newest = checkpoint_folders(torn / "checkpoints")[-1][1].name
    for name, edit in EDITS.items():
        run = folder / f"torn-{name}"
        shutil.copytree(torn, run)
        state = run / "checkpoints" / newest / "state.json"
        state.write_text(edit(state.read_text()))
        caplog.clear()
        with caplog.at_level("INFO", logger="latent_medi"):
            train(run_settings(out=str(run), max_steps=6, keep_checkpoints=3))
        assert "state.json" in caplog.text, name
        assert "at 4 images" in caplog.text, name
        assert same(weights(run), whole), name


def test_types_that_a_state_of_an_earlier_version_should_not_have_go_back(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole, torn = cut_off(folder)
    file = checkpoint_folders(torn / "checkpoints")[-1][1] / "state.json"
    state = json.loads(file.read_text())
    del state["seal"]
    for key, odd in (("run", None), ("whitening", [[1.0], "x"]), ("sha256", []), ("window", 3), ("images", "8")):
        shutil.rmtree(folder / "odd", ignore_errors=True)
        shutil.copytree(torn, folder / "odd")
        (folder / "odd" / file.relative_to(torn)).write_text(json.dumps({**state, key: odd}))
        train(run_settings(out="odd", max_steps=6, keep_checkpoints=3))
        assert key in caplog.text
        assert same(weights(folder / "odd"), whole), key


def test_a_damaged_run_file_is_replaced_by_what_the_checkpoint_says(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole, torn = cut_off(folder)
    text = (torn / "run.json").read_text()
    (torn / "run.json").write_text(text.replace('"global_batch": 2', '"global_batch": 3'))
    train(run_settings(out=str(torn), max_steps=6, keep_checkpoints=3))
    assert "run.json is damaged" in caplog.text
    assert same(weights(torn), whole)
    assert (torn / "run.json").read_text() == text
    (torn / "run.json").write_text("{}")
    with pytest.raises(UserError, match="global_batch was 2"):
        train(run_settings(out=str(torn), max_steps=6, global_batch=3))


def test_a_finished_model_that_is_damaged_is_named_with_what_to_do(folder: Path) -> None:
    torch.set_num_threads(1)
    train(run_settings(out="made"))
    before = weights(Path("made"))
    flip(Path("made/model/unet/diffusion_pytorch_model.safetensors"))
    for use in (
        lambda: train(run_settings(out="made")),
        lambda: MediPipeline.from_pretrained("made/model"),
        lambda: open_source("made/model"),
    ):
        with pytest.raises(UserError, match=r"diffusion_pytorch_model\.safetensors is damaged"):
            use()
    with pytest.raises(UserError, match="remove it and repeat the command"):
        train(run_settings(out="made"))
    shutil.rmtree("made/model")
    train(run_settings(out="made"))
    assert same(weights(Path("made")), before)


def test_what_a_person_adds_to_a_model_folder_does_not_matter(folder: Path) -> None:
    MediPipeline.from_pretrained("model").save_pretrained("mine")
    (Path("mine") / "README.md").write_text("Our own words.")
    (Path("mine") / "notes.txt").write_text("x")
    MediPipeline.from_pretrained("mine")
    (Path("mine") / "objective.json").unlink()
    with pytest.raises(UserError, match=r"objective\.json is absent"):
        MediPipeline.from_pretrained("mine")


def test_a_damaged_average_is_named(folder: Path) -> None:
    train(run_settings(out="kept", ema=EmaSettings(also=[0.05], snapshot_every_images=4)))
    assert AverageSettings  # what `latent-medi average` is asked with
    reconstruct("kept", 0.07)
    flip(sorted(Path("kept/averages").iterdir())[0])
    with pytest.raises(UserError, match=r"averages/images-.* is damaged"):
        reconstruct("kept", 0.07)


@pytest.mark.parametrize("name", ["../data/part-000000.safetensors", "/etc/passwd", "data/../../x", "", 7])
def test_no_file_outside_its_folder_is_read(folder: Path, name: Any) -> None:
    info = json.loads(Path("latents/latents.json").read_text())
    info["shards"][0]["file"] = name
    Path("latents/latents.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match=r"latents\.json"):
        LatentStore("latents")
    index = Path("model/unet/diffusion_pytorch_model.safetensors.index.json")
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UserError, match="no file inside"):
        MediPipeline.from_pretrained("model")


def test_patches_without_a_class_are_refused(folder: Path) -> None:
    data = PatchDataset.open("data")
    for missing in (None, float("nan")):
        data.index["class"] = pd.Series(["a", missing, "b", missing, "a", "b"], dtype=object)
        with pytest.raises(UserError, match="2 of 5 training patches of data have no class, such as k1"):
            refuse_null(data, "class", np.arange(5))
        data.index.to_parquet("data/index.parquet")
        with pytest.raises(UserError, match="2 of 6"):
            open_data(run_settings(), None)


# ---- JSON of another program, or edited, in folders that have no checksums: a message or a result, nothing else


def used(what: str) -> Any:
    """Read an artefact of the working folder and use it."""
    if what == "latents":
        store = LatentStore("latents")
        return store.moments(np.arange(len(store)))
    if what == "source":
        return open_source("model")
    pipe = MediPipeline.from_pretrained("model")
    if what == "adapter":
        pipe.load_adapter("adapter")
    return pipe(num_images=1, steps=2, output_type="np")


FILES = {
    "latents/latents.json": "latents",
    "model/model_index.json": "model",
    "model/autoencoder.json": "model",
    "model/objective.json": "model",
    "model/provenance.json": "model",
    "model/scheduler/scheduler_config.json": "model",
    "model/conditioning/config.json": "model",
    "model/unet/config.json": "model",
    "model/autoencoder/config.json": "model",
    "adapter/adapter.json": "adapter",
    "adapter/adapter_config.json": "adapter",
}


@pytest.mark.parametrize("file", FILES)
@given(data=st.data())
@QUICK
def test_mistyped_json_is_one_message(folder: Path, file: str, data: st.DataObject) -> None:
    change = data.draw(changes(json.loads((FOLDER / file).read_text())))
    with with_change(folder / file, change):
        for what in {FILES[file], "source"} if FILES[file] == "model" else {FILES[file]}:
            with suppress(UserError):
                used(what)


def test_a_checkpoint_after_a_skipped_update_is_whole(tmp_path: Path) -> None:
    """Under fp16 the loss scaler skips updates, which then have no gradient norm."""
    state = {"run": {}, "window": [(0.5, None), (0.25, 1.0)], "losses": [], "scaler": {}, "whitening": [[0.0], [1.0]]}
    path = save_checkpoint(tmp_path, 8, {"model": {"w": torch.zeros(2)}}, state, 1)
    assert verify_checkpoint(path) == ""
    assert newest_checkpoint(tmp_path) == path
