"""Checks before an experiment runs: what would otherwise stop it after hours of training."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from latent_medi.core import config
from latent_medi.core.device import check_precision
from latent_medi.core.errors import UserError, nearest
from latent_medi.core.progress import get_logger
from latent_medi.evaluation.cohort.study import Study
from latent_medi.experiment.cost import experiment_cost
from latent_medi.experiment.experiment import Experiment
from latent_medi.experiment.kinds.datasets import make_plans
from latent_medi.experiment.limits import announce
from latent_medi.experiment.models import CORPUS, Model, refuse_trained_on, training_data
from latent_medi.metadata.schema import Schema
from latent_medi.sampling.settings import GenerateSettings
from latent_medi.shards.dataset import SPLIT_PREFIX, PatchDataset
from latent_medi.training.run_folder import PRODUCTS, check_can_continue
from latent_medi.training.settings import TrainSettings

log = get_logger(__name__)


def preflight(e: Experiment) -> None:
    """Check the stages that are not finished; needs the dataset folder.

    Raises:
        UserError: Training settings that build no network; a sampler, guidance, selection or evaluation that cannot
            be followed; a split, field or held-out combination that the dataset does not have, or one that training
            patches cannot identify; an encoder that cannot be loaded; more images or hours than the settings allow.
    """
    if all(e.stages.finished(name) for name in e.settings.stages if name != "report"):
        return
    check_fields(e)
    if e.has("evaluate") and not e.stages.finished("evaluate"):
        _check_evaluation(e)
    _check_precisions(e)
    dataset = PatchDataset.open(e.data)
    schema = dataset.schema
    if e.settings.split not in dataset.splits:
        raise UserError(
            f"{e.data} has no split {e.settings.split!r}; {nearest(e.settings.split, dataset.splits)}.",
            "`latent-medi split` makes one.",
        )
    _check_guidance_names(e, schema)
    for model in e.models.values():
        _check_model(e, model, schema)
    if e.has("select"):
        _check_selection(e)
    if e.has("real_classifier"):
        _check_classifiers(e)
    if e.has("autoencoder"):
        adaptation = e.adaptation()
        adaptation.check()
        _check_shared(e, "autoencoder_train", adaptation.global_batch)
    plans = make_plans(e) if e.has("plan") and not e.stages.finished("plan") else None
    if not e.settings.dry_run:
        announce(e, experiment_cost(e, plans, measure=e.settings.max_hours > 0))


def check_fields(e: Experiment) -> None:
    """Refuse a field that the dataset does not have, at once: what else is checked takes encoders or measurements.

    Raises:
        UserError: Names the setting, and the closest field that there is.
    """
    known = PatchDataset.open(e.data).schema
    site = e.settings.site_field
    if site and site not in known.names and e.has("evaluate"):
        raise UserError(
            f"{e.data} has no field {site!r}; {nearest(site, known.names)}.",
            "Name the hospital's field with site_field=NAME; site_field='' leaves out all that compares sites.",
        )
    own = [model for model in e.models.values() if model.source is None and not model.entry.data]
    for model in own:
        for name in known.named(model.fields or ()):
            if name not in known.names:
                raise UserError(
                    f"models.{model.name} is conditioned on {name!r}, no field of {e.data}; "
                    f"{nearest(name, known.names)}.",
                    f"models.{model.name}.train.model.fields=[…] names its fields.",
                )


def _check_evaluation(e: Experiment) -> None:
    from latent_medi.evaluation.cohort.combinations import describe
    from latent_medi.evaluation.cohort.open_study import open_study
    from latent_medi.evaluation.cohort.roles import synthetic_roles
    from latent_medi.evaluation.cohort.sample_size import thin_support
    from latent_medi.evaluation.evaluate import check_settings, load_encoders
    from latent_medi.metadata.estimability import Verdicts

    settings = e.evaluation
    check_settings(settings)
    synthetic_roles(settings.synthetic, settings.candidate)
    if unknown := sorted(set(settings.selected) - set(settings.synthetic)):
        raise UserError(
            f"evaluate.selected names {unknown[0]!r}, no model that is sampled; "
            f"{nearest(unknown[0], settings.synthetic)}."
        )
    if settings.downstream_protocol == "histodiffusion":
        wanted = settings.histodiffusion_protocol.selection
        if not e.has("select") or wanted not in ("", e.selection_name):
            raise UserError(
                f"downstream_protocol histodiffusion needs the selection {wanted or e.selection_name!r}.",
                f"List the stage select before evaluate{f', with select.name={wanted}' if wanted else ''}.",
            )
    alone = dataclasses.replace(settings, synthetic={}, further_seeds={}, selected={}, candidate="")
    study: Study = open_study(alone)
    for model in e.models.values() if settings.unseen else ():
        refuse_trained_on(model, study.held_out)
    verdict_of = Verdicts(study.index.iloc[study.shown], thin_patients=1)
    for combination in study.held_out:
        found = verdict_of(combination)
        if found["verdict"] == "unidentifiable":
            raise UserError(
                f"{describe(combination)} cannot be generated from the training patches: {found['reason']}.",
                "Hold out other combinations: `latent-medi audit` lists those that can be identified.",
            )
    for warning in (*study.notes, *thin_support(study, settings.downstream)):
        log.warning("%s", warning)
    load_encoders(settings)


def _check_precisions(e: Experiment) -> None:
    for encoding in e.encodings.values():
        check_precision(encoding.precision, encoding.device or "cuda")
    for model in e.to_train:
        check_precision((model.training or {}).get("precision"), "cuda")
    for model in e.sampled:
        check_precision(e.generation(model)["precision"], "cuda")


def _check_guidance_names(e: Experiment, schema: Schema) -> None:
    """Refuse guidance scales of fields that the dataset does not have; each model takes those of its own fields."""
    guidance = e.settings.generate.guidance
    for name in [*guidance.scales, *guidance.order]:
        if name not in schema.names:
            raise UserError(
                f"generate.guidance names {name!r}, no field of the dataset; {nearest(name, schema.names)}."
            )


def _check_model(e: Experiment, model: Model, schema: Schema) -> None:
    """Refuse a network that cannot be built, and a sampler or guidance that its training does not allow."""
    from latent_medi.diffusion.conditioning import MetadataConditioner
    from latent_medi.diffusion.guidance import check_guidance
    from latent_medi.diffusion.objective import settings_of
    from latent_medi.diffusion.samplers import check_sampler
    from latent_medi.features.encoders import load_encoder
    from latent_medi.training.finetune.transfer import inherited_objective, open_source

    if model in e.guided:
        classifier = e.classifier(model)
        classifier.check()
        _check_shared(e, f"models.{model.name}.classifier", classifier.global_batch)
        _check_length(e, "classifier", Path(classifier.out), classifier.training().total_images, ("classifier",))
    generate = config.make(GenerateSettings, e.generation(model), "generate") if model.entry.sample else None
    if model.source is not None:
        if generate:
            check_sampler(settings_of(model.source.scheduler or {}), generate.sampler)
            check_guidance(generate.guidance, model.source.conditioner)
        return
    settings = config.make(TrainSettings, model.training or {}, model.name)
    settings.check()
    _check_shared(e, f"models.{model.name}", settings.global_batch)
    _check_length(e, "train", model.out, settings.total_images, PRODUCTS)
    if settings.preview_encoder:
        load_encoder(settings.preview_encoder, settings.preview_weights or None)
    if model.entry.data and model.entry.data != CORPUS:  # of a corpus they are left out
        _warn_of_shared_patients(e, model)
    if settings.init_from and (model.parent is None or model.parent.source is not None):
        objective = inherited_objective(open_source(settings.init_from), settings)
        if generate:  # what a transferred conditioner allows is known when it is made
            check_sampler(objective, generate.sampler)
        return
    settings.model.resolved()
    if generate is None or model.parent is not None:
        return
    check_sampler(settings.objective, generate.sampler)
    known = schema if settings.model.fields is None else schema.subset(settings.model.fields)
    conditioner = None
    if known.names:  # of any width: only the names of its fields matter here
        patterns = dataclasses.asdict(settings.dropout)
        conditioner = MetadataConditioner(known.to_dict(), 1, fusion="additive", dropout_patterns=patterns)
    check_guidance(generate.guidance, conditioner)


def _check_shared(e: Experiment, name: str, global_batch: int) -> None:
    """Refuse a batch of which the launched processes cannot take equal parts."""
    if global_batch % e.where.processes:
        raise UserError(
            f"{name} has a global_batch of {global_batch}, which {e.where.processes} processes cannot share equally.",
            "Choose launch_processes, or a global_batch, such that it is a multiple.",
        )


def _check_length(e: Experiment, stage: str, out: Path, images: int, products: Sequence[str]) -> None:
    """Refuse a run that is to be longer and cannot be continued, before the experiment is recorded as the longer."""
    if e.has(stage) and out not in e.stages.to_remove(stage):
        check_can_continue(out, images, products)


def _warn_of_shared_patients(e: Experiment, model: Model) -> None:
    """Warn where a dataset of its own has patients whom the experiment does not train on."""
    data, part = training_data(e.settings, model.entry)
    other, own = PatchDataset.open(data), PatchDataset.open(e.data)
    rows = other.rows({SPLIT_PREFIX + part: "train"}) if part else slice(None)
    split = SPLIT_PREFIX + e.settings.split
    kept_out = own.index["patient"][own.index[split] != "train"] if split in own.index else own.index["patient"]
    if shared := sorted(set(other.index["patient"].iloc[rows]) & set(kept_out)):
        log.warning(
            "%s is trained on %d patients of %s, such as %s, whom split %r of %s keeps out of training.",
            model.name,
            len(shared),
            data,
            shared[0],
            e.settings.split,
            e.data,
        )


def _check_selection(e: Experiment) -> None:
    from latent_medi.features.encoders import load_encoder
    from latent_medi.selection.inputs import check_settings

    settings = e.selection(e.sampled[0].name)
    check_settings(settings)
    if not e.selects_by_classifier:
        load_encoder(settings.encoder, settings.weights or None)


def _check_classifiers(e: Experiment) -> None:
    """Refuse image classifiers that cannot be trained on these data."""
    from latent_medi.image_classifier.data import open_parts

    settings = e.comparison()
    settings.check()
    _check_shared(e, "image_classifier", settings.global_batch)
    open_parts(dataclasses.replace(settings, synthetic={}, selection=""))
