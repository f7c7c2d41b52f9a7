"""Settings of the evaluation; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from latent_medi.core.kinds import Range
from latent_medi.core.paths import PathText
from latent_medi.core.settings import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Settings,
    UnitInterval,
)


@dataclass
class CnnSettings(Settings):
    """A small network that is trained on pixels, with the same number of steps for every training set.

    Args:
        network: Name of a torchvision classifier such as "resnet18", or "encoder" to fine-tune the evaluated encoder
            end to end.
        weights: File with a state dict to start a torchvision network from, its last layer aside; empty starts from
            random weights.
        size: Width and height in pixels that patches are resized to for a torchvision network; 0 keeps their own.
        steps: Optimiser steps; pre-training and fine-tuning take half each.
        batch: Patches per step.
        learning_rate: Highest learning rate of AdamW; it falls to zero along a cosine.
        weight_decay: Of AdamW.
        flips: Turn each training patch by a multiple of 90° and flip it at random.
        seeds: Networks per training set, each with its own initial weights, order and draw of added patches.
    """

    network: str = "resnet18"
    weights: PathText = ""
    size: NonNegativeInt = 0
    steps: PositiveInt = 600
    batch: PositiveInt = 64
    learning_rate: PositiveFloat = 1e-3
    weight_decay: NonNegativeFloat = 1e-4
    flips: bool = True
    seeds: PositiveInt = 5


@dataclass
class MediProtocolSettings(Settings):
    """MeDi's downstream protocol: a few sites, few real patches, and synthetic ones in proportion.

    Args:
        tasks: Classes by name of a task, such as {nsclc: [LUAD, LUSC]}; empty is one task of all classes.
        ratios: Synthetic patches per real one.
        pools: Samples that are drawn from: "union" all of the task's classes; "separate" those at sites where training
            has the class. A set without sites has one pool; as "separate" it has the classes in the training patches'
            proportions.
        max_real: Real training patches per class, at most; 0 takes all.
        sites: Number of training sites, drawn at random by seed such that every class of a task has one; 0 takes
            all, and their own number then adds nothing.
        seeds: Runs with seeds 0 to n − 1.
    """

    tasks: dict[str, list[str]] = field(default_factory=dict)
    ratios: list[NonNegativeFloat] = field(default_factory=lambda: [0.0, 0.5, 1.0])
    pools: list[Literal["union", "separate"]] = field(default_factory=lambda: ["union"])
    max_real: list[NonNegativeInt] = field(default_factory=lambda: [0])
    sites: list[NonNegativeInt] = field(default_factory=lambda: [0])
    seeds: PositiveInt = 5


@dataclass
class HistoDiffusionProtocolSettings(Settings):
    """HistoDiffusion's downstream protocol: growing shares of synthetic patches, selected or random.

    Args:
        percent: Synthetic patches per 100 real ones of the same class.
        selection: Name of the selection, without "selected_"; empty takes the first that a dataset has.
        seeds: Runs with seeds 0 to n − 1, of the random choice and of a network's initial weights.
    """

    percent: list[NonNegativeFloat] = field(default_factory=lambda: [50.0, 100.0, 300.0])
    selection: str = ""
    seeds: PositiveInt = 5


@dataclass
class EvaluateSettings(Settings):
    """An evaluation of synthetic sets on real patients.

    Args:
        real: Folder of the real dataset; its split column names training, reference and test patches.
        synthetic: Folder of each synthetic set by name.
        candidate: Name of the synthetic set that the verdict is about; empty takes "medi" if there is one, otherwise
            the first. The others are its baselines; ratios are taken to "cls", or to the first of them.
        further_seeds: By synthetic set the folders of further ones: samples of the same model and plan, trained with
            other seeds. Repeats take the seeds in turn; with three or more seeds in all, intervals are over
            patients and seeds, and the verdict speaks of the method. Distances, adherence, stain and copies are of the
            first alone.
        selected: By synthetic set the column of a selection, such as selected_best: only the patches that it chose take
            part.
        out: Folder for metrics.json, predictions.csv, the reference statistics and the feature cache.
        held_out: Combinations without a training patch, each a mapping of field to value. May be empty with
            downstream=false. Or the word "split": those that the split's recipe holds out, else every class × site
            with test patches and no training patch; those with fewer than 10 test patients or 20 test patches, or
            that training cannot identify, are listed and not evaluated.
        unseen: Whether the combinations of held_out must be without a training patch; false allows combinations of
            which training has few.
        by_fields: Lists of fields, such as [[class, site]]: distances are also computed for each combination of their
            values.
        references: What samples are compared with: "test", the test patients, without which there is no evaluation, and
            also "train", the images that the models were trained on, per class and per class and site, as published
            distances do. A generator that copies is nearest to its training images.
        encoders: Names or folders of encoders; the first gives the headline.
        weights: Weight file or folder by encoder name, for encoders that need one.
        colour_free: Also use each encoder on the haematoxylin channel alone.
        split: Name of the split column, without "split_".
        train_value: Split value of training patches (seen combinations only).
        probe_value: Split value of further real patients, held-out combinations included. The linear probes of the
            adherence are trained on them, the oracle on them and the training patients; they give the real-vs-real
            distance.
        test_value: Split value of the patients that all scores are computed on.
        only: Values by field, such as {class: [LUAD, LUSC]}: only real and synthetic patches with one of them take
            part, also as training patches that samples may be copies of. Fields that are not named keep all, and so do
            fields that a model was not conditioned on.
        site_field: Field that names the hospital; empty if the data have none: all that compares sites is left out.
        protocol: "default", or "paper" to add raw Fréchet distances, labelled "rank-deficient", where there are too few
            patches for one.
        seed: Seed of every subsample.
        repeats: Draws of added patches per training set, which show how much another draw would change; those without a
            draw are built once. With further_seeds as many for each seed, and cnn.seeds instead with classifier=cnn.
        real_splits: Number of random splits of the real patients into two groups. They give, for each measure, the
            range that real patients reach; 0 leaves that out.
        regularisation: C of the logistic regressions (inverse strength, standardised features). With 0,
            cross-validation on the real training patches alone chooses it per encoder, the same for every training set,
            and the linear probes of the adherence use 1.
        added_per_combination: Patches that each training set adds per held-out combination; 0 takes half of the
            smallest synthetic set's, at most the median count of the class × site cells that have training patches.
            With more than four fifths of a set's, its accuracies have no interval, unless there are three training
            seeds.
        downstream: Train and compare the downstream classifiers.
        projection: Plane of the report's scatter plots of features: "components", two principal components of real
            training patches, or "tsne", which puts similar patches near each other.
        memorisation: Look for copies of training patches, and for samples too near to training patients.
        max_copy_rate: Largest share, 0 to 1, of a synthetic set's patches that may be copies of training patches; with
            more the command fails, after everything is written. 1 lets all pass.
        training_sets: Names of the training sets to compare; empty for all that can be built.
        stain_jitter: σ of the stain augmentation: each stain's concentration is multiplied by 1 ± σ and shifted by
            ± σ/10 in decadic optical density.
        classifier: Downstream classifier: "linear", a linear probe on frozen features, or "cnn", a small network that
            is trained on the pixels.
        cnn: The small network.
        downstream_protocol: "default"; or also "medi" or "histodiffusion", a published protocol, into
            metrics["protocols"].
        medi_protocol: Sizes for "medi".
        histodiffusion_protocol: Sizes for "histodiffusion".
        patient_names: Name real patients and patches in metrics.json and the report as the dataset does; otherwise they
            are numbers, by which only who has the dataset can find them. predictions.csv has the names either way.
        device: Torch device of the encoders; empty takes a GPU if there is one.
        batch: Patches per forward pass of the encoders.
        cache: Folder of the feature cache; empty means inside ``out``.
    """

    COMMON: ClassVar = "real synthetic held_out out encoders weights split candidate only downstream repeats"
    EXAMPLES: ClassVar = (
        "latent-medi evaluate real=my/data synthetic.medi=my/samples held_out=split out=my/evaluation",
        "latent-medi evaluate real=my/data synthetic.medi=my/samples downstream=false out=my/distances",
    )

    RENAMED: ClassVar = {
        "cells": "by_fields",
        "resamples": "Leave it out: intervals have no random draws.",
        "deals": "real_splits",
        "added_per_cell": "added_per_combination",
        "downstream_arms": "training_sets",
        "classifier=probe": "classifier=linear",
    }

    real: PathText = ""
    synthetic: dict[str, PathText] = field(default_factory=dict)
    candidate: str = ""
    further_seeds: dict[str, list[PathText]] = field(default_factory=dict)
    selected: dict[str, str] = field(default_factory=dict)
    out: PathText = "runs/evaluation"
    held_out: Literal["split"] | list[dict[str, str]] = field(default_factory=list)
    unseen: bool = True
    by_fields: list[list[str]] = field(default_factory=list)
    references: list[Literal["test", "train"]] = field(default_factory=lambda: ["test"])
    encoders: list[PathText] = field(default_factory=lambda: ["phikon-v2"])
    weights: dict[str, PathText] = field(default_factory=dict)
    colour_free: bool = True
    split: str = "main"
    train_value: str = "train"
    probe_value: str = "probe"
    test_value: str = "test"
    only: dict[str, list[str]] = field(default_factory=dict)
    site_field: str = "site"
    protocol: Literal["default", "paper"] = "default"
    seed: int = 0
    repeats: PositiveInt = 10
    real_splits: NonNegativeInt = 60
    regularisation: NonNegativeFloat = 1.0
    added_per_combination: NonNegativeInt = 0
    downstream: bool = True
    projection: Literal["components", "tsne"] = "components"
    memorisation: bool = True
    max_copy_rate: UnitInterval = 1.0
    training_sets: list[str] = field(default_factory=list)
    stain_jitter: Annotated[float, Range(0, 1, below=True)] = 0.2
    classifier: Literal["linear", "cnn"] = "linear"
    cnn: CnnSettings = field(default_factory=CnnSettings)
    downstream_protocol: Literal["default", "medi", "histodiffusion"] = "default"
    medi_protocol: MediProtocolSettings = field(default_factory=MediProtocolSettings)
    histodiffusion_protocol: HistoDiffusionProtocolSettings = field(default_factory=HistoDiffusionProtocolSettings)
    patient_names: bool = False
    device: str = ""
    batch: PositiveInt = 128
    cache: PathText = ""


@dataclass
class FloorsSettings(Settings):
    """What an evaluation can reach, measured on real patients alone.

    Args:
        data: Folder of the real dataset; all its patches take part, whatever their split.
        only: Values by field, such as {class: [LUAD, LUSC]}: only patches with one of them. Fields that are not named
            keep all.
        out: Folder for floors.json, floors.csv and the feature cache.
        encoders: Names or folders of encoders.
        weights: Weight file or folder by encoder name, for encoders that need one.
        colour_free: Also use each encoder on the haematoxylin channel alone.
        site_field: Field that names the hospital; empty if the data have none.
        fields: Further categorical fields that linear probes are trained for; class and site always are.
        real_splits: Number of random splits of the patients into two groups, 20 or more.
        seed: Seed of the splits.
        regularisation: C of the linear probes (inverse strength, standardised features).
        device: Torch device of the encoders; empty takes a GPU if there is one.
        batch: Patches per forward pass of the encoders.
        cache: Folder of the feature cache; empty means inside ``out``.
    """

    COMMON: ClassVar = "data out encoders weights fields site_field only"
    EXAMPLES: ClassVar = (
        "latent-medi floors my/data encoders='[phikon-v2]' out=my/floors",
        "latent-medi floors runs/demo/data encoders='[demo]'",
    )

    RENAMED: ClassVar = {"deals": "real_splits"}

    data: PathText = ""
    only: dict[str, list[str]] = field(default_factory=dict)
    out: PathText = "runs/floors"
    encoders: list[PathText] = field(default_factory=lambda: ["phikon-v2"])
    weights: dict[str, PathText] = field(default_factory=dict)
    colour_free: bool = True
    site_field: str = "site"
    fields: list[str] = field(default_factory=list)
    real_splits: Annotated[int, Range(20)] = 40
    seed: int = 0
    regularisation: PositiveFloat = 1.0
    device: str = ""
    batch: PositiveInt = 128
    cache: PathText = ""
