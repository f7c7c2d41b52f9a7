"""Images per second from a dataset folder to a finished latent folder, against a bare loop over the same images.

    python benchmarks/encoding.py [--quick] [--autoencoder NAME] [--size PX] [--json FILE]

The peer reads the same images, one PNG file each, with Pillow in the loop, calls the same autoencoder's ``encode`` with
the same batch and precision, and keeps the means and standard deviations in memory. Encoding reads ahead, checks,
stores, syncs and hashes as well. On a GPU the autoencoder is of Stable Diffusion's architecture at 256 px with random
weights in bf16; without one, the demo's at 64 px. The autoencoder over and over on one batch is measured too: the most
that any way of reading could give. Without a GPU the ratio is also reported in CPU time, which other programs on the
machine disturb less.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from output import options, report
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from parts import stable_diffusion_vae
from reading import as_files, build

from latent_medi.latents.autoencoder import PRECISIONS, Autoencoder, load_autoencoder
from latent_medi.latents.encode import encode_dataset

BATCH = 64


def seconds(run: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Wall-clock seconds of a run, all work of the device included, and seconds of CPU time."""
    start, busy = time.perf_counter(), time.process_time()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, time.process_time() - busy


def bare_loop(files: list[Path], autoencoder: Autoencoder) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Moments of image files, nothing around it."""
    means, stds = [], []
    for i in range(0, len(files), BATCH):
        images = np.stack([np.asarray(Image.open(file)) for file in files[i : i + BATCH]])
        mean, std = autoencoder.encode(images)
        means.append(mean.half().cpu())
        if std is not None:
            stds.append(std.half().cpu())
    return torch.cat(means), torch.cat(stds) if stds else None


def main() -> None:
    parser = options(__doc__, "an eighth of the images")
    parser.add_argument("--autoencoder", help="name or folder instead of the one that fits the machine")
    parser.add_argument("--size", type=int, help="edge of a patch in px")
    arguments = parser.parse_args()
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    size = arguments.size or (256 if gpu else 64)
    count = (8192 if gpu else 4096) // (8 if arguments.quick else 1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dataset = build(folder / "set", count, size)
        files = as_files(dataset, folder / "png")
        chosen = arguments.autoencoder or (stable_diffusion_vae(folder / "vae") if gpu else "demo")
        precision = "bf16" if gpu else "fp32"
        autoencoder = load_autoencoder(chosen, device, PRECISIONS[precision])
        parameters = sum(p.numel() for p in autoencoder.model.parameters())
        zeros = np.zeros((BATCH, size, size, 3), np.uint8)

        def only() -> None:
            for _ in range(count // BATCH):
                autoencoder.encode(zeros)

        runs: dict[str, Callable[[int], object]] = {
            "encode_dataset": lambda i: encode_dataset(dataset.folder, autoencoder, folder / f"latents-{i}", BATCH),
            "bare_loop": lambda i: bare_loop(files, autoencoder),
            "autoencoder_alone": lambda i: only(),
        }
        bare_loop(files[:BATCH], autoencoder)  # kernels are chosen once
        best, busy = dict.fromkeys(runs, float("inf")), dict.fromkeys(runs, float("inf"))
        for i in range(3):  # in turns, so that all meet the same machine
            for key, run in runs.items():
                wall, cpu = seconds(partial(run, i), device)
                best[key], busy[key] = min(best[key], wall), min(busy[key], cpu)
    rates = {f"{key}_images_per_s": count / best[key] for key in runs}
    result: dict[str, float] = {
        "images": count,
        "pixels_per_edge": size,
        "autoencoder_parameters": parameters,
        "batch": BATCH,
        **rates,
        "encode_dataset_over_bare_loop": best["bare_loop"] / best["encode_dataset"],
        "encode_dataset_over_autoencoder_alone": best["autoencoder_alone"] / best["encode_dataset"],
    }
    if not gpu:
        result["encode_dataset_over_bare_loop_in_cpu_time"] = busy["bare_loop"] / busy["encode_dataset"]
    report(result, arguments.json)


if __name__ == "__main__":
    main()
