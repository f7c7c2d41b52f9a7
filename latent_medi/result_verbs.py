"""The verbs of whole experiments, of plans and samples, and of their evaluation: each takes its settings, prints, and
returns the result as JSON.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latent_medi.doctor import DoctorSettings
    from latent_medi.evaluation.settings import EvaluateSettings, FloorsSettings
    from latent_medi.experiment.settings import DemoSettings, ExperimentSettings
    from latent_medi.experiment.shift_settings import ShiftSettings
    from latent_medi.explore.settings import ExploreSettings
    from latent_medi.planning.settings import PlanSettings
    from latent_medi.report.settings import ReadingSheetSettings, ReportSettings
    from latent_medi.sampling.settings import GenerateSettings, GridSettings, TranslateSettings
    from latent_medi.selection.settings import SelectSettings

Printed = dict[str, Any]


def demo(settings: DemoSettings) -> Printed:
    from latent_medi.experiment.run import demo

    return demo(settings)


def run(settings: ExperimentSettings) -> Printed:
    from latent_medi.experiment.run import run, take_part

    return {} if take_part(settings) else run(settings)


def doctor(settings: DoctorSettings) -> Printed:
    from latent_medi.doctor import doctor

    return doctor(settings)


def explore(settings: ExploreSettings) -> Printed:
    from latent_medi.explore.page import explore

    return explore(settings)


def plan(settings: PlanSettings) -> Printed:
    from latent_medi.core.records import encode
    from latent_medi.metadata.heatmap import write_heat_maps
    from latent_medi.planning.planner import plan_from
    from latent_medi.planning.summary import figure_tables, plan_text

    made = plan_from(settings)
    print(plan_text(made))
    print(f"written to {settings.out}")
    if settings.figure:
        write_heat_maps(figure_tables(made), settings.figure)
    return {"plan": settings.out, **encode(made.summary)}


def sample(settings: GenerateSettings) -> Printed:
    from latent_medi.sampling.generate import generate

    dataset = generate(settings)
    if dataset is None:
        print(settings.grid)
        return {"grid": settings.grid, "patches": settings.n}
    return {"folder": str(dataset.folder), "patches": len(dataset)}


def grid(settings: GridSettings) -> Printed:
    from latent_medi.sampling.grids import grid

    path = grid(settings)
    print(path)
    return {"grid": str(path)}


def select(settings: SelectSettings) -> Printed:
    from latent_medi.selection.result import selection_text
    from latent_medi.selection.select import select

    selection = select(settings)
    print(selection_text(selection))
    return selection.to_json()


def translate(settings: TranslateSettings) -> Printed:
    from latent_medi.sampling.translate import translate
    from latent_medi.sampling.translation_baselines import measures_text

    done = translate(settings)
    if done.measures:
        print(measures_text(done.measures))
    counts = {"patches": len(done.dataset), "left_out": done.unchanged}
    return {"folder": str(done.dataset.folder), **counts, "measures": done.measures}


def evaluate(settings: EvaluateSettings) -> Printed:
    from latent_medi.evaluation.evaluate import evaluate
    from latent_medi.evaluation.results import metrics_json
    from latent_medi.evaluation.summary import evaluation_text, headline

    metrics = evaluate(settings)
    if os.environ.get("RANK", "0") == "0":
        print(evaluation_text(metrics, headline(metrics)))
        print(f"\nThe page: latent-medi report metrics={Path(settings.out) / 'metrics.json'}")
    return metrics_json(metrics)


def embed(settings: EvaluateSettings) -> Printed:
    from latent_medi.evaluation.evaluate import embed

    return {"features": str(embed(settings))}


def floors(settings: FloorsSettings) -> Printed:
    from latent_medi.evaluation.real_baseline import floors, floors_text

    result = floors(settings)
    print(floors_text(result))
    return result


def benchmark_shift(settings: ShiftSettings) -> Printed:
    from latent_medi.experiment.run import run_changed
    from latent_medi.experiment.shift_benchmark import benchmark_shift
    from latent_medi.experiment.shift_result import mean_of_seeds

    if settings.mean:
        return mean_of_seeds(settings.mean, settings.out)
    return benchmark_shift(settings, lambda changes: run_changed(settings.experiment, changes, settings.changes))


def report(settings: ReportSettings) -> Printed:
    from latent_medi.report.render import render

    return {"report": str(render(settings))}


def reading_sheet(settings: ReadingSheetSettings) -> Printed:
    from latent_medi.report.reading_score import score_sheet, score_text
    from latent_medi.report.reading_sheet import make_sheet

    if not settings.score:
        return make_sheet(settings)
    result = score_sheet(settings)
    print(score_text(result))
    return result
