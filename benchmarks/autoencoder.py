"""What adapting an autoencoder to a dataset gains on held-out biopsies, and what it costs on other tissue.

    python benchmarks/autoencoder.py --prostate SOURCE --consep FOLDER --oral FOLDER --models MODELS \
        [--out runs/autoencoder] [--images N] [--quick] [--json FILE]

SOURCE is what `latent-medi shards prostate` reads; FOLDER holds images of other tissue; MODELS has taef2/ and
squeezenet/. Two autoencoders are adapted to training biopsies: TAEF2 (the decoder alone; encoder and decoder), and a
small one with a posterior, which is trained here before, on the oral tissue, from random weights and with a
discriminator. All on squares of --crop px, cut at random from patches of 256 px.

Reconstructions of held-out biopsies and of CoNSeP (a colon, which no training here sees) are measured at the beginning
and the end, by two encoders: a scorer, a small network that is trained here to tell class and hospital of the training
biopsies and is in no loss; and SqueezeNet, which is the perceptual network and so says what it was asked for. The
weight of the perceptual term is swept; the one to report (`chosen`) has the smallest kernel distance on validation
biopsies among those whose PSNR there does not fall. Numbers are ratios to the start, but for PSNR (differences in dB).

Every step is kept in --out, and the same command continues.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from output import options, report
from torch.nn import functional as F

from latent_medi.autoencoder.data import cropped
from latent_medi.autoencoder.settings import (
    AdversarialSettings,
    AutoencoderSettings,
    NewNetworkSettings,
    PerceptualSettings,
)
from latent_medi.autoencoder.train import train_autoencoder
from latent_medi.core.progress import progress
from latent_medi.features.tiny_encoder import TinyEncoder
from latent_medi.latents.views import view_of
from latent_medi.recipes.registry import load_recipe
from latent_medi.shards.dataset import PatchDataset
from latent_medi.shards.importing.images import import_images
from latent_medi.shards.settings import ImportSettings

WEIGHTS = (0.0, 0.03, 0.1, 0.3)
"""Weights of the perceptual term that are tried."""

OTHER = "consep"
SCORER = "scorer"


def few_of(source: Path, folder: Path, count: int) -> Path:
    """A folder with links to ``count`` images of a folder, or of each biopsy of its manifest; all with 0."""
    if not count:
        return source
    folder.mkdir(parents=True, exist_ok=True)
    manifest = source / "manifest.csv"
    if manifest.is_file():
        table = pd.read_csv(manifest, dtype=str, keep_default_na=False).groupby("patient").head(count)
        table.to_csv(folder / manifest.name, index=False)
        names = {Path(image).parts[0] for image in table["image"]}
    else:
        names = {file.name for file in sorted(source.iterdir())[:count]}
    for name in names:
        if not (folder / name).exists():
            (folder / name).symlink_to((source / name).resolve())
    return folder


def datasets(words: argparse.Namespace, out: Path) -> dict[str, Path]:
    """Dataset folders by name, made unless they are there."""
    folders = {name: out / "data" / name for name in ("prostate", OTHER, "oral")}
    if not (folders["prostate"] / "dataset.json").is_file():
        source = few_of(words.prostate, out / "few" / "prostate", words.few)
        load_recipe("prostate").build(source, folders["prostate"], patch_size=256, codec="png", jobs=1)
    for name, whole, size in ((OTHER, words.consep, 256), ("oral", words.oral, 224)):
        source = few_of(whole, out / "few" / name, 40 * words.few)
        if not (folders[name] / "dataset.json").is_file():
            # An image stands for its patient, whom the source does not name.
            pattern = r"(?:.*/)?(?P<patient>[^/]+)\.(?:jpe?g|png)"
            settings = ImportSettings(
                folder=str(source),
                pattern=pattern,
                out=str(folders[name]),
                name=name,
                class_field="",
                codec="png",
                patch_size=size,
                source_mpp=1.0,
                max_bad=0.1,
            )
            import_images(settings)
    return folders


def scorer(data: Path, folder: Path, crop: int, steps: int) -> Path:
    """Folder of a small encoder that learned class × hospital of the training biopsies, trained unless it is there."""
    if (folder / "encoder.json").is_file():
        return folder
    dataset = PatchDataset.open(data)
    rows = dataset.rows({"split_main": "train"})
    table = dataset.index.iloc[rows]
    cells, labels = np.unique(table["class"].astype(str) + " " + table["site"].astype(str), return_inverse=True)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    shape = {"dim": 48, "channels": [24, 48, 96], "groups": 8, "image_size": crop}
    encoder = TinyEncoder({**shape, "mean": [0.75, 0.6, 0.75], "std": [0.2, 0.2, 0.2]})
    head = torch.nn.Linear(48, len(cells))
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=1e-3, weight_decay=0.05)
    mean, std = (torch.tensor(encoder.config[name])[:, None, None] for name in ("mean", "std"))
    weights = torch.from_numpy(1 / np.bincount(labels)).float()
    for step in progress(range(steps), desc="scorer", unit="step"):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 50) * (1 - step / steps)
        at = rng.choice(len(rows), 32)
        corners = rng.integers(dataset.patch_size - crop + 1, size=(32, 2))
        images = view_of(cropped(dataset.read(rows[at]), corners, crop), rng.integers(8, size=32))
        x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
        loss = F.cross_entropy(head(encoder((x - mean) / std)), torch.from_numpy(labels[at]), weights)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    encoder.save(folder)
    return folder


def runs(words: argparse.Namespace, folders: dict[str, Path], out: Path) -> dict[str, tuple[float, list[dict]]]:
    """By name, the perceptual weight of each adaptation and the rows of its evaluation.csv."""
    squeezenet = str(words.models / "squeezenet")
    measuring = {
        "encoders": [str(scorer(folders["prostate"], out / SCORER, words.crop, words.scorer_steps)), "squeezenet"],
        "weights": {"squeezenet": squeezenet},
        "measure_patches": words.measured,
        "others": {OTHER: str(folders[OTHER])},
    }
    common: dict[str, Any] = {"crop": words.crop, "global_batch": 16, "log_every_images": 800, **measuring}
    common |= {"checkpoint_every_images": 1600, "warmup_fraction": 0.05}
    small = AutoencoderSettings(
        data=str(folders["oral"]),
        out=str(out / "small"),
        init="",
        split="",
        measure=[],
        max_images=words.small_images,
        network=NewNetworkSettings("AutoencoderKL", [32, 64, 96], 1, 4, 16),
        lr=1e-3,
        perceptual=PerceptualSettings(0.1, "squeezenet", squeezenet),
        adversarial=AdversarialSettings(0.1, words.small_images // 2, 32, 2),
        **common,
    )
    starts = {"taef2": str(words.models / "taef2"), "small": train_autoencoder(small)["autoencoder"]}
    found = {}
    for start, train in (("taef2", "decoder"), ("taef2", "both"), ("small", "both")):
        for weight in words.perceptual:
            name = f"{start}_{train}_perceptual_{weight:g}"
            settings = AutoencoderSettings(
                data=str(folders["prostate"]),
                out=str(out / name),
                init=starts[start],
                train=train,  # type: ignore[arg-type]
                max_images=words.images,
                lr=words.lr,
                perceptual=PerceptualSettings(weight, "squeezenet", squeezenet),
                measure=["val", "test"],
                **common,
            )
            found[name] = weight, train_autoencoder(settings)["measured"]
    return found


def compared(rows: list[dict[str, Any]], part: str, encoder: str) -> dict[str, float]:
    """What one run changed on one part in one feature space."""
    before, after = (
        next(row for row in rows if (row["images"], row["part"], row["encoder"]) == (images, part, encoder))
        for images in (min(row["images"] for row in rows), max(row["images"] for row in rows))
    )
    ratios = {name: after[name] / before[name] for name in ("kid", "fd")}
    return {**ratios, "psnr_gain": after["psnr"] - before["psnr"], "kid_before": before["kid"]}


def measure(words: argparse.Namespace, out: Path) -> dict[str, float]:
    """All numbers, flat."""
    found = runs(words, datasets(words, out), out)
    result: dict[str, float] = {}
    for name, (_, rows) in found.items():
        for part in ("val", "test", OTHER):
            for encoder in (SCORER, f"{SCORER}:haematoxylin", "squeezenet"):
                numbers = compared(rows, part, encoder)
                result |= {f"{name}_{part}_{encoder.replace(':', '_')}_{key}": v for key, v in numbers.items()}
    for kind in sorted({name.rpartition("_perceptual_")[0] for name in found}):
        names = [name for name in found if name.startswith(kind)]
        gains = {name: compared(found[name][1], "val", SCORER) for name in names}
        sound = [name for name in names if gains[name]["psnr_gain"] >= 0] or names
        best = min(sound, key=lambda name: gains[name]["kid"])
        result[f"{kind}_chosen_weight"] = found[best][0]
        for part in ("test", OTHER):
            numbers = compared(found[best][1], part, SCORER)
            result |= {f"{kind}_chosen_{part}_{key}": value for key, value in numbers.items()}
    return result


def main() -> None:
    """Make the datasets, train what does not exist yet, measure and report."""
    parser = options(__doc__, quick="32 images per run, one weight: says that it runs, not how well")
    parser.add_argument("--prostate", type=Path, required=True, help="folder with manifest.csv and the images it names")
    parser.add_argument("--consep", type=Path, required=True, help="folder with images of other tissue, to measure")
    parser.add_argument("--oral", type=Path, required=True, help="folder with images to train the small one on")
    parser.add_argument("--models", type=Path, required=True, help="folder with taef2/ and squeezenet/")
    parser.add_argument("--out", type=Path, default=Path("runs/autoencoder"), help="folder of all steps")
    parser.add_argument("--images", type=int, default=16_000, help="images of each adaptation")
    parser.add_argument("--small-images", type=int, default=48_000, help="images of the small one's training")
    parser.add_argument("--few", type=int, default=0, help="patches of each biopsy, 40 times as many others; 0: all")
    parser.add_argument("--scorer-steps", type=int, default=1500, help="updates of the scorer, 32 images each")
    parser.add_argument("--crop", type=int, default=64, help="edge of the squares, in pixels")
    parser.add_argument("--measured", type=int, default=512, help="patches of each part that are measured")
    parser.add_argument("--lr", type=float, default=1e-4, help="highest learning rate of an adaptation")
    parser.add_argument("--perceptual", type=float, nargs="+", default=list(WEIGHTS), help="weights that are tried")
    words = parser.parse_args()
    if words.quick:
        words.images, words.small_images, words.scorer_steps, words.measured, words.perceptual = 32, 32, 4, 16, [0.1]
        words.few = 1
        with tempfile.TemporaryDirectory() as folder:
            report(measure(words, Path(folder)), words.json)
    else:
        report(measure(words, words.out), words.json)


if __name__ == "__main__":
    main()
