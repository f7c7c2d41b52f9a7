"""HistoDiffusion on real biopsies at 256 px: a pre-training on other tissue, each adaptation, and image classifiers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gpu_parts.child import Context, NotHere
from gpu_parts.real import FORWARDS, command, images_per_second, pack_patches, real_data
from latent_medi.image_classifier.comparison import ClassifierComparison, read_comparison
from latent_medi.sampling.grids import contact_sheet, save_sheet
from latent_medi.shards.dataset import INFO_FILE, PatchDataset

PARTS_OF_LENGTH = {"guided": 6.0, "finetuned": 1.0, "class_vectors": 0.25, "lora": 0.75, "scratch": 3.0}
"""Updates of each model, in those of fine-tuning: scratch has three times as many as each adaptation."""
SAMPLED = ("guided", "finetuned", "lora", "scratch")
SAMPLES = 300  # of each class and set
RESERVE = 300.0  # seconds for all of `run` that is neither training nor sampling, with a budget of 540
SHARE = 0.8  # of the time left that training is given
CLASSIFIER_IMAGES = 6400
STAGES = ["shards", "corpus", "encode", "train", "classifier", "plan", "sample", "real_classifier", "select"]
STAGES += ["image_classifier"]


def _patches(context: Context) -> None:
    """Two dataset folders: biopsies, and the other tissue."""
    pack_patches(context)
    other, data = context.other, context.work / "other"
    if not other.is_dir():
        raise NotHere(f"no folder {other} (--other DIR names it)")
    if (other / INFO_FILE).is_file() and not context.quick:
        data = other
    elif (other / INFO_FILE).is_file():
        raise NotHere("--quick takes a folder of images as --other")
    else:
        source = other
        if context.quick:
            source = context.work / "few other"
            shutil.rmtree(source, ignore_errors=True)
            source.mkdir(parents=True)
            for file in sorted(other.iterdir())[:32]:
                (source / file.name).symlink_to(file.resolve())
        words = ["shards", "images", f"folder={source}", f"out={data}", r"pattern=.*\.(?:jpe?g|png)", "name=other"]
        words += ["class_field=", "patient_is=image", "source_mpp=1.0", "max_bad=0.1"]
        command(context, [*words, f"patch_size={64 if context.quick else 256}"], "other.log")
    context.figures(other=str(data))
    context.show(other_patches=len(PatchDataset.open(data)))


def _other(context: Context) -> str:
    record = json.loads((context.out / context.part / "patches.json").read_text(encoding="utf-8"))
    return str(record["figures"]["other"])


def _rate(context: Context) -> None:
    """Images per second of real updates, and how many updates of each model fit the time that is left."""
    rate, batch = images_per_second(context, "prostate/cls_256px")
    if context.quick:
        unit, samples = 4.0, 6
    else:
        samples = SAMPLES
        left = context.seconds_left() - RESERVE * context.scale - 3 * len(SAMPLED) * samples * FORWARDS / rate
        unit = max(50.0, SHARE * left * rate / batch / sum(PARTS_OF_LENGTH.values()))
    steps = {name: max(2, round(unit * part)) for name, part in PARTS_OF_LENGTH.items()}
    (context.work / "chosen.json").write_text(json.dumps({"steps": steps, "batch": batch, "samples": samples}))
    context.show(
        images_per_s=rate, images_pretraining=steps["guided"] * batch, images_adapting=steps["scratch"] * batch
    )


def words_of(context: Context, chosen: Mapping[str, Any]) -> list[str]:
    """The words of `latent-medi run`."""
    size = "prostate" if context.quick else "prostate_256px"
    words = ["run", "--config", f"histodiffusion/{size}", f"data={real_data(context)}", f"out={context.work / 'run'}"]
    words += [f"corpus.second.data={_other(context)}", f"seen_per_cell={chosen['samples']}", "select.percent=100"]
    words += [f"stages=[{','.join(STAGES)}]", "select_rounds=1", "image_classifier_train.percents=[100]"]
    words.append(f"generate.codec={PatchDataset.open(real_data(context)).info['codec']}")
    words += [f"models.{name}.train.max_steps={steps}" for name, steps in chosen["steps"].items()]
    images = 64 if context.quick else CLASSIFIER_IMAGES
    words += [f"image_classifier_train.max_images={images}", f"image_classifier_train.evaluate_every_images={images}"]
    if context.quick:
        words += ["autoencoder=demo", "train.global_batch=8", "generate.sampler.steps=2", "encoders=[demo]"]
        return [*words, "models.guided.classifier_train.max_steps=4"]
    if not (autoencoder := context.models / "taef2").is_dir():
        raise NotHere(f"no autoencoder {autoencoder} (--models DIR names the folder)")
    return [*words, f"autoencoder={autoencoder}", "encoders=[demo]", "models.guided.classifier_train.max_steps=1000"]


def _run(context: Context) -> None:
    """Pre-training, adaptation, samples, selection and image classifiers; an interrupted run continues."""
    chosen = json.loads((context.work / "chosen.json").read_text())
    run = context.work / "run"
    begun = run.exists()
    command(context, words_of(context, chosen), "run.log")
    found = read_comparison(run / "image_classifiers")
    for name in ("classifiers.json", "classifiers.csv"):
        shutil.copy(run / "image_classifiers" / name, context.pictures / name)
    stages = {file.stem: json.loads(file.read_text()).get("seconds") for file in (run / "stages").glob("*.json")}
    context.figures(stages={name: value for name, value in stages.items() if value is not None}, went_on=begun)
    context.figures(**chosen)
    context.show(test_patients=found.n_patients, **accuracies(found))


def accuracies(found: ClassifierComparison) -> dict[str, float]:
    """Accuracy on the test patches by kind of training."""
    return {
        row.training_set + ("" if row.choice == "none" else f" {row.choice}"): row.accuracy.mean for row in found.rows
    }


def _pictures(context: Context) -> None:
    """Patches of each class: labelled ones, and each set's selected ones."""
    run, n = context.work / "run", 3
    real = PatchDataset.open(real_data(context))
    index = real.index
    sets = {"labelled": (real, (index["split_few"] == "train").to_numpy())}
    for name in SAMPLED:
        made = PatchDataset.open(run / "synthetic" / name)
        sets[name] = made, made.index["selected_best"].to_numpy().astype(bool)
    lines, classes = [], sorted(index["class"].unique())
    size = real.patch_size
    for grade in classes:
        line: list[np.ndarray] = []
        for dataset, chosen in sets.values():
            rows = np.flatnonzero(chosen & (dataset.index["class"] == grade).to_numpy())
            rows = rows[np.linspace(0, len(rows) - 1, min(n, len(rows))).astype(int)] if len(rows) else rows
            images = list(dataset.read(rows)) if len(rows) else []
            line += images + [np.full((size, size, 3), 255, np.uint8)] * (n - len(images))
        lines.append(line)
    columns = [word for name in sets for word in (name, *[""] * (n - 1))]
    save_sheet(contact_sheet(lines, classes, columns), context.pictures / "selected.png")
    counts = {name: int(chosen.sum()) for name, (_, chosen) in sets.items()}
    context.show(**{f"{name} patches": count for name, count in counts.items()})
    context.require(min(counts.values()) > 0, "a set without any selected patch")


ROWS: dict[str, Callable[[Context], None]] = {
    "patches": _patches,
    "rate": _rate,
    "run": _run,
    "pictures": _pictures,
}
