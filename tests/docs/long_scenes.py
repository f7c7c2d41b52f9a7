"""Scenes of documented commands that take longer: launchers, whole experiments, Stable Diffusion's autoencoder; and
those of HistoDiffusion's parts."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image
from scenes import (
    COHORT,
    HELD_OUT,
    IMAGES,
    MINE,
    NETWORK,
    PARTS,
    PIXELS,
    SAMPLE,
    SHORT,
    TWO,
    Row,
    biopsies,
    demo_runs,
    own_folder,
    prostate_source,
    shown,
    write_images,
)


def demo_for_launchers() -> None:
    """The demo's cohort, small, with latents."""
    demo_runs()
    shown("latent-medi shards demo out=runs/demo/data", COHORT)
    shown("latent-medi encode data=runs/demo/data out=runs/demo/latents autoencoder=demo device_batch=64")
    shown("latent-medi plan data=runs/demo/data out=runs/demo/plan.csv goal=each per_cell=1 fields=[class,site]")
    shown("latent-medi train --config demo/medi max_steps=1")


LAUNCHED = [
    Row(f"{TWO} train.py --config demo/medi out=runs/two", "max_steps=2", launched=True),
    Row(f"{TWO} train.py --config demo/medi max_steps=20", "max_steps=3 out=runs/three", launched=True),
    Row(f"{TWO} sample.py", "sampler.steps=2 out=runs/demo/synthetic ignore=[age]", launched=True),
]


TINY_RUN = (
    "train.max_steps=2 train.global_batch=8 train.device_batch=8 train.precision=fp32 train.channels_last=false "
    "train.compile=false train.checkpoint_every_images=8 encode.precision=fp32 encode.reconstruction_error.patches=0 "
    "generate.sampler.steps=2 generate.precision=fp32 generate.device_batch=32 "
    "evaluate.repeats=2 evaluate.real_splits=20"
)
TINY_NETWORK = " ".join("train." + word for word in NETWORK.split())


def own_experiment() -> None:
    """A dataset folder made by the commands of the configuration's header, and a file that begins with it."""
    from parts import make_autoencoder

    from latent_medi.latents.autoencoder import save_autoencoder

    own_folder()
    shown(
        "latent-medi shards images table=patches.csv out=data/own class_field=class categorical=[site] "
        "source_mpp=0.5 patch_size=32"
    )
    shown(
        "latent-medi split data/own hold_out='[{class: tumour, site: north}]' stratify='[class, site]' "
        "hold_out_fractions='{probe: 0.4, test: 0.6}' fractions='{train: 0.6, probe: 0.2, test: 0.2}'"
    )
    save_autoencoder(make_autoencoder(), Path("tiny"))
    Path("my-experiment.yaml").write_text("base: own/experiment\n")


def prostate_experiment() -> None:
    """A source of biopsies, and links to the weights that the configuration names."""
    write_images("patches.csv", ("benign", "gleason3", "gleason4"), ("karolinska", "radboud"), 24, 2)
    prostate_source()
    for name in ("taef2", "squeezenet"):
        Path(name).symlink_to(Path(os.environ["MODELS"]) / name)


def hub_weights() -> None:
    """Stable Diffusion's autoencoder with random weights where the Hub's program keeps downloads."""
    from parts import stable_diffusion_vae

    place = Path("hub/models--stabilityai--sd-vae-ft-mse")
    (place / "snapshots").mkdir(parents=True)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0" * 40)
    stable_diffusion_vae(place / "snapshots" / ("0" * 40))
    write_images("patches.csv", ("benign", "tumour"), ("north",), 4, 1)
    shown("latent-medi shards images table=patches.csv out=data/mine", IMAGES)


def labelled_and_synthetic() -> None:
    """Biopsies with a split and latents, and a synthetic dataset with a selection."""
    biopsies()
    shown(f"latent-medi split data {HELD_OUT} {PARTS}")
    shown("latent-medi encode data=data out=latents autoencoder=tiny reconstruction_error.patches=0")
    shown(f"latent-medi train {MINE} out=runs/medi model.fields=[class]")
    shown("latent-medi plan data=data out=plan.csv goal=each per_cell=24 fields=[class]")
    shown("latent-medi sample model=runs/medi/model plan=plan.csv out=synthetic/medi", SAMPLE)
    shown("latent-medi select synthetic/medi real=data encoder=demo farthest=0 filters=[copies]")


def _corpus() -> None:
    """``corpus``, other tissue without the patients of ``data``, and its latents."""
    Path("others").mkdir()
    rng = np.random.default_rng(1)
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(f"others/{i}.png")
    shown("latent-medi shards images folder=others out=more class_field= patient_is=image source_mpp=0.5 patch_size=32")
    shown("latent-medi shards join corpus more without=[data]")
    shown("latent-medi encode data=corpus out=corpus-latents autoencoder=tiny reconstruction_error.patches=0")


CLASSIFIER = (
    "max_steps=2 global_batch=8 network.block_out_channels=[32,32] network.attention=[false,true] "
    "network.attention_head_dim=16"
)

HISTODIFFUSION = [
    Row(
        "latent-medi train --config histodiffusion/pretrained",
        f"max_steps=2 {SHORT} warmup_images=0 {NETWORK}",
        {"data/corpus": "corpus", "latents/corpus": "corpus-latents"},
        before=_corpus,
    ),
    Row(
        "latent-medi classifier --config histodiffusion/latent_classifier",
        CLASSIFIER,
        {"data/crc": "data", "latents/crc": "latents"},
    ),
    Row("latent-medi image-classifier --config histodiffusion/vit data=data", f"network=test_vit {PIXELS}"),
    Row(
        "latent-medi image-classifier --config histodiffusion/vit data=runs/crc/data",
        f"network=test_vit {PIXELS}",
        {"runs/crc/data": "data"},
    ),
    Row(
        "accelerate launch --num_processes 8 -m latent_medi.cli image-classifier --config …",
        f"--config histodiffusion/resnet network=test_resnet data=data out=runs/resnet {PIXELS}",
    ),
    Row("latent-medi classify model=runs/vit/model data=elsewhere out=predictions.csv", places={"elsewhere": "data"}),
]


LONG = {
    "histodiffusion": (labelled_and_synthetic, HISTODIFFUSION),
    "launched": (demo_for_launchers, LAUNCHED),
    "own": (
        own_experiment,
        [
            *(
                Row(
                    f"latent-medi run --config {name}",
                    f"autoencoder=tiny encoders=[demo] seen_per_cell=8 unseen_per_cell=24 {TINY_RUN} {TINY_NETWORK} "
                    f"train.model.preset= {out}",
                )
                for name, out in [
                    ("own/experiment", ""),
                    ("my-experiment.yaml", ""),  # the same run again, from a file of one's own
                    ("own/cpu", "out=runs/cpu"),
                ]
            ),
        ],
    ),
    "hub": (
        hub_weights,
        [
            Row("latent-medi encode data=data/mine out=latents/mine autoencoder=sd-vae-ft-mse", launched=True),
        ],
    ),
    "demo": (
        demo_runs,
        [
            Row(
                "latent-medi run --config demo/experiment",
                f"seen_per_cell=2 unseen_per_cell=24 {TINY_RUN}",
            ),
        ],
    ),
    "prostate": (
        prostate_experiment,
        [
            Row(
                "latent-medi run --config prostate/64px",
                f"patch_size=32 seen_per_cell=8 unseen_per_cell=24 {TINY_RUN} train.model.block_out_channels=[32,32]",
                {
                    "source=/path/to/prostate": "source=source",
                    "source=prostate": "source=source",
                    "/path/to/taef2": "taef2",
                    "/path/to/squeezenet": "squeezenet",
                },
            ),
        ],
    ),
}
