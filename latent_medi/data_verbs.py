"""The verbs of dataset folders and tables: each takes its settings, prints, and returns the result as JSON."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latent_medi.core.counting import counted
from latent_medi.core.errors import Incomplete, UserError

if TYPE_CHECKING:
    from latent_medi.demo.settings import CohortFolderSettings
    from latent_medi.metadata.settings import AuditSettings, SplitSettings
    from latent_medi.shards.dataset import PatchDataset
    from latent_medi.shards.settings import (
        ExportSettings,
        ImportSettings,
        InfoSettings,
        JoinSettings,
        SlideSettings,
        VerifySettings,
    )

Printed = dict[str, Any]


def shards_images(settings: ImportSettings) -> Printed:
    from latent_medi.shards.importing.images import import_images
    from latent_medi.shards.importing.rejected import incomplete

    dataset = import_images(settings)
    rejected = dataset.info["provenance"]["rejected"]
    count, result = rejected["count"], {"folder": str(dataset.folder), "patches": len(dataset)}
    note = f"; {count} image{'s' * (count > 1)} rejected, see its dataset.json" if count else ""
    print(_holds(dataset) + note)
    if lacking := incomplete(rejected, settings.max_bad):
        raise Incomplete(lacking, result)
    return result


def shards_slides(settings: SlideSettings) -> Printed:
    from latent_medi.shards.slides.cut import cut_slides

    return cut_slides(settings)


def shards_demo(settings: CohortFolderSettings) -> Printed:
    from latent_medi.demo.cohort import build_folder

    dataset = build_folder(settings)
    print(_holds(dataset))
    return {"folder": str(dataset.folder), "patches": len(dataset)}


def join_words(_: type, words: list[str]) -> list[str]:
    """``OUT FOLDER FOLDER …`` at the beginning as the settings ``out`` and ``folders``."""
    paths = list(takewhile(lambda word: not word.startswith("-") and "=" not in word, words))
    named = [f"out={path}" for path in paths[:1]] + (["--folders", *paths[1:]] if paths[1:] else [])
    return [*words[len(paths) :], *named]


def shards_join(settings: JoinSettings) -> Printed:
    from latent_medi.shards.writing.join import join

    dataset = join(settings)
    print(_holds(dataset))
    splits = {name: split["counts"] for name, split in dataset.info["splits"].items()}
    return {"folder": str(dataset.folder), "patches": len(dataset), "splits": splits}


def _holds(dataset: PatchDataset) -> str:
    """The size and path of a dataset folder, for printing."""
    patients = counted(dataset.index["patient"].nunique(), "patient")
    return f"{counted(len(dataset), 'patch')} of {patients} in {dataset.folder}"


def shards_info(settings: InfoSettings) -> Printed:
    from latent_medi.shards.field_counts import info

    return info(settings)


def shards_verify(settings: VerifySettings) -> Printed:
    from latent_medi.core.locks import output_lock
    from latent_medi.shards.checking.duplicates import SPLIT_REMEDY, duplicates_report, duplicates_text, find_duplicates
    from latent_medi.shards.checking.verify import picture_problems, seal
    from latent_medi.shards.dataset import INFO_FILE, PatchDataset

    if not settings.data:
        raise UserError("No folder is given.", "latent-medi shards verify runs/demo/data")
    folder = Path(settings.data)
    if folder.is_dir() and not (folder / INFO_FILE).is_file():
        from latent_medi.experiment.verify_artefacts import verify_artefact

        if kind := verify_artefact(folder, settings.seal):
            print(f"no problem: {kind} in {folder}{', checksums added' if settings.seal else ''}")
            return {"folder": str(folder), "problems": []}
    with output_lock(settings.data) if settings.seal else nullcontext():  # from reading the index to writing it
        dataset = PatchDataset.open(settings.data)
        if problems := dataset.verify():
            raise UserError(f"{dataset.folder}: {len(problems)} problems:\n  " + "\n  ".join(problems))
        find_duplicates(dataset)  # an earlier version did not
        if settings.seal:
            seal(dataset)
    duplicates = duplicates_report(dataset)
    if text := duplicates_text(duplicates):
        print(text)
    if sides := picture_problems(dataset):
        raise UserError(f"{dataset.folder}: {len(sides)} problems:\n  " + "\n  ".join(sides), SPLIT_REMEDY)
    print(f"no problem: {_holds(dataset)}{', checksums added' if settings.seal else ''}")
    return {"folder": str(dataset.folder), "problems": [], "duplicates": duplicates}


def export(settings: ExportSettings) -> Printed:
    from latent_medi.shards.export import export

    result = export(settings)
    parts = [f"{part}: {counted(count, 'patch')}" for part, count in result["parts"].items()]
    print(f"{', '.join(parts)} in {result['folder']}")
    return result


def audit(settings: AuditSettings) -> Printed:
    from latent_medi.metadata.audit import class_by_site
    from latent_medi.metadata.audit_text import audit_text
    from latent_medi.metadata.heatmap import write_heat_map
    from latent_medi.metadata.table_index import audit_index, audit_table, is_table
    from latent_medi.shards.checking.duplicates import duplicates_report, duplicates_text, find_duplicates
    from latent_medi.shards.dataset import PatchDataset

    if is_table(settings.data):
        result = audit_table(settings)
    else:
        dataset = PatchDataset.open(settings.data)
        part = (settings.split, settings.split_value) if settings.split else None
        result = audit_index(dataset.index, dataset.schema, settings, part)
        if settings.duplicates:
            find_duplicates(dataset)
            result["duplicates"] = duplicates_report(dataset)
    print(audit_text(result))
    if text := duplicates_text(result.get("duplicates", {})):
        print(text)
    if settings.figure:
        write_heat_map(class_by_site(result), settings.figure, "patients")
    return result


def split(settings: SplitSettings) -> Printed:
    from latent_medi.metadata.split_schemes import split_summary
    from latent_medi.metadata.table_index import is_table, split_table
    from latent_medi.shards.split import split_folder

    made, index = split_table(settings) if is_table(settings.data) else split_folder(settings)
    summary = split_summary(index, made)
    for part, counts in summary.items():
        print(f"{part or 'in no part'}: " + ", ".join(f"{count} {unit}" for unit, count in counts.items()))
    for combination in made.recipe.get("held_out", []):
        print("held out: " + " × ".join(combination.values()))
    if together := made.recipe.get("together"):
        print(
            f"kept in one part, because they share a picture: {'; '.join(', '.join(group) for group in together[:5])}"
            + (f"; … and {len(together) - 5} more groups" if len(together) > 5 else "")
        )
    return {"name": settings.name, "parts": summary, "recipe": made.recipe}
