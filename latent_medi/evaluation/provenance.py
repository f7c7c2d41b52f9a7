"""What is recorded with a result: its command, versions and data, without paths or patients' names.

Results are sent to colleagues and published, so they do not name folders or patients: paths are relative to the
result's own folder, and patients are numbers unless ``patient_names`` is set.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd

import latent_medi
from latent_medi.core.kinds import path_settings
from latent_medi.evaluation.cohort.combinations import NotEvaluated
from latent_medi.evaluation.cohort.study import Study, SyntheticSet
from latent_medi.evaluation.settings import EvaluateSettings, FloorsSettings
from latent_medi.metadata.row_filter import only_mask, with_values_of

Settings = TypeVar("Settings", EvaluateSettings, FloorsSettings)
_DECIDING = (
    "torch",
    "torchvision",
    "diffusers",
    "transformers",
    "timm",
    "torchmetrics",
    "torch-fidelity",
    "scikit-learn",
    "numpy",
    "scipy",
)
"""Packages whose versions can change a number."""
_REVISION_FILE, _REVISION = "REVISION", re.compile(r"[0-9a-f]{40,64}")
_PATHS = {*path_settings(EvaluateSettings), *path_settings(FloorsSettings)} - {"encoders"}
"""Settings that are recorded relative to the result's folder; encoders are mostly names."""
_PATH = re.compile(r"(?<![\w./:<-])/[\w.@+-]+(?:/[\w.@+-]+)+")


@dataclass(frozen=True)
class RunRecord:
    """What is needed to make the numbers again.

    Args:
        command: The command line, paths relative to the result's folder.
        git_revision: Revision of the source tree; null for an installed package.
        seed: The seed.
        date: UTC, ISO 8601.
        versions: Version by package; null where one is not installed.
    """

    command: str
    git_revision: str | None
    seed: int
    date: str
    versions: dict[str, str | None]


@dataclass(frozen=True)
class Counts:
    """Tables of class (row) × site (column) by split value.

    Args:
        patches: Patches.
        patients: Patients.
    """

    patches: dict[str, list[list[int]]]
    patients: dict[str, list[list[int]]]


@dataclass(frozen=True)
class RealDataset:
    """The real dataset.

    Args:
        name: Its name.
        folder: Its folder, relative to the result's folder.
        class_field, site_field: Names of the two fields; site_field is empty if the data have none, and all patches
            then count as one site, "all".
        split: Name of the split.
        classes, sites: Their values.
        n_patches, n_patients: Patches and patients of all splits.
        counts: Counts by class, site and split value.
        held_out: Held-out combinations.
        not_evaluated: Combinations that the split holds out and that cannot be evaluated, with ``held_out: split``.
        patient_is: What counts as a patient: "patient", or where patients are not known "slide", "image" or "group".
    """

    name: str
    folder: str
    class_field: str
    site_field: str
    split: str
    classes: list[str]
    sites: list[str]
    n_patches: int
    n_patients: int
    counts: Counts
    held_out: list[dict[str, str]]
    not_evaluated: list[NotEvaluated] = field(default_factory=list)
    patient_is: str = "patient"


@dataclass(frozen=True)
class SyntheticRecord:
    """One synthetic dataset.

    Args:
        folder: Its folder, relative to the result's folder.
        name: Its name.
        n_patches: Patches that take part.
        fields: Its fields.
        provenance: How it was made, as the dataset itself records it.
        selected: Column of the selection whose patches alone take part.
        n_unselected: Patches before that selection.
    """

    folder: str
    name: str
    n_patches: int
    fields: list[str]
    provenance: dict[str, object]
    selected: str | None = None
    n_unselected: int | None = None


@dataclass(frozen=True)
class EncoderRecord:
    """One feature space.

    Args:
        fingerprint: Hash of weights and preprocessing.
        dim: Dimensions.
        preprocessing: In words.
        license: Of the weights.
    """

    fingerprint: str
    dim: int
    preprocessing: str
    license: str


def relative_path(text: str, folder: str | Path) -> str:
    """A path relative to ``folder``; anything else (an address, a name on the hub) unchanged."""
    if not text or "://" in text or not (os.path.isabs(text) or os.path.exists(text)):
        return text
    return Path(os.path.relpath(os.path.realpath(text), os.path.realpath(folder))).as_posix()


def portable(value: Any, folder: str | Path, known: Iterable[str | Path] = ()) -> Any:
    """The same structure with relative paths instead of absolute ones.

    Args:
        value: JSON-able.
        folder: The folder that paths become relative to.
        known: Folders that sentences may name; elsewhere in a sentence, a path ends at the first blank.
    """
    if not isinstance(value, (Mapping, list, tuple, str)):  # matrices of hundreds of sites are millions of numbers
        return value
    roots = sorted({str(Path(k)) for k in known if len(Path(k).parts) > 1 and os.path.isabs(k)}, key=len, reverse=True)

    def plain(text: str) -> str:
        if os.path.isabs(text) and "\n" not in text and os.path.exists(text):
            return relative_path(text, folder)
        for root in roots:
            shown = relative_path(root, folder).replace("\\", r"\\")
            text = re.sub(rf"(?<![\w/.]){re.escape(root)}(?![\w.-])", shown, text)
        return _PATH.sub(lambda found: _of_this_machine(found[0], folder), text)

    if isinstance(value, Mapping):
        return {plain(str(key)): portable(entry, folder, known) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [portable(entry, folder, known) for entry in value]
    return plain(value)


def _of_this_machine(path: str, folder: str | Path) -> str:
    """A path from the root becomes relative if its first folder is one of this machine's; ``/day`` is no path."""
    return relative_path(path, folder) if os.path.isdir("/" + path.split("/")[1]) and path.count("/") > 1 else path


def recorded_settings(settings: Settings, folder: str | Path) -> Settings:
    """Settings with their paths relative to ``folder``.

    Args:
        settings: A dataclass.
        folder: The result's folder.
    """

    def relative(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: relative(entry) for key, entry in value.items()}
        return list(map(relative, value)) if isinstance(value, list) else relative_path(str(value), folder)

    names = _PATHS.intersection(path_settings(type(settings)))
    return replace(settings, **{name: relative(getattr(settings, name)) for name in names})


def _command(folder: str | Path) -> str:
    """The command line, its paths relative to ``folder``."""

    def plain(word: str) -> str:
        name, equals, value = word.partition("=")
        setting = name.lstrip("-").partition(".")[0]
        if equals and ("/" in value or setting in _PATHS) and os.path.exists(value):
            return f"{name}={relative_path(value, folder)}"
        return relative_path(word, folder) if "/" in word else word

    result: str = portable(shlex.join([Path(sys.argv[0]).name, *map(plain, sys.argv[1:])]), folder, [Path.home()])
    return result


def _version(package: str) -> str | None:
    """The version of a package; ``None`` where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def run_record(seed: int, folder: str | Path) -> RunRecord:
    """What is needed to make the numbers again: command, git revision, versions, seed, date.

    Args:
        seed: The seed.
        folder: The result's folder, which paths of the command are relative to.
    """
    own = {"latent-medi": latent_medi.__version__, "python": sys.version.split()[0]}
    return RunRecord(
        command=_command(folder),
        git_revision=git_revision(),
        seed=seed,
        date=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        versions={**own, **{name: _version(name) for name in _DECIDING}},
    )


def git_revision() -> str | None:
    """Revision of the source tree, "-dirty" if it has changes, in a packed copy as its file REVISION says; None for an
    installed package."""
    root = Path(latent_medi.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        packed = root / _REVISION_FILE
        text = packed.read_text(encoding="utf-8", errors="replace").strip() if packed.is_file() else ""
        return text if _REVISION.fullmatch(text) else None
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None


def dataset_record(study: Study, settings: EvaluateSettings, folder: str | Path) -> RealDataset:
    """Counts of the real patches that take part by class, site and split, and the held-out combinations."""
    index, split, schema = study.index, settings.split, study.real.schema
    kept = only_mask(index, settings.only, str(study.real.folder))
    if settings.only:
        schema = with_values_of(schema, index[kept])
    column = np.where(kept, index[f"split_{split}"].to_numpy(str), "")
    classes, sites = (list(schema.field(name).values) for name in (study.class_field, study.site_field))
    is_first = ~index.duplicated([f"split_{split}", study.class_field, study.site_field, "patient"]).to_numpy()

    def counts(rows: np.ndarray) -> dict[str, list[list[int]]]:
        tables = {}
        for value in sorted(set(column) - {""}):
            here = rows & (column == value)
            table = pd.crosstab(study.class_labels[here], study.site_labels[here])
            tables[value] = table.reindex(index=classes, columns=sites, fill_value=0).to_numpy().tolist()
        return tables

    return RealDataset(
        name=study.real.info.get("name", ""),
        folder=relative_path(str(study.real.folder), folder),
        class_field=study.class_field,
        site_field=settings.site_field,
        split=split,
        classes=classes,
        sites=sites,
        n_patches=int(kept.sum()),
        n_patients=int(index["patient"][kept].nunique()),
        counts=Counts(counts(np.ones(len(index), bool)), counts(is_first)),
        held_out=study.held_out,
        not_evaluated=study.not_evaluated,
        patient_is=study.real.patient_is,
    )


def synthetic_record(synthetic: SyntheticSet, selected: str, folder: str | Path) -> SyntheticRecord:
    """A synthetic dataset: how many patches, and where they come from."""
    dataset = synthetic.dataset
    return SyntheticRecord(
        folder=relative_path(str(dataset.folder), folder),
        name=dataset.info.get("name", ""),
        n_patches=len(synthetic.rows),
        fields=list(dataset.schema.names),
        provenance=dataset.info.get("provenance", {}),
        selected=selected or None,
        n_unselected=len(dataset) if selected else None,
    )
