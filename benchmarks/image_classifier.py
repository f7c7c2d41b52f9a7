"""Training images per second of one core, read, augmented and mixed, against timm's own loader with the same settings.

    python benchmarks/image_classifier.py [--quick] [--json FILE]

HistoDiffusion's augmentation: RandAugment, random resized crops of 224 px of 256 px patches, flips, random erasing,
mixup and cutmix. Both end with normalised and mixed float images in batches of 64 on the CPU. timm's loader
(`create_loader`, no helper processes) reads one PNG file per image; ours reads the tars of a dataset folder, compares
their checksums and seeds every image. No network runs. The ratio is of CPU time, which other programs on the machine
disturb less; the runs take turns.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from output import options, report
from timm.data import ImageDataset, Mixup, create_loader

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from reading import as_files, build

from latent_medi.features.classifier_folder import preprocessing_for
from latent_medi.image_classifier.augment import Augmentation, keep_a_bit
from latent_medi.image_classifier.data import ImageData
from latent_medi.image_classifier.settings import AugmentSettings

BATCH, SIZE, TURNS = 64, 224, 3
CPU = torch.device("cpu")


def main() -> None:
    arguments = options(__doc__, "128 images instead of 1,024").parse_args()
    torch.set_num_threads(1)
    count = 128 if arguments.quick else 1024
    settings = AugmentSettings()
    with tempfile.TemporaryDirectory() as name:
        dataset = build(Path(name) / "set", count, 256)
        for file, label in zip(as_files(dataset, Path(name) / "png"), dataset.index["class"], strict=True):
            (folder := Path(name) / "files" / str(label)).mkdir(parents=True, exist_ok=True)
            file.rename(folder / file.name)

        how = preprocessing_for("vit_small_patch16_224", SIZE, "")
        rows = np.arange(count)
        labels = (dataset.index["class"] == "b").to_numpy(np.int64)
        data = ImageData([dataset], 0 * rows, rows, labels, None, Augmentation(settings, how, 2, 0))

        def ours() -> None:
            for number in range(count // BATCH):
                data.batch(number, BATCH, 0, 0, None, 0, 1).parts(BATCH, CPU)

        loader = create_loader(
            ImageDataset(str(Path(name) / "files")),
            (3, SIZE, SIZE),
            BATCH,
            is_training=True,
            use_prefetcher=False,
            num_workers=0,
            persistent_workers=False,
            auto_augment=settings.rand_augment,
            color_jitter=settings.color_jitter,
            hflip=settings.hflip,
            vflip=settings.vflip,
            interpolation=how.resize,
            re_prob=settings.erase,
            re_mode="pixel",
            mean=how.mean,
            std=how.std,
        )
        keep_a_bit(loader.dataset.transform.transforms)
        mixup = Mixup(settings.mixup, settings.cutmix, label_smoothing=settings.smoothing, num_classes=2)

        def peer() -> None:
            for images, targets in loader:
                mixup(images, targets)

        runs: dict[str, Callable[[], None]] = {"ours": ours, "timm": peer}
        best = dict.fromkeys(runs, float("inf"))
        for _ in range(TURNS):
            for key, run in runs.items():
                start = time.process_time()
                run()
                best[key] = min(best[key], time.process_time() - start)
    result: dict[str, float] = {f"{key}_images_per_cpu_s": count / seconds for key, seconds in best.items()}
    result["ours_over_timm"] = best["timm"] / best["ours"]
    report({"images": count, **result}, arguments.json)


if __name__ == "__main__":
    main()
