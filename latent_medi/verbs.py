"""The verbs of the command line: each function takes the words after the verb, and returns the result as JSON."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latent_medi.core import config
from latent_medi.core.errors import Incomplete, UserError
from latent_medi.core.locks import output_lock
from latent_medi.recipes.registry import load_recipe, recipes

if TYPE_CHECKING:
    from latent_medi.shards.dataset import PatchDataset

Printed = dict[str, Any]


def _demo(words: list[str]) -> Printed:
    from latent_medi.experiment.run import demo
    from latent_medi.experiment.settings import DemoSettings

    return demo(config.parse(DemoSettings, words, "demo"))


def _run(words: list[str]) -> Printed:
    from latent_medi.experiment.run import run, take_part
    from latent_medi.experiment.settings import ExperimentSettings

    # The defaults alone would run a demo that does not print its results.
    settings = config.parse(ExperimentSettings, words or ["--help"], "run")  # every node refuses what cannot be read
    return {} if take_part(settings) else run(settings)


def _doctor(words: list[str]) -> Printed:
    from latent_medi.doctor import DoctorSettings, doctor

    return doctor(config.parse(DoctorSettings, words, "doctor"))


def _explore(words: list[str]) -> Printed:
    from latent_medi.explore import ExploreSettings, explore

    return explore(config.parse(ExploreSettings, words, "explore", positional="data"))


_SHARDS = """latent-medi shards WHAT …

  images    make a dataset folder from a table or folder of images
  slides    make a dataset folder from patches of whole slides
  demo      make a dataset folder of the demo's procedural tissue
  join      make one dataset folder of several: join OUT FOLDER FOLDER …
  info      count patches by every pair of fields, with heat maps
  verify    check the files of a dataset folder
  RECIPE    make a dataset folder from the files of a public dataset

`latent-medi shards WHAT --help` lists its settings. Recipes: """


def _shards(words: list[str]) -> Printed:
    what = words[0] if words and not words[0].startswith("-") else ""
    if what == "verify":
        return _verify(words[1:])
    if what == "info":
        from latent_medi.shards.field_counts import info
        from latent_medi.shards.settings import InfoSettings

        return info(config.parse(InfoSettings, words[1:], "shards info", positional="data"))
    if what == "images":
        from latent_medi.shards.importing.images import import_images
        from latent_medi.shards.importing.rejected import incomplete
        from latent_medi.shards.settings import ImportSettings

        settings = config.parse(ImportSettings, words[1:], "shards images")
        dataset = import_images(settings)
        rejected = dataset.info["provenance"]["rejected"]
        count, result = rejected["count"], {"folder": str(dataset.folder), "patches": len(dataset)}
        note = f"; {count} image{'s' * (count > 1)} rejected, see its dataset.json" if count else ""
        print(_holds(dataset) + note)
        if lacking := incomplete(rejected, settings.max_bad):
            raise Incomplete(lacking, result)
        return result
    if what == "slides":
        from latent_medi.shards.settings import SlideSettings

        slides = config.parse(SlideSettings, words[1:], "shards slides")
        from latent_medi.shards.slides.cut import cut_slides  # after --help, which needs no OpenSlide

        return cut_slides(slides)
    if what == "join":
        return _join(words[1:])
    if what == "demo":
        from latent_medi.demo.cohort import build_folder
        from latent_medi.demo.settings import CohortFolderSettings

        dataset = build_folder(config.parse(CohortFolderSettings, words[1:], "shards demo"))
        print(_holds(dataset))
        return {"folder": str(dataset.folder), "patches": len(dataset)}
    if not what:
        print(_SHARDS + ", ".join(recipes()))
        return {"recipes": list(recipes())}
    return load_recipe(what).main(words[1:]) or {}


def _join(words: list[str]) -> Printed:
    from latent_medi.shards.settings import JoinSettings
    from latent_medi.shards.writing.join import join

    paths = list(takewhile(lambda word: not word.startswith("-") and "=" not in word, words))
    named = [f"out={path}" for path in paths[:1]] + (["--folders", *paths[1:]] if paths[1:] else [])
    dataset = join(config.parse(JoinSettings, [*words[len(paths) :], *named], "shards join"))
    print(_holds(dataset))
    splits = {name: split["counts"] for name, split in dataset.info["splits"].items()}
    return {"folder": str(dataset.folder), "patches": len(dataset), "splits": splits}


def _holds(dataset: PatchDataset) -> str:
    """The size and path of a dataset folder, for printing."""
    return f"{len(dataset)} patches of {dataset.index['patient'].nunique()} patients in {dataset.folder}"


def _verify(words: list[str]) -> Printed:
    from latent_medi.shards.checking.duplicates import SPLIT_REMEDY, duplicates_report, duplicates_text, find_duplicates
    from latent_medi.shards.checking.verify import picture_problems, seal
    from latent_medi.shards.dataset import INFO_FILE, PatchDataset
    from latent_medi.shards.settings import VerifySettings

    settings = config.parse(VerifySettings, words, "shards verify", positional="data")
    if not settings.data:
        raise UserError("No folder is given.", "latent-medi shards verify runs/demo/data")
    folder = Path(settings.data)
    if folder.is_dir() and not (folder / INFO_FILE).is_file():
        from latent_medi.experiment.verify_artefacts import verify_artefact

        if kind := verify_artefact(folder, settings.seal):
            print(f"no problem: {kind} in {folder}{', checksums added' if settings.seal else ''}")
            return {"folder": str(folder), "problems": []}
    with output_lock(settings.data) if settings.seal else nullcontext():  # from reading the index to writing it
        dataset = PatchDataset.open(settings.data)
        if problems := dataset.verify():
            raise UserError(f"{dataset.folder}: {len(problems)} problems:\n  " + "\n  ".join(problems))
        find_duplicates(dataset)  # an earlier version did not
        if settings.seal:
            seal(dataset)
    duplicates = duplicates_report(dataset)
    if text := duplicates_text(duplicates):
        print(text)
    if sides := picture_problems(dataset):
        raise UserError(f"{dataset.folder}: {len(sides)} problems:\n  " + "\n  ".join(sides), SPLIT_REMEDY)
    print(f"no problem: {_holds(dataset)}{', checksums added' if settings.seal else ''}")
    return {"folder": str(dataset.folder), "problems": [], "duplicates": duplicates}


def _export(words: list[str]) -> Printed:
    from latent_medi.shards.export import export
    from latent_medi.shards.settings import ExportSettings

    result = export(config.parse(ExportSettings, words, "export", positional="data"))
    print(", ".join(f"{part}: {count} patches" for part, count in result["parts"].items()) + f" in {result['folder']}")
    return result


def _audit(words: list[str]) -> Printed:
    from latent_medi.metadata.audit import class_by_site
    from latent_medi.metadata.audit_text import audit_text
    from latent_medi.metadata.heatmap import write_heat_map
    from latent_medi.metadata.settings import AuditSettings
    from latent_medi.metadata.table_index import audit_index, audit_table, is_table
    from latent_medi.shards.checking.duplicates import duplicates_report, duplicates_text, find_duplicates
    from latent_medi.shards.dataset import PatchDataset

    settings = config.parse(AuditSettings, words, "audit", positional="data")
    if is_table(settings.data):
        result = audit_table(settings)
    else:
        dataset = PatchDataset.open(settings.data)
        split = (settings.split, settings.split_value) if settings.split else None
        result = audit_index(dataset.index, dataset.schema, settings, split)
        if settings.duplicates:
            find_duplicates(dataset)
            result["duplicates"] = duplicates_report(dataset)
    print(audit_text(result))
    if text := duplicates_text(result.get("duplicates", {})):
        print(text)
    if settings.figure:
        write_heat_map(class_by_site(result), settings.figure, "patients")
    return result


def _split(words: list[str]) -> Printed:
    from latent_medi.metadata.settings import SplitSettings
    from latent_medi.metadata.split_schemes import split_summary
    from latent_medi.metadata.table_index import is_table, split_table
    from latent_medi.shards.split import split_folder

    settings = config.parse(SplitSettings, words, "split", positional="data")
    split, index = split_table(settings) if is_table(settings.data) else split_folder(settings)
    summary = split_summary(index, split)
    for part, counts in summary.items():
        print(f"{part or 'in no part'}: " + ", ".join(f"{count} {unit}" for unit, count in counts.items()))
    for combination in split.recipe.get("held_out", []):
        print("held out: " + " × ".join(combination.values()))
    if together := split.recipe.get("together"):
        print(
            f"kept in one part, because they share a picture: {'; '.join(', '.join(group) for group in together[:5])}"
            + (f"; … and {len(together) - 5} more groups" if len(together) > 5 else "")
        )
    return {"name": settings.name, "parts": summary, "recipe": split.recipe}


def _encode(words: list[str]) -> Printed:
    from latent_medi.latents.encode import encode
    from latent_medi.latents.info import read_info
    from latent_medi.latents.settings import EncodeSettings

    out = encode(config.parse(EncodeSettings, words, "encode"))
    return {"latents": str(out), "floor": read_info(out).get("floor")}


def _train(words: list[str]) -> Printed:
    if "--estimate" in words:
        return _estimate([word for word in words if word != "--estimate"])
    import torch

    from latent_medi.training.loop import train
    from latent_medi.training.settings import TrainSettings

    try:
        made = train(config.parse(TrainSettings, words, "train"))
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"The device's memory is full: {str(error).splitlines()[0]}",
            "Lower device_batch (the update stays the same), or set resident=ram, checkpoint_activations=true, "
            "optimizer=adamw8bit. `latent-medi train --estimate` lists what needs how much memory.",
        ) from None
    return {made.name: str(made)}  # "model", or "adapter" of a run with lora


def _classifier(words: list[str]) -> Printed:
    from latent_medi.latent_classifier.settings import ClassifierSettings
    from latent_medi.latent_classifier.train import train_classifier

    return train_classifier(config.parse(ClassifierSettings, words, "classifier"))


def _image_classifier(words: list[str]) -> Printed:
    from latent_medi.core.records import encode
    from latent_medi.image_classifier.scores import scores_text
    from latent_medi.image_classifier.settings import ImageClassifierSettings
    from latent_medi.image_classifier.train import train_image_classifier

    folder, scores = train_image_classifier(config.parse(ImageClassifierSettings, words, "image-classifier"))
    if scores is not None and os.environ.get("RANK", "0") == "0":
        print(scores_text(scores))
    return {"model": str(folder), "scores": encode(scores)}


def _compare_classifiers(words: list[str]) -> Printed:
    from latent_medi.core.records import encode
    from latent_medi.image_classifier.compare import compare_classifiers
    from latent_medi.image_classifier.comparison import comparison_text
    from latent_medi.image_classifier.settings import CompareClassifiersSettings

    found = compare_classifiers(config.parse(CompareClassifiersSettings, words, "compare-classifiers"))
    if os.environ.get("RANK", "0") == "0":
        print(comparison_text(found))
    result: Printed = encode(found)
    return result


def _classify(words: list[str]) -> Printed:
    from latent_medi.core.records import encode
    from latent_medi.image_classifier.classify import classify
    from latent_medi.image_classifier.scores import scores_text
    from latent_medi.image_classifier.settings import ClassifySettings

    settings = config.parse(ClassifySettings, words, "classify")
    done = classify(settings)
    if os.environ.get("RANK", "0") == "0":
        if done.scores is not None:
            print(scores_text(done.scores))
        print(f"{done.patches} patches classified, written to {settings.out}")
    return {"table": settings.out, "patches": done.patches, "scores": encode(done.scores)}


def _autoencoder(words: list[str]) -> Printed:
    from latent_medi.autoencoder.settings import AutoencoderSettings
    from latent_medi.autoencoder.train import train_autoencoder

    return train_autoencoder(config.parse(AutoencoderSettings, words, "autoencoder"))


def _average(words: list[str]) -> Printed:
    from latent_medi.training.run_folder import write_average
    from latent_medi.training.settings import AverageSettings

    return {"model": str(write_average(config.parse(AverageSettings, words, "average", positional="run")))}


def _estimate(words: list[str]) -> Printed:
    from latent_medi.training.estimate.report import estimate, estimate_text
    from latent_medi.training.settings import EstimateSettings

    result = estimate(config.parse(EstimateSettings, words, "train --estimate"))
    print(estimate_text(result))
    return result


def _plan(words: list[str]) -> Printed:
    from latent_medi.core.records import encode
    from latent_medi.metadata.heatmap import write_heat_maps
    from latent_medi.planning.planner import plan_from
    from latent_medi.planning.settings import PlanSettings
    from latent_medi.planning.summary import figure_tables, plan_text

    settings = config.parse(PlanSettings, words, "plan", positional="data")
    plan = plan_from(settings)
    print(plan_text(plan))
    print(f"written to {settings.out}")
    if settings.figure:
        write_heat_maps(figure_tables(plan), settings.figure)
    return {"plan": settings.out, **encode(plan.summary)}


def _sample(words: list[str]) -> Printed:
    from latent_medi.sampling.generate import generate
    from latent_medi.sampling.settings import GenerateSettings

    settings = config.parse(GenerateSettings, config.under("fields", GenerateSettings, words), "sample")
    dataset = generate(settings)
    if dataset is None:
        print(settings.grid)
        return {"grid": settings.grid, "patches": settings.n}
    return {"folder": str(dataset.folder), "patches": len(dataset)}


def _grid(words: list[str]) -> Printed:
    from latent_medi.sampling.grids import grid
    from latent_medi.sampling.settings import GridSettings

    path = grid(config.parse(GridSettings, config.under("fields", GridSettings, words), "grid"))
    print(path)
    return {"grid": str(path)}


def _select(words: list[str]) -> Printed:
    from latent_medi.selection.result import selection_text
    from latent_medi.selection.select import select
    from latent_medi.selection.settings import SelectSettings

    selection = select(config.parse(SelectSettings, words, "select", positional="data"))
    print(selection_text(selection))
    return selection.to_json()


def _translate(words: list[str]) -> Printed:
    from latent_medi.sampling.settings import TranslateSettings
    from latent_medi.sampling.translate import translate
    from latent_medi.sampling.translation_baselines import measures_text

    done = translate(config.parse(TranslateSettings, words, "translate"))
    if done.measures:
        print(measures_text(done.measures))
    counts = {"patches": len(done.dataset), "left_out": done.unchanged}
    return {"folder": str(done.dataset.folder), **counts, "measures": done.measures}


def _evaluate(words: list[str]) -> Printed:
    from latent_medi.evaluation.evaluate import embed, evaluate
    from latent_medi.evaluation.results import metrics_json
    from latent_medi.evaluation.settings import EvaluateSettings
    from latent_medi.evaluation.summary import evaluation_text, headline

    if "--embed" in words:
        words = [word for word in words if word != "--embed"]
        return {"features": str(embed(config.parse(EvaluateSettings, words, "evaluate --embed")))}
    settings = config.parse(EvaluateSettings, words, "evaluate")
    metrics = evaluate(settings)
    if os.environ.get("RANK", "0") == "0":
        print(evaluation_text(metrics, headline(metrics)))
        print(f"\nThe page: latent-medi report metrics={Path(settings.out) / 'metrics.json'}")
    return metrics_json(metrics)


def _floors(words: list[str]) -> Printed:
    from latent_medi.evaluation.real_baseline import floors, floors_text
    from latent_medi.evaluation.settings import FloorsSettings

    result = floors(config.parse(FloorsSettings, words, "floors", positional="data"))
    print(floors_text(result))
    return result


def _benchmark_shift(words: list[str]) -> Printed:
    from latent_medi.experiment import run
    from latent_medi.experiment.shift_benchmark import benchmark_shift
    from latent_medi.experiment.shift_result import mean_of_seeds
    from latent_medi.experiment.shift_settings import ShiftSettings

    settings = config.parse(ShiftSettings, words, "benchmark-shift")
    if settings.mean:
        return mean_of_seeds(settings.mean, settings.out)
    return benchmark_shift(settings, lambda changes: run.run_changed(settings.experiment, changes, settings.changes))


def _report(words: list[str]) -> Printed:
    from latent_medi.report.render import render
    from latent_medi.report.settings import ReportSettings

    return {"report": str(render(config.parse(ReportSettings, words, "report")))}


def _reading_sheet(words: list[str]) -> Printed:
    from latent_medi.report.reading_score import score_sheet, score_text
    from latent_medi.report.reading_sheet import make_sheet
    from latent_medi.report.settings import ReadingSheetSettings

    settings = config.parse(ReadingSheetSettings, words, "reading-sheet")
    if not settings.score:
        return make_sheet(settings)
    result = score_sheet(settings)
    print(score_text(result))
    return result


VERBS: dict[str, tuple[Callable[[list[str]], Printed], str]] = {
    "demo": (_demo, "run all steps on procedural tissue whose truth is known"),
    "run": (_run, "run all steps on a dataset, from one configuration"),
    "shards": (_shards, "make a dataset folder from slides, images or a public dataset; check one; count its patches"),
    "export": (_export, "write a dataset folder as tars per split for the Hugging Face hub, or as image folders"),
    "audit": (_audit, "report which combinations of class, site and other fields a dataset has and lacks"),
    "split": (_split, "split patients into parts, at random or with sites or combinations held out"),
    "autoencoder": (_autoencoder, "adapt an autoencoder to a dataset, or train one from random weights"),
    "encode": (_encode, "encode a dataset folder into latents of a frozen autoencoder"),
    "train": (_train, "train a diffusion model; --estimate: predict its memory, time and disk space"),
    "classifier": (_classifier, "train a classifier of noisy latents, for guiding a model to a class"),
    "image-classifier": (_image_classifier, "train a classifier of patches, on real and perhaps synthetic ones"),
    "compare-classifiers": (_compare_classifiers, "train image classifiers on growing shares of synthetic patches"),
    "classify": (_classify, "classify the patches of a dataset or image folder with a trained image classifier"),
    "average": (_average, "write a finished run's model with another EMA length"),
    "plan": (_plan, "decide which combinations to generate, and how many images of each"),
    "sample": (_sample, "generate the patches of a plan as a dataset folder, or of one combination: --class X --n 16"),
    "grid": (_grid, "draw samples as a picture: a grid of combinations, an interpolation, or the denoising steps"),
    "select": (_select, "select the best synthetic patches of each combination, and as many random ones"),
    "translate": (_translate, "translate real patches to another hospital's appearance, as a dataset folder"),
    "evaluate": (
        _evaluate,
        "measure fidelity, adherence and accuracy on held-out real patients; --embed: only embed the patches",
    ),
    "floors": (_floors, "measure what real patients reach: real-vs-real distances and accuracy on real patches"),
    "benchmark-shift": (_benchmark_shift, "measure accuracy as the association of class and site increases"),
    "report": (_report, "write one HTML page from metrics.json; --compare A B: compare several evaluations"),
    "explore": (_explore, "browse real and synthetic patches in a page on this machine, and draw samples"),
    "doctor": (_doctor, "say what this machine has and lacks: packages, GPU, disk, hub, weights, launcher"),
    "reading-sheet": (_reading_sheet, "write a blinded real-or-synthetic sheet for pathologists; --score: score it"),
}
