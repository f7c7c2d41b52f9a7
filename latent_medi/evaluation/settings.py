"""Settings of the evaluation; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class EvaluateSettings:
    """What is compared with what.

    Args:
        real: Folder of the real dataset; its split column names training, probe and test patches.
        synthetic: Folder of each synthetic dataset by the name of its arm: "medi" knows the metadata, "cls" the class
            alone.
        selected: By name of an arm the column of a selection, such as selected_best: only the patches that it chose
            take part.
        out: Folder for metrics.json, predictions.csv, the reference statistics and the feature cache.
        held_out: Combinations without a training patch, each a mapping of field to value.
        unseen: Whether the combinations of held_out must be without a training patch; false to judge combinations that
            training has few of.
        cells: Further combinations of fields to judge each by itself, such as [[class, site]].
        encoders: Names or folders of encoders; the first gives the headline.
        weights: Weight file or folder by encoder name, for encoders that need one.
        colour_free: Also use each encoder on the haematoxylin channel alone.
        split: Name of the split column, without "split_".
        train_value: Split value of training patches (seen combinations only).
        probe_value: Split value of further real patients, held-out combinations included: they train the probes and the
            oracle, and give the floor.
        test_value: Split value of the patients that everything is judged on.
        site_field: Field that names the hospital.
        protocol: "default", or "paper" to add raw Fréchet distances where they are rank-deficient, labelled so.
        seed: Seed of every subsample and resample.
        repeats: Draws of added patches per downstream arm.
        resamples: Patient resamples for the intervals.
        deals: How often real patients are dealt into two sides, for the range of each measure that they reach;
            0 leaves that out.
        regularisation: C of the logistic regressions (inverse strength, standardised features).
        added_per_cell: Patches added per held-out cell in every downstream arm; 0 takes as many as the synthetic arms
            have,
            at most the median count of the seen cells.
        downstream: Train and compare the downstream classifiers.
        memorisation: Look for copies of training patches, and for samples too near to training patients.
        max_copy_rate: Largest share, 0 to 1, of an arm's patches that may be copies of training patches; with more the
            command fails, after everything is written. 1 lets all pass.
        device: Torch device of the encoders.
        batch: Patches per forward pass of the encoders.
        cache: Folder of the feature cache; empty means inside ``out``.
    """

    real: str = ""
    synthetic: dict[str, str] = field(default_factory=dict)
    selected: dict[str, str] = field(default_factory=dict)
    out: str = "runs/evaluation"
    held_out: list[dict[str, str]] = field(default_factory=list)
    unseen: bool = True
    cells: list[list[str]] = field(default_factory=list)
    encoders: list[str] = field(default_factory=lambda: ["demo"])
    weights: dict[str, str] = field(default_factory=dict)
    colour_free: bool = True
    split: str = "main"
    train_value: str = "train"
    probe_value: str = "probe"
    test_value: str = "test"
    site_field: str = "site"
    protocol: str = "default"
    seed: int = 0
    repeats: int = 3
    resamples: int = 200
    deals: int = 60
    regularisation: float = 1.0
    added_per_cell: int = 0
    downstream: bool = True
    memorisation: bool = True
    max_copy_rate: float = 1.0
    device: str = "cpu"
    batch: int = 128
    cache: str = ""
