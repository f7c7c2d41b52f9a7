"""HistoDiffusion on the demo's tissue: what synthetic patches are worth where labels of 3 % of the patients teach, and
those of another 7 % choose the best weights.

    python benchmarks/histodiffusion_demo.py [key=value …] [--out runs/histodiffusion] [--seeds 0 1 2] [--quick]

A seed is another cohort, with another split, other models and other classifiers: `latent-medi run --config
histodiffusion/demo seed=S out=OUT/seed-S`, with the settings given here. A second run on the same patients leaves out
the autoencoder's adaptation; its fine-tuned model is the training set "unadapted". Seeds share no patient, so
differences are paired by test patient within a seed, and intervals are over patients and seeds.

From averages of the weights that the trainings keep on their way, samples of the fine-tuned model and of the one from
scratch are compared with test patches: the mean over classes of the kernel distance, unguided, from the same noise.

OUT/result.json (or the file of --json) and OUT/table.md hold the result of all seeds that are finished. The same
command continues, and keeps finished seeds. Settings may be tuned on other seeds than those that are reported.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from output import options

from latent_medi.core import config
from latent_medi.core.checksums import load_tensors
from latent_medi.core.files import write_json, write_text
from latent_medi.core.records import encode
from latent_medi.diffusion.pipeline import MediPipeline
from latent_medi.experiment.experiment import COMPARISON
from latent_medi.experiment.models import CORPUS
from latent_medi.experiment.run import run
from latent_medi.experiment.settings import ExperimentSettings
from latent_medi.features.encoders import load_encoder
from latent_medi.image_classifier.compare import Kind
from latent_medi.image_classifier.comparison import (
    METRICS,
    ClassifierComparison,
    ClassifierDifferences,
    ComparedClassifiers,
    TestScores,
    comparison_text,
    conclusion,
    published_order,
    read_comparison,
)
from latent_medi.shards.dataset import SPLIT_PREFIX, PatchDataset
from latent_medi.statistics.differences import Draws, Scored
from latent_medi.statistics.intervals import LEVEL, Estimate, estimate
from latent_medi.statistics.kernel_distance import kid
from latent_medi.statistics.left_out import Score
from latent_medi.statistics.seeds import MeanOverSeeds
from latent_medi.training.posthoc_ema import list_snapshots

CONFIG = "histodiffusion/demo"
UNADAPTED = "unadapted"
TUNED, SCRATCH = "finetuned", "scratch"
MEASURED = {TUNED: 1600, SCRATCH: 5440}
"""Models whose distance is followed, and images between two measurements: six and five at their packaged lengths."""
QUICK = (
    "models.guided.train.max_steps=5",
    "models.guided.classifier_train.max_steps=5",
    "models.finetuned.train={max_steps: 4, ema: {snapshot_every_images: 32}}",
    "models.class_vectors.train.max_steps=4",
    "models.lora.train.max_steps=4",
    "models.scratch.train={max_steps: 12, ema: {snapshot_every_images: 64}}",
    "autoencoder_train={max_images: 64, measure_patches: 32}",
    "generate.sampler.steps=2",
    "seen_per_cell=12",
    "image_classifier_train={max_images: 128, evaluate_every_images: 128}",
    "evaluate.real_splits=0",
)


def settings_of(seed: int, folder: Path, changes: Sequence[str]) -> ExperimentSettings:
    """Settings of a seed's experiment; the followed models keep averages on their way."""
    kept = [f"models.{name}.train.ema.snapshot_every_images={images}" for name, images in MEASURED.items()]
    return config.parse(
        ExperimentSettings, ["--config", CONFIG, f"out={folder}", f"seed={seed}", *kept, *changes], "run"
    )


def without_adaptation(settings: ExperimentSettings, folder: Path) -> ExperimentSettings:
    """The same patients and trainings of the fine-tuned model, with the autoencoder as it is."""
    main = Path(settings.out)
    own: dict[str, Any] = {
        "data": str(main / CORPUS),
        "split": CORPUS,
        "sample": False,
        "classifier": "",
        "classifier_train": {},
    }
    before = replace(settings.models["guided"], **own)
    left_out = ("corpus", "autoencoder", "classifier", "evaluate", "report")
    return replace(
        settings,
        out=str(folder),
        data=str(main / "data"),
        corpus={},
        stages=[stage for stage in settings.stages if stage not in left_out],
        models={"guided": before, UNADAPTED: settings.models[TUNED]},
        evaluate=settings.evaluate | {"candidate": UNADAPTED},
    )


def run_seed(seed: int, out: Path, changes: Sequence[str], each: int) -> dict[str, Any]:
    """Both experiments of a seed and the distances on the way, run unless an earlier command finished them.

    Returns:
        What is kept in OUT/seed-S.json: ``changes`` and ``each``; ``seconds`` by stage, of both experiments and the
        distances; ``distances`` by model, as images seen and distance; ``acceptance`` by model and class.
    """
    file, folder = out / f"seed-{seed}.json", out / f"seed-{seed}"
    how = {"changes": list(changes), "each": each}
    if file.is_file() and how.items() <= (found := json.loads(file.read_text("utf-8"))).items():
        return dict(found)
    settings = settings_of(seed, folder, changes)
    seconds = {"adapted": run(settings)["seconds"]}
    control = without_adaptation(settings, out / f"seed-{seed}-unadapted")
    seconds["unadapted"] = run(control)["seconds"]
    start = time.perf_counter()
    distances = {name: distances_of(folder, settings, name, each) for name in MEASURED}
    seconds["distances"] = {"in all": time.perf_counter() - start}
    accepted = {name: acceptance(folder, name) for name, entry in settings.models.items() if entry.sample}
    accepted[UNADAPTED] = acceptance(Path(control.out), UNADAPTED)
    result = {**how, "seconds": seconds, "distances": distances, "acceptance": accepted}
    write_json(file, result)
    return result


def acceptance(folder: Path, name: str) -> dict[str, float]:
    """Share of a model's samples that the selection accepted, by class."""
    content = json.loads((folder / f"selection-{name}.json").read_text("utf-8"))
    return {" ".join(cell["cell"].values()): cell["acceptance"] for cell in content["cells"]}


def distances_of(folder: Path, settings: ExperimentSettings, name: str, each: int) -> list[tuple[int, float]]:
    """Images seen and distance to test patches, of the averages that a training kept."""
    dataset = PatchDataset.open(folder / "data")
    rows = dataset.rows({SPLIT_PREFIX + settings.split: "test"})
    table = dataset.index.iloc[rows]
    encoder = load_encoder(settings.encoders[0])
    classes = sorted(set(table["class"].astype(str)))
    chosen = {value: rows[(table["class"] == value).to_numpy()] for value in classes}
    real = {value: encoder.features([dataset.read(chosen[value])]) for value in classes}
    patients = {value: dataset.index["patient"].to_numpy()[chosen[value]] for value in classes}
    pipeline = MediPipeline.from_pretrained(folder / name / "model")
    wanted = [value for value in classes for _ in range(each)]
    found = []
    for snapshot in list_snapshots(folder / name):
        pipeline.denoiser.load_state_dict(load_tensors(snapshot.path, "Train again.", "pt")[0])
        images = pipeline(class_=wanted, seeds=range(len(wanted)), steps=10, batch=64).images
        made = np.split(encoder.features([np.stack([np.asarray(one) for one in images])]), len(classes))
        parts = [kid(real[value], own, patients[value]) for value, own in zip(classes, made, strict=True)]
        found.append((snapshot.images, float(np.mean(parts))))
    return found


@dataclass(frozen=True)
class Seed:
    """Finished classifiers of one seed.

    Args:
        number: The seed.
        found: Its comparison, and that of the unadapted autoencoder.
        test: Its test patches.
        scores: By kind of training the scores on these.
    """

    number: int
    found: list[ClassifierComparison]
    test: TestScores
    scores: dict[Kind, dict[str, list[Score]]]


def open_seed(number: int, out: Path) -> Seed:
    """A seed's classifiers, from the predictions that they left."""
    folders = [out / f"seed-{number}{ending}" / COMPARISON for ending in ("", "-unadapted")]
    found = [read_comparison(folder) for folder in folders]
    labels = found[0].labels
    first: pd.DataFrame | None = None
    test: TestScores | None = None
    scores: dict[Kind, dict[str, list[Score]]] = {}
    for folder, comparison in zip(folders, found, strict=True):
        for row in comparison.rows:
            kind = Kind(row.training_set, row.choice, row.percent)
            path = folder / kind.folder(number) / "test_predictions.csv"
            table = pd.read_csv(path, dtype=str, keep_default_na=False)
            if first is None or test is None:
                first = table
                test = TestScores(codes(table["truth"], labels), table["patient"].to_numpy(str), len(labels))
            assert table[["key", "truth"]].equals(first[["key", "truth"]]), f"{path}: other test patches"
            scores.setdefault(kind, test.of([codes(table["predicted"], labels)]))
    assert test is not None
    return Seed(number, found, test, scores)


def codes(values: pd.Series, labels: Sequence[str]) -> np.ndarray:
    """Positions of values among the labels, [N]."""
    return np.array([labels.index(value) for value in values], np.int64)


def pooled(seeds: Sequence[Seed], first: Kind, second: Kind, compared: int = 1) -> ClassifierDifferences:
    """First minus second: the mean over seeds, whose patients are different ones, with its interval over both. The
    variance between seeds holds that between patients already, so that intervals are wider than need be.

    Args:
        seeds: Finished classifiers.
        first, second: Kinds of training.
        compared: Number of differences that a sentence on the accuracy will be about.
    """
    each = {name: _pooled(seeds, first, second, name) for name in METRICS}
    level = 1 - (1 - LEVEL) / compared
    return ClassifierDifferences(**each, accuracy_of_all=_pooled(seeds, first, second, "accuracy", level))


def _pooled(seeds: Sequence[Seed], first: Kind, second: Kind, name: str, level: float = LEVEL) -> Estimate:
    pairs = [(seed.scores[first][name][0], seed.scores[second][name][0]) for seed in seeds]
    by_seed = np.array([a.value - b.value for a, b in pairs])
    sizes = [seed.test.n_patients for seed in seeds]
    left_out = np.repeat(by_seed[:, None], sum(sizes), axis=1)  # another seed's patient changes nothing
    strata: list[np.ndarray] = []
    at = strata_before = 0
    for i, ((a, b), seed) in enumerate(zip(pairs, seeds, strict=True)):
        left_out[i, at : at + sizes[i]] = a.left_out - b.left_out
        strata.append(seed.test.strata + strata_before)
        at, strata_before = at + sizes[i], strata_before + int(seed.test.strata.max()) + 1
    # As of one comparison with several seeds: nothing is drawn from a small pool.
    scored = Scored(Draws(0.0, [0] * len(seeds)), by_seed, left_out, np.concatenate(strata))
    reason = "the noise of the training is unknown: it takes at least two seeds" if len(seeds) < 2 else None
    smallest = sum(seed.test.smallest_class for seed in seeds)
    n = sum(len(seed.test.truth) for seed in seeds), sum(sizes)
    return estimate(scored.value, *n, scored.spread, None, smallest, reason, level)


def all_seeds(seeds: Sequence[Seed]) -> ClassifierComparison:
    """One comparison over seeds, with the training patches of the first and the test patches and patients of all."""
    rows = {Kind(r.training_set, r.choice, r.percent): r for found in seeds[0].found for r in found.rows}
    real, made = next(iter(rows)), list[ComparedClassifiers]()
    for kind, row in rows.items():
        random = Kind(kind.training_set, "random", kind.percent)
        values = {name: [seed.scores[kind][name][0].value for seed in seeds] for name in METRICS}
        means: dict[str, Any] = {name: MeanOverSeeds.of(found) for name, found in values.items()}
        made.append(
            replace(
                row,
                **means,
                minus_real=None if kind == real else pooled(seeds, kind, real, len(rows) - 1),
                minus_random=pooled(seeds, kind, random) if kind.choice == "selected" else None,
            )
        )
    patches, patients = (sum(n) for n in zip(*((len(s.test.truth), s.test.n_patients) for s in seeds), strict=True))
    return replace(seeds[0].found[0], seeds=len(seeds), n_patches=patches, n_patients=patients, rows=made)


def reached(distances: Mapping[str, Sequence[tuple[int, float]]]) -> dict[str, float | None]:
    """When fine-tuning is as near to test patches as the model from scratch in the end; ``None``: never.

    Returns:
        ``images`` of fine-tuning; ``scratch_images`` and ``distance`` of the other at its end; and ``share``, the one
        number of images over the other.
    """
    last, distance = distances[SCRATCH][-1]
    images = next((images for images, found in distances[TUNED] if found <= distance), None)
    share = None if images is None else images / last
    return {"images": images, "scratch_images": last, "distance": distance, "share": share}


def markdown(found: ClassifierComparison, runs: Mapping[int, dict[str, Any]]) -> str:
    """The tables of all seeds."""
    percents = list(dict.fromkeys(row.percent for row in found.rows[1:]))
    kinds = {(row.training_set, row.choice, row.percent): row for row in found.rows}
    head = "".join(f" {percent:g} % |" for percent in percents)
    lines = [conclusion(found), ""]
    for name, words in METRICS.items():
        lines += [f"| {words} | |{head}", "|---|---|" + "---|" * len(percents)]
        lines.append(f"| real patches alone | | {_mean(getattr(found.rows[0], name))} |" + " |" * (len(percents) - 1))
        for one, choice in dict.fromkeys((row.training_set, row.choice) for row in found.rows[1:]):
            cells = [_cell(kinds[one, choice, percent], name) for percent in percents]
            lines.append(f"| {one} | {choice} | {' | '.join(cells)} |")
        lines.append("")
    lines += ["| seed | model | images: kernel distance to test patches |", "|---|---|---|"]
    for seed, content in runs.items():
        for name, curve in content["distances"].items():
            lines.append(f"| {seed} | {name} | {', '.join(f'{n:,}: {value:.4f}' for n, value in curve)} |")
    lines += ["", "| seed | model | accepted by class |", "|---|---|---|"]
    for seed, content in runs.items():
        for name, shares in content["acceptance"].items():
            lines.append(f"| {seed} | {name} | {', '.join(f'{c} {share:.0%}' for c, share in shares.items())} |")
    lines += ["", "| seed | minutes |", "|---|---|"]
    for seed, content in runs.items():
        parts = {name: sum(stages.values()) / 60 for name, stages in content["seconds"].items()}
        lines.append(f"| {seed} | {', '.join(f'{name} {minutes:.1f}' for name, minutes in parts.items())} |")
    return "\n".join(lines) + "\n"


def _mean(score: MeanOverSeeds) -> str:
    return f"{score.mean:.3f}" + ("" if score.sem is None else f" ± {score.sem:.3f}")


def _cell(row: ComparedClassifiers, name: str) -> str:
    change: Estimate = getattr(row.minus_real, name)
    bounds = change.interval
    text = f"{_mean(getattr(row, name))} ({change.value:+.3f}"
    return text + (f" [{bounds[0]:+.3f}, {bounds[1]:+.3f}])" if isinstance(bounds, tuple) else ")")


def measure(out: Path, numbers: Sequence[int], changes: Sequence[str], each: int, file: Path | None) -> None:
    """Run the seeds one after the other; after each, write the result of those that there are, and print it."""
    runs: dict[int, dict[str, Any]] = {}
    for number in numbers:
        runs[number] = run_seed(number, out, changes, each)
        found = all_seeds([open_seed(seed, out) for seed in runs])
        held, of = published_order(found)
        content = {
            "changes": list(changes),
            "comparison": encode(found),
            "order": {"held": held, "of": of},
            "reached": {seed: reached(content["distances"]) for seed, content in runs.items()},
            "seeds": runs,
        }
        write_json(file or out / "result.json", content)
        write_text(out / "table.md", markdown(found, runs))
    print(comparison_text(found))
    for seed in runs:
        print(f"seed {seed}: {content['reached'][seed]}")
    print(f"{file or out / 'result.json'}, {out / 'table.md'}")


def main() -> None:
    parser = options(__doc__, quick="one seed, some updates of each model: says that it runs, not how well")
    parser.add_argument("--out", type=Path, default=Path("runs/histodiffusion"), help="folder of all seeds")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="the seeds")
    parser.add_argument("--each", type=int, default=100, help="samples of a class in each distance")
    parser.add_argument("changes", nargs="*", help="settings of the experiment")
    words = parser.parse_args()
    if words.quick:
        with tempfile.TemporaryDirectory() as folder:
            measure(Path(folder), words.seeds[:1], [*QUICK, *words.changes], 8, words.json)
    else:
        measure(words.out, words.seeds, words.changes, words.each, words.json)


if __name__ == "__main__":
    main()
