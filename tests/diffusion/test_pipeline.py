"""The model as one thing: asked by name, saved, loaded in another process, refused where it cannot answer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusion_parts import make_denoiser
from parts import make_autoencoder

from latent_medi.core.errors import UserError
from latent_medi.diffusion.denoiser import lay_out
from latent_medi.diffusion.pipeline import MediPipeline
from latent_medi.diffusion.samplers import draw_noise
from latent_medi.diffusion.settings import GuidanceSettings, ObjectiveSettings, SamplerSettings
from latent_medi.latents.autoencoder import save_autoencoder

ASKED = {"class_": "gleason4", "site": "radboud", "gender": "male", "age": 61.5}
SHIFT, SCALE = torch.tensor([0.1, -0.2, 0.3, 0.0]), torch.tensor([0.9, 1.1, 1.3, 0.7])


def make_pipeline(schema, autoencoder=None, patterns=None) -> MediPipeline:
    facts = {"dataset": "prostate", "mpp": 0.5}
    denoiser = make_denoiser(schema, patterns=patterns)
    return MediPipeline.from_parts(
        denoiser, ObjectiveSettings(), autoencoder or make_autoencoder(), SHIFT, SCALE, facts
    )


@pytest.fixture(scope="module")
def pipe(schema):
    return make_pipeline(schema)


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models") / "medi"
    pipe.save_pretrained(path, include_autoencoder=True)
    return path


def images(pipe, **asked) -> np.ndarray:
    return np.stack(pipe(**{"steps": 3, **ASKED, **asked}).images)


def test_images_are_asked_for_by_name(pipe):
    out = pipe(class_="gleason4", site="radboud", gender="male", age=61.5, num_images=3, steps=2)
    assert len(out.images) == 3
    assert out.images[0].size == (32, 32)
    assert pipe.patch_size == 32
    array = images(pipe, num_images=3)
    assert array.shape == (3, 32, 32, 3)
    assert array.dtype == np.uint8
    assert np.array_equal(images(pipe, num_images=3), array)
    assert not np.array_equal(images(pipe, site="karolinska", num_images=3), array)
    by_own_name = {k: v for k, v in ASKED.items() if k != "class_"} | {"grade": "gleason4"}
    assert np.array_equal(np.stack(pipe(**by_own_name, num_images=3, steps=3).images), array)


def test_seeds_belong_to_images(pipe):
    four = images(pipe, num_images=4, seed=10)
    assert np.array_equal(images(pipe, seeds=[12, 13, 10, 11]), four[[2, 3, 0, 1]])
    assert not np.array_equal(four[0], four[1])


def test_each_image_can_have_its_own_conditions(pipe):
    both = images(pipe, site=["radboud", "karolinska"], seeds=[5, 5])
    assert not np.array_equal(both[0], both[1])
    assert np.array_equal(both[0], images(pipe, seeds=[5, 5])[0])


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"site": "radbud"}, "closest: 'radboud'"),
        ({"sites": "radboud"}, "closest: 'site'"),
        ({"grade": "benign"}, "given twice"),
        ({"seeds": [1, 2], "num_images": 3}, "disagree"),
        ({"num_images": 0}, "num_images .*0"),
        ({"output_type": "jpeg"}, "output_type"),
        ({"sampler": "dpm"}, "'dpm'"),
        ({"sampler": "ddim", "steps": 30}, "must divide"),
        ({"age": "old"}, "not a number"),
        ({"guidance": {"sites": 2.0}}, "closest: 'site'"),
    ],
)
def test_what_it_cannot_answer_is_refused_with_the_reason(pipe, asked, why):
    with pytest.raises(UserError, match=why):
        images(pipe, **asked)


def test_leaving_fields_out_needs_training_for_it(schema):
    narrow = make_pipeline(
        schema,
        patterns={"keep_all": 0.9, "all_null": 0.1, "metadata_null": 0.0, "independent": 0.0, "independent_rate": 0.5},
    )
    with pytest.raises(UserError, match="site, gender, age left out"):
        narrow(class_="gleason4", steps=2)
    assert len(narrow(steps=2).images) == 1  # nothing given: the unconditional pattern was trained


def test_an_unconditional_model_knows_no_field(schema):
    plain = make_pipeline(None)
    assert len(plain(num_images=2, steps=2).images) == 2
    for asked in ({"site": "radboud"}, {"class_": "gleason4"}, {"guidance": 2.0}):
        with pytest.raises(UserError, match=r"uncondition|no class"):
            plain(steps=2, **asked)


def test_guidance_of_one_changes_nothing_and_more_does(pipe):
    plain = images(pipe)
    assert np.array_equal(images(pipe, guidance=1.0), plain)
    assert np.array_equal(images(pipe, guidance=GuidanceSettings("chain")), plain)
    assert not np.array_equal(images(pipe, guidance={"site": 4.0}), plain)


def test_the_folder_has_the_layout_and_nothing_that_runs(folder, schema):
    files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert {
        "model_index.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "conditioning/config.json",
        "conditioning/diffusion_pytorch_model.safetensors",
        "scheduler/scheduler_config.json",
        "autoencoder.json",
        "README.md",
    } <= files
    assert {Path(f).suffix for f in files} == {".json", ".safetensors", ".md"}
    index = json.loads((folder / "model_index.json").read_text())
    assert index["conditioning"] == ["latent_medi.diffusion.conditioning", "MetadataConditioner"]
    assert index["unet"] == ["diffusers", "UNet2DModel"]
    config = json.loads((folder / "conditioning/config.json").read_text())
    assert config["schema"] == schema.to_dict()
    assert config["dropout_patterns"]["keep_all"] == 0.7
    known = json.loads((folder / "autoencoder.json").read_text())
    assert known.items() >= {"kind": "AutoencoderKL", "latent_channels": 4, "factor": 4, "latent_size": 8}.items()
    assert torch.equal(torch.tensor(known["scale"]), SCALE)
    card = (folder / "README.md").read_text()
    assert card.startswith("---\n")
    assert "radboud" in card
    assert "from_pretrained" in card


def test_the_card_does_not_list_every_combination(pipe, tmp_path):
    rows = [["a|b", f"hospital-{i}", 1] for i in range(5000)]
    seen = {"complete": True, "parts": [{"fields": ["class", "site"], "rows": rows}]}
    known = dict(pipe.provenance)
    pipe.provenance["seen"] = seen
    pipe.save_pretrained(tmp_path / "model")
    pipe.provenance = known
    card = (tmp_path / "model" / "README.md").read_text()
    assert len(card) < 20_000
    assert "| training combinations | 5000, listed in provenance.json |" in card
    assert json.loads((tmp_path / "model" / "provenance.json").read_text())["seen"] == seen


def test_round_trip_in_this_process(pipe, folder, tmp_path):
    loaded = MediPipeline.from_pretrained(folder)
    assert loaded.model_hash == pipe.model_hash
    assert loaded.schema == pipe.schema
    assert loaded.objective == pipe.objective
    assert loaded.provenance == pipe.provenance
    assert np.array_equal(images(loaded, num_images=2), images(pipe, num_images=2))
    # Mapped from the file they would lie anywhere, and some processors' products round otherwise there.
    for part in (loaded.unet, loaded.conditioning, loaded.autoencoder.model):
        assert all(weight.data_ptr() % 64 == 0 for weight in part.state_dict().values())
    loaded.save_pretrained(tmp_path / "again")
    for file in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "README.md"):
        assert (tmp_path / "again" / file.relative_to(folder)).read_bytes() == file.read_bytes(), file


def test_a_new_process_makes_the_same_images(pipe, folder, tmp_path):
    script = """
import sys, numpy as np
from latent_medi.diffusion.pipeline import MediPipeline
pipe = MediPipeline.from_pretrained(sys.argv[1])
out = pipe(class_="gleason4", site="radboud", gender="male", age=61.5, num_images=2, seed=3, steps=3)
np.save(sys.argv[2], np.stack(out.images))
"""
    repository = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(repository), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-c", script, str(folder), str(tmp_path / "out.npy")],
        check=True,
        cwd=tmp_path,
        env=environment,
    )
    torch.set_num_threads(1)
    assert np.array_equal(np.load(tmp_path / "out.npy"), images(pipe, num_images=2, seed=3))


def test_the_hash_is_of_everything_that_images_depend_on(pipe, schema):
    assert make_pipeline(schema).model_hash == pipe.model_hash
    other = make_pipeline(schema)
    with torch.no_grad():
        other.conditioning.embeddings["field_site"].codes.weight[0, 0] += 1e-3
    assert other.model_hash != pipe.model_hash
    assert make_pipeline(schema, make_autoencoder(seed=1)).model_hash != pipe.model_hash


def test_another_autoencoder_is_refused(folder):
    with pytest.raises(UserError, match="is another"):
        MediPipeline.from_pretrained(folder, autoencoder=make_autoencoder(seed=1))
    assert MediPipeline.from_pretrained(folder, autoencoder=make_autoencoder()).autoencoder.source == "random"


def test_an_autoencoder_from_a_folder_travels_inside_and_a_named_one_does_not(schema, tmp_path, monkeypatch):
    from latent_medi.latents import autoencoder as module

    save_autoencoder(make_autoencoder(), tmp_path / "vae")
    local = module.load_autoencoder(tmp_path / "vae")
    make_pipeline(schema, local).save_pretrained(tmp_path / "inside")
    assert (tmp_path / "inside/autoencoder/config.json").is_file()
    assert str(tmp_path) not in "".join(p.read_text() for p in (tmp_path / "inside").rglob("*.json"))
    MediPipeline.from_pretrained(tmp_path / "inside")
    named = module.Autoencoder(local.model, "demo")
    make_pipeline(schema, named).save_pretrained(tmp_path / "outside")
    assert not (tmp_path / "outside/autoencoder").exists()
    monkeypatch.setattr(module, "demo_folder", lambda: tmp_path / "vae")
    assert MediPipeline.from_pretrained(tmp_path / "outside").autoencoder.source == "demo"


def test_folders_that_are_no_model(folder, pipe, tmp_path):
    with pytest.raises(UserError, match="no model folder"):
        MediPipeline.from_pretrained(tmp_path / "absent")
    with pytest.raises(UserError, match="cannot be downloaded"):
        MediPipeline.from_pretrained("somebody/medi")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(UserError, match="holds no model"):
        pipe.save_pretrained(tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"
    pipe.save_pretrained(tmp_path / "foreign", include_autoencoder=True)
    (tmp_path / "foreign/checksums.json").unlink()
    index = json.loads((tmp_path / "foreign/model_index.json").read_text())
    (tmp_path / "foreign/model_index.json").write_text(json.dumps({**index, "_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(UserError, match="not a latent-medi model"):
        MediPipeline.from_pretrained(tmp_path / "foreign")


@pytest.mark.parametrize("damage", ["cut", "absent", "pickle"])
def test_damaged_weights_are_refused(pipe, tmp_path, damage):
    pipe.save_pretrained(tmp_path / "m", include_autoencoder=True)
    weights = tmp_path / "m/unet/diffusion_pytorch_model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    else:
        weights.unlink()
    if damage == "pickle":
        torch.save(pipe.unet.state_dict(), tmp_path / "m/unet/diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match=r"model\.safetensors is (damaged|absent)"):
        MediPipeline.from_pretrained(tmp_path / "m")
    (tmp_path / "m/checksums.json").unlink()  # as an earlier version left it
    with pytest.raises(UserError, match="cannot be loaded"):
        MediPipeline.from_pretrained(tmp_path / "m")


@pytest.mark.parametrize("sampler", [SamplerSettings(steps=3), SamplerSettings("ddpm", 3)])
def test_padded_batches_make_an_image_independent_of_what_else_is_generated(pipe, sampler):
    rows = [{"grade": g, "site": s} for g in ("benign", "gleason3", "gleason4") for s in ("radboud", "karolinska")][:5]
    seeds = [7, 8, 9, 10, 11]

    def run(which: list[int], batch: int = 4) -> torch.Tensor:
        noise, generators = draw_noise([seeds[i] for i in which], pipe.latent_shape)
        conditions = pipe.conditions([rows[i] for i in which])
        return pipe.generate_latents(conditions, noise, sampler, None, generators, batch=batch, pad=True)

    five = run([0, 1, 2, 3, 4])  # a batch of four and a padded one
    assert five.shape == (5, 4, 8, 8)
    for which in ([4], [1, 3], [3, 0, 2, 4, 1]):
        assert torch.equal(run(which), five[which])


def test_batches_differ_by_a_grey_level_at_most(pipe):
    together = images(pipe, num_images=5, batch=5).astype(int)
    apart = images(pipe, num_images=5, batch=2).astype(int)
    assert np.abs(together - apart).max() <= 1


def test_decoding_undoes_the_whitening(pipe):
    pictures = images(pipe, num_images=2)
    latents = pipe.encode(pictures)
    raw, std = pipe.autoencoder.encode(pictures)
    torch.testing.assert_close(latents * SCALE.view(-1, 1, 1) + SHIFT.view(-1, 1, 1), raw, atol=1e-5, rtol=1e-5)
    assert np.abs(pipe.decode(latents).astype(int) - pipe.autoencoder.decode(raw)).max() <= 1
    sampled = pipe.encode(pictures, seeds=[1, 2])
    assert 0.3 < ((sampled - latents) * SCALE.view(-1, 1, 1) / std).std() < 3


def test_bf16_inside_the_network(pipe):
    noise, _ = draw_noise([1], pipe.latent_shape)
    conditions = pipe.conditions([{"grade": "benign"}])
    full = pipe.generate_latents(conditions, noise, SamplerSettings(steps=3))
    half = pipe.generate_latents(conditions, noise, SamplerSettings(steps=3), precision="bf16")
    assert half.dtype == torch.float32
    assert 0 < (half - full).abs().max() < 0.2
    with pytest.raises(UserError, match="precision"):
        pipe.generate_latents(conditions, noise, precision="int8")


def test_parts_that_do_not_fit_are_refused(schema):
    with pytest.raises(UserError, match="4 channels"):
        MediPipeline.from_parts(make_denoiser(schema), ObjectiveSettings(), make_autoencoder(), SHIFT[:3], SCALE)


def test_sampling_lays_the_network_out_for_speed_and_changes_nothing_else(schema, tmp_path):
    pipe = make_pipeline(schema)
    pipe.save_pretrained(tmp_path / "before", include_autoencoder=True)
    weight, known = pipe.unet.conv_in.weight, pipe.model_hash
    assert not weight.is_contiguous(memory_format=torch.channels_last)
    conditions, noise = (
        pipe.conditions([{"grade": "gleason4", "site": "radboud", "gender": "male", "age": 61.5}]),
        draw_noise([3], (4, 8, 8))[0],
    )
    with torch.no_grad():
        plain = pipe.denoiser(noise, torch.tensor([500]), conditions)
        pipe.generate_latents(conditions, noise, SamplerSettings(steps=2))
        laid_out = pipe.denoiser(noise, torch.tensor([500]), conditions)
    assert pipe.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(laid_out, plain, rtol=1e-4, atol=1e-4)
    assert pipe.model_hash == known
    pipe.save_pretrained(tmp_path / "after", include_autoencoder=True)
    for file in sorted((tmp_path / "before").rglob("*.safetensors")):
        assert (tmp_path / "after" / file.relative_to(tmp_path / "before")).read_bytes() == file.read_bytes()


def test_how_the_weights_lay_before_does_not_change_the_samples(schema):
    pipe = make_pipeline(schema)
    conditions, noise = pipe.conditions([{"grade": "gleason4"}]), draw_noise([3], pipe.latent_shape)[0]
    sampler = SamplerSettings(steps=2)
    first = pipe.generate_latents(conditions, noise, sampler)
    lay_out(pipe.unet, half=False)
    torch.testing.assert_close(pipe.generate_latents(conditions, noise, sampler), first, rtol=0, atol=0)
    torch.nn.Module.to(pipe.unet, memory_format=torch.contiguous_format)
    # What a training run shares stays as that run has it.
    pipe.generate_latents(conditions, noise, sampler, keep_layout=True)
    assert not pipe.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
