"""What is done with every documented command: run in which folder with which words appended, or why not.

A row's command is the documented text or its beginning; the longest one that fits a text counts.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from slide_parts import tissue, write_slide
from source_layouts import write_camelyon, write_nct_crc, write_pannuke

NETWORK = (
    "model.block_out_channels=[16,32] model.layers_per_block=1 model.attention=[false,true] "
    "model.attention_head_dim=16 model.norm_num_groups=8"
)
SHORT = "global_batch=8 device_batch=8 precision=fp32 channels_last=false compile=false log_every_images=8"
TRAIN = f"max_steps=2 {SHORT} checkpoint_every_images=8 {NETWORK}"
PRESET = f"max_images=16 {SHORT} checkpoint_every_images=8 warmup_images=0 {NETWORK} model.preset="
SAMPLE = "sampler.steps=2 sampler.name=dpmpp_2m precision=fp32 device_batch=32"
FLOORS = "encoders=[demo] real_splits=20"
EVALUATE = f"{FLOORS} repeats=2"


@dataclass(frozen=True)
class Row:
    """A command and what is done with it.

    Args:
        command: The documented text, or its beginning.
        extra: Words appended: what the page leaves open, and a size for tests. The last of two words of one setting
            counts.
        places: Text to replace in the command by text: placeholders by paths.
        code: Expected exit code.
        launched: Run as it stands, launcher and all, instead of in this process.
        before: Called before the command.
        prepares: No page shows it; later rows need what it makes. It is run as it stands, with ``extra``.
    """

    command: str
    extra: str = ""
    places: dict[str, str] = field(default_factory=dict)
    code: int = 0
    launched: bool = False
    before: Callable[[], object] | None = None
    prepares: bool = False


def own_folder() -> None:
    """``patches.csv`` and ``manifest.csv`` with images of two classes and three hospitals, ``slides`` with a table."""
    write_images("patches.csv", ("benign", "tumour"), ("north", "south", "west"), patients=24, patches=2)
    shutil.copy("patches.csv", "manifest.csv")
    Path("slides").mkdir()
    rows = []
    for number in range(2):
        write_slide(Path("slides") / f"s{number}.tif", tissue(1200, 900, number))
        rows.append(
            {"slide": f"s{number}.tif", "patient": f"p{number}", "class": ("benign", "tumour")[number], "site": "north"}
        )
    pd.DataFrame(rows).to_csv("slides.csv", index=False)
    shutil.copy("slides.csv", "cut.csv")


def own_and_public() -> None:
    """:func:`own_folder`, and sources of public datasets."""
    own_folder()
    for name, write in PUBLIC.items():
        write(Path(name))


def write_images(table: str, classes: tuple[str, ...], sites: tuple[str, ...], patients: int, patches: int) -> None:
    """A table of PNGs of 32 px: stripes by class, colour by site, noise; ``race`` by turns."""
    rng = np.random.default_rng(0)
    rows, x = [], np.arange(32)
    Path("images").mkdir()
    for c, tumour in enumerate(classes):
        for s, site in enumerate(sites):
            for person in range(patients):
                for number in range(patches):
                    image = f"images/{tumour}-{site}-{person}-{number}.png"
                    stripes = 30 * np.sin(2 * np.pi * x * (c + 1) / 16 + rng.random())[None, :, None]
                    colour = np.array([180, 110 + 25 * s, 160])
                    pixels = colour + stripes + rng.normal(0, 12, (32, 32, 3))
                    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(image)
                    race = ("white", "black", "asian")[person % 3]
                    rows.append([image, f"{tumour}-{site}-{person}", tumour, site, race])
    columns = ["image", "patient", "class", "site", "race"]
    pd.DataFrame(rows, columns=columns).to_csv(table, index=False)


IMAGES = "patch_size=32 categorical=[site,race] class_field=class source_mpp=0.5"

PUBLIC = {"camelyon17-wilds": write_camelyon, "nct-crc": write_nct_crc, "pannuke": write_pannuke}

OWN = [
    Row("latent-medi shards images table=patches.csv out=data/own", "patch_size=32"),
    Row("latent-medi audit data/own"),
    Row("latent-medi split data/own"),
    Row("latent-medi floors data/own", FLOORS),
    Row("latent-medi shards images table=manifest.csv out=runs/mine", "patch_size=32"),
    Row("latent-medi shards images table=patches.csv out=data …", IMAGES),
    Row("latent-medi audit data"),
    Row("latent-medi audit slides.csv"),
    Row("latent-medi split data hold_out='[{class: tumour"),
    Row("latent-medi shards verify FOLDER seal=true", places={"FOLDER": "data"}),
    Row(
        "latent-medi shards slides source=slides table=slides.csv out=data class_field=class",
        "patch_size=64 max_patches=4",
        {"out=data": "out=cut"},
    ),
    Row(
        "latent-medi shards slides source=slides table=slides.csv out=data/slides", "patch_size=64 max_patches=4 jobs=1"
    ),
    Row(
        "latent-medi shards slides source=slides out=data mpp=0.5 …",
        "patch_size=64 max_patches=4",
        {"out=data": "out=cut2"},
    ),
    Row(
        "latent-medi shards join data/corpus",
        places={
            "data/corpus": "corpus",
            "data/more data/others": "runs/mine",
            "data/more": "runs/mine",
            "data/mine": "cut",
        },
    ),
    Row("latent-medi shards slides --help"),
    Row("latent-medi split --help"),
    *(
        Row(f"{program} SOURCE OUT {further}", "", {"SOURCE OUT": f"{name} runs/{name}-{number}"})
        for name in PUBLIC
        for number, (program, further) in enumerate(
            [
                (f"latent-medi shards {name}", "--patch-size"),
                (f"latent-medi shards {name}", "…"),
                (f"python shards/{name.replace('-', '_')}.py", "…"),
            ]
        )
    ),
    Row("python shards/tcga_tiles.py SOURCE OUT …", "--help", {"SOURCE OUT": ""}),
    Row("latent-medi shards slides source=/path/to/slides", "max_patches=3 jobs=1", {"/path/to/slides": "slides"}),
]


def biopsies() -> None:
    """A table of biopsies of three classes and two hospitals, and an autoencoder with random weights."""
    from parts import make_autoencoder

    from latent_medi.latents.autoencoder import save_autoencoder

    write_images("patches.csv", ("benign", "gleason3", "gleason4"), ("karolinska", "radboud"), 24, 2)
    save_autoencoder(make_autoencoder(), Path("tiny"))
    shown("latent-medi shards images table=patches.csv out=data", IMAGES)
    prostate_source()
    pd.DataFrame({"class": ["gleason4"], "site": ["radboud"], "race": ["white"], "count": ["40"]}).to_csv(
        "wanted.csv", index=False
    )


def prostate_source() -> None:
    """``source``, with a manifest as the recipe reads it."""
    Path("source").mkdir()
    Path("source/images").symlink_to(Path("images").resolve())
    pd.read_csv("patches.csv").drop(columns="race").assign(isup_grade="1").to_csv("source/manifest.csv", index=False)


def shown(command: str, extra: str = "") -> None:
    """A command that prepares what others read."""
    from running import run_here, words_of

    assert run_here(words_of(command, extra)) == 0, command


def _synthetic_cls() -> None:
    shown("latent-medi plan data=data out=classes.csv goal=each per_cell=24 fields=[class]")
    shown("latent-medi train data=data latents=latents out=runs/cls model.fields=[class]", TRAIN)
    shown("latent-medi sample model=runs/cls/model plan=classes.csv out=synthetic/cls", SAMPLE)


def _small_plan() -> None:
    shown("latent-medi plan data=data out=small.csv goal=each per_cell=24 fields=[class,site]")


HELD_OUT = "hold_out='[{class: gleason4, site: radboud}]' hold_out_fractions='{probe: 0.4, test: 0.6}'"
PARTS = "fractions='{train: 0.6, probe: 0.2, test: 0.2}'"
MINE = f"data=data latents=latents {TRAIN}"

PIXELS = (
    "validation_value=probe image_size=64 max_images=16 global_batch=8 precision=fp32 workers=0 "
    "evaluate_every_images=0 checkpoint_every_images=0"
)
AUTOENCODER = "data=data init=tiny split= max_images=16 global_batch=8 encoders=[]"

BIOPSIES = [
    Row("latent-medi split data name=main", f"{HELD_OUT} {PARTS}", prepares=True),
    Row("latent-medi split data name=random"),
    Row("latent-medi split data name=external"),
    Row("latent-medi split data name=named"),
    Row("latent-medi split data name=drawn"),
    Row("latent-medi shards prostate /path/to/source runs/prostate", "--patch-size 32", {"/path/to/source": "source"}),
    Row("latent-medi shards verify runs/prostate"),
    Row("latent-medi shards prostate SOURCE runs/prostate256", "--patch-size 32", {"SOURCE": "source"}),
    Row("latent-medi shards prostate SOURCE OUT", "--patch-size 32", {"SOURCE": "source", "OUT": "runs/p1"}),
    Row("python shards/prostate.py SOURCE OUT …", "--patch-size 32", {"SOURCE": "source", "OUT": "runs/p2"}),
    Row("latent-medi shards prostate", "source runs/p3 --patch-size 32", prepares=True),
    Row("latent-medi floors runs/prostate256", FLOORS),
    Row("latent-medi shards join OUT", "patients=separate", {"OUT FOLDER FOLDER": "joined runs/p1 runs/p3"}),
    Row("latent-medi shards join out data more …", "patients=separate", {"data more": "runs/p1 runs/p3"}),
    Row("latent-medi shards info data figures=maps"),
    Row("latent-medi shards verify data"),
    Row("latent-medi export data split=main out=…", "out=exported"),
    Row("latent-medi floors data 'encoders=[phikon-v2]' out=runs/floors", FLOORS),
    Row("latent-medi encode", "data=data out=latents autoencoder=tiny", prepares=True),
    Row("latent-medi autoencoder data=data/mine", f"{AUTOENCODER} perceptual.weight=0 perceptual.weights="),
    Row("latent-medi encode data=data/mine out=latents/mine autoencoder=runs/autoencoder/autoencoder", "data=data"),
    Row("latent-medi autoencoder data=runs/own/data", AUTOENCODER),
    Row("accelerate launch --num_processes 8 -m latent_medi.cli autoencoder", f"out=runs/ae2 {AUTOENCODER}"),
    Row(
        "latent-medi train",
        f"--config demo/medi {MINE} out=runs/mine/medi max_steps=8 "
        "ema='{kind: power, relative_width: 0.10, also: [0.05], snapshot_every_images: 8}'",
        prepares=True,
    ),
    Row("latent-medi average runs/mine/medi width=0.07"),
    Row(
        "latent-medi train … preview_every_images=500000",
        f"{MINE} out=runs/preview preview_every_images=8 preview_images=16 preview_encoder=demo",
    ),
    Row("latent-medi train lora=…", f"lora='{{rank: 2}}' init_from=runs/mine/medi/model {MINE} out=runs/a"),
    Row("latent-medi sample adapters=", f"model=runs/mine/medi/model --class gleason3 --n 2 --grid a.png {SAMPLE}"),
    Row("latent-medi plan data=data out=plan.csv goal=balance"),
    Row("latent-medi plan data=data out=plan.csv target=wanted.csv"),
    Row("latent-medi plan data=data out=plan.csv goal=fill_unseen", "per_cell=4"),
    Row("latent-medi sample model=runs/mine/medi/model --class gleason4", f"n=4 {SAMPLE}"),
    Row(
        "latent-medi sample model=runs/mine/medi/model plan=plan.csv",
        SAMPLE,
        {"plan.csv": "small.csv"},
        before=_small_plan,
    ),
    Row("latent-medi grid model=runs/mine/medi/model out=cells.png", "sampler.steps=2"),
    Row("latent-medi grid model=runs/mine/medi/model out=blend.png", "sampler.steps=2 n=1"),
    Row("latent-medi grid model=runs/mine/medi/model out=way.png", "sampler.steps=2"),
    Row("latent-medi grid model=runs/prostate/medi/model", "n=1 sampler.steps=2", {"runs/prostate": "runs/mine"}),
    Row("latent-medi evaluate real=data synthetic.medi=synthetic/medi synthetic.cls", EVALUATE, before=_synthetic_cls),
    Row(
        "latent-medi evaluate",
        "real=data synthetic.medi=synthetic/medi out=runs/b held_out='[{class: gleason4, site: radboud}]' " + EVALUATE,
        prepares=True,
    ),
    Row("latent-medi report metrics=runs/mine/metrics.json"),
    Row("latent-medi report --compare runs/a runs/b", places={"runs/a": "runs/mine"}),
    Row("latent-medi reading-sheet data=data", "n=8"),
    Row("latent-medi select synthetic/medi real=data share", "encoder=demo farthest=0 filters=[copies,duplicates]"),
    Row("latent-medi select synthetic/medi real=data encoder", "encoder=demo farthest=0 name=filtered"),
    Row(
        "latent-medi compare-classifiers --config histodiffusion/vit data=data out=runs/classifiers",
        f"network=test_vit {PIXELS} seeds=1",
    ),
    Row(
        "latent-medi compare-classifiers --config histodiffusion/vit data=data/crc",
        f"split=main out=runs/crc network=test_vit {PIXELS} seeds=1 percents=[50]",
        {"data/crc": "data", "synthetic/guided": "synthetic/medi"},
    ),
    Row("latent-medi report metrics=… classifiers=runs/classifiers", "metrics=runs/mine/metrics.json"),
    Row("latent-medi translate data=runs/mine/data", "", {"runs/mine/data": "data"}),
]


def hub_tables() -> None:
    """The published tables of TCGA, tars as the Hub has them, and an autoencoder with random weights."""
    from hub_tars import write_hub_tars
    from parts import make_autoencoder

    from latent_medi.latents.autoencoder import save_autoencoder

    tables = Path(os.environ["TABLES"])
    shutil.copy(tables / "all_slide_metadata.csv", "all_slide_metadata.csv")
    shutil.copy(tables / "all_slide_metadata.csv", "slides.csv")
    shutil.copy(tables / "tissueSourceSite.tsv", "tissueSourceSite.tsv")
    write_hub_tars(Path("hub"), tables)
    save_autoencoder(make_autoencoder(), Path("tiny"))


def _tcga_samples() -> None:
    shown("latent-medi train --config tcga_ut/cls", f"out=runs/cls {PRESET}")
    for name, goal in (("medi", "goal=own_sites fields=[class,tss]"), ("cls", "goal=each fields=[class]")):
        shown(f"latent-medi plan data=data/tcga_ut split=medi site_field=tss per_cell=24 {goal} out={name}.csv")
        ignore = "ignore=[age,scan_mpp]"
        shown(f"latent-medi sample model=runs/{name}/model plan={name}.csv out=synthetic/{name} {ignore}", SAMPLE)


SHARED_RUNS = {"/shared/": "shared/"}
TCGA_TRAIN = f"{PRESET} model.fields=[class,tss]"
EIGHT = "accelerate launch --config_file configs/accelerate/eight_gpus.yaml"
NODES = "accelerate launch --config_file configs/accelerate/two_nodes.yaml"
TWO = "accelerate launch --config_file configs/accelerate/cpu.yaml"
TCGA_SAMPLE = f"ignore=[age,scan_mpp] {SAMPLE}"
TCGA_ENCODE = "autoencoder=tiny precision=fp32 reconstruction_error.patches=0"

TCGA = [
    Row("latent-medi audit slides.csv --class-field"),
    Row("latent-medi split slides.csv out=slides_split.csv"),
    Row("latent-medi plan data=slides.csv out=plan.csv tss_table"),
    Row("latent-medi plan data=slides.csv out=plan.csv site_field=tss"),
    Row("latent-medi shards tcga-ut SOURCE data/tcga_ut", "--patch-size 32", {"SOURCE": "hub"}),
    Row("latent-medi shards tcga-ut SOURCE OUT", "--patch-size 32", {"SOURCE": "hub", "OUT": "data/again"}),
    Row("latent-medi shards tcga-ut SOURCE OUT …", "--patch-size 32", {"SOURCE": "hub", "OUT": "data/bare"}),
    Row("python shards/tcga_ut.py SOURCE OUT …", "--patch-size 32", {"SOURCE": "hub", "OUT": "data/bare"}),
    Row("latent-medi split data name=medi table=slides_split.csv", "", {"split data": "split data/bare"}),
    Row("latent-medi split data name=medi table=slides.csv", "replace=true", {"split data": "split data/bare"}),
    Row("latent-medi encode --config tcga_ut/encode", TCGA_ENCODE),
    Row(f"{EIGHT} -m latent_medi.cli encode", f"data=data/tcga_ut out=latents/again {TCGA_ENCODE}"),
    Row(
        "sbatch --nodes 2 --gpus-per-node 4 configs/cluster/slurm.sh -m latent_medi.cli encode",
        f"data=data/tcga_ut out=latents/slurm {TCGA_ENCODE}",
    ),
    Row(f"{EIGHT} train.py --config tcga_ut/medi out=runs/medi", TCGA_TRAIN),
    Row(f"{EIGHT} --num_processes 4 train.py", f"--config tcga_ut/medi out=runs/four {TCGA_TRAIN}"),
    Row(f"{EIGHT} train.py --config tcga_ut/medi", TCGA_TRAIN),
    Row(f"{NODES} --machine_rank 0 --main_process_ip 10.0.0.1", f"out=runs/node0 {TCGA_TRAIN}"),
    Row(f"{NODES} --machine_rank 1 --main_process_ip 10.0.0.1", f"out=runs/node1 {TCGA_TRAIN}"),
    Row(f"{NODES} train.py", f"out=runs/nodes2 {TCGA_TRAIN}"),
    Row("sbatch --nodes 2 --gpus-per-node 8 configs/cluster/slurm.sh train.py", TCGA_TRAIN, SHARED_RUNS),
    Row("sbatch --nodes 4 --gpus-per-node 4", f"--config tcga_ut/medi out=runs/slurm {TCGA_TRAIN}"),
    Row("accelerate launch --num_processes 2 train.py --config medi_faithful", TRAIN),
    Row(f"{EIGHT} sample.py model=runs/medi/model", TCGA_SAMPLE, {"plan.csv": "medi.csv"}, before=_tcga_samples),
    Row(
        f"{EIGHT} sample.py model=…",
        f"model=runs/medi/model {TCGA_SAMPLE}",
        {"plan.csv": "medi.csv", "synthetic/medi": "synthetic/again"},
    ),
    Row(
        "sbatch --nodes 2 --gpus-per-node 4 configs/cluster/slurm.sh sample.py",
        f"model=runs/medi/model plan=medi.csv out=synthetic/slurm {TCGA_SAMPLE}",
    ),
    Row(
        "sbatch --nodes 1 --gpus-per-node 4 configs/cluster/slurm.sh sample.py",
        f"model=runs/medi/model plan=medi.csv out=synthetic/slurm {TCGA_SAMPLE}",
    ),
    Row(
        "latent-medi sample … sampler.name=ddim sampler.steps=100",
        "model=runs/medi/model plan=medi.csv out=synthetic/ddim sampler.steps=2 precision=fp32 ignore=[age,scan_mpp]",
    ),
    Row("latent-medi evaluate real=data/tcga_ut", EVALUATE),
    Row(
        "latent-medi evaluate … site_field=tss",
        f"real=data/tcga_ut split=medi synthetic.medi=synthetic/medi out=runs/tasks medi_protocol.seeds=2 "
        f"medi_protocol.sites=[2,0] {EVALUATE}",
    ),
    Row(
        f"{EIGHT} -m latent_medi.cli evaluate",
        "real=data/tcga_ut split=medi synthetic.medi=synthetic/medi out=runs/launched site_field=tss downstream=false "
        + EVALUATE,
    ),
]


def demo_runs() -> None:
    """Nothing but names that the commands' outputs get."""


def _demo_latents() -> None:
    shown("latent-medi encode data=runs/demo/data out=runs/demo/latents autoencoder=demo device_batch=64")
    shown("latent-medi plan data=runs/demo/data out=classes.csv goal=each per_cell=2 fields=[class]")


COHORT = "scale=0.03 processes=1"
CLASSIFIER = "max_steps=2 global_batch=8 network.block_out_channels=[32,32,32]"

DEMO = [
    Row("latent-medi shards demo out=data …", COHORT),
    Row("latent-medi shards demo out=practice", COHORT),
    Row("latent-medi export practice"),
    Row("latent-medi shards images table=patches/all/metadata.csv"),
    Row("latent-medi split data/own hold_out='[{class: solid"),
    Row(
        "latent-medi shards demo out=runs/shift-data train_patients=60",
        COHORT,
        {"runs/shift-data": "runs/demo/data", "train_patients=60": ""},
    ),
    Row("latent-medi shards demo out=runs/shift-data-0", COHORT),
    Row(
        "latent-medi train --config demo/medi model.fields=[] out=runs/demo/uncond", "max_steps=2", before=_demo_latents
    ),
    Row("latent-medi train --config demo/medi model.fields=[]", "max_steps=2 out=runs/again"),
    Row("latent-medi classifier --config demo/classifier", CLASSIFIER),
    Row(
        "accelerate launch --num_processes 8 -m latent_medi.cli classifier",
        f"--config demo/classifier out=runs/c {CLASSIFIER}",
    ),
    Row("latent-medi sample model=runs/demo/uncond/model plan=classes.csv", "sampler.steps=2 ignore=[age]"),
    Row("accelerate launch train.py --config demo/medi", "max_steps=2"),
    Row("accelerate launch --num_processes 8 -m latent_medi.training", "--config demo/medi max_steps=2 out=runs/eight"),
    Row(
        "python -m latent_medi.launch --config_file configs/accelerate/two_nodes.yaml --machine_rank 0 … train.py",
        "--config demo/medi max_steps=2 out=runs/nodes",
        {"--config …": ""},
    ),
    Row("latent-medi train --config presets/8gb --estimate"),
    Row("latent-medi train --estimate", "--config presets/8gb"),
    Row(
        "latent-medi train --config presets/8gb data=…",
        f"data=runs/demo/data latents=runs/demo/latents out=runs/8gb {PRESET}",
    ),
    Row(
        "accelerate launch train.py --config presets/12gb",
        PRESET,
        {"data/mine": "runs/demo/data", "latents/mine": "runs/demo/latents"},
    ),
]


SCENES = {
    "own": (own_and_public, OWN),
    "biopsies": (biopsies, BIOPSIES),
    "tcga": (hub_tables, TCGA),
    "demo": (demo_runs, DEMO),
}
"""Scenes: what prepares the folder, and the rows in their order."""
