"""Settings of planning; import no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from latent_medi.core.paths import PathText
from latent_medi.core.settings import NonNegativeFloat, NonNegativeInt, PositiveInt, Settings


@dataclass
class PlanSettings(Settings):
    """What to generate. A goal chooses combinations and how many images each wants; the number is per_cell, a ratio to
    the real data, or whatever a budget allows; min_per_cell, max_per_cell and the budget then bound it.

    Args:
        data: Dataset folder whose gaps to fill, or a CSV, TSV or Parquet table with a row per slide or patch.
        out: The plan's file, .csv or .parquet.
        goal: "fill_unseen" plans combinations without a patch; "each" all alike; "all_sites_of_classes" every class at
            every site of any of the classes, "own_sites" every class at its own sites (MeDi's two modes; further fields
            count as part of the site); "balance" raises every combination to the same number; "within_site" raises
            every class to the largest one of its site; "target" reaches the numbers of a table; "tasks" is the plan of
            MeDi's study, both modes in one: every combination as often as the data have it, and each class of a task
            also at the sites of the task's other classes, as often as those have patches there. Empty means "target"
            with a target table, "tasks" with tasks, otherwise "fill_unseen".
        per_cell: Images per combination; for "balance" the number to reach, 0 meaning that of the largest combination.
        ratio: Images in all, as a multiple of the real ones (0.5, 1, 2, …), rounded down; 0 for none. All combinations
            of the goal share them evenly, as in MeDi's study; "balance" and "within_site" share them in proportion to
            what each combination lacks, and evenly once nothing is lacking. Real ones are all rows that `only` leaves,
            those with an unknown value too. For "tasks" it multiplies the number of every combination; 0 is 1.
        spread: How "own_sites" shares a ratio: "even", or "real" in proportion to the combination's real images, so
            that ratio=1 mirrors the data (as for MeDi's Fréchet distances).
        tasks: Classes by name of a task, such as {nsclc: [LUAD, LUSC]}, for the goal "tasks".
        target: Table with columns of fields and `count`, the number to reach by combination (real and planned).
        fields: Class and categorical fields to combine; empty means all, those of the target's columns, or class and
            site of a table. Of a site code (tss) and its institution, empty means only the one that is site_field.
        only: Values to plan for by field, such as {class: [LUAD, LUSC]}; fields not named keep all. Verdicts still rest
            on all data.
        max_images: Budget in images; 0 for none.
        gpu_hours: Budget in hours of GPUs added up, at images_per_s each; 0 for none. The smaller budget holds.
        images_per_s: Images per second of one GPU, as `latent-medi sample` prints it.
        min_per_cell: Least images of a combination that is planned at all.
        max_per_cell: Most images of a combination; 0 for no limit.
        force_unidentifiable: Also plan combinations whose effects the data cannot separate; otherwise they are listed
            with count 0. "tasks" always plans them.
        draw_from: Whose values of a continuous field are drawn. "cell": those of the row's combination, if
            thin_patients patients there have one, else of its class, else of all; the plan's column FIELD_from says
            which. "all": those of all that the model was trained on.
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
        thin_patients: Combinations with fewer patients are called thin, and have too few to draw from (draw_from); so
            are those without a patch that rest on fewer effective patients.
        figure: PNG to write: real patches by class and site, before and after.
        seed: Seed of the whole plan.
    """

    COMMON: ClassVar = "data out goal per_cell ratio target fields only max_images figure"
    EXAMPLES: ClassVar = (
        "latent-medi plan my/data goal=fill_unseen per_cell=90 out=plan.csv",
        "latent-medi plan my/data goal=balance max_images=20_000 out=plan.csv figure=plan.png",
    )

    RENAMED: ClassVar = {
        "floor": "min_per_cell",
        "cap": "max_per_cell",
        "goal=union": "goal=all_sites_of_classes",
        "goal=separate": "goal=own_sites",
    }

    data: PathText = ""
    out: PathText = ""
    goal: Literal[
        "", "fill_unseen", "each", "all_sites_of_classes", "own_sites", "balance", "within_site", "target", "tasks"
    ] = ""
    per_cell: NonNegativeInt = 0
    ratio: NonNegativeFloat = 0.0
    spread: Literal["even", "real"] = "even"
    tasks: dict[str, list[str]] = field(default_factory=dict)
    target: PathText = ""
    fields: list[str] = field(default_factory=list)
    only: dict[str, list[str]] = field(default_factory=dict)
    max_images: NonNegativeInt = 0
    gpu_hours: NonNegativeFloat = 0.0
    images_per_s: NonNegativeFloat = 0.0
    min_per_cell: NonNegativeInt = 0
    max_per_cell: NonNegativeInt = 0
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
    patches_per_row: PositiveInt = 1
    thin_patients: PositiveInt = 10
    figure: PathText = ""
    seed: int = 0
