"""Starting from another model: exactly at it, with a table that says what was taken over."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pandas as pd
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from latent_medi.core.checksums import write_checksums
from latent_medi.core.errors import UserError
from latent_medi.diffusion.conditioning import Conditions
from latent_medi.diffusion.denoiser import Denoiser
from latent_medi.diffusion.objective import Objective, diffusion_loss
from latent_medi.diffusion.pipeline import MediPipeline
from latent_medi.diffusion.settings import ModelSettings, ObjectiveSettings
from latent_medi.metadata.training_record import was_trained_on
from latent_medi.shards.dataset import PatchDataset
from latent_medi.training import loop, run_folder
from latent_medi.training.data import open_data
from latent_medi.training.finetune.transfer import inherited_objective, open_source
from latent_medi.training.loop import train
from latent_medi.training.settings import LoraSettings, TrainSettings

WIDE = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}

Make = Callable[..., TrainSettings]


def start_of(settings: TrainSettings) -> tuple[Denoiser, pd.DataFrame]:
    """The denoiser before its first update, as the loop builds it."""
    source = open_source(settings.init_from)
    data = open_data(settings, source)
    denoiser, table = run_folder.build(settings, data, source)
    assert table is not None
    return denoiser.eval(), table


def inputs(count: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 4, 8, 8, generator=generator), torch.arange(count) * 150


@pytest.fixture
def plain(run_settings: Make, tmp_path: Path) -> MediPipeline:
    """An unconditional model that was trained a little."""
    folder = train(run_settings(out=str(tmp_path / "plain"), max_steps=4, model={"fields": []}, lr=1e-2))
    return MediPipeline.from_pretrained(folder)


def test_conditional_starts_at_an_unconditional_model(plain: MediPipeline, run_settings: Make, tmp_path: Path) -> None:
    settings = run_settings(init_from=str(tmp_path / "plain" / "model"))
    denoiser, table = start_of(settings)
    x, t = inputs()
    schema = denoiser.conditioner.schema  # type: ignore[union-attr]
    rows = [
        {"class": c, "site": s, "age": a} for c in ("benign", "tumour") for s, a in (("NA", 50), ("birch", "unknown"))
    ]
    conditions = Conditions.from_schema(schema, [*rows, {}, {"class": "benign"}])
    assert torch.equal(denoiser(x, t, conditions), plain.denoiser(x, t))
    assert set(table["status"]) == {"loaded", "new"}
    assert table[table["tensor"].str.startswith("unet.")]["status"].eq("loaded").all()
    assert table[table["tensor"].str.startswith("conditioner.")]["status"].eq("new").all()
    assert len(table) == len(denoiser.state_dict())


def first_loss(settings: TrainSettings) -> tuple[torch.Tensor, tuple[Any, ...]]:
    """Loss of each sample of a run's first update, as the loop computes it, and what it was computed from."""
    seen: list[tuple[torch.Tensor, tuple[Any, ...]]] = []

    def watched(model: Any, *arguments: Any) -> torch.Tensor:
        each = diffusion_loss(model, *arguments)
        seen.append((each.detach().clone(), arguments))
        return each

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "diffusion_loss", watched)
        train(settings)
    return seen[0]


@pytest.mark.parametrize("change", ["everything", "parts", "adapter"])
@pytest.mark.parametrize("conditional", [False, True])
def test_first_loss_is_the_source_s(change: str, conditional: bool, run_settings: Make, tmp_path: Path) -> None:
    """On the target's latents, with the inherited whitening and objective, before anything was learned."""
    own = ObjectiveSettings(prediction="epsilon", schedule="linear", zero_terminal_snr=False, weighting="min_snr")
    model = {} if conditional else {"fields": []}
    folder = train(run_settings(out=str(tmp_path / "source"), max_steps=4, lr=1e-2, objective=own, model=model))
    source = MediPipeline.from_pretrained(folder)
    started: dict[str, Any] = {"init_from": str(folder), "max_steps": 1, "seed": 5}
    if change == "parts":
        started["train_parts"] = ["conditioning", "time"]
    if change == "adapter":
        started |= {"lora": LoraSettings(rank=2), "model": model}
    ours, (latents, noise, timesteps, conditions, objective) = first_loss(run_settings(**started))
    assert (conditions is None) == (change == "adapter" and not conditional)
    assert objective.settings == own
    known = conditions if conditional else None
    with torch.no_grad():
        theirs = diffusion_loss(source.denoiser, latents, noise, timesteps, known, Objective(source.objective))
    assert torch.equal(ours, theirs)
    assert bool((ours > 0).all())


def test_new_conditions_are_learned(plain: MediPipeline, run_settings: Make, tmp_path: Path) -> None:
    folder = train(run_settings(init_from=str(tmp_path / "plain" / "model"), max_steps=6, lr=1e-2))
    after = MediPipeline.from_pretrained(folder)
    weights = after.conditioning.state_dict()
    assert all(bool(v.abs().sum() > 0) for v in weights.values())
    assert torch.equal(after.shift, plain.shift)
    assert torch.equal(after.scale, plain.scale)
    table = pd.read_csv(tmp_path / "run" / "transfer.csv")
    assert list(table.columns) == ["tensor", "status", "shape", "note", "training"]
    assert table["training"].eq("trained").all()


@pytest.mark.parametrize("fusion", ["concat", "additive", "linear"])
def test_further_hospital_starts_at_the_conditional_model(
    fusion: str, run_settings: Make, tiny_more: Path, tmp_path: Path
) -> None:
    source = train(run_settings(out=str(tmp_path / "source"), max_steps=4, model={"fusion": fusion}))
    before = MediPipeline.from_pretrained(source)
    more = {"data": str(tiny_more / "data"), "latents": str(tiny_more / "latents")}
    denoiser, table = start_of(run_settings(init_from=str(source), **more))
    schema = denoiser.conditioner.schema  # type: ignore[union-attr]
    old = before.schema.field("site").values
    assert schema.field("site").values == (*old, "cedar")  # appended: every old code keeps its meaning
    x, t = inputs()
    rows = [{"class": "tumour", "site": s, "age": a} for s in old for a in (45, "unknown")]
    ours = denoiser(x, t, Conditions.from_schema(schema, rows))
    theirs = before.denoiser(x, t, before.conditions(rows))
    assert torch.equal(ours, theirs)
    assert (table["status"] == "loaded").all()
    assert table["note"].str.contains("1 new values").sum() == 1


@pytest.mark.parametrize(("before", "after"), [("concat", "additive"), ("additive", "additive"), ("linear", "linear")])
def test_further_field_starts_at_the_conditional_model(
    before: str, after: str, run_settings: Make, tmp_path: Path
) -> None:
    old = {"fields": ["class", "age"], "fusion": before}
    source = MediPipeline.from_pretrained(train(run_settings(out=str(tmp_path / "source"), max_steps=4, model=old)))
    settings = run_settings(init_from=str(tmp_path / "source" / "model"), model={"fusion": after})
    denoiser, table = start_of(settings)
    x, t = inputs()
    schema = denoiser.conditioner.schema  # type: ignore[union-attr]
    assert set(schema.names) == {"class", "age", "site"}
    sites = ("NA", "aster", "birch", "unknown", "NA", "birch")
    told = [{"class": c, "age": a} for c in ("benign", "tumour") for a in (41, 60, "unknown")]
    asked = [{**row, "site": site} for row, site in zip(told, sites, strict=True)]
    ours = denoiser(x, t, Conditions.from_schema(schema, asked))
    theirs = source.denoiser(x, t, source.conditions(told))
    if after == "linear":  # a longer sum of the same terms and zeros
        assert torch.allclose(ours, theirs, atol=1e-5)
    else:
        assert torch.equal(ours, theirs)
    assert set(table[table["tensor"].str.contains("site")]["status"]) == {"new"}


def test_further_field_does_not_fit_into_a_concatenation(run_settings: Make, tmp_path: Path) -> None:
    train(run_settings(out=str(tmp_path / "source"), max_steps=2, model={"fields": ["class"]}))
    with pytest.raises(UserError, match="fusion=additive"):
        start_of(run_settings(init_from=str(tmp_path / "source" / "model")))


def test_conditional_source_of_an_unconditional_run_is_refused(run_settings: Make, tmp_path: Path) -> None:
    train(run_settings(out=str(tmp_path / "source"), max_steps=2))
    with pytest.raises(UserError, match="unconditional"):
        train(run_settings(init_from=str(tmp_path / "source" / "model"), model={"fields": []}))


@pytest.mark.parametrize("whole", [True, False])
def test_starts_at_a_diffusers_network(whole: bool, run_settings: Make, tmp_path: Path) -> None:
    torch.manual_seed(3)
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    unet = UNet2DModel(sample_size=8, in_channels=4, out_channels=4, num_class_embeds=3, **blocks, **WIDE).eval()
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", num_train_timesteps=500)
    (DDPMPipeline(unet, scheduler) if whole else unet).save_pretrained(tmp_path / "foreign")
    settings = run_settings(init_from=str(tmp_path / "foreign"))
    denoiser, table = start_of(settings)
    x, t = inputs(4)
    conditions = Conditions.from_schema(denoiser.conditioner.schema, [{"class": "benign", "site": "NA", "age": 50}] * 4)  # type: ignore[union-attr]
    plain = UNet2DModel.from_config({**unet.config, "num_class_embeds": None}).eval()
    plain.load_state_dict(unet.state_dict(), strict=False)
    assert torch.equal(denoiser(x, t, conditions), plain(x, t).sample)
    objective = inherited_objective(open_source(tmp_path / "foreign"), settings)
    if whole:
        assert (objective.prediction, objective.schedule, objective.timesteps) == ("epsilon", "squaredcos_cap_v2", 500)
        assert not objective.zero_terminal_snr
    else:
        assert objective == settings.objective
    assert (table["status"] == "skipped").sum() == len(unet.state_dict()) - len(plain.state_dict())


def test_objective_and_scaling_are_inherited_unless_overridden(
    run_settings: Make, tmp_path: Path, tiny_more: Path
) -> None:
    own = ObjectiveSettings(prediction="epsilon", schedule="linear", zero_terminal_snr=False, weighting="uniform")
    train(run_settings(out=str(tmp_path / "source"), max_steps=2, objective=own, model={"fields": []}))
    more = {"data": str(tiny_more / "data"), "latents": str(tiny_more / "latents"), "max_steps": 2}
    more["init_from"] = str(tmp_path / "source" / "model")
    same = MediPipeline.from_pretrained(train(run_settings(out=str(tmp_path / "same"), **more)))
    source = MediPipeline.from_pretrained(tmp_path / "source" / "model")
    assert same.objective == source.objective == own
    assert torch.equal(same.shift, source.shift)
    other = run_settings(out=str(tmp_path / "other"), override=["weighting", "scaling"], **more)
    changed = MediPipeline.from_pretrained(train(other))
    assert changed.objective.weighting == "min_snr_plus_one"
    assert changed.objective.prediction == "epsilon"
    assert not torch.equal(changed.shift, source.shift)


def test_other_autoencoder_is_refused(plain: MediPipeline, run_settings: Make, tmp_path: Path) -> None:
    file = tmp_path / "plain" / "model" / "autoencoder.json"
    text = file.read_text()
    file.write_text(text.replace(plain.autoencoder.hash, "0" * 64))
    write_checksums(file.parent)
    with pytest.raises(UserError, match="another autoencoder"):
        train(run_settings(init_from=str(tmp_path / "plain" / "model")))


def test_source_from_the_hub(
    plain: MediPipeline, run_settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(tmp_path / "plain" / "model")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    folder = train(run_settings(init_from="some-lab/plain", max_steps=1))
    assert asked == [("some-lab/plain", ["*.json", "*.safetensors"])]  # nothing that could run code
    assert torch.equal(MediPipeline.from_pretrained(folder).shift, plain.shift)
    by_path = run_settings(init_from=str(tmp_path / "plain" / "model"), max_steps=1)
    monkeypatch.setattr(loop, "diffusion_loss", None)
    assert train(by_path) == folder  # the same run: a source is told by its weights


def test_source_from_the_hub_without_a_network(run_settings: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"(?s)some-lab/plain is no folder here.*hf download some-lab/plain"):
        train(run_settings(init_from="some-lab/plain", max_steps=1))


def test_other_latent_channels_are_refused(run_settings: Make, tmp_path: Path) -> None:
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    UNet2DModel(sample_size=8, in_channels=3, out_channels=3, **blocks, **WIDE).save_pretrained(tmp_path / "rgb")
    with pytest.raises(UserError, match="works on 3 channels; the latents have 4"):
        train(run_settings(init_from=str(tmp_path / "rgb"), max_steps=1))


def test_what_is_no_model_is_refused(run_settings: Make, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no model to start from"):
        train(run_settings(init_from=str(tmp_path)))


def test_other_source_is_another_run(
    plain: MediPipeline, run_settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = run_settings(init_from=str(tmp_path / "plain" / "model"), max_steps=2)
    train(settings)
    monkeypatch.setattr(loop, "diffusion_loss", None)
    train(settings)
    with torch.no_grad():
        next(plain.unet.parameters()).add_(1)
    plain.save_pretrained(tmp_path / "plain" / "model")
    with pytest.raises(UserError, match="init_from changed"):
        train(settings)


def test_settings_of_the_source_architecture_win(plain: MediPipeline, run_settings: Make, tmp_path: Path) -> None:
    wider = {"block_out_channels": [32, 64]}
    denoiser, _ = start_of(run_settings(init_from=str(tmp_path / "plain" / "model"), model=wider))
    assert denoiser.unet.config["block_out_channels"] == plain.unet.config["block_out_channels"]
    assert ModelSettings(**wider).block_out_channels == [32, 64]


def test_a_model_remembers_what_it_was_shown(run_settings: Make, tiny: Path, tiny_more: Path, tmp_path: Path) -> None:
    """Its own training patches, not those of other parts, and those of the model that it started from."""
    first = train(run_settings(out=str(tmp_path / "first"), max_steps=1))
    more = {"data": str(tiny_more / "data"), "latents": str(tiny_more / "latents"), "init_from": str(first)}
    second = train(run_settings(out=str(tmp_path / "second"), max_steps=1, **more))
    for model, folders in ((first, [tiny]), (second, [tiny, tiny_more])):
        record = MediPipeline.from_pretrained(model).provenance["seen"]
        assert record["complete"]
        shown = set()
        for folder in folders:
            index = PatchDataset.open(folder / "data").index
            shown |= set(index[index["split_main"] == "train"][["class", "site"]].astype(str).itertuples(index=False))
        for tumour in {key[0] for key in shown}:
            for site in ("aster", "NA", "birch", "cedar"):
                assert was_trained_on(record, {"class": tumour, "site": site}) == ((tumour, site) in shown)
    (first / "provenance.json").unlink()  # as of another program, which writes no checksums either
    (first / "checksums.json").unlink()
    third = train(run_settings(out=str(tmp_path / "third"), max_steps=1, **more))
    assert was_trained_on(MediPipeline.from_pretrained(third).provenance["seen"], {"site": "birch"}) is None
