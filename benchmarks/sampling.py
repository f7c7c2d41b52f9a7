"""Images per second of sampling against a plain diffusers loop, and quality per step of two samplers.

    python benchmarks/sampling.py [--run RUN] [--quick] [--json FILE]

Speed: the peer is the usual DDIM loop with classifier-free guidance as diffusers' pipelines write it: two branches in
one batch at every step, the same network, steps, batch and precision. Ours runs the same sampler at the same guidance
scale, in the memory layout that it samples in, once with guidance at every step (``same_guidance``: the same work,
image for image) and once within the interval of ᾱ up to 0.25 that the recommended settings use, where the other steps
need one branch. Networks have random weights: UNet S on 4×32×32 latents in bf16 on a GPU, the demo's on 4×16×16 in fp32
without one. Decoding is not in it.

Quality (with --run, the demo's finished folder): the same plan and seeds, DPM-Solver++ with 20 steps and DDIM with 100,
5,000 samples each, in the mix of combinations that the real side has: as many patches of patients of the demo's
cohort that no network has seen. The floor is the Fréchet distance between these and as many of other patients. The
ratio of the two distances, each less the floor, has a paired 95 % interval over 200 resamples of the plan's samples and
of the patients of both sides, the same ones for both samplers. Samples are kept under the run; a rerun goes on.
"""

from __future__ import annotations

import copy
import statistics
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from demo_tissue import demo_run, in_batches, real_patches
from diffusers import DDIMScheduler
from output import options, report

from latent_medi.core import config
from latent_medi.core.progress import set_up_logging
from latent_medi.diffusion.conditioning import Conditions, MetadataConditioner
from latent_medi.diffusion.denoiser import Denoiser, build_unet, lay_out
from latent_medi.diffusion.objective import make_scheduler
from latent_medi.diffusion.samplers import draw_noise, make_sampler, sample_latents
from latent_medi.diffusion.settings import (
    DropoutSettings,
    GuidanceSettings,
    ModelSettings,
    ObjectiveSettings,
    SamplerSettings,
)
from latent_medi.features.encoders import load_encoder
from latent_medi.metadata.schema import Field, Schema
from latent_medi.planning.plan import read_plan
from latent_medi.sampling.generate import generate_plan
from latent_medi.statistics.distances import frechet_distance

STEPS, SCALE = 50, 2.0
SCHEMA = Schema(
    (
        Field("class", "class", tuple(f"c{i}" for i in range(3))),
        Field("site", "categorical", tuple(f"s{i}" for i in range(4))),
    )
)


def plain_loop(denoiser: Denoiser, conditions: Conditions, noise: torch.Tensor, dtype: torch.dtype | None) -> None:
    """What diffusers' guided pipelines do: null and whole conditions in one batch, at every step."""
    scheduler = DDIMScheduler.from_config(
        make_scheduler(ObjectiveSettings()).config, clip_sample=False, timestep_spacing="trailing"
    )
    scheduler.set_timesteps(STEPS)
    both = Conditions.cat([conditions.null_like(), conditions])
    latents = noise
    with torch.no_grad(), torch.autocast(noise.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
        for t in scheduler.timesteps:
            doubled = scheduler.scale_model_input(torch.cat([latents] * 2), t)
            of_none, of_all = denoiser(doubled, t.to(noise.device).expand(len(doubled)), both).chunk(2)
            latents = scheduler.step(of_none + SCALE * (of_all - of_none), t, latents).prev_sample


def speed(quick: bool) -> dict[str, float]:
    """Images per second of each way, the median of turns."""
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    model = (
        ModelSettings(preset="S")
        if gpu
        else config.build(ModelSettings, config.load_yaml("demo/medi")["model"] | {"fields": None})
    )
    size, batch, dtype = (32, 64, torch.bfloat16) if gpu else (16, 16, None)
    torch.manual_seed(0)
    conditioner = MetadataConditioner(SCHEMA.to_dict(), model.embed_dim, dropout_patterns=asdict(DropoutSettings()))
    denoiser = Denoiser(build_unet(model, 4, size, conditional=True), conditioner).eval().to(device)
    rows = [{"class": f"c{i % 3}", "site": f"s{i % 4}"} for i in range(batch)]
    conditions = Conditions.from_schema(SCHEMA, rows).to(device)
    noise = draw_noise(range(batch), (4, size, size))[0].to(device)
    laid_out = copy.deepcopy(denoiser)
    lay_out(laid_out.unet, half=dtype is not None)  # as MediPipeline.generate_latents does
    sampler = make_sampler(make_scheduler(ObjectiveSettings()).config, SamplerSettings("ddim", STEPS))

    def ours(interval: tuple[float, float]) -> None:
        sample_latents(
            laid_out, conditions, noise, sampler, GuidanceSettings("chain", SCALE, interval=interval), dtype=dtype
        )

    ways = {
        "plain_ddim_loop": lambda: plain_loop(denoiser, conditions, noise, dtype),
        "same_guidance": lambda: ours((0.0, 1.0)),
        "guidance_in_its_interval": lambda: ours((0.0, 0.25)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(2 if quick else 6):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if gpu:
                torch.cuda.synchronize()
            if turn:  # the first warms up
                seconds[name].append(time.perf_counter() - start)
    rate = {name: batch / statistics.median(times) for name, times in seconds.items()}
    result = {f"{name}_images_per_s": value for name, value in rate.items()}
    for name in ("same_guidance", "guidance_in_its_interval"):
        result[f"{name}_over_plain_ddim_loop"] = rate[name] / rate["plain_ddim_loop"]
    return result


def quality(folder: Path, quick: bool) -> dict[str, float]:
    """Distances of the two samplers on one plan, their ratio and its interval."""
    run = demo_run(folder)
    total = 240 if quick else 5000
    encoder = load_encoder("demo")
    # Twice as many patients as one side has: every other patient of a combination is the reference.
    images, rows = real_patches(run.seed, "test", -(-2 * total // 60))
    features = encoder.features(in_batches(images))
    first = rows["patient"].str[-3:].astype(int).to_numpy() % 2 == 0
    reference, others = features[first], features[~first]
    floor = frechet_distance(reference, others)
    plan = read_plan(folder / "plan-medi.csv")
    names = [name for name in plan.columns if name in rows and name != "age"]
    mix = rows[first].groupby(names).size()
    mix = np.array([mix.get(tuple(row), 0) for row in plan[names].itertuples(index=False, name=None)], float)
    plan["count"] = np.ceil(mix / mix.sum() * total).astype(int)
    made = {}
    for name, sampler in (
        ("dpmpp_2m_20", SamplerSettings("dpmpp_2m", 20)),
        ("ddim_100", SamplerSettings("ddim", 100)),
    ):
        out = folder / f"sampling-{total}" / name
        data = generate_plan(plan, folder / "medi" / "model", out, replace(run.generate, sampler=sampler))
        made[name] = encoder.features(image for _, image in data.iterate(None, 128))
    samples = len(made["ddim_100"])
    distance = {name: frechet_distance(reference, value) for name, value in made.items()}
    rng = np.random.default_rng(0)
    people = rows["patient"].to_numpy(str)
    sides = [[np.flatnonzero(people == name) for name in np.unique(people[side])] for side in (first, ~first)]
    ratios = []
    for _ in range(20 if quick else 200):
        drawn = rng.integers(samples, size=samples)
        real, other = (
            features[np.concatenate([side[i] for i in rng.integers(len(side), size=len(side))])] for side in sides
        )
        # The floor is drawn anew as well: drawing with replacement raises every distance by about as much as this one.
        least = frechet_distance(real, other)
        a, b = (frechet_distance(real, made[name][drawn]) - least for name in ("dpmpp_2m_20", "ddim_100"))
        ratios.append(a / b)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return {
        "samples": samples,
        "real_patches": len(reference),
        "real_patients": len(sides[0]),
        "floor": floor,
        **{f"fd_{name}": value for name, value in distance.items()},
        "dpmpp_2m_20_over_ddim_100": (distance["dpmpp_2m_20"] - floor) / (distance["ddim_100"] - floor),
        "ratio_low": float(low),
        "ratio_high": float(high),
    }


def main() -> None:
    parser = options(__doc__, "one turn; 240 samples")
    parser.add_argument("--run", type=Path, help="folder of a finished experiment, for the quality per step")
    arguments = parser.parse_args()
    set_up_logging()
    result = speed(arguments.quick)
    if arguments.run:
        result |= quality(arguments.run, arguments.quick)
    report(result, arguments.json)


if __name__ == "__main__":
    main()
