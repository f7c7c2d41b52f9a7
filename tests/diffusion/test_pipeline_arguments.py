"""What people do with any pipeline of diffusers works here, or is refused with what to write instead."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import diffusers
import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from diffusion_parts import make_denoiser
from parts import make_autoencoder
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import latent_medi
from latent_medi.core.errors import UserError
from latent_medi.diffusion.pipeline import MediPipeline
from latent_medi.diffusion.samplers import SAMPLERS
from latent_medi.diffusion.settings import ObjectiveSettings, SamplerSettings
from latent_medi.metadata.schema import Schema

ASKED = {"class_": "gleason4", "site": "radboud", "gender": "male", "age": 61.5, "steps": 3, "output_type": "np"}


@pytest.fixture(scope="module")
def folder(schema, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models") / "medi"
    denoiser, shift, scale = make_denoiser(schema), torch.zeros(4), torch.ones(4)
    pipe = MediPipeline.from_parts(denoiser, ObjectiveSettings(), make_autoencoder(), shift, scale)
    pipe.save_pretrained(path, include_autoencoder=True)
    return path


@pytest.fixture
def pipe(folder) -> MediPipeline:
    return MediPipeline.from_pretrained(folder)


def images(pipe: MediPipeline, **asked: object) -> np.ndarray:
    return pipe(**{**ASKED, **asked}).images


SCHEDULERS = {
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "dpmpp_2m_sde": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
}


def test_a_scheduler_of_diffusers_is_the_sampler(schema, tmp_path):
    objective = ObjectiveSettings(zero_terminal_snr=False)  # heun takes no other
    pipe = MediPipeline.from_parts(make_denoiser(schema), objective, make_autoencoder(), torch.zeros(4), torch.ones(4))
    digest, made = pipe.model_hash, {}
    asked = {"steps": 4, "output_type": "latent"}  # ddim's steps divide 1000
    for name, kind in SCHEDULERS.items():  # each from the one before
        options = {"algorithm_type": "sde-dpmsolver++" if name.endswith("sde") else "dpmsolver++"}
        options = options if name.startswith("dpmpp") else {}
        pipe.scheduler = getattr(diffusers, kind).from_config(pipe.scheduler.config, **options)
        made[name] = images(pipe, **asked).numpy()
        assert np.array_equal(made[name], images(pipe, sampler=name, **asked)), name
        assert pipe.model_hash == digest
    assert set(made) == set(SAMPLERS)
    assert len({latents.tobytes() for latents in made.values()}) == len(made)
    for same in (MediPipeline(**pipe.components), MediPipeline.from_pipe(pipe)):
        assert np.array_equal(images(same, **asked), made["ddpm"])
    # The sampler belongs to the pipeline, not to the folder.
    pipe.save_pretrained(tmp_path / "model", include_autoencoder=True)
    assert type(pipe.scheduler).__name__ == "DDPMScheduler"
    loaded = MediPipeline.from_pretrained(tmp_path / "model")
    assert np.array_equal(images(loaded, **asked), made["dpmpp_2m"])
    given = MediPipeline.from_pretrained(tmp_path / "model", scheduler=pipe.scheduler)
    assert np.array_equal(images(given, **asked), made["ddpm"])


def test_a_scheduler_that_cannot_be_honoured_is_refused_with_the_reason(pipe, folder):
    config, before = pipe.scheduler.config, images(pipe)
    for scheduler, why in (
        (diffusers.PNDMScheduler.from_config(config), r"no sampler of PNDMScheduler[\s\S]*EulerDiscreteScheduler"),
        (diffusers.EulerDiscreteScheduler(), r"beta_start=0\.0001 \(here 0\.00085\)"),
        (diffusers.EulerDiscreteScheduler.from_config(config, use_karras_sigmas=True), "use_karras_sigmas=True"),
        (diffusers.DPMSolverMultistepScheduler.from_config(config, solver_order=3), "solver_order=3"),
        (diffusers.DDIMScheduler.from_config(config, timestep_spacing="leading"), "timestep_spacing='leading'"),
        (diffusers.EulerDiscreteScheduler, "an object of diffusers"),
    ):
        for give in (
            lambda it: setattr(pipe, "scheduler", it),
            lambda it: MediPipeline.from_pretrained(folder, scheduler=it),
            lambda it: MediPipeline.from_pipe(pipe, scheduler=it),
        ):
            with pytest.raises(UserError, match=why):
                give(scheduler)
    assert np.array_equal(images(pipe), before)
    pipe.scheduler = diffusers.HeunDiscreteScheduler.from_config(config)
    with pytest.raises(UserError, match=r"heun.*ends at"):
        images(pipe)


def test_the_class_for_the_whole_folder_is_named(folder):
    assert latent_medi.MediPipeline is MediPipeline
    with pytest.raises(UserError, match=r"MediPipeline\.from_pretrained\(folder\)"):
        DiffusionPipeline.from_pretrained(folder)


@pytest.mark.parametrize(
    "options",
    [
        {"torch_dtype": "auto"},
        {"torch_dtype": None},
        {"dtype": "float32"},
        {"device_map": "cpu"},
        {"device_map": {"": "cpu"}},
        {"local_files_only": True},
        {"use_safetensors": True},
        {"cache_dir": "/nowhere"},
        {"low_cpu_mem_usage": True},
        {"variant": None},
        {"trust_remote_code": False},
        {"force_download": False},
    ],
)
def test_usual_ways_to_load_that_change_nothing(pipe, folder, options):
    assert np.array_equal(images(MediPipeline.from_pretrained(folder, **options)), images(pipe))


@pytest.mark.parametrize("name", ["torch_dtype", "dtype"])
@pytest.mark.parametrize("given", [torch.bfloat16, "bfloat16", "torch.bfloat16", "bf16"])
def test_a_precision_by_name_is_the_precision(folder, name, given):
    assert MediPipeline.from_pretrained(folder, **{name: given}).unet.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"torch_dtype": "float17"}, "torch.float32, torch.float16 or torch.bfloat16"),
        ({"torch_dtype": torch.int8}, "torch.float32, torch.float16 or torch.bfloat16"),
        ({"device_map": "balanced"}, "one device"),
        ({"device_map": "auto"}, "one device"),
        ({"device_map": {"unet": "cpu"}}, "one device"),
        ({"device_map": "cpu", "device": "meta"}, "Give one of them"),
        ({"device": "tpu9"}, "no device 'tpu9'"),
        ({"use_safetensors": False}, "safetensors"),
        ({"variant": "fp16"}, r"torch_dtype=torch\.float16"),
        ({"trust_remote_code": True}, "trust_remote_code"),
        ({"custom_pipeline": "x/y"}, "custom_pipeline"),
        ({"revision": "v1"}, "revision"),
        ({"unet": None, "vae": "x"}, "autoencoder=…"),
        ({"torch_dtyp": "x"}, "closest: 'torch_dtype'"),
    ],
)
def test_ways_to_load_that_mean_nothing_here_say_what_does(folder, options, why):
    with pytest.raises(UserError, match=why):
        MediPipeline.from_pretrained(folder, **options)


def test_other_pipelines_names_of_arguments(pipe):
    want = images(pipe, guidance=2.0, steps=4)
    assert np.array_equal(images(pipe, guidance_scale=2.0, steps=None, num_inference_steps=4), want)


def test_generators_are_seeds(pipe):
    def seeded(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    for sampler in ("dpmpp_2m", "ddpm"):
        want = images(pipe, seeds=[3, 4], sampler=sampler)
        assert np.array_equal(images(pipe, generator=[seeded(3), seeded(4)], sampler=sampler), want)
        assert np.array_equal(images(pipe, generator=seeded(3), sampler=sampler), want[:1])
    assert len({image.tobytes() for image in images(pipe, generator=seeded(3), num_images=3)}) == 3


def test_kinds_of_output(pipe):
    pictures = pipe(**{**ASKED, "output_type": "pil"}).images
    array, tensor, latents = (images(pipe, output_type=kind) for kind in ("np", "pt", "latent"))
    assert array.dtype == np.float32
    assert np.array_equal((array * 255).round().astype(np.uint8), np.stack(pictures))
    assert torch.equal(tensor, torch.from_numpy(array).permute(0, 3, 1, 2))
    assert np.array_equal(pipe.decode(latents), np.stack(pictures))


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "tif", "gif"])
def test_files_of_images_are_marked_as_synthetic(pipe, tmp_path, ending):
    picture = pipe(**{**ASKED, "output_type": "pil"}).images[0]
    picture.save(tmp_path / f"x.{ending}")
    with Image.open(tmp_path / f"x.{ending}") as saved:
        assert np.shape(saved.convert("RGB")) == (32, 32, 3)
        if ending == "png":  # as `sample` marks its own
            assert saved.info["origin"] == "synthetic"
        mark = saved.info.get("comment", b"").decode() or saved.getexif().get(0x010E) or saved.info.get("origin")
        assert mark in ("origin=synthetic", "synthetic")


def test_a_mark_leaves_what_the_caller_writes(pipe, tmp_path):
    picture, text = pickle.loads(pickle.dumps(pipe(**{**ASKED, "output_type": "pil"}).images[0])), PngInfo()
    text.add_text("slide", "s1")
    picture.save(tmp_path / "x.png", pnginfo=text)
    with Image.open(tmp_path / "x.png") as saved:
        assert saved.info.items() >= {"slide": "s1", "origin": "synthetic"}.items()
    picture.resize((8, 8)).save(tmp_path / "small.jpg")
    with Image.open(tmp_path / "small.jpg") as saved:
        assert saved.info["comment"] == b"origin=synthetic"
    assert picture.copy().info["origin"] == "synthetic"


def test_a_callback_sees_and_changes_the_latents(pipe):
    seen = []

    def look(given, step, timestep, values):
        seen.append((given, step, int(timestep), values["latents"].shape))

    want = images(pipe, num_images=3, batch=2)
    assert np.array_equal(images(pipe, num_images=3, batch=2, callback_on_step_end=look), want)
    assert [(step, shape[0]) for _, step, _, shape in seen] == [(i, n) for n in (2, 1) for i in range(3)]
    assert all(given is pipe for given, *_ in seen)
    assert [t for _, _, t, _ in seen[:3]] == sorted((t for _, _, t, _ in seen[:3]), reverse=True)
    nothing = images(pipe, output_type="latent", callback_on_step_end=lambda *a: {"latents": 0 * a[-1]["latents"]})
    assert not nothing.any()


def test_fields_that_are_called_like_arguments(tmp_path):
    table = pd.DataFrame({"class": ["a", "b"], "batch": ["x", "y"], "seed": ["1", "2"]})
    denoiser = make_denoiser(Schema.from_table(table, "class", ["batch", "seed"]))
    pipe = MediPipeline.from_parts(denoiser, ObjectiveSettings(), make_autoencoder(), torch.zeros(4), torch.ones(4))
    for asked in ({"class_": "a", "batch": "x"}, {"class_": "a", "seed": 1}, {"class_": "a"}):
        with pytest.raises(UserError, match=r"(batch|seed) is a field of the model and an argument[\s\S]*conditions="):
            pipe(**asked, steps=2)

    def made(**asked: object) -> bytes:
        return pipe(**asked, steps=2, output_type="np").images.tobytes()

    one = made(conditions={"class_": "a", "batch": "x", "seed": "1"}, batch=4, seed=2)
    assert made(conditions={"class": "a", "batch": "x", "seed": ["1"]}, seeds=[2]) == one
    assert made(conditions={"batch": "x", "seed": "1"}, class_="a", seed=2) == one
    assert made(conditions={"class": "a", "batch": "y", "seed": "1"}, seed=2) != one
    assert made(conditions={"class": "a", "batch": "x", "seed": "2"}, seed=2) != one
    with pytest.raises(UserError, match="class is given twice"):
        pipe(conditions={"class": "a"}, **{"class": "a"})


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"num_inference_steps": 3}, "steps and num_inference_steps are the same"),
        ({"guidance": 2.0, "guidance_scale": 3.0}, "the same argument"),
        ({"generator": torch.Generator(), "seed": 1}, "Seeds and a generator"),
        ({"generator": torch.Generator(), "seeds": [1]}, "Seeds and a generator"),
        ({"generator": 3}, "generator .*3"),
        ({"generator": [torch.Generator(), 3]}, "generator .*3"),
        ({"generator": [torch.Generator()], "num_images": 2}, "disagree"),
        ({"callback_on_step_end": 3}, "callback_on_step_end .*3"),
        ({"callback_on_step_end_tensor_inputs": ["latents"]}, "Leave it out"),
        ({"conditions": "gleason4"}, "conditions .*gleason4"),
        ({"conditions": {"site": "radboud"}}, "site is given twice"),
        ({"sampler": DDIMScheduler()}, r"pipe\.scheduler ="),
        ({"num_images_per_prompt": 2}, "num_images="),
        ({"return_dict": False}, "images"),
        ({"eta": 0.5}, "SamplerSettings"),
        ({"height": 64}, "one size"),
        ({"class_labels": [0]}, "class_="),
        ({"latents": torch.zeros(1, 4, 8, 8)}, "generate_latents"),
        ({"num_images": 2.0}, "num_images .*2.0"),
        ({"num_images": "2"}, "num_images .*'2'"),
        ({"num_images": True}, "num_images .*True"),
        ({"seeds": 5}, "seeds .*5"),
        ({"seeds": "12"}, "seeds .*'12'"),
        ({"seeds": [-1]}, r"seeds\[0\] .*-1"),
        ({"seeds": [1.5]}, r"seeds\[0\] .*1.5"),
        ({"seed": 2**63}, "seed .*9223372036854775808"),
        ({"seed": None}, "seed .*None"),
        ({"steps": 4.0}, "steps .*4.0"),
        ({"steps": 0}, "between 1 and the 1000"),
        ({"batch": 0}, "batch .*0"),
        ({"guidance": "3"}, "guidance .*'3'"),
        ({"guidance": {"site": "3"}}, "guidance .*'site'"),
        ({"guidance": float("nan")}, "finite"),
        ({"sampler": 3}, "sampler .*3"),
        ({"sampler": {"name": "ddim"}}, "sampler .*'ddim'"),
    ],
)
def test_a_wrong_argument_of_a_call_is_one_message(pipe, asked, why):
    with pytest.raises(UserError, match=why):
        images(pipe, **asked)


def test_whole_numbers_of_numpy_and_torch_are_whole_numbers(pipe):
    want = images(pipe, seeds=[1, 2])
    for seeds in (np.arange(1, 3), torch.tensor([1, 2]), (1, 2), range(1, 3)):
        assert np.array_equal(images(pipe, seeds=seeds, steps=np.int64(3), batch=np.int32(4)), want)
    assert np.array_equal(images(pipe, seed=np.int64(1), num_images=np.int64(2)), want)
    assert np.array_equal(images(pipe, seeds=[1, 2], sampler=SamplerSettings(steps=9)), want)


def test_copies_share_or_repeat_the_model(pipe):
    want, digest = images(pipe), pipe.model_hash
    for made in (
        copy.deepcopy(pipe),
        pickle.loads(pickle.dumps(pipe)),
        MediPipeline(**pipe.components),
        MediPipeline.from_pipe(pipe),
    ):
        assert np.array_equal(images(made), want)
        assert made.model_hash == digest
    assert MediPipeline.from_pipe(pipe).unet is pipe.unet
    assert MediPipeline.from_pipe(copy.deepcopy(pipe), torch_dtype=torch.bfloat16).unet.dtype == torch.bfloat16
    with pytest.raises(UserError, match="is no MediPipeline"):
        MediPipeline.from_pipe(diffusers.DDPMPipeline(pipe.unet, pipe.scheduler))


def test_a_part_that_is_set_is_what_samples(pipe):
    before, digest = images(pipe), pipe.model_hash
    other = copy.deepcopy(pipe.unet)
    with torch.no_grad():
        other.conv_in.weight.mul_(1.5)
    pipe.unet = other
    assert not np.array_equal(images(pipe), before)
    assert pipe.model_hash != digest
    pipe.scheduler = pipe.scheduler


def test_a_compiled_network_samples_and_is_the_same_model(pipe):
    before, digest = images(pipe), pipe.model_hash
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    assert np.array_equal(images(pipe), before)
    assert pipe.model_hash == digest
