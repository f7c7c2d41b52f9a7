"""What people do with any pipeline of diffusers works here, or is refused with what to write instead."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusion_parts import make_denoiser
from parts import make_autoencoder

from latent_medi.core.errors import UserError
from latent_medi.diffusion.pipeline import MediPipeline
from latent_medi.diffusion.samplers import SAMPLERS
from latent_medi.diffusion.settings import ObjectiveSettings, SamplerSettings

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


@pytest.mark.parametrize(
    ("name", "options", "instead"),
    [
        ("EulerDiscreteScheduler", {}, "sampler='euler'"),
        ("DDIMScheduler", {}, "sampler='ddim'"),
        ("DDPMScheduler", {}, "sampler='ddpm'"),
        ("HeunDiscreteScheduler", {}, "sampler='heun'"),
        ("UniPCMultistepScheduler", {}, "sampler='unipc'"),
        ("DPMSolverMultistepScheduler", {}, "sampler='dpmpp_2m'"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "sampler='dpmpp_2m_sde'"),
        ("PNDMScheduler", {}, "sampler=…"),
        ("LMSDiscreteScheduler", {}, "sampler=…"),
    ],
)
def test_another_scheduler_is_refused_wherever_it_is_given(pipe, folder, name, options, instead, tmp_path):
    before, digest = images(pipe), pipe.model_hash
    kind = getattr(diffusers, name)
    other = kind.from_config(pipe.scheduler.config, **options)
    for give in (
        lambda: setattr(pipe, "scheduler", other),
        lambda: MediPipeline.from_pretrained(folder, scheduler=other),
        lambda: MediPipeline.from_pipe(pipe, scheduler=other),
        lambda: images(pipe, sampler=other),
        lambda: images(pipe, sampler=kind) if not options else images(pipe, sampler=other),
    ):
        with pytest.raises(UserError) as told:
            give()
        assert name in str(told.value)
        assert instead in str(told.value)
    assert type(pipe.scheduler).__name__ == "DDPMScheduler"
    pipe.save_pretrained(tmp_path / "again")
    for same in (pipe, MediPipeline.from_pretrained(tmp_path / "again")):
        assert np.array_equal(images(same), before)
        assert same.model_hash == digest


def test_every_sampler_has_a_scheduler_that_leads_to_it(pipe):
    from latent_medi.diffusion.pipeline_arguments import _SAMPLER_OF

    assert {*_SAMPLER_OF.values(), "dpmpp_2m_sde"} == set(SAMPLERS)


def test_the_class_for_the_whole_folder_is_named(folder):
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


def test_a_download_is_given_its_options(monkeypatch, folder):
    import huggingface_hub

    asked: dict[str, object] = {}

    def download(name: str, **options: object) -> str:
        asked.update(options, name=name)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    options = {"revision": "v1", "cache_dir": "/c", "local_files_only": True, "token": "t"}
    MediPipeline.from_pretrained("owner/name", **options)
    assert asked.items() >= {**options, "name": "owner/name"}.items()


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"num_inference_steps": 3}, "steps="),
        ({"guidance_scale": 3.0}, "guidance="),
        ({"generator": torch.Generator()}, "seed="),
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
