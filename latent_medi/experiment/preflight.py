"""What would end an experiment after hours of training, found out before it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from latent_medi.core.errors import UserError
from latent_medi.diffusion.settings import GuidanceSettings, SamplerSettings
from latent_medi.evaluation.settings import EvaluateSettings
from latent_medi.training.settings import TrainSettings

if TYPE_CHECKING:
    from latent_medi.evaluation.cohort.study import Study
    from latent_medi.metadata.schema import Schema
    from latent_medi.training.finetune.transfer import Source


def check_study(judging: EvaluateSettings) -> Study:
    """The real side of an evaluation, opened.

    Raises:
        UserError: Settings that cannot be followed; a split, field or held-out combination that the dataset does not
            have; or a combination that training patches cannot tell anything of.
    """
    from latent_medi.evaluation.cohort.combinations import describe
    from latent_medi.evaluation.cohort.open_study import open_study
    from latent_medi.evaluation.evaluate import check_settings
    from latent_medi.metadata.estimability import verdict

    check_settings(judging)
    if judging.downstream_protocol == "histodiffusion":
        raise UserError(
            "downstream_protocol histodiffusion needs a selection, and an experiment makes none.",
            "After it, `latent-medi select` the samples and `latent-medi evaluate` them with that protocol.",
        )
    study = open_study(dataclasses.replace(judging, synthetic={}, selected={}))
    for combination in study.held_out:
        found = verdict(study.index.iloc[study.shown], combination)
        if found["verdict"] == "unidentifiable":
            raise UserError(
                f"{describe(combination)} cannot be generated from the training patches: {found['reason']}.",
                "Hold out other combinations: `latent-medi audit` tells which can be told apart.",
            )
    return study


def check_training(asked: TrainSettings, guidance: GuidanceSettings, sampler: SamplerSettings, schema: Schema) -> None:
    """Refuse a network that cannot be built, and a sampler or guidance that its training does not allow.

    Args:
        asked: How it will be trained.
        guidance, sampler: How it will be sampled.
        schema: Of the dataset.

    Raises:
        UserError: Says which and why.
    """
    from latent_medi.diffusion.conditioning import MetadataConditioner
    from latent_medi.diffusion.guidance import check_guidance
    from latent_medi.diffusion.samplers import check_sampler
    from latent_medi.training.finetune.transfer import inherited_objective, open_source

    asked.model.resolved()
    if asked.init_from:  # what a transferred conditioner can be asked is known when it is there
        check_sampler(inherited_objective(open_source(asked.init_from), asked), sampler)
        return
    check_sampler(asked.objective, sampler)
    known = schema if asked.model.fields is None else schema.subset(asked.model.fields)
    conditioner = None
    if known.names:  # of any width: only what it knows is looked at
        patterns = dataclasses.asdict(asked.dropout)
        conditioner = MetadataConditioner(known.to_dict(), 1, fusion="additive", dropout_patterns=patterns)
    check_guidance(guidance, conditioner)


def check_model(model: Source, guidance: GuidanceSettings, sampler: SamplerSettings) -> None:
    """The same for a model that is trained already."""
    from latent_medi.diffusion.guidance import check_guidance
    from latent_medi.diffusion.objective import settings_of
    from latent_medi.diffusion.samplers import check_sampler

    check_sampler(settings_of(model.scheduler), sampler)
    check_guidance(guidance, model.conditioner)
