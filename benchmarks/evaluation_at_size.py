"""What one whole ``evaluate`` costs: 100,000 patches, 2,048 features, time by stage and peak memory.

    python benchmarks/evaluation_at_size.py [--quick] [--json FILE] [--folder FOLDER]

60,000 real patches of 1,200 patients, 6 classes and 8 hospitals, half of them for training, and two synthetic sets of
20,000 patches; four class × hospital combinations are held out. The patches are 16 px wide and the encoder is a random
projection, so that the time is the evaluation's own: distances, adherence, copies, downstream classifiers with the
default ten repeats. --quick takes a quarter of the patches and 256 features. The folder is kept if one is given.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from output import options, report, timed_command

from latent_medi.core.config import save_settings
from latent_medi.evaluation.results import read_metrics
from latent_medi.evaluation.settings import EvaluateSettings
from latent_medi.metadata.schema import Field, Schema
from latent_medi.shards.writing.writer import Patch, write_dataset

CLASSES = tuple("abcdef")
SITES = tuple(f"hospital{i}" for i in range(8))
HELD_OUT = [{"class": name, "site": site} for name, site in zip("abcd", SITES, strict=False)]
SIZE = 16
PER_PATIENT = 50
WIDTH = "BENCHMARK_FEATURES"  # environment variable: number of features of the encoder


class Projection(torch.nn.Module):
    """Rectified random projections of the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.dim = int(os.environ.get(WIDTH, "2048"))
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(self.dim, 3 * SIZE * SIZE, generator=generator) / SIZE)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[n, 3, 16, 16] to [n, dim]."""
        return torch.relu((images.flatten(1) - 0.6) @ self.weight.T)


def encoder() -> torch.nn.Module:
    """The encoder, as ``evaluate`` finds it by name."""
    return Projection()


def _image(name: str, site: str, shift: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """Stained waves whose frequency is the class and whose colour the hospital's, a little shifted by the patient."""
    y, x = np.mgrid[0:SIZE, 0:SIZE] / SIZE
    angle = draw.uniform(0, np.pi)
    wave = np.sin(
        2 * np.pi * ((1 + 0.6 * CLASSES.index(name)) * (x * np.cos(angle) + y * np.sin(angle)) + draw.random())
    )
    density = 0.4 + 0.2 * wave + draw.normal(0, 0.1, (SIZE, SIZE))
    colour = np.array([0.55, 0.75, 0.35]) + 0.03 * (SITES.index(site) - 4) * np.array([1, -1, 1]) + shift
    return np.rint(255 * 10.0 ** -(np.clip(density, 0, 2)[..., None] * colour)).astype(np.uint8)


def _real(count: int, parts: dict[str, str]) -> Iterator[Patch]:
    draw = np.random.default_rng(0)
    for number in range(count // PER_PATIENT):
        fields = {"class": CLASSES[number % len(CLASSES)], "site": SITES[(number // len(CLASSES)) % len(SITES)]}
        patient, shift = f"p{number:05d}", draw.normal(0, 0.02, 3)
        part = ("train", "test", "train", "probe")[(number // (len(CLASSES) * len(SITES))) % 4]
        parts[patient] = "test" if part == "train" and fields in HELD_OUT else part
        for i in range(PER_PATIENT):
            image = _image(fields["class"], fields["site"], shift, draw)
            yield Patch(f"{patient}/{i}", image, patient, patient, -1, -1, 0.5, fields)


def _synthetic(count: int, seed: int) -> Iterator[Patch]:
    draw = np.random.default_rng(seed)
    for i in range(count):
        fields = {"class": CLASSES[i % len(CLASSES)], "site": SITES[(i // len(CLASSES)) % len(SITES)]}
        image = _image(fields["class"], fields["site"], draw.normal(0, 0.02 * seed, 3), draw)
        name = f"synthetic:{seed}:{i}"
        yield Patch(f"s{i:06d}", image, name, name, -1, -1, 0.5, fields, origin="synthetic")


def run(folder: Path, count: int, features: int) -> dict[str, float]:
    """Make the datasets and evaluate; seconds by stage and the most memory that it had."""
    schema = Schema((Field("class", "class", CLASSES), Field("site", "categorical", SITES)))
    parts: dict[str, str] = {}
    patches = list(_real(count * 6 // 10, parts))
    write_dataset(folder / "real", patches, "real", schema, SIZE, 0.5, splits={"main": (parts, {"kind": "planted"})})
    for seed, name in enumerate(("medi", "cls"), start=1):
        write_dataset(folder / name, _synthetic(count * 2 // 10, seed), name, schema, SIZE, 0.5)
    settings = EvaluateSettings(
        real=str(folder / "real"),
        synthetic={name: str(folder / name) for name in ("medi", "cls")},
        out=str(folder / "evaluation"),
        held_out=HELD_OUT,
        encoders=["evaluation_at_size:encoder"],
        colour_free=False,
    )
    return {"patches": count, "features": features} | evaluated(settings, features)


def evaluated(settings: EvaluateSettings, features: int) -> dict[str, float]:
    """Evaluate with :func:`encoder` in a process of its own.

    Args:
        settings: The evaluation.
        features: Number of features of the encoder.

    Returns:
        Processor seconds, peak memory, and wall seconds, by stage as well.
    """
    file = Path(settings.out).with_suffix(".yaml")
    save_settings(settings, file)
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"PYTHONPATH": os.pathsep.join(paths), WIDTH: str(features)}
    found = timed_command(["evaluate", "--config", str(file)], environment)
    return found | {f"{stage}_s": value for stage, value in read_metrics(settings.out).seconds.items()}


def main() -> None:
    """Measure and report."""
    parser = options(__doc__, "a quarter of the patches, and 256 features")
    parser.add_argument("--folder", type=Path, help="folder for the datasets and the evaluation")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        size = (25_000, 256) if given.quick else (100_000, 2048)
        report(run(given.folder or Path(temporary), *size), given.json)


if __name__ == "__main__":
    main()
