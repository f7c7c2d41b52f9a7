"""Settings of the evaluation; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from latent_medi.core.paths import PathText
from latent_medi.core.settings import NonNegativeInt, Range, Settings, UnitInterval


@dataclass
class CnnSettings(Settings):
    """A small network that is trained on pixels, with the same number of steps in every arm.

    Args:
        network: Name of a torchvision classifier such as "resnet18", or "encoder" to fine-tune the evaluated encoder
            end to end.
        weights: File with a state dict to start a torchvision network from, its last layer aside; empty starts from
            random weights.
        size: Side in pixels that patches are resized to for a torchvision network; 0 keeps their own.
        steps: Optimiser steps in all; pre-training and fine-tuning take half each.
        batch: Patches per step.
        learning_rate: Highest learning rate of AdamW; it falls to zero along a cosine.
        weight_decay: Of AdamW.
        flips: Turn each training patch by a multiple of 90° and flip it at random.
        seeds: Networks per arm, each with its own initial weights, order and draw of added patches.
    """

    network: str = "resnet18"
    weights: PathText = ""
    size: int = 0
    steps: int = 600
    batch: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    flips: bool = True
    seeds: int = 5


@dataclass
class MediProtocolSettings(Settings):
    """MeDi's downstream comparison: a few sites, few real patches, and synthetic ones in proportion.

    Args:
        ratios: Synthetic patches per real one.
        max_real: Real training patches per class, at most; 0 takes all. Several are swept.
        sites: Number of training sites, drawn at random by seed; 0 takes all. Several are swept.
        seeds: Runs with seeds 0 to n − 1.
    """

    ratios: list[float] = field(default_factory=lambda: [0.0, 0.5, 1.0])
    max_real: list[int] = field(default_factory=lambda: [0])
    sites: list[int] = field(default_factory=lambda: [0])
    seeds: int = 5


@dataclass
class HistoDiffusionProtocolSettings(Settings):
    """HistoDiffusion's comparison: growing shares of synthetic patches, selected or random.

    Args:
        percent: Synthetic patches per 100 real ones of the same class.
        selection: Name of the selection, without "selected_"; empty takes the first that a dataset has.
        seeds: Runs with seeds 0 to n − 1, for the random choice and for a network's initial weights.
    """

    percent: list[float] = field(default_factory=lambda: [50.0, 100.0, 300.0])
    selection: str = ""
    seeds: int = 5


@dataclass
class EvaluateSettings(Settings):
    """The datasets of an evaluation and what is computed.

    Args:
        real: Folder of the real dataset; its split column names training, probe and test patches.
        synthetic: Folder of each synthetic set by its name. The model of "medi" is conditioned on the metadata, that of
            "cls" on the class alone.
        candidate: Name of the synthetic set that the verdict is about; empty takes "medi" if there is one, otherwise
            the first. The others are its baselines, "cls" or the first of them that of the ratios.
        selected: Column of a selection by synthetic set, such as selected_best: only the patches that it chose take
            part.
        out: Folder for metrics.json, predictions.csv, the reference statistics and the feature cache.
        held_out: Combinations without a training patch, each a mapping of field to value. May be empty with
            downstream=false.
        unseen: Whether the combinations of held_out must be without a training patch; false to evaluate combinations
            that training has few of.
        by_fields: Fields whose combinations are compared one by one, such as [[class, site]].
        encoders: Names or folders of encoders; the first gives the headline.
        weights: Weight file or folder by encoder name, for encoders that need one.
        colour_free: Also use each encoder on the haematoxylin channel alone.
        split: Name of the split column, without "split_".
        train_value: Split value of training patches (seen combinations only).
        probe_value: Split value of further real patients, held-out combinations included: they train the linear probes
            and the oracle, and give the real-vs-real distances.
        test_value: Split value of the test patients.
        site_field: Field that names the hospital.
        protocol: "default", or "paper" to add raw Fréchet distances where they are rank-deficient, with a label.
        seed: Seed of every subsample and resample.
        repeats: Draws of added patches per downstream arm; those without a draw are the same each time.
        resamples: Patient resamples for the intervals.
        real_splits: Random splits of real patients into two groups, for the range of each measure between real
            patients; 0 leaves that out.
        regularisation: C of the logistic regressions (inverse strength, standardised features). 0 chooses it per
            encoder by cross-validation on the real training patches alone, the same for every downstream arm; the
            probes of the adherence then use 1.
        added_per_cell: Patches added per held-out cell in every downstream arm; 0 takes as many as the synthetic arms
            have, at most the median count of the seen cells.
        downstream: Train and compare the downstream classifiers.
        memorisation: Find copies of training patches, and samples that are too near to training patients.
        max_copy_rate: Largest share, 0 to 1, of a synthetic set's patches that may be copies of training patches. With
            more the command fails, after everything is written. 1 never fails.
        downstream_arms: Names of the arms to train; empty for all that can take part.
        stain_jitter: σ of the stain augmentation: each stain's concentration is multiplied by 1 ± σ and shifted by
            ± σ/10 in decadic optical density.
        classifier: "probe" (linear, on frozen features) or "cnn" (a small network trained on the pixels).
        cnn: The small network.
        downstream_protocol: "default"; or also "medi" or "histodiffusion", a published protocol, into
            metrics["protocols"].
        medi_protocol: Sizes for "medi".
        histodiffusion_protocol: Sizes for "histodiffusion".
        patient_names: Use the dataset's names of real patients and patches in metrics.json and the report; otherwise
            numbers, which only the dataset's owner can resolve. predictions.csv has the names either way.
        device: Torch device of the encoders; empty takes a GPU if there is one.
        batch: Patches per forward pass of the encoders.
        cache: Folder of the feature cache; empty means inside ``out``.
    """

    real: PathText = ""
    synthetic: dict[str, PathText] = field(default_factory=dict)
    candidate: str = ""
    selected: dict[str, str] = field(default_factory=dict)
    out: PathText = "runs/evaluation"
    held_out: list[dict[str, str]] = field(default_factory=list)
    unseen: bool = True
    by_fields: list[list[str]] = field(default_factory=list)
    encoders: list[PathText] = field(default_factory=lambda: ["phikon-v2"])
    weights: dict[str, PathText] = field(default_factory=dict)
    colour_free: bool = True
    split: str = "main"
    train_value: str = "train"
    probe_value: str = "probe"
    test_value: str = "test"
    site_field: str = "site"
    protocol: Literal["default", "paper"] = "default"
    seed: int = 0
    repeats: int = 5
    resamples: int = 200
    real_splits: NonNegativeInt = 60
    regularisation: float = 1.0
    added_per_cell: int = 0
    downstream: bool = True
    memorisation: bool = True
    max_copy_rate: UnitInterval = 1.0
    downstream_arms: list[str] = field(default_factory=list)
    stain_jitter: float = 0.2
    classifier: str = "probe"
    cnn: CnnSettings = field(default_factory=CnnSettings)
    downstream_protocol: str = "default"
    medi_protocol: MediProtocolSettings = field(default_factory=MediProtocolSettings)
    histodiffusion_protocol: HistoDiffusionProtocolSettings = field(default_factory=HistoDiffusionProtocolSettings)
    patient_names: bool = False
    device: str = ""
    batch: int = 128
    cache: PathText = ""

    RENAMED: ClassVar = {"deals": "real_splits", "cells": "by_fields"}


@dataclass
class FloorsSettings(Settings):
    """What is measured on real patients alone.

    Args:
        data: Folder of the real dataset; all its patches take part, whatever their split.
        out: Folder for floors.json, floors.csv and the feature cache.
        encoders: Names or folders of encoders.
        weights: Weight file or folder by encoder name, for encoders that need one.
        colour_free: Also use each encoder on the haematoxylin channel alone.
        site_field: Field that names the hospital.
        fields: Categorical fields for further linear probes, besides class and site.
        real_splits: Random splits of patients into two groups, 20 or more.
        seed: Seed of the splits.
        regularisation: C of the linear probes (inverse strength, standardised features).
        device: Torch device of the encoders; empty takes a GPU if there is one.
        batch: Patches per forward pass of the encoders.
        cache: Folder of the feature cache; empty means inside ``out``.
    """

    data: PathText = ""
    out: PathText = "runs/floors"
    encoders: list[PathText] = field(default_factory=lambda: ["phikon-v2"])
    weights: dict[str, PathText] = field(default_factory=dict)
    colour_free: bool = True
    site_field: str = "site"
    fields: list[str] = field(default_factory=list)
    real_splits: Annotated[int, Range(20)] = 40
    seed: int = 0
    regularisation: float = 1.0
    device: str = ""
    batch: int = 128
    cache: PathText = ""

    RENAMED: ClassVar = {"deals": "real_splits"}
