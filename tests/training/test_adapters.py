"""Low-rank adapters: small, bound to their model, exact on resume, stacked and merged at sampling."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_loop import assert_same_bits, finished, interrupt_at, launch, two_processes, weights

from latent_medi.core.errors import UserError
from latent_medi.diffusion.adapters import open_adapter
from latent_medi.diffusion.pipeline import MediPipeline
from latent_medi.diffusion.settings import SamplerSettings
from latent_medi.metadata.training_record import was_trained_on
from latent_medi.sampling.generate import generate, generate_plan
from latent_medi.sampling.settings import GenerateSettings
from latent_medi.training import loop, updates
from latent_medi.training.checkpoint import checkpoint_folders
from latent_medi.training.loop import train
from latent_medi.training.settings import LoraSettings, TrainSettings

Make = Callable[..., TrainSettings]
ASKED: dict[str, Any] = {"class_": "tumour", "age": 55, "steps": 3, "output_type": "np", "num_images": 2}


@pytest.fixture
def base(run_settings: Make, tmp_path: Path) -> Path:
    """A conditional model of three hospitals."""
    return train(run_settings(out=str(tmp_path / "base"), max_steps=4, lr=1e-2))


def adapting(base: Path, **values: Any) -> dict[str, Any]:
    """Settings of an adapter's run, fast enough that its update shows."""
    common = {"init_from": str(base), "max_steps": 8, "lr": 5e-2, "weight_decay": 0.1}
    return {**common, "lora": LoraSettings(rank=2, alpha=8.0), **values}


def cedar(tiny_more: Path) -> dict[str, Any]:
    """Settings for data with a hospital that the base does not know."""
    return {"data": str(tiny_more / "data"), "latents": str(tiny_more / "latents"), "train_parts": ["new"]}


def latents(pipeline: MediPipeline, **fields: Any) -> torch.Tensor:
    rows = [{"class": "tumour", "age": 50, **fields}, {"class": "benign", "age": "unknown", **fields}]
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    return pipeline.generate_latents(pipeline.conditions(rows), noise, SamplerSettings(steps=4))


def test_adapter_is_trained_and_saved_alone(base: Path, run_settings: Make, tmp_path: Path) -> None:
    folder = train(run_settings(**adapting(base)))
    assert folder == tmp_path / "run" / "adapter"
    assert not (tmp_path / "run" / "model").exists()
    assert {file.name for file in folder.iterdir()} >= {"adapter.json", "adapter_config.json"}
    assert [file.name for file in folder.glob("*.safetensors")] == ["adapter_model.safetensors"]
    plain = MediPipeline.from_pretrained(base)
    facts = json.loads((folder / "adapter.json").read_text())
    assert facts["base"] == plain.model_hash
    assert facts["provenance"]["images_seen"] == 64
    # The averaged matrices, and nothing else, are trained, kept in the checkpoint and given to the optimizer.
    last = checkpoint_folders(tmp_path / "run" / "checkpoints")[-1][1]
    average, raw = load_file(last / "ema.safetensors"), load_file(last / "model.safetensors")
    assert all("lora_" in name for name in average)
    saved = open_adapter(folder).weights
    assert {f"unet.{name}".replace(".weight", ".default.weight") for name in saved} == set(average) == set(raw)
    for name, value in saved.items():
        assert torch.equal(value, average[f"unet.{name}".replace(".weight", ".default.weight")])
    assert any(not torch.equal(average[name], raw[name]) for name in raw)
    assert {key.rsplit("/", 1)[0] for key in load_file(last / "optimizer.safetensors")} == set(raw)
    table = pd.read_csv(tmp_path / "run" / "transfer.csv")
    assert set(table[table["status"] == "new"]["tensor"]) == set(raw)
    assert (table[table["status"] == "loaded"]["training"] == "frozen").all()
    adapted = MediPipeline.from_pretrained(base)
    adapted.load_adapter(folder)
    assert float((latents(adapted, site="NA") - latents(plain, site="NA")).abs().max()) > 1e-3
    assert "lora" not in str(list(plain.denoiser.state_dict()))


def test_finished_adapter_returns_at_once(
    base: Path, run_settings: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = run_settings(**adapting(base, max_steps=1))
    folder = train(settings)
    monkeypatch.setattr(loop, "diffusion_loss", None)
    assert train(settings) == folder
    with pytest.raises(UserError, match=r"lora.rank was 2 and is 3"):
        train(replace(settings, lora=LoraSettings(rank=3, alpha=8.0)))


@pytest.mark.parametrize("targets", [["attention", "time"], ["attention", "time", "residual"]])
def test_adapter_is_small(targets: list[str], run_settings: Make, tmp_path: Path) -> None:
    model = {"block_out_channels": [64, 128], "attention_head_dim": 64}
    base = train(run_settings(out=str(tmp_path / "base"), max_steps=1, model=model))
    rank = 1 if "residual" in targets else 4
    folder = train(run_settings(**adapting(base, max_steps=1, lora=LoraSettings(rank=rank, targets=targets))))

    def size(of: Path) -> int:
        return sum(file.stat().st_size for file in of.rglob("*") if file.is_file())

    assert size(folder) < 0.05 * size(base)


def test_peft_alone_reads_it(base: Path, run_settings: Make) -> None:
    folder = train(run_settings(**adapting(base)))
    ours, theirs = MediPipeline.from_pretrained(base), MediPipeline.from_pretrained(base)
    ours.load_adapter(folder)
    bare = PeftModel.from_pretrained(theirs.unet, str(folder)).eval()
    x, t, z = torch.randn(2, 4, 8, 8), torch.tensor([10, 700]), torch.randn(2, 64)
    with torch.no_grad():
        assert torch.equal(ours.unet(x, t, class_labels=z).sample, bare(x, t, class_labels=z).sample)


def test_killed_and_resumed_equals_unbroken(base: Path, run_settings: Make, tiny_more: Path, tmp_path: Path) -> None:
    """With the adapter's own dropout, and the vector of a new hospital."""
    torch.set_num_threads(1)
    lora = LoraSettings(rank=2, targets=["attention", "time", "residual"], dropout=0.2)
    whole = run_settings(**adapting(base, out=str(tmp_path / "whole"), max_steps=24, lora=lora, **cedar(tiny_more)))
    train(whole)
    torn = replace(whole, out=str(tmp_path / "torn"))
    assert finished(launch(torn, {"step": 13})) < 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(updates, "clip_gradients", interrupt_at(10))
        with pytest.raises(KeyboardInterrupt):
            train(torn)
    train(torn)
    for name in ("adapter", "checkpoints/images-000000000192"):
        assert_same_bits(weights(tmp_path / "whole" / name), weights(tmp_path / "torn" / name))
    assert len(weights(tmp_path / "whole" / "adapter")) == 2


@pytest.mark.slow
def test_two_processes_train_the_same_adapter(base: Path, run_settings: Make, tiny_more: Path, tmp_path: Path) -> None:
    one = run_settings(**adapting(base, out=str(tmp_path / "one"), lr=1e-3, **cedar(tiny_more)))
    train(one)
    two_processes(replace(one, out=str(tmp_path / "two")), 29519)
    a, b = (weights(tmp_path / name / "adapter") for name in ("one", "two"))
    assert a.keys() == b.keys()
    for file in a:
        before, after = (torch.cat([t.flatten() for t in w[file].values()]) for w in (a, b))
        assert float((before - after).norm() / before.norm()) <= 1e-5


def test_stacked_scaled_and_merged(base: Path, run_settings: Make, tmp_path: Path) -> None:
    first = train(run_settings(**adapting(base, out=str(tmp_path / "first"))))
    residual = LoraSettings(rank=3, targets=["residual", "attention"])
    second = train(run_settings(**adapting(base, out=str(tmp_path / "second"), seed=4, lora=residual)))
    plain = MediPipeline.from_pretrained(base)
    alone, both, none = (MediPipeline.from_pretrained(base) for _ in range(3))
    alone.load_adapter(first)
    both.load_adapter(first, scale=0.5)
    both.load_adapter(second, scale=1.5)
    none.load_adapter(first, scale=0.0)
    assert torch.equal(latents(none, site="NA"), latents(plain, site="NA"))
    hashes = [pipeline.model_hash for pipeline in (plain, alone, both, none)]
    assert len(set(hashes)) == 4
    assert both.model_hash == hashes[2]
    stacked = latents(both, site="NA")
    assert float((stacked - latents(alone, site="NA")).abs().max()) > 1e-3

    # W + Σ scale · alpha / rank · B·A, layer by layer.
    name = "down_blocks.1.attentions.0.to_q"
    expected = plain.unet.get_submodule(name).weight.clone()
    for folder, scale, ratio in ((first, 0.5, 8 / 2), (second, 1.5, 1.0)):
        matrices = open_adapter(folder).weights
        expected += scale * ratio * matrices[f"{name}.lora_B.weight"] @ matrices[f"{name}.lora_A.weight"]
    with pytest.raises(UserError, match="merge_adapters"):
        both.save_pretrained(tmp_path / "merged")
    both.merge_adapters()
    assert torch.allclose(both.unet.get_submodule(name).weight, expected, atol=1e-5)
    assert both.unet.state_dict().keys() == plain.unet.state_dict().keys()
    torch.testing.assert_close(latents(both, site="NA"), stacked, rtol=1e-4, atol=1e-4)
    both.save_pretrained(tmp_path / "merged")
    again = MediPipeline.from_pretrained(tmp_path / "merged")
    assert torch.equal(latents(again, site="NA"), latents(both, site="NA"))
    assert again.model_hash == both.model_hash not in hashes
    assert again.provenance["merged_adapters"]["model"] == plain.model_hash
    with pytest.raises(UserError, match="belongs to the model"):
        again.load_adapter(first)


def test_hospital_stored_with_its_adapter(base: Path, run_settings: Make, tiny_more: Path, tmp_path: Path) -> None:
    before = (base / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    folder = train(run_settings(**adapting(base, **cedar(tiny_more))))
    plain, adapted, silent = (MediPipeline.from_pretrained(base) for _ in range(3))
    assert (base / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == before
    assert "cedar" not in plain.schema.field("site").values
    adapted.load_adapter(folder)
    assert was_trained_on(plain.provenance["seen"], {"site": "cedar"}) is False
    assert was_trained_on(adapted.provenance["seen"], {"site": "cedar"})
    assert adapted.schema.field("site").values == (*plain.schema.field("site").values, "cedar")
    assert adapted(site="cedar", **ASKED).images.shape == (2, 32, 32, 3)
    row = load_file(folder / "values.safetensors")["site"]
    assert torch.equal(adapted.conditioning.embeddings["field_site"].codes.weight[-1:], row)  # type: ignore[union-attr]
    # The adapter's update reaches every hospital; with its scale at 0, old ones are as they were, bit for bit.
    assert not torch.equal(latents(adapted, site="NA"), latents(plain, site="NA"))
    silent.load_adapter(folder, scale=0.0)
    assert torch.equal(latents(silent, site="NA"), latents(plain, site="NA"))
    adapted.merge_adapters()
    adapted.save_pretrained(tmp_path / "merged")
    assert "cedar" in MediPipeline.from_pretrained(tmp_path / "merged").schema.field("site").values
    with pytest.raises(UserError, match="adds site cedar, which another adapter added before"):
        silent.load_adapter(folder)


def test_adapter_of_an_unconditional_model(run_settings: Make, tmp_path: Path) -> None:
    model: dict[str, Any] = {"fields": []}
    base = train(run_settings(out=str(tmp_path / "base"), max_steps=2, model=model))
    folder = train(run_settings(**adapting(base, model=model)))
    pipeline = MediPipeline.from_pretrained(base)
    noise = torch.randn(1, 4, 8, 8)
    plain = pipeline.generate_latents(None, noise)
    pipeline.load_adapter(folder)
    assert not torch.equal(pipeline.generate_latents(None, noise), plain)
    with pytest.raises(UserError, match=r"has no field class, site, age, and an adapter adds values to fields"):
        train(run_settings(**adapting(base, out=str(tmp_path / "other"))))


def test_what_an_adapter_cannot_be_is_refused(base: Path, run_settings: Make, tiny_more: Path, tmp_path: Path) -> None:
    refused = [
        ({"train_parts": ["mid"]}, r"train_parts must be unset or \[new\]"),
        ({"override": ["scaling"]}, "own scaling"),
        ({"init_from": ""}, "lora needs init_from"),
        ({"train_parts": ["new"]}, "knows every value"),
        ({**cedar(tiny_more), "train_parts": None}, r"does not know: site cedar"),
        ({"init_from": str(base / "unet")}, "not a complete model"),
    ]
    for values, words in refused:
        with pytest.raises(UserError, match=words):
            train(run_settings(**adapting(base, **values)))
    for wrong in ({"rank": 0}, {"targets": ["atention"]}, {"dropout": 1.0}, {"alpha": 0.0}):
        with pytest.raises(UserError, match=f"{next(iter(wrong))}.* is "):
            LoraSettings(**wrong)


def test_damaged_or_foreign_adapter_is_refused(
    base: Path, run_settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = train(run_settings(**adapting(base, max_steps=1)))
    pipeline = MediPipeline.from_pretrained(base)
    untouched = pipeline.model_hash
    with pytest.raises(UserError, match=r"no adapter of this program"):
        pipeline.load_adapter(base)
    with pytest.raises(UserError, match="no model folder"):
        pipeline.load_adapter(tmp_path / "nowhere")
    cut = tmp_path / "cut"
    shutil.copytree(folder, cut)
    (cut / "adapter_model.safetensors").write_bytes(b"none")
    with pytest.raises(UserError, match=r"adapter_model\.safetensors is damaged"):
        pipeline.load_adapter(cut)
    (cut / "checksums.json").unlink()  # as an earlier version left it
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(dict(list(tensors.items())[:-1]), cut / "adapter_model.safetensors")
    with pytest.raises(UserError, match="do not fit"):
        pipeline.load_adapter(cut)
    (cut / "adapter_model.safetensors").write_bytes(b"none")
    with pytest.raises(UserError, match="cannot be read"):
        pipeline.load_adapter(cut)
    facts = json.loads((cut / "adapter.json").read_text())
    (cut / "adapter.json").write_text(json.dumps({**facts, "format": 99}))
    with pytest.raises(UserError, match="format 99"):
        pipeline.load_adapter(cut)
    assert pipeline.model_hash == untouched  # a refused adapter leaves nothing behind
    pipeline.load_adapter(folder)
    with torch.no_grad():
        other = MediPipeline.from_pretrained(base)
        next(other.unet.parameters()).add_(1e-3)
    with pytest.raises(UserError, match="belongs to the model"):
        other.load_adapter(folder)
    fresh = MediPipeline.from_pretrained(base)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"latent-medi\[lora\]"):
        fresh.load_adapter(folder)


def test_generation_with_adapters(base: Path, run_settings: Make, tiny_more: Path, tmp_path: Path) -> None:
    folder = train(run_settings(**adapting(base, **cedar(tiny_more))))
    plan = pd.DataFrame({"class": ["tumour"], "site": ["cedar"], "age": ["50"], "count": [3], "seed": [11]})
    common: dict[str, Any] = {"sampler": SamplerSettings(steps=2), "device_batch": 2}
    plan.to_csv(tmp_path / "plan.csv", index=False)
    paths = {"plan": str(tmp_path / "plan.csv"), "model": str(base), "out": str(tmp_path / "made")}
    settings = GenerateSettings(**paths, adapters=[str(folder)], adapter_scales=[0.5], **common)
    made = generate(settings)
    pipeline = MediPipeline.from_pretrained(base)
    pipeline.load_adapter(folder, 0.5)
    assert made.info["provenance"]["model"] == pipeline.model_hash
    assert made.info["provenance"]["adapters"] == [{"hash": open_adapter(folder).hash, "scale": 0.5}]
    assert set(made.index["site"]) == {"cedar"}
    assert made.index["patient"].iloc[0] == f"synthetic:{pipeline.model_hash[:12]}:0"
    same = generate_plan(plan, pipeline, tmp_path / "same", GenerateSettings(name="made", **common))
    assert [s["sha256"] for s in same.info["shards"]] == [s["sha256"] for s in made.info["shards"]]
    with pytest.raises(UserError, match="holds another dataset"):
        generate(replace(settings, adapter_scales=[1.0]))
    with pytest.raises(UserError, match="1 adapters and 2 adapter_scales"):
        generate(replace(settings, adapter_scales=[1.0, 1.0]))
    with pytest.raises(UserError, match="load_adapter"):
        generate_plan(plan, pipeline, tmp_path / "other", settings)
    with pytest.raises(UserError, match="cedar"):
        generate(replace(settings, adapters=[], adapter_scales=[], out=str(tmp_path / "none")))
