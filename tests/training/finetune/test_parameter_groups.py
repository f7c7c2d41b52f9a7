"""Training parts of a model: what is frozen stays bit for bit, and a new hospital changes nothing that was there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from test_loop import assert_same_bits, finished, interrupt_at, launch, two_processes, weights

from latent_medi.core.errors import UserError
from latent_medi.diffusion.objective import Objective, diffusion_loss
from latent_medi.diffusion.pipeline import MediPipeline
from latent_medi.diffusion.settings import DropoutSettings, GuidanceSettings
from latent_medi.latents.store import LatentStore
from latent_medi.metadata.schema import FIRST_VALUE
from latent_medi.shards.dataset import PatchDataset
from latent_medi.training import loop, updates
from latent_medi.training.checkpoint import checkpoint_folders
from latent_medi.training.data import TrainingData, open_data
from latent_medi.training.finetune.transfer import Source, open_source
from latent_medi.training.loop import train
from latent_medi.training.settings import PARAMETER_GROUPS, TrainSettings

Make = Callable[..., TrainSettings]
STRONG = {"lr": 1e-2, "weight_decay": 0.5}  # what is not held fast moves visibly


@pytest.fixture
def source(run_settings: Make, tmp_path: Path) -> MediPipeline:
    """A conditional model of three hospitals."""
    return MediPipeline.from_pretrained(train(run_settings(out=str(tmp_path / "source"), max_steps=4, lr=1e-2)))


def further(tmp_path: Path, tiny_more: Path, **values: Any) -> dict[str, Any]:
    """Settings that add the hospital cedar to the source."""
    more = {"data": str(tiny_more / "data"), "latents": str(tiny_more / "latents"), "max_steps": 12, **STRONG}
    return {**more, "init_from": str(tmp_path / "source" / "model"), "train_parts": ["new"], **values}


@pytest.mark.parametrize("part", [part for part in PARAMETER_GROUPS if part != "new"])
def test_only_the_named_part_moves(part: str, source: MediPipeline, run_settings: Make, tmp_path: Path) -> None:
    start = {"init_from": str(tmp_path / "source" / "model"), "train_parts": [part], "max_steps": 3, **STRONG}
    after = MediPipeline.from_pretrained(train(run_settings(**start)))
    before, now = source.denoiser.state_dict(), after.denoiser.state_dict()
    moved = {name for name in before if not torch.equal(before[name], now[name])}
    table = pd.read_csv(tmp_path / "run" / "transfer.csv", keep_default_na=False).set_index("tensor")["training"]
    assert set(table.index) == set(before)
    assert moved == set(table.index[table == "trained"])
    assert set(table[table != "trained"]) == {"frozen"}
    told = {
        "conditioning": "conditioner.",
        "attention": "attentions",
        "time": "time_emb",
        "down": "unet.down_blocks.",
        "mid": "unet.mid_block.",
        "up": "unet.up_blocks.",
    }[part]
    assert {name for name in before if told in name} <= moved
    folder = checkpoint_folders(tmp_path / "run" / "checkpoints")[-1][1]
    for file in ("model", "ema"):
        assert set(load_file(folder / f"{file}.safetensors")) == moved
    assert {key.rsplit("/", 1)[0] for key in load_file(folder / "optimizer.safetensors")} == moved


def test_unknown_or_pointless_parts_are_refused(source: MediPipeline, run_settings: Make, tmp_path: Path) -> None:
    start = {"init_from": str(tmp_path / "source" / "model"), "max_steps": 1}
    with pytest.raises(UserError, match=r"train_parts\[0\] is 'atention'"):
        train(run_settings(train_parts=["atention"], **start))
    with pytest.raises(UserError, match="train_parts needs init_from"):
        train(run_settings(train_parts=["attention"]))
    with pytest.raises(UserError, match="new_fields_lr needs init_from"):
        train(run_settings(new_fields_lr=10.0))
    with pytest.raises(UserError, match="leaves nothing to train"):
        train(run_settings(train_parts=["new"], **start))


@pytest.mark.parametrize("fusion", ["concat", "additive", "linear"])
def test_further_hospital_leaves_the_others_as_they_were(
    fusion: str, run_settings: Make, tiny_more: Path, tmp_path: Path
) -> None:
    model = {"fusion": fusion}
    before = MediPipeline.from_pretrained(
        train(run_settings(out=str(tmp_path / "source"), max_steps=4, lr=1e-2, model=model))
    )
    after = MediPipeline.from_pretrained(train(run_settings(**further(tmp_path, tiny_more))))
    sites = before.schema.field("site").values
    assert after.schema.field("site").values == (*sites, "cedar")
    asked: dict[str, Any] = {"steps": 3, "output_type": "np", "seed": 7}
    for site in (*sites, "unknown"):
        for rest in ({"class_": "tumour", "age": 55}, {"class_": "benign", "age": "unknown"}, {"class_": "benign"}):
            told = {"site": site, **rest, "num_images": 2}
            assert (before(**told, **asked).images == after(**told, **asked).images).all()
    assert (before(**asked).images == after(**asked).images).all()  # no condition at all
    rows = [{"class": "tumour", "site": site, "age": 50} for site in sites]
    noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    guided = GuidanceSettings("margins", 2.0)
    ours, theirs = (p.generate_latents(p.conditions(rows), noise, guidance=guided) for p in (after, before))
    assert torch.equal(ours, theirs)

    # Bit for bit in every weight, and only the new row is new.
    assert_same_bits({"unet": before.unet.state_dict()}, {"unet": after.unet.state_dict()})
    old, new = (p.conditioning.state_dict() for p in (before, after))
    table = "embeddings.field_site.codes.weight"
    assert torch.equal(new[table][:-1], old[table])
    assert all(torch.equal(new[name], old[name]) for name in old if name != table)
    assert float((new[table][-1] - old[table][FIRST_VALUE:].mean(0)).norm()) > 0.01
    told = pd.read_csv(tmp_path / "run" / "transfer.csv").set_index("tensor")["training"]
    assert told[f"conditioner.{table}"] == "new part"
    assert (told.drop(f"conditioner.{table}") == "frozen").all()
    state = load_file(checkpoint_folders(tmp_path / "run" / "checkpoints")[-1][1] / "optimizer.safetensors")
    assert max(value.numel() for value in state.values()) == new[table].shape[1]  # a single row's


def test_further_hospital_is_learned(
    run_settings: Make, tiny_more: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hospitals differ in the mean of their latents; the new one is as the highest, far from the mean hospital."""
    levels = {"aster": -1.0, "NA": -1.0, "birch": 2.0, "cedar": 2.0}
    sites: dict[int, np.ndarray] = {}
    moments, opened = LatentStore.moments, open_data

    def shifted(store: LatentStore, rows: np.ndarray, *views: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        mean, std = moments(store, rows, *views)
        return mean + torch.tensor([levels[site] for site in sites[id(store)][rows]])[:, None, None, None], std

    def noted(settings: TrainSettings, source: Source | None, *device: Any) -> TrainingData:
        data = opened(settings, source, *device)
        sites[id(data.store)] = PatchDataset.open(settings.data).index["site"].to_numpy()
        return data

    monkeypatch.setattr(LatentStore, "moments", shifted)
    monkeypatch.setattr(loop, "open_data", noted)
    train(run_settings(out=str(tmp_path / "source"), max_steps=100, lr=5e-3))
    settings = run_settings(**further(tmp_path, tiny_more, max_steps=40, lr=5e-2, weight_decay=0.0))
    after = MediPipeline.from_pretrained(train(settings))
    start = open_source(settings.init_from)
    data = noted(settings, start)
    data.whiten(start, [])
    batch = data.batch(0, 256, 99, 1000, DropoutSettings(1.0, 0.0, 0.0, 0.0), 0, 1)
    assert batch.conditions is not None
    site = after.schema.names.index("site")
    cedar = (batch.conditions.codes[:, site] == after.schema.field("site").code("cedar")).nonzero()[:, 0]
    inputs = batch.latents[cedar], batch.noise[cedar], batch.timesteps[cedar], batch.conditions.rows(cedar)
    rows = after.conditioning.embeddings["field_site"].codes.weight  # type: ignore[union-attr]
    with torch.no_grad():
        learned = float(diffusion_loss(after.denoiser, *inputs, Objective(after.objective)).mean())
        rows[-1] = rows[FIRST_VALUE:-1].mean(0)
        mean = float(diffusion_loss(after.denoiser, *inputs, Objective(after.objective)).mean())
    assert learned < 0.98 * mean


def test_guidance_is_what_the_source_was_trained_for(run_settings: Make, tiny_more: Path, tmp_path: Path) -> None:
    """A new vector trains no null: the model must not claim patterns that only this run drew."""
    never = DropoutSettings(1.0, 0.0, 0.0, 0.0)
    train(run_settings(out=str(tmp_path / "source"), max_steps=2, dropout=never))
    after = MediPipeline.from_pretrained(train(run_settings(**further(tmp_path, tiny_more, max_steps=1))))
    assert after.conditioning is not None
    assert after.conditioning.patterns == never
    with pytest.raises(UserError):
        after(class_="benign", site="cedar", age=50, guidance=2.0, steps=2)
    whole = further(tmp_path, tiny_more, max_steps=1, train_parts=None, out=str(tmp_path / "whole"))
    trained = MediPipeline.from_pretrained(train(run_settings(**whole)))
    assert trained.conditioning is not None
    assert trained.conditioning.patterns == DropoutSettings()


@pytest.mark.parametrize("fusion", ["additive", "linear"])
def test_further_field_alone_is_trained(fusion: str, run_settings: Make, tmp_path: Path) -> None:
    model = {"fields": ["class", "age"], "fusion": fusion}
    before = MediPipeline.from_pretrained(
        train(run_settings(out=str(tmp_path / "source"), max_steps=4, lr=1e-2, model=model))
    )
    start = {"init_from": str(tmp_path / "source" / "model"), "train_parts": ["new"], "max_steps": 6, **STRONG}
    after = MediPipeline.from_pretrained(train(run_settings(model={"fusion": fusion}, **start)))
    assert after.conditioning is not None
    assert before.conditioning is not None
    assert_same_bits({"unet": before.unet.state_dict()}, {"unet": after.unet.state_dict()})
    new, old = after.conditioning.state_dict(), before.conditioning.state_dict()
    assert all(torch.equal(new[name], old[name]) for name in old if name != "mix.weight")
    assert bool(new["embeddings.field_site.codes.weight"].abs().sum() > 0)
    if fusion == "linear":
        width = new["mix.weight"].shape[0]
        parts = dict(zip(after.schema.names, new["mix.weight"].split(width, 1), strict=True))
        olds = dict(zip(before.schema.names, old["mix.weight"].split(width, 1), strict=True))
        assert all(torch.equal(parts[name], olds[name]) for name in olds)
        assert bool(parts["site"].abs().sum() > 0)


def unconditional(run_settings: Make, tmp_path: Path) -> dict[str, Any]:
    """Settings that start at a model that knows no field."""
    train(run_settings(out=str(tmp_path / "plain"), max_steps=4, model={"fields": []}, lr=1e-2))
    return {"init_from": str(tmp_path / "plain" / "model"), "schedule": "constant", "warmup_fraction": 0.0}


@pytest.mark.parametrize("parts", [["new"], ["conditioning", "mid"], None])
def test_killed_and_resumed_equals_unbroken(
    parts: list[str] | None, source: MediPipeline, run_settings: Make, tiny_more: Path, tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    start = unconditional(run_settings, tmp_path) | {"max_steps": 24}  # all parts, and those of new fields faster
    if parts:
        start = further(tmp_path, tiny_more, max_steps=24, train_parts=parts)
    whole = run_settings(out=str(tmp_path / "whole"), **start)
    train(whole)
    torn = replace(whole, out=str(tmp_path / "torn"))
    assert finished(launch(torn, {"step": 11})) < 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(updates, "clip_gradients", interrupt_at(10))
        with pytest.raises(KeyboardInterrupt):
            train(torn)
    train(torn)
    for name in ("model", "checkpoints/images-000000000192"):
        assert_same_bits(weights(tmp_path / "whole" / name), weights(tmp_path / "torn" / name))


@pytest.mark.slow
def test_two_processes_train_the_same_part(
    source: MediPipeline, run_settings: Make, tiny_more: Path, tmp_path: Path
) -> None:
    one = run_settings(out=str(tmp_path / "one"), **further(tmp_path, tiny_more, weight_decay=0.0))
    train(one)
    two_processes(replace(one, out=str(tmp_path / "two")), 29517)
    a, b = (weights(tmp_path / name / "model") for name in ("one", "two"))
    assert_same_bits(*({k: v for k, v in w.items() if k.startswith("unet")} for w in (a, b)))
    table = "embeddings.field_site.codes.weight"
    ours, theirs = (w["conditioning/diffusion_pytorch_model.safetensors"][table] for w in (a, b))
    assert torch.equal(ours[:-1], theirs[:-1])
    assert float((ours[-1] - theirs[-1]).norm() / ours[-1].norm()) <= 1e-5


def test_vectors_of_new_fields_learn_faster(run_settings: Make, tmp_path: Path) -> None:
    """They begin at zero; Adam's first update moves every value by its learning rate, whatever the gradient."""
    start = unconditional(run_settings, tmp_path)
    train(run_settings(max_steps=1, lr=1e-4, new_fields_lr=40.0, weight_decay=0.0, **start))
    folder = checkpoint_folders(tmp_path / "run" / "checkpoints")[-1][1]
    before = open_source(tmp_path / "plain" / "model").unet.state_dict()
    moved = {
        name: float((value - before.get(name.removeprefix("unet."), torch.zeros(()))).abs().max())
        for name, value in load_file(folder / "model.safetensors").items()
        if name.startswith("unet.") or name.endswith("codes.weight")
    }
    vectors = {name: size for name, size in moved.items() if name.startswith("conditioner.")}
    assert len(vectors) == 3
    assert all(size == pytest.approx(4e-3, rel=1e-2) for size in vectors.values())
    assert max(size for name, size in moved.items() if name not in vectors) == pytest.approx(1e-4, rel=1e-2)
