"""HistoDiffusion on real prostate biopsies, one or two of each class and hospital labelled, at CPU scale (64 px).

    python benchmarks/histodiffusion_prostate.py --shared FOLDER [--out runs/histodiffusion-prostate] [--draws N] \
        [--at-once N] [--estimate] [--quick] [--json FILE]

FOLDER has data/prostate (images and manifest.csv), data/unlabelled/consep and oral, data/tcga_tiles and models/taef2.
An unconditional model is pre-trained on the other tissue alone ("other"), and on it and the patches of the draw's
biopsies that do not test, without their labels ("both"). It is adapted to the labelled biopsies as HistoDiffusion
does, guided by a classifier of latents, by fine-tuning, and by an adapter; the controls are a model that was not
pre-trained, three times as long, and real patches alone. Each set's patches are selected in the space of the image
classifier of the labelled patches, and an image classifier is trained on real patches and these, or as many random
ones, for as many images as on real ones alone.

A draw is a choice of test biopsies and of two labelled ones of each class and hospital, of which the first is labelled
alone as well; in a class and hospital of three biopsies one is left to test. Draws share test biopsies, so that their
points are shown, without a standard error. A biopsy counts for its class if the mean probability over its patches is
highest there (`biopsies`); `patches` is the share of patches that are right. Both are means over a class's test
biopsies, then over classes. As many samples are made of each class; benign biopsies are of one hospital, so that the
best third of their samples is selected, and the best two thirds of the others'.

Each pre-training and each adaptation is an experiment that `latent-medi run` runs, --at-once of them in parallel with
one thread each. What is finished is kept in --out, where the same command continues; results.json, results.md and
samples.png appear at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import pandas as pd
from histodiffusion_parts.experiments import LABELLED, QUICK, Benchmark, Size
from histodiffusion_parts.results import draw_samples, kinds, markdown, scored
from histodiffusion_parts.running import finished, run_jobs
from output import options, report

from latent_medi.core.files import write_json


def measure(words: argparse.Namespace, out: Path, size: Size) -> dict[str, float | None]:
    """Everything; returns the means over draws, flat."""
    benchmark = Benchmark(words.shared, out, size)
    jobs = benchmark.pretrainings(), benchmark.adaptations()
    left = sum(job.seconds for part in jobs for job in part if not finished(job, out))
    print(f"about {left / 60 / words.at_once:.0f} minutes on {words.at_once} idle cores are left", flush=True)
    if words.estimate:
        return {"minutes": left / 60 / words.at_once}
    out.mkdir(parents=True, exist_ok=True)
    if not all(finished(job, out) for part in jobs for job in part):
        benchmark.prepare()
    for part in jobs:
        run_jobs(part, out, words.at_once)
    rows = scored(benchmark)
    page = markdown(rows, benchmark)
    took = [json.loads((out / "finished" / f"{job.name}.json").read_text()) for part in jobs for job in part]
    seconds = sum(one["processor_s"] for one in took)
    page += f"\nThe experiments took {seconds / 60:.0f} minutes of a processor.\n"
    write_json(out / "results.json", {"rows": rows, "processor_s": seconds})
    (out / "results.md").write_text(page, encoding="utf-8")
    draw_samples(benchmark)
    print(page)
    table = pd.DataFrame(rows)
    result: dict[str, float | None] = {"processor_s": seconds}
    for kind in kinds(size):
        for name, number in LABELLED.items():
            own = table[(table["labelled"] == number) & (table["training_set"] == kind.training_set)]
            own = own[(own["choice"] == kind.choice) & (own["percent"] == kind.percent)]
            key = kind.training_set + ("" if kind.choice == "none" else f"_{kind.choice}_{kind.percent:g}")
            result |= {f"{key}_{name}_{score}": float(own[score].mean()) for score in ("biopsies", "patches")}
    return result


def main() -> None:
    """Run what is not finished, and report."""
    parser = options(__doc__, quick="one draw, few images and patches: says that it runs, not how well")
    parser.add_argument("--shared", type=Path, required=True, help="folder with data/ and models/")
    parser.add_argument("--out", type=Path, default=Path("runs/histodiffusion-prostate"), help="folder of all steps")
    parser.add_argument("--draws", type=int, default=Size.draws, help="choices of biopsies")
    parser.add_argument("--percents", type=int, nargs="+", default=list(Size.percents), help="synthetic per 100 real")
    parser.add_argument("--at-once", type=int, default=min(2, os.cpu_count() or 1), help="experiments in parallel")
    parser.add_argument("--estimate", action="store_true", help="only say how long it will take")
    words = parser.parse_args()
    if words.quick:
        with tempfile.TemporaryDirectory(prefix="latent-medi-") as folder:
            report(measure(words, Path(folder), QUICK), words.json)
    else:
        report(
            measure(words, words.out, replace(Size(), draws=words.draws, percents=tuple(words.percents))), words.json
        )


if __name__ == "__main__":
    main()
