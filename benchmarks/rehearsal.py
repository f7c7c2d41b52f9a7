"""TCGA-UT at full size without its pixels: 271,710 patches of 8,726 slides, with random latents and features.

    python benchmarks/rehearsal.py --metadata all_slide_metadata.csv --codes tissueSourceSite.tsv
        [--quick] [--parts tables loader checkpoint evaluation] [--folder FOLDER] [--json FILE] [key=value …]

Classes, institutions, site codes, gender, race and age are those of the slide table. Each slide has 31 patches, the
first ones 32. A few procedural pictures stand for all. All is written to ``--folder``, or to a temporary folder, and
removed afterwards: 4.4 GB of latents, 5.6 GiB of a checkpoint, 4 GB of features.

- tables: audit, split with held-out combinations, MeDi's split, plan, as the commands that a user runs.
- loader: training batches of 256 from files that are mapped, by one process and by two at the same time.
- checkpoint: that of a run of presets/24gb (8gb with --quick), written, checked and read again.
- evaluation: configs/tcga_ut/paper.yaml from its plan on: samples of its two models, 1,024 random features with
  classes, codes and patients in them, distances, MeDi's protocol, the report, and the page in Chromium if there is one.
  Further words are settings of the study. Without any, ``evaluate.memorisation=false``: looking for copies takes hours
  of a CPU.

Seconds are wall time; processor seconds follow, since other programs on the machine change the former.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from output import options, report, timed_command
from rehearsal_parts import checkpoint, evaluation, folders, loader

PATCHES = 271_710
COMMANDS = {
    "audit": ["fields=[site,race,gender]"],
    "split": ["name=main", "hold_out_fields=[class,site]", "hold_out_share=0.2", "fractions={train: 0.8, test: 0.2}"],
    "plan": ["goal=own_sites", "spread=real", "ratio=1", "fields=[class,site]"],
}
PARTS = ["tables", "loader", "checkpoint", "evaluation"]


def tables(data: Path, plan: Path) -> dict[str, float]:
    """What audit, split and plan take, each and together."""
    found = {
        name: timed_command([name, str(data), *words, *([f"out={plan}"] if name == "plan" else [])])
        for name, words in COMMANDS.items()
    }
    result = {f"{name}_{key}": value for name, step in found.items() for key, value in step.items()}
    result |= {f"audit_split_plan_{key}": sum(step[key] for step in found.values()) for key in ("s", "processor_s")}
    return result


def main() -> None:
    parser = options(__doc__, "a tenth of the patches, a quarter of the features, and a smaller network's checkpoint")
    parser.add_argument("--metadata", type=Path, required=True, help="table of TCGA's slides")
    parser.add_argument("--codes", type=Path, required=True, help="GDC's table of tissue source sites")
    parser.add_argument("--folder", type=Path, help="where to put 14 GB for a while")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure; default: all")
    parser.add_argument("changes", nargs="*", help="settings of the study")
    arguments = parser.parse_args()
    quick, parts = arguments.quick, arguments.parts
    patches, batches, features = (PATCHES // 10, 20, 256) if quick else (PATCHES, 200, 1024)
    result: dict[str, float | None] = {"patches": patches}

    def add(part: str, found: dict[str, float] | dict[str, float | None]) -> None:
        result.update({f"{part}_{name}": value for name, value in found.items()})

    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        data, latents = Path(name) / "real", Path(name) / "latents"
        shards = folders.write_real(data, folders.index_of(arguments.metadata, arguments.codes, patches))
        if "tables" in parts:
            add("tables", tables(data, Path(name) / "plan.csv"))
        medi = ["name=medi", f"table={arguments.metadata}", "scheme=medi", "site_field=tss"]
        add("medi_split", timed_command(["split", str(data), *medi]))
        if "loader" in parts:
            folders.write_latents(latents, shards)
            for count in (1, 2):
                add(f"loader_{count}", loader.loader(data, latents, count, batches))
        if "checkpoint" in parts:
            add("checkpoint", checkpoint.checkpoint(Path(name) / "run", "presets/8gb" if quick else "presets/24gb"))
        if "evaluation" in parts:
            changes = arguments.changes or ["evaluate.memorisation=false"]
            add("evaluation", evaluation.evaluation(data, Path(name) / "study", features, changes))
            add("report", evaluation.report(Path(name) / "study"))
    report(result, arguments.json)


if __name__ == "__main__":
    main()
