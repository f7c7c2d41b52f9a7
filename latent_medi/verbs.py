"""The verbs of the command line: what each is for, the settings that it takes, and the function that does it.

A verb's settings and function are named here and imported when it is used, so that ``--help`` and completion need
neither torch nor a library of tables.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from latent_medi import data_verbs, result_verbs, training_verbs
from latent_medi.core import config
from latent_medi.core.errors import BAD_INPUT

Printed = dict[str, Any]
"""What a verb prints, as JSON."""


class Verb(NamedTuple):
    """A verb.

    Args:
        run: Takes the settings, or the words after the verb if it has no settings; returns the result as JSON.
        text: What the verb does.
        settings: Module and name of the settings class, as ``module:Class``.
        positional: The setting that a word without a key gives.
        prepare: Changes the words before they are read as settings: takes the class and the words.
        alone: Whether the verb does its work without any words; otherwise it then shows its help.
    """

    run: Callable[[Any], Printed]
    text: str
    settings: str = ""
    positional: str = ""
    prepare: Callable[[type, list[str]], list[str]] | None = None
    alone: bool = False

    def settings_class(self) -> type:
        """The class of its settings."""
        module, _, name = self.settings.partition(":")
        found: type = getattr(importlib.import_module(module), name)
        return found


def _fields(settings_class: type, words: list[str]) -> list[str]:
    return config.under("fields", settings_class, words)


def settings_of(verb: Verb, words: Sequence[str], name: str) -> Any:
    """The settings of a verb from the words after it; shows the help if they ask for it.

    Raises:
        UserError: A word cannot be read.
        SystemExit: The help was shown: 0 if it was asked for, else 2, since nothing was done.
    """
    settings_class = verb.settings_class()
    if not words and not verb.alone:
        config.show_help(settings_class, [], name)
        sys.exit(BAD_INPUT)
    if not {"-h", "--help"} & set(words) and verb.prepare is not None:
        words = verb.prepare(settings_class, list(words))
    return config.parse(settings_class, words, name, positional=verb.positional)


def found_verb(words: Sequence[str]) -> tuple[str, list[str]]:
    """The name of the verb that words begin with, and the words after it.

    ``shards images`` is a verb of two words. ``train --estimate`` is one whose second word may stand anywhere.
    """
    first, rest = words[0], list(words[1:])
    if rest and f"{first} {rest[0]}" in VERBS:
        return f"{first} {rest[0]}", rest[1:]
    for switch in rest:
        if switch.startswith("--") and f"{first} {switch}" in VERBS:
            return f"{first} {switch}", [word for word in rest if word != switch]
    return first, rest


def _shards(words: list[str]) -> Printed:
    """A recipe by its name; without one, the list of what `shards` does."""
    from latent_medi.recipes.registry import load_recipe, recipes

    if words and not words[0].startswith("-"):
        return (
            load_recipe(words[0], [name.split()[1] for name in VERBS if name.startswith("shards ")]).main(words[1:])
            or {}
        )
    print("latent-medi shards WHAT …\n")
    for name, verb in VERBS.items():
        if name.startswith("shards "):
            print(f"  {name.split()[1]:<10}{verb.text}")
    print(f"  {'RECIPE':<10}make a dataset folder from the files of a public dataset")
    print(f"\n`latent-medi shards WHAT --help` lists its settings. Recipes: {', '.join(recipes())}")
    if not words:  # nothing was done
        sys.exit(BAD_INPUT)
    return {"recipes": list(recipes())}


VERBS: dict[str, Verb] = {
    "demo": Verb(
        result_verbs.demo,
        "run all steps on procedural tissue whose truth is known",
        "latent_medi.experiment.settings:DemoSettings",
        alone=True,
    ),
    "run": Verb(
        result_verbs.run,
        "run all steps on a dataset, from one configuration",
        "latent_medi.experiment.settings:ExperimentSettings",
    ),
    "shards": Verb(
        _shards, "make a dataset folder from slides, images or a public dataset; check one; count its patches"
    ),
    "shards images": Verb(
        data_verbs.shards_images,
        "make a dataset folder from a table or folder of images",
        "latent_medi.shards.settings:ImportSettings",
    ),
    "shards slides": Verb(
        data_verbs.shards_slides,
        "make a dataset folder from patches of whole slides",
        "latent_medi.shards.settings:SlideSettings",
    ),
    "shards demo": Verb(
        data_verbs.shards_demo,
        "make a dataset folder of the demo's procedural tissue",
        "latent_medi.demo.settings:CohortFolderSettings",
        alone=True,
    ),
    "shards join": Verb(
        data_verbs.shards_join,
        "make one dataset folder of several: join OUT FOLDER FOLDER …",
        "latent_medi.shards.settings:JoinSettings",
        prepare=data_verbs.join_words,
    ),
    "shards info": Verb(
        data_verbs.shards_info,
        "count patches by every pair of fields, with heat maps; list splits and selections",
        "latent_medi.shards.settings:InfoSettings",
        positional="data",
    ),
    "shards verify": Verb(
        data_verbs.shards_verify,
        "check the files of a dataset folder, of latents or of a model",
        "latent_medi.shards.settings:VerifySettings",
        positional="data",
    ),
    "export": Verb(
        data_verbs.export,
        "write a dataset folder as tars per split for the Hugging Face hub, or as image folders",
        "latent_medi.shards.settings:ExportSettings",
        positional="data",
    ),
    "audit": Verb(
        data_verbs.audit,
        "report which combinations of class, site and other fields a dataset has and lacks",
        "latent_medi.metadata.settings:AuditSettings",
        positional="data",
    ),
    "split": Verb(
        data_verbs.split,
        "split patients into parts, at random or with sites or combinations held out",
        "latent_medi.metadata.settings:SplitSettings",
        positional="data",
    ),
    "autoencoder": Verb(
        training_verbs.autoencoder,
        "adapt an autoencoder to a dataset, or train one from random weights",
        "latent_medi.autoencoder.settings:AutoencoderSettings",
    ),
    "encode": Verb(
        training_verbs.encode,
        "encode a dataset folder into latents of a frozen autoencoder",
        "latent_medi.latents.settings:EncodeSettings",
    ),
    "train": Verb(
        training_verbs.train,
        "train a diffusion model; --estimate: predict its memory, time and disk space",
        "latent_medi.training.settings:TrainSettings",
    ),
    "train --estimate": Verb(
        training_verbs.estimate,
        "predict the memory, time and disk space of a training",
        "latent_medi.training.settings:EstimateSettings",
        alone=True,
    ),
    "classifier": Verb(
        training_verbs.classifier,
        "train a classifier of noisy latents, for guiding a model to a class",
        "latent_medi.latent_classifier.settings:ClassifierSettings",
    ),
    "image-classifier": Verb(
        training_verbs.image_classifier,
        "train a classifier of patches, on real and perhaps synthetic ones",
        "latent_medi.image_classifier.settings:ImageClassifierSettings",
    ),
    "compare-classifiers": Verb(
        training_verbs.compare_classifiers,
        "train image classifiers on growing shares of synthetic patches",
        "latent_medi.image_classifier.settings:CompareClassifiersSettings",
    ),
    "classify": Verb(
        training_verbs.classify,
        "classify the patches of a dataset or image folder with a trained image classifier",
        "latent_medi.image_classifier.settings:ClassifySettings",
    ),
    "average": Verb(
        training_verbs.average,
        "write a finished run's model with another EMA length",
        "latent_medi.training.settings:AverageSettings",
        positional="run",
    ),
    "plan": Verb(
        result_verbs.plan,
        "decide which combinations to generate, and how many images of each",
        "latent_medi.planning.settings:PlanSettings",
        positional="data",
    ),
    "sample": Verb(
        result_verbs.sample,
        "generate the patches of a plan as a dataset folder, or of one combination: --class X --n 16",
        "latent_medi.sampling.settings:GenerateSettings",
        prepare=_fields,
    ),
    "grid": Verb(
        result_verbs.grid,
        "draw samples as a picture: a grid of combinations, an interpolation, or the denoising steps",
        "latent_medi.sampling.settings:GridSettings",
        prepare=_fields,
    ),
    "select": Verb(
        result_verbs.select,
        "select the best synthetic patches of each combination, and as many random ones",
        "latent_medi.selection.settings:SelectSettings",
        positional="data",
    ),
    "translate": Verb(
        result_verbs.translate,
        "translate real patches to another hospital's appearance, as a dataset folder",
        "latent_medi.sampling.settings:TranslateSettings",
    ),
    "evaluate": Verb(
        result_verbs.evaluate,
        "measure fidelity, adherence and accuracy on held-out real patients; --embed: only embed the patches",
        "latent_medi.evaluation.settings:EvaluateSettings",
    ),
    "evaluate --embed": Verb(
        result_verbs.embed,
        "only embed the patches of an evaluation",
        "latent_medi.evaluation.settings:EvaluateSettings",
    ),
    "floors": Verb(
        result_verbs.floors,
        "measure what real patients reach: real-vs-real distances and accuracy on real patches",
        "latent_medi.evaluation.settings:FloorsSettings",
        positional="data",
    ),
    "benchmark-shift": Verb(
        result_verbs.benchmark_shift,
        "measure accuracy as the association of class and site increases",
        "latent_medi.experiment.shift_settings:ShiftSettings",
    ),
    "report": Verb(
        result_verbs.report,
        "write one HTML page from metrics.json; --compare A B: compare several evaluations",
        "latent_medi.report.settings:ReportSettings",
    ),
    "doctor": Verb(
        result_verbs.doctor,
        "say what this machine has and lacks: packages, GPU, disk, hub, weights, launcher",
        "latent_medi.doctor:DoctorSettings",
        alone=True,
    ),
    "explore": Verb(
        result_verbs.explore,
        "browse real and synthetic patches in a page on this machine, and draw samples",
        "latent_medi.explore.settings:ExploreSettings",
        positional="data",
    ),
    "reading-sheet": Verb(
        result_verbs.reading_sheet,
        "write a blinded real-or-synthetic sheet for pathologists; --score: score it",
        "latent_medi.report.settings:ReadingSheetSettings",
    ),
}
