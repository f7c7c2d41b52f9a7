"""The whole pipeline from one configuration: shards → audit → encode → train → plan → sample → evaluate → report.

``latent-medi run`` takes any dataset that a recipe makes; ``latent-medi demo`` is the same on procedural tissue whose
truth is known.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from latent_medi.core import config
from latent_medi.core.errors import UserError
from latent_medi.core.files import write_json, write_text
from latent_medi.core.locks import output_lock
from latent_medi.core.progress import duration, get_logger
from latent_medi.diffusion.settings import GuidanceSettings
from latent_medi.experiment.damaged_outputs import (
    damaged_dataset,
    damaged_latents,
    damaged_metrics,
    damaged_model,
    reopen,
)
from latent_medi.experiment.inputs import (
    ARMS,
    data_folder,
    encode_settings,
    given_model,
    has_numbers,
    latents_of,
    split_of,
    train_settings,
)
from latent_medi.experiment.preflight import check_model, check_study, check_training
from latent_medi.experiment.settings import DemoSettings, ExperimentSettings
from latent_medi.experiment.stages import Stage, Stages, side_by_side
from latent_medi.sampling.settings import GenerateSettings
from latent_medi.training.settings import TrainSettings

log = get_logger(__name__)


STAGES = ("shards", "audit", "encode", "train", "plan", "sample", "evaluate", "report")
_FILES = ("settings.yaml", "headline.json", "encode.yaml", "train-*.yaml", "sample-*.yaml")


def demo(settings: DemoSettings) -> dict[str, Any]:
    """Run the demo; returns the headline."""
    own = {"out": settings.out, "seed": settings.seed, "replace": settings.replace}
    values = config.merge(config.load(ExperimentSettings, Path(settings.settings)), own)
    return run(config.make(ExperimentSettings, values, settings.settings))


def run_changed(name: str, changes: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """Run a packaged configuration, or a path, with a program's changes put over it, and then a person's."""
    values = config.merge(config.load(ExperimentSettings, Path(name)), changes)
    values = config.merge(values, config.partial(ExperimentSettings, asked, "changes", "changes."))
    return run(config.make(ExperimentSettings, values, name))


def _build_demo(settings: ExperimentSettings, out: Path) -> None:
    from latent_medi.demo.cohort import build
    from latent_medi.demo.settings import CohortSettings

    build(out, CohortSettings(seed=settings.seed), jobs=settings.processes or os.cpu_count() or 1)


def _build_recipe(settings: ExperimentSettings, out: Path) -> None:
    from latent_medi.recipes.registry import load_recipe

    jobs = settings.processes or os.cpu_count() or 1
    load_recipe(settings.recipe).build(
        Path(settings.source), out, patch_size=settings.patch_size, seed=settings.seed, jobs=jobs
    )


def _parallel(settings: ExperimentSettings) -> int:
    if settings.parallel:
        return settings.parallel
    import torch

    return 1 if torch.cuda.is_available() else min(2, os.cpu_count() or 1)


def _run_arms(settings: ExperimentSettings, commands: dict[str, list[str]]) -> None:
    at_once = _parallel(settings)
    threads = max(1, (os.cpu_count() or 1) // at_once)
    names = list(commands)
    for start in range(0, len(names), at_once):
        side_by_side({name: commands[name] for name in names[start : start + at_once]}, threads)


def run(settings: ExperimentSettings) -> dict[str, Any]:
    """Run every stage that is not finished, print the headline, and return it.

    Raises:
        UserError: Settings that cannot be followed; a folder that another job writes; or, before anything is removed,
            latents, models or samples in the folder that were made from others.
    """
    with output_lock(settings.out):
        return _run(settings)


def _run(settings: ExperimentSettings) -> dict[str, Any]:
    from latent_medi.evaluation.results import read_metrics
    from latent_medi.evaluation.summary import headline, headline_text

    experiment = _Experiment(settings)
    stages, folder = experiment.stages, experiment.folder
    experiment.declare()
    if not settings.replace:
        stages.check()
    if settings.data or stages.finished("shards"):  # before anything is removed
        experiment.look_ahead()
        stages.begin(*_FILES)
        stages.run("shards")
    else:
        stages.begin(*_FILES)
        stages.run("shards")
        experiment.declare()
        experiment.look_ahead()
    config.save_settings(replace(settings, replace=False), folder / "settings.yaml")
    stages.run(*STAGES[1:])

    record = headline(read_metrics(folder), stages.seconds)
    write_json(folder / "headline.json", record)
    total = duration(sum(stages.seconds.values()))
    print(f"\n{headline_text(record)}\n\n{total} in all. Report: {folder / 'report.html'}")
    return record


class _Experiment:
    """What an experiment's stages do, and what each depends on."""

    def __init__(self, settings: ExperimentSettings) -> None:
        from latent_medi.evaluation.settings import EvaluateSettings

        self.settings = settings
        self.folder = Path(settings.out)
        self.data = data_folder(settings, self.folder)
        self.latents = settings.latents or str(self.folder / "latents")
        self.synthetic = {arm: self.folder / "synthetic" / arm for arm in ARMS}
        self.models = {arm: given_model(settings, arm) for arm in settings.models}
        if not settings.data and settings.recipe != "demo" and not settings.source:
            raise UserError(
                f"The recipe {settings.recipe!r} needs the folder of its source.",
                f"latent-medi run --config {settings.recipe}/… source=/path/to/it",
            )
        self.encoding = encode_settings(settings, self.folder)
        self.training = {arm: train_settings(settings, arm, self.folder) for arm in ARMS}
        self.trained = {arm: values for arm, values in self.training.items() if arm not in settings.models}
        derived = {
            "real": str(self.data), "synthetic": {arm: str(path) for arm, path in self.synthetic.items()},
            "out": str(self.folder), "held_out": settings.held_out, "split": settings.split,
            "encoders": settings.encoders, "weights": settings.weights, "site_field": settings.site_field,
            "seed": settings.seed,
        }  # fmt: skip
        self.judging = config.make(EvaluateSettings, config.merge(derived, settings.evaluate), "evaluate")
        self.stages = Stages(self.folder, STAGES)

    def declare(self) -> None:
        """Tell every stage what it depends on: content, not paths, and nothing that changes speed or memory alone."""
        from latent_medi.features.cache import dataset_hash
        from latent_medi.shards.dataset import PatchDataset
        from latent_medi.training.run_folder import FREE

        settings, plain = self.settings, config.as_dict(self.settings)
        if settings.data:  # nothing to make; what comes after depends on it all the same
            shards = Stage(lambda: None, {"sha256": dataset_hash(PatchDataset.open(self.data))})
        else:
            made_of = {k: plain[k] for k in ("recipe", "source", "patch_size", "seed")}
            whole: dict[str, Any] = {"damaged": lambda: damaged_dataset(self.data), "mend": lambda: reopen(self.data)}
            shards = Stage(self.build, made_of, outputs=("data",), costly=True, **whole)
        self.stages.add("shards", shards)
        # Whoever divides the patients anew, or corrects what is known of them, has another experiment.
        there = settings.data or self.stages.finished("shards")
        split = {"split": split_of(self.data, settings.split) if there else {"name": settings.split}}
        encoded: dict[str, Any] = {"shared": (f"{settings.latents}/latents.json",)}
        if not settings.latents:
            encoded = {"outputs": ("latents",), "costly": True, "damaged": lambda: damaged_latents(Path(self.latents))}
        lessons: dict[str, Any] = {
            arm: _without(values, FREE - {"init_from", "autoencoder", "stream"}) for arm, values in self.trained.items()
        }
        if self.models:
            lessons["models"] = {arm: model.model_hash for arm, model in self.models.items()}
        counts = {key: plain[key] for key in ("plan_fields", "seen_per_cell", "unseen_per_cell", "seed")}
        if settings.draw_from != "all" and there and has_numbers(self.data):  # else the plan is as it always was
            counts["draw_from"] = settings.draw_from
        sampling = _without(plain["generate"], {"plan", "model", "out", "grid", "device_batch"})
        judged = _without(config.as_dict(self.judging), {"real", "synthetic", "out", "cache", "batch", "device"})
        for name, stage in {
            "audit": Stage(
                self.audit, split | {"held_out": settings.held_out}, ("shards",), ("audit.json", "audit.txt")
            ),
            "encode": Stage(self.encode, latents_of(self.encoding), ("shards",), **encoded),
            "train": Stage(
                self.train, lessons | split, ("encode",), tuple(self.trained), costly=True, damaged=self.damaged_models
            ),
            "plan": Stage(self.plan, counts | split, ("shards",), tuple(f"plan-{arm}.csv" for arm in ARMS)),
            "sample": Stage(
                self.sample, sampling, ("train", "plan"), ("synthetic",), costly=True,
                damaged=lambda: [path for folder in self.synthetic.values() for path in damaged_dataset(folder)],
                mend=lambda: reopen(*self.synthetic.values()),
            ),
            # The features that it caches are found by content, and stay.
            "evaluate": Stage(
                self.evaluate, judged, ("sample",), ("metrics.json",), ("predictions.csv", "reference"),
                damaged=lambda: damaged_metrics(self.folder / "metrics.json"),
            ),
            "report": Stage(
                self.report, {key: plain[key] for key in ("title", "report_cells")}, ("evaluate",), ("report.html",)
            ),
        }.items():  # fmt: skip
            self.stages.add(name, stage)

    def look_ahead(self) -> None:
        """Find out now what would otherwise end the evaluation, after hours of training; unless it is finished.

        Raises:
            UserError: Training settings that do not build a network; a sampler or guidance that does not go with them;
                a split, field or held-out combination that the dataset does not have, or one that training patches
                cannot tell anything of; an encoder that cannot be loaded; evaluation settings that cannot be followed.
        """
        from latent_medi.evaluation.cohort.sample_size import thin_support
        from latent_medi.evaluation.evaluate import load_encoders

        if self.stages.finished("evaluate"):
            return
        study = check_study(self.judging)
        self._check_precisions()
        sampler = self.settings.generate.sampler
        for arm in ARMS:
            guidance = config.make(GuidanceSettings, self._guidance(arm), "generate.guidance")
            if arm in self.models:
                check_model(self.models[arm], guidance, sampler)
            else:
                asked = config.make(TrainSettings, self.training[arm], arm)
                check_training(asked, guidance, sampler, study.real.schema)
        for told in (*study.notes, *thin_support(study, self.judging.downstream)):
            log.warning("%s", told)
        load_encoders(self.judging)

    def _check_precisions(self) -> None:
        from latent_medi.core.device import check_precision

        check_precision(self.encoding.precision, self.encoding.device or "cuda")
        check_precision(self.settings.generate.precision, "cuda")
        for values in self.trained.values():
            check_precision(values.get("precision"), "cuda")

    def build(self) -> None:
        """Make the dataset folder."""
        (_build_demo if self.settings.recipe == "demo" else _build_recipe)(self.settings, self.data)

    def audit(self) -> None:
        """Say what the training patches can support."""
        _audit(self.settings, self.folder)

    def encode(self) -> None:
        """Encode every patch; in a process of its own, so that this one holds no memory that training needs."""
        config.save_settings(self.encoding, self.folder / "encode.yaml")
        side_by_side({"encode": ["encode", "--config", str(self.folder / "encode.yaml")]})

    def train(self) -> None:
        """Train the arms that are not given."""
        commands = {}
        for arm, values in self.trained.items():
            config.save_partial(TrainSettings, values, self.folder / f"train-{arm}.yaml")
            commands[arm] = ["train", "--config", str(self.folder / f"train-{arm}.yaml")]
        _run_arms(self.settings, commands)

    def damaged_models(self) -> list[Path]:
        """Models that this run trained and that are no longer whole."""
        made = {arm: self.folder / arm / ("adapter" if values.get("lora") else "model")
                for arm, values in self.trained.items()}  # fmt: skip
        return [path for model in made.values() for path in damaged_model(model)]

    def plan(self) -> None:
        """Plan what each arm generates."""
        _plan(self.settings, self.folder)

    def sample(self) -> None:
        """Generate both plans."""
        commands = {}
        for arm in ARMS:
            values = config.merge(config.as_dict(self.settings.generate), {
                "model": self.settings.models.get(arm) or str(self.folder / arm / "model"),
                "plan": str(self.folder / f"plan-{arm}.csv"),
                "out": str(self.synthetic[arm]),
            })  # fmt: skip
            values = {**values, "guidance": self._guidance(arm)}
            config.save_partial(GenerateSettings, values, self.folder / f"sample-{arm}.yaml")
            commands[arm] = ["sample", "--config", str(self.folder / f"sample-{arm}.yaml")]
        _run_arms(self.settings, commands)

    def _guidance(self, arm: str) -> dict[str, Any]:
        """The settings' guidance; the class-only arm's by the fields that it knows."""
        guidance = config.as_dict(self.settings.generate.guidance)
        if arm != "cls":
            return guidance
        known = self.training[arm].get("model", {}).get("fields") or []
        if arm in self.models:
            knows = self.models[arm].conditioner
            known = [] if knows is None else list(knows.schema.names)
        scales = {name: scale for name, scale in guidance["scales"].items() if name in known}
        return {**guidance, "scales": scales, "order": [name for name in guidance["order"] if name in known]}

    def evaluate(self) -> None:
        """Judge the samples."""
        from latent_medi.core.device import release_memory
        from latent_medi.evaluation.evaluate import evaluate
        from latent_medi.evaluation.fidelity.memorisation import TooManyCopies

        try:
            evaluate(self.judging)
        except TooManyCopies:
            self.report()  # which shows the copies
            raise
        finally:
            release_memory()  # another experiment of this process trains in processes of its own

    def report(self) -> None:
        """Write the page."""
        from latent_medi.evaluation.results import read_metrics
        from latent_medi.report.render import render_report

        render_report(
            read_metrics(self.folder), self.folder / "report.html",
            title=self.settings.title, real=self.data, synthetic=self.synthetic, per_cell=self.settings.report_cells,
        )  # fmt: skip


def _without(values: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in names}


def _audit(settings: ExperimentSettings, folder: Path) -> None:
    from latent_medi.metadata.audit import audit
    from latent_medi.metadata.audit_text import audit_text
    from latent_medi.shards.dataset import SPLIT_PREFIX, PatchDataset

    dataset = PatchDataset.open(data_folder(settings, folder))
    rows = dataset.rows({SPLIT_PREFIX + settings.split: "train"})
    index = dataset.index.iloc[rows]
    result = audit(index, dataset.schema, requested=settings.held_out or None)
    text = audit_text(result)
    if settings.held_out:
        result["all_combinations"] = audit(index, dataset.schema)["verdict_counts"]
        counts = ", ".join(f"{count} {verdict}" for verdict, count in result["all_combinations"].items() if count)
        text += f"\nall combinations of the fields, held out or not: {counts}"
    write_json(folder / "audit.json", result)
    write_text(folder / "audit.txt", text)
    print(text)


def _plan(settings: ExperimentSettings, folder: Path) -> None:
    """MeDi: every combination, the unseen ones more often. CLS: as many patches of each class."""
    from latent_medi.planning.plan import stable_seed, write_plan
    from latent_medi.planning.planner import make_plan
    from latent_medi.planning.settings import PlanSettings
    from latent_medi.shards.dataset import SPLIT_PREFIX, PatchDataset

    dataset = PatchDataset.open(data_folder(settings, folder))
    index = dataset.index.iloc[dataset.rows({SPLIT_PREFIX + settings.split: "train"})]
    fields = settings.plan_fields
    asked = PlanSettings(
        goal="each", per_cell=settings.seen_per_cell, seed=settings.seed, fields=fields, draw_from=settings.draw_from
    )  # fmt: skip
    plan = make_plan(index, dataset.schema, asked).table
    names = [f.name for f in dataset.schema.fields if f.name in plan.columns and not f.continuous]
    there = set(index[names].astype(str).itertuples(index=False, name=None))
    unseen = ~plan[names].astype(str).apply(tuple, axis=1).isin(there)
    plan.loc[unseen & (plan["count"] > 0), "count"] = settings.unseen_per_cell
    write_plan(plan, folder / "plan-medi.csv")
    class_field = dataset.schema.class_field
    assert class_field is not None
    classes = plan.groupby(class_field.name, sort=True, as_index=False)["count"].sum()
    classes["verdict"] = "seen"
    classes["seed"] = [stable_seed(settings.seed, "cls", name) for name in classes[class_field.name]]
    write_plan(classes, folder / "plan-cls.csv")
