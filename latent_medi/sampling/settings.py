"""Settings of planning and generation; import no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from dataclasses import field as dataclass_field
from typing import Literal

from latent_medi.core.paths import PathText
from latent_medi.diffusion.settings import (
    AutoguidanceSettings,
    ClassifierGuidanceSettings,
    GuidanceSettings,
    SamplerSettings,
)


@dataclass
class PlanSettings:
    """What to generate. A goal chooses combinations and how many images each wants; the number is per_cell, a ratio to
    the real data, or whatever a budget allows; floor, cap and budget then bound it.

    Args:
        data: Dataset folder whose gaps are to be filled, or a CSV, TSV or Parquet table with a row per slide or patch.
        out: The plan's file, .csv or .parquet.
        goal: "fill_unseen" plans combinations without a patch; "each" all alike; "union" every class at every site that
            any of the classes was seen at, "separate" every class at its own sites (MeDi's two modes; further fields
            count as part of the site); "balance" tops every combination up to the same number; "within_site" tops every
            class up to the largest one of its site; "target" reaches the numbers of a table. Empty means "target" if
            there is such a table, otherwise "fill_unseen".
        per_cell: Images per combination; for "balance" the number to reach, 0 meaning that of the largest combination.
        ratio: Images in all, as a multiple of the real ones (0.5, 1, 2, …), rounded down; 0 for none. All combinations
            of the goal share them evenly, as in MeDi's study; "balance" and "within_site" share them in proportion to
            what each combination lacks, and evenly once nothing is lacking. Real ones are all rows that `only` leaves,
            those with an unknown value too.
        spread: How "separate" shares a ratio: "even", or "real" in proportion to the combination's real images, so that
            ratio=1 mirrors the data (as for MeDi's Fréchet distances).
        target: Table with columns of fields and `count`, the number to reach by combination (real and planned).
        fields: Class and categorical fields to combine; empty means all, those of the target's columns, or class and
            site of a table.
        only: Values to plan for by field, such as {class: [LUAD, LUSC]}; fields not named keep all. Verdicts still rest
            on all data.
        max_images: Budget in images; 0 for none.
        gpu_hours: Budget in hours of GPUs added up, at images_per_s each; 0 for none. The smaller budget holds.
        images_per_s: Images per second of one GPU, as `latent-medi sample` prints it.
        floor: Fewest images of a combination that is planned at all.
        cap: Most images of a combination; 0 for none.
        force_unidentifiable: Also plan combinations whose effects the data cannot tell apart; otherwise they are listed
            with count 0.
        draw_from: Whose values of a continuous field are drawn. "cell": those of the row's combination, if
            thin_patients patients there have one, else of its class, else of all; written into the plan, which says
            whose they are. "all": those of all that the model was trained on.
        split: Named split that defines what the model has seen; empty means every row. A table without the column
            split_main is taken whole.
        split_value: The part of the split.
        class_field: Class column of a table; a dataset folder says itself.
        site_field: The site's field: what tss_table maps, and the columns of the summary.
        continuous: Columns of numbers of a table, such as [age_at_index].
        patient_field: Patient column of a table; empty for patient or case_submitter_id, or the TCGA barcode's.
        slide_field: Slide column of a table; empty for slide or slide_submitter_id, or each row by itself.
        tss_table: GDC's table of TCGA tissue source sites; the site column's codes become institutions.
        patches_per_row: Real patches that a row of a table stands for.
        thin_patients: Combinations with fewer patients are called thin.
        figure: PNG to write: real patches by class and site, before and after.
        seed: Seed of the whole plan.
    """

    data: PathText = ""
    out: PathText = ""
    goal: Literal["", "fill_unseen", "each", "union", "separate", "balance", "within_site", "target"] = ""
    per_cell: int = 0
    ratio: float = 0.0
    spread: Literal["even", "real"] = "even"
    target: PathText = ""
    fields: list[str] = field(default_factory=list)
    only: dict[str, list[str]] = field(default_factory=dict)
    max_images: int = 0
    gpu_hours: float = 0.0
    images_per_s: float = 0.0
    floor: int = 0
    cap: int = 0
    force_unidentifiable: bool = False
    draw_from: Literal["cell", "all"] = "cell"
    split: str = "main"
    split_value: str = "train"
    class_field: str = "class"
    site_field: str = "site"
    continuous: list[str] = field(default_factory=list)
    patient_field: str = ""
    slide_field: str = ""
    tss_table: PathText = ""
    patches_per_row: int = 1
    thin_patients: int = 10
    figure: PathText = ""
    seed: int = 0


@dataclass
class GenerateSettings:
    """How a plan becomes a dataset folder.

    Args:
        plan: The plan, .csv or .parquet.
        model: Model folder.
        out: Dataset folder to write.
        adapters: Folders (or hub ids) of low-rank adapters to stack on the model, in order.
        adapter_scales: Scale of each adapter's update, 1 as trained; empty means 1 for each.
        sampler: The sampler and its steps.
        guidance: Guidance scales per field.
        autoguidance: Guidance by a weaker version of the model.
        classifier: Guidance by a classifier of noisy latents.
        device_batch: Images per forward pass; short batches are padded to it, so that results do not depend on the
            number of processes. Halved, with a warning, when the device's memory is full.
        patches_per_shard: Patches per tar, the unit of work of a process and of a resume.
        codec: "png" (exact), "jpg" or "webp"; that of the real patches, where both are compared.
        precision: Arithmetic inside the denoiser: "fp32", "bf16" or "fp16".
        ignore: Columns of the plan that the model does not know and that are left out knowingly, such as the site for
            a class-only model.
        name: The dataset's name; empty means the folder's name.
        mpp: µm per pixel of the patches; 0 means what the model was trained on.
        n: Without a plan: images of the one combination in ``fields``.
        fields: Without a plan: what the model is told, value by field; on the command line also --class VALUE and so
            on.
        seed: Without a plan: seed of the images.
        grid: PNG to write, a line of up to 16 patches for each of the plan's first 24 rows. With n, up to 384 patches
            in lines of 16; out may then be left out.
    """

    plan: PathText = ""
    model: PathText = ""
    out: PathText = ""
    adapters: list[PathText] = field(default_factory=list)
    adapter_scales: list[float] = field(default_factory=list)
    sampler: SamplerSettings = field(default_factory=SamplerSettings)
    guidance: GuidanceSettings = field(default_factory=GuidanceSettings)
    autoguidance: AutoguidanceSettings = field(default_factory=AutoguidanceSettings)
    classifier: ClassifierGuidanceSettings = field(default_factory=ClassifierGuidanceSettings)
    device_batch: int = 64
    patches_per_shard: int = 512
    codec: Literal["png", "jpg", "webp"] = "png"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    ignore: list[str] = field(default_factory=list)
    name: str = ""
    mpp: float = 0.0
    n: int = 0
    fields: dict[str, str] = field(default_factory=dict)
    seed: int = 0
    grid: PathText = ""


@dataclass
class GridSettings:
    """A picture of what a model makes.

    Args:
        model: Model folder.
        out: PNG to write.
        kind: "cells": a cell per pair of values of ``rows`` × ``columns``; "blend": from ``start`` to ``stop`` of a
            field in even steps; "trajectory": a sample's way out of the noise.
        n: Patches per cell, or rows of a blend or trajectory; each from its own seed.
        seed: Seed of the first; the same seeds in every cell.
        rows: Field down the side of "cells".
        columns: Field across the top of "cells".
        field: Field that "blend" changes.
        start: Its first value.
        stop: Its last value.
        steps: Columns of "blend" and "trajectory".
        fields: What the model is told beside, value by field.
        sampler: The sampler and its steps.
        guidance: Guidance scales per field.
        device_batch: Images per forward pass.
    """

    model: PathText
    out: PathText
    kind: Literal["cells", "blend", "trajectory"] = "cells"
    n: int = 1
    seed: int = 0
    rows: str = "class"
    columns: str = "site"
    field: str = "site"
    start: str = ""
    stop: str = ""
    steps: int = 8
    fields: dict[str, str] = dataclass_field(default_factory=dict)
    sampler: SamplerSettings = dataclass_field(default_factory=SamplerSettings)
    guidance: GuidanceSettings = dataclass_field(default_factory=GuidanceSettings)
    device_batch: int = 16

    def problems(self) -> list[str]:
        """What does not go together, in words."""
        found = [f"{k} is {getattr(self, k)}, and at least {n}" for k, n in
                 (("n", 1), ("steps", 2), ("device_batch", 1)) if getattr(self, k) < n]  # fmt: skip
        if self.kind == "cells" and self.rows == self.columns:
            found.append(f"rows and columns are both {self.rows!r}")
        if self.kind == "blend" and not (self.start and self.stop):
            found.append("a blend needs start and stop")
        twice = {"cells": {self.rows, self.columns}, "blend": {self.field}}.get(self.kind, set()) & set(self.fields)
        if twice:
            found.append(f"fields gives {', '.join(sorted(twice))}, which the picture varies")
        return found


Criterion = Literal["centroid", "confidence", "outliers", "copies", "duplicates"]


@dataclass
class SelectSettings:
    """Which patches of a synthetic dataset are worth keeping, judged by what real training patches look like.

    Args:
        data: Folder of the synthetic dataset. It gains columns, and loses nothing.
        real: Folder of the real dataset.
        name: Name of the selection: the columns are selected_NAME, selected_NAME_control and selected_NAME_score.
        split: Named split of the real dataset.
        split_value: Its part to learn from; a training part, test patients are refused.
        cells: Fields whose combinations are the cells to choose from; empty means every class and categorical field
            that the synthetic patches state.
        fields: Fields that centroids and confidence judge; empty means the class alone, or those of cells where they
            lack it. A field that real patches hardly show drowns the others in noise.
        criteria: What a patch must pass. "centroid": in each group of fields, the nearest centroid of real patches is
            that of its own values. "confidence": a probe of each field finds the value asked for. "outliers": not too
            far from every real patch. "copies": not too near to one, and no real patch turned or mirrored.
            "duplicates": not too near to a better synthetic one, and not one turned or mirrored.
        centroids: Groups of fields; a centroid belongs to a combination of a group's values. Empty means each of fields
            by itself. A combination without real training patches has no centroid, so a group must not hold it.
        adjust: Take what the other fields do to the features (least squares over real training patches) out of them
            before a field is judged. Without it, combinations that training lacks are refused for their rarity:
            a probe of the class that never saw it at a site takes the site for evidence against it.
        confidence: Least probability of each value asked for, 0 to 1, for the criterion of that name.
        outliers: Quantile, 0 to 1, of the distances of real patches to the nearest one of another patient (and, for a
            cell without real patches, of another cell): a patch farther from the nearest real one is an outlier.
        copies: Quantile of the distances between patients: a patch nearer to a real one is a copy.
        duplicates: Quantile of the distances between patients: of two synthetic patches nearer to each other, the worse
            one is a duplicate.
        rank: What "best" means: "confidence" (mean log probability over fields), "centroid" (mean squared distance to
            the own centroids) or "distance" (to the nearest real patch). selected_NAME_score holds it, lower is better.
        per_cell: Patches to choose per cell at most; 0 for no such bound.
        share: Share of a cell's patches, above 0 to 1, to choose at most, rounded up.
        control: Also choose as many per cell at random, from all of its patches.
        encoder: Name of an encoder (docs/evaluation.md lists them), a folder with one, or ``module:callable``.
        weights: Weight file or folder for encoders that need one; empty means the hub's cache.
        colour_free: Judge by the haematoxylin channel alone.
        regularisation: C of the probes (inverse strength, standardised features); 0 chooses it by cross-validation over
            patients.
        most: Real patches that a probe learns from, and whose distances give the quantiles, at most; evenly by patient.
        seed: Seed of the control and of every subsample.
        batch: Patches per forward pass.
        device: Torch device, such as "cpu" or "cuda"; empty takes a GPU if there is one.
        workers: Threads that decode patches for the comparison of pixels; 0 decodes in the main thread.
        cache: Folder of the feature cache; empty means "features" beside the synthetic dataset.
        replace: Whether another selection of that name may be overwritten.
    """

    data: PathText = ""
    real: PathText = ""
    name: str = "best"
    split: str = "main"
    split_value: str = "train"
    cells: list[str] = field(default_factory=list)
    fields: list[str] = field(default_factory=list)
    criteria: list[Criterion] = field(default_factory=lambda: ["outliers", "copies", "duplicates"])
    centroids: list[list[str]] = field(default_factory=list)
    adjust: bool = True
    confidence: float = 0.5
    outliers: float = 0.99
    copies: float = 0.001
    duplicates: float = 0.001
    rank: Literal["confidence", "centroid", "distance"] = "confidence"
    per_cell: int = 0
    share: float = 0.5
    control: bool = True
    encoder: PathText = "phikon-v2"
    weights: PathText = ""
    colour_free: bool = False
    regularisation: float = 0.0
    most: int = 10_000
    seed: int = 0
    batch: int = 128
    device: str = ""
    workers: int = 2
    cache: PathText = ""
    replace: bool = False


@dataclass
class TranslateSettings:
    """Real patches as another hospital (or another value of any field) would have made them.

    Args:
        data: Dataset folder with the patches to translate.
        model: Model folder.
        out: Dataset folder to write.
        to: New value by field, as in ``--to site=radboud``; the other fields stay what they are.
        where: Value, or list of values, by field or column of the index: which patches. Empty means all.
        split: Named split to choose patches by; empty means every row. A training set for a study may only hold
            translations of its training patients.
        split_value: The part of the split to translate.
        stain_value: The part of the split whose patches say what each site's stain is, for the mappings shown beside.
        limit: Patches to translate at most, patients in equal parts; 0 means all.
        seed: Seed of the choice when there is a limit, and of the choices for measures and figure.
        synthetic: Whether synthetic patches may be translated too.
        adapters: Folders (or hub ids) of low-rank adapters to stack on the model, in order.
        adapter_scales: Scale of each adapter's update, 1 as trained; empty means 1 for each.
        strength: Share of the noise schedule to go back, above 0 and up to 1: how much may change.
        steps: DDIM steps of the whole schedule, dividing the training timesteps; strength × steps of them are taken
            back and forth.
        refinements: Further network evaluations per step back, which bring the round trip closer to the input.
        guidance: Guidance on the way forth.
        device_batch: Images per forward pass; short batches are padded to it, so that results do not depend on the
            number of processes.
        patches_per_shard: Patches per tar, the unit of work of a process and of a resume.
        codec: "png" (exact), "jpg" or "webp"; that of the real patches, where both are compared.
        name: The dataset's name; empty means the folder's name.
        measured: Patches at most whose structure is measured beside the rivals' when all is done; 0 measures nothing.
        figure: PNG to write, with a row per patch: original, round trip, no-op, stain mappings, translated.
        figure_rows: Patches in the figure, of different patients as far as possible.
    """

    data: PathText = ""
    model: PathText = ""
    out: PathText = ""
    to: dict[str, str | float] = field(default_factory=dict)
    where: dict[str, str | list[str]] = field(default_factory=dict)
    split: str = "main"
    split_value: str = "train"
    stain_value: str = "train"
    limit: int = 0
    seed: int = 0
    synthetic: bool = False
    adapters: list[PathText] = field(default_factory=list)
    adapter_scales: list[float] = field(default_factory=list)
    strength: float = 1.0
    steps: int = 20
    refinements: int = 1
    guidance: GuidanceSettings = field(default_factory=GuidanceSettings)
    device_batch: int = 64
    patches_per_shard: int = 512
    codec: Literal["png", "jpg", "webp"] = "png"
    name: str = ""
    measured: int = 256
    figure: PathText = ""
    figure_rows: int = 8
