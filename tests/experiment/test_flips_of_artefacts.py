"""Single flipped bits in every kind of artefact, at every reader: named, done without, or of no effect; never another
value without a word."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from earlier import earlier, run_settings
from flips import equal, flipped, flips

from latent_medi.diffusion.pipeline import MediPipeline
from latent_medi.diffusion.settings import ObjectiveSettings
from latent_medi.experiment.verify_artefacts import verify_artefact
from latent_medi.features.cache import cached_features
from latent_medi.features.encoders import load_encoder
from latent_medi.features.tiny_encoder import TinyEncoder
from latent_medi.latent_classifier.network import LatentClassifier, LatentEncoder
from latent_medi.latent_classifier.network_settings import EncoderSettings
from latent_medi.latents.autoencoder import demo_folder, load_autoencoder
from latent_medi.latents.store import LatentStore
from latent_medi.shards.dataset import PatchDataset
from latent_medi.training.checkpoint import (
    checkpoint_folders,
    load_state,
    load_tensors,
    newest_checkpoint,
    tensor_files,
)
from latent_medi.training.finetune.transfer import open_source
from latent_medi.training.loop import train
from latent_medi.training.posthoc_ema import list_snapshots, reconstruct
from latent_medi.training.settings import EmaSettings

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The earlier version's folders with checksums, a finished run that kept averages, and a classifier."""
    with earlier(tmp_path_factory.mktemp("flips") / "w") as folder:
        for name in ("latents", "model", "adapter"):
            verify_artefact(folder / name, seal=True)
        shutil.rmtree("run")
        train(run_settings(ema=EmaSettings(also=[0.05], snapshot_every_images=4)))
        settings = EncoderSettings(
            block_out_channels=[4, 4], attention=[False, False], norm_num_groups=2, attention_head_dim=4
        )
        network = LatentEncoder(settings, 2, 4, 2)
        LatentClassifier(
            network, settings, (2, 4, 4), "class", ("a", "b"), ObjectiveSettings(), torch.zeros(2), torch.ones(2), "0"
        ).save_pretrained("classifier")
        yield folder


def latents(resident: Any) -> Callable[[], Any]:
    def read() -> Any:
        store = LatentStore("latents", resident)
        return store.moments(np.arange(len(store))), store.info["autoencoder"], store.info["shards"]

    return read


def model() -> Any:
    pipe = MediPipeline.from_pretrained("model")
    return pipe.model_hash, pipe(seed=1, steps=2, output_type="np").images, pipe.provenance


def source() -> Any:
    found = open_source("model")
    return found.hash, found.model_hash, found.seen, found.unet.state_dict()


def adapter() -> Any:
    pipe = MediPipeline.from_pretrained("model")
    pipe.load_adapter("adapter")
    return pipe.model_hash


def classifier() -> Any:
    return LatentClassifier.from_pretrained("classifier").hash


READERS: dict[str, tuple[str, Callable[[], Any], int]] = {
    "latents, mmap": ("latents/data/part-000000.safetensors", latents("mmap"), 100),
    "latents, ram": ("latents/data/part-000001.safetensors", latents("ram"), 100),
    "latents' record": ("latents/latents.json", latents("ram"), 100),
    "weights, sampling": ("model/unet/diffusion_pytorch_model.safetensors", model, 100),
    "weights, training": ("model/unet/diffusion_pytorch_model.safetensors", source, 100),
    "conditioner's weights": ("model/conditioning/diffusion_pytorch_model.safetensors", model, 30),
    "network": ("model/unet/config.json", model, 30),
    "conditioner": ("model/conditioning/config.json", model, 30),
    "scheduler": ("model/scheduler/scheduler_config.json", model, 30),
    "autoencoder's record": ("model/autoencoder.json", model, 30),
    "objective": ("model/objective.json", source, 30),
    "provenance": ("model/provenance.json", model, 30),
    "index": ("model/model_index.json", model, 30),
    "checksums": ("model/checksums.json", model, 30),
    "adapter's weights": ("adapter/adapter_model.safetensors", adapter, 50),
    "adapter's record": ("adapter/adapter.json", adapter, 50),
    "adapter's configuration": ("adapter/adapter_config.json", adapter, 50),
    "classifier's weights": ("classifier/model.safetensors", classifier, 100),
    "classifier's record": ("classifier/config.json", classifier, 100),
}


@pytest.mark.parametrize("name", READERS)
def test_readers_refuse_or_give_the_same(world: Path, name: str) -> None:
    file, read, count = READERS[name]
    # A damaged list of checksums may be told by the file that then seems to differ, or not to be there.
    flips(world / file, read, count, names=(Path(file).name, str(world), "model", Path(file).parts[0])).check()


def contents(checkpoint: Path) -> list[object]:
    """All that a run reads of a checkpoint."""
    state = load_state(checkpoint)
    return [state, *(load_tensors(file) for file in tensor_files(checkpoint, state).values())]


def test_averages(world: Path) -> None:
    path = list_snapshots(world / "run")[0].path
    flips(path, lambda: reconstruct("run", 0.07), 100, names=str(path.name)).check()


@pytest.mark.parametrize("file", ["state.json", "model.safetensors", "ema.safetensors", "optimizer.safetensors"])
def test_a_damaged_checkpoint_is_passed_over(world: Path, file: str) -> None:
    """The state that a run goes on from is the newest one's, or the one's before: 100 flips, no third outcome."""
    folder = world / "run" / "checkpoints"
    (_, before), (_, newest) = checkpoint_folders(folder)
    whole, older = contents(newest), contents(before)
    passed_over = 0
    for place in np.random.default_rng(0).choice(8 * (newest / file).stat().st_size, 100, replace=False).tolist():
        with flipped(newest / file, *divmod(place, 8)):
            found = newest_checkpoint(folder)
            assert found is not None
            passed_over += found == before
            assert equal(contents(found), older if found == before else whole), f"{file}, bit {place}"
    assert passed_over > 60  # the rest is whitespace between values


def test_a_damaged_cache_is_embedded_again(world: Path) -> None:
    data, encoder = PatchDataset.open("data"), load_encoder("demo")

    def read() -> np.ndarray:
        return cached_features(data, np.arange(6), encoder, "cache")

    whole = read()
    (path,) = (world / "cache").iterdir()
    for place in np.random.default_rng(0).choice(8 * path.stat().st_size, 100, replace=False).tolist():
        with flipped(path, *divmod(place, 8)):
            assert np.allclose(read(), whole, atol=1e-6), f"bit {place}"


def test_packaged_weights(world: Path) -> None:
    for folder, read in (
        (demo_folder(), lambda: load_autoencoder("autoencoder-copy").hash),
        (demo_folder().parent / "encoder", lambda: TinyEncoder.load("encoder-copy").state_dict()),
    ):
        copy = shutil.copytree(folder, world / f"{folder.name}-copy")
        for file in sorted(copy.glob("*.safetensors")) + sorted(copy.glob("*.json")):
            flips(file, read, 20, names=(file.name, copy.name)).check()
