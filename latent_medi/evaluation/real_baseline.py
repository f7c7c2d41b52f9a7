"""The verb ``floors``: distances between groups of real patients, and the accuracy of linear probes on real patches.

Patients are split at random into two groups, many times, within each combination of class and site. The kernel distance
between the groups is about 0, and its range over the splits is what chance does with so few patients: a generator
inside it is as near as real patients are. No linear probe can be expected to be more accurate on samples than on the
group that it was not trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from accelerate import Accelerator
from threadpoolctl import threadpool_limits

from latent_medi.core.agreement import agreed
from latent_medi.core.errors import UserError, nearest
from latent_medi.core.files import read_sealed, refuse_foreign, write_sealed
from latent_medi.core.locks import output_lock
from latent_medi.core.progress import get_logger, progress
from latent_medi.core.records import encode
from latent_medi.evaluation.cohort.combinations import categorical_fields, describe
from latent_medi.evaluation.cohort.matching import strata
from latent_medi.evaluation.cohort.study import NO_SITE, with_one_site
from latent_medi.evaluation.fidelity.real_split_range import Groups, real_splits
from latent_medi.evaluation.provenance import portable, recorded_settings, run_record
from latent_medi.evaluation.settings import FloorsSettings
from latent_medi.features.cache import cached_features, content_hash
from latent_medi.features.encoders import ImageEncoder, colour_free, load_encoder
from latent_medi.launch import make_accelerator
from latent_medi.metadata.fields import is_missing
from latent_medi.metadata.row_filter import only_mask
from latent_medi.metadata.tables import write_for_people
from latent_medi.shards.dataset import PatchDataset
from latent_medi.statistics.distances import Basis, frechet_distance, pca_basis, pca_dims
from latent_medi.statistics.intervals import LEVEL, MIN_PATIENTS, NOT_ESTIMABLE
from latent_medi.statistics.kernel_distance import KID_UNIT, kid, kid_text
from latent_medi.statistics.linear_probe import fit_linear_probe
from latent_medi.statistics.patient_means import PatientTable
from latent_medi.statistics.subsampling import patients_in_turn, whole_patients

log = get_logger(__name__)

_MOST = 2000
_MOST_TRAINING = 10_000
_FEWEST = 4
"""Patients of a combination: two in each group."""


@dataclass(frozen=True)
class _Cell:
    """One class × site cell.

    Args:
        name: The combination in words.
        combination: Value of class and site.
        rows: Positions among the rows that take part.
        n_patients: Patients of these.
    """

    name: str
    combination: dict[str, str]
    rows: np.ndarray
    n_patients: int

    @property
    def values(self) -> tuple[str, str]:
        """Class and site."""
        tumour, site = self.combination.values()
        return tumour, site


@dataclass(frozen=True)
class _Cohort:
    """Rows of a dataset whose class and site are known.

    Args:
        dataset: The dataset.
        pair: Names of the class and site field.
        rows: Rows of its index.
        patients: Patient of each, [N].
        cells: The class × site cells.
    """

    dataset: PatchDataset
    pair: list[str]
    rows: np.ndarray
    patients: np.ndarray
    cells: list[_Cell]


def floors(settings: FloorsSettings, encoders: list[ImageEncoder] | None = None) -> dict[str, Any]:
    """Measure real-vs-real distances and accuracies on real patches, and write ``floors.json`` and ``floors.csv``.

    Several launched processes share the embedding; the first one does the rest, and all return the same.

    Args:
        settings: The dataset, the encoders and the number of splits.
        encoders: Encoders that are loaded already, instead of ``settings.encoders``.

    Returns:
        The content of ``floors.json``: ``run``, ``settings``, and per encoder ``fingerprint``, ``cells`` and
        ``ceilings``. A cell has ``name``, ``combination``, ``n_patches``, ``n_patients``, and, where a split has two of
        its patients in each group, ``n`` (median patches per group), ``kid`` (without pairs of patches of one patient)
        and ``fd_pca`` (each ``value``, the median over the splits, and ``range``, their central 95 %, "not estimable"
        with fewer than ten patients), ``pca_dims``, and ``other_site``: the site whose patches of this class are
        nearest, and their ``kid``. A ceiling, per field, has ``value`` and
        ``range`` of a linear probe's balanced accuracy on the group that it was not trained on (patients first, then
        the values that it could learn), ``chance``, and ``cells``: accuracy by combination.

    Raises:
        UserError: Fewer than 20 splits, an unknown field, synthetic patches, or no combination with four patients;
            or another job writes the folder.
    """
    accelerator = make_accelerator(cpu=settings.device == "cpu", patient=True)
    with output_lock(settings.out, accelerator):
        return _floors(settings, encoders, accelerator)


def _floors(settings: FloorsSettings, encoders: list[ImageEncoder] | None, accelerator: Accelerator) -> dict[str, Any]:
    device = settings.device or str(accelerator.device)
    with agreed(accelerator) as declared:
        refuse_foreign(settings.out, {"floors.json": "encoders"}, ["floors.json", "floors.csv"])
        cohort = _open(settings)
        chosen = list(encoders or [load_encoder(n, settings.weights.get(n), device) for n in settings.encoders])
        if settings.colour_free:
            chosen = [e for encoder in chosen for e in (encoder, colour_free(encoder))]
        declared.add_input("data", settings.data, lambda: content_hash(cohort.dataset))
        declared.add_settings(settings, without=("data", "weights", "device", "cache"))
        declared.add_settings({encoder.name: encoder.fingerprint for encoder in chosen}, prefix="encoder")
    index, rows = cohort.dataset.index, cohort.rows
    splits = real_splits(cohort.patients, strata(index, rows, cohort.pair), 0.5, settings.real_splits, settings.seed)
    out = Path(settings.out)
    cache = Path(settings.cache) if settings.cache else out / "features"
    found: dict[str, Any] = {}
    with threadpool_limits(1, user_api="blas"):
        for encoder in chosen:
            log.info("Real patients with %s", encoder.name)
            x = cached_features(cohort.dataset, rows, encoder, cache, settings.batch, device, accelerator)
            if not accelerator.is_main_process:
                continue
            basis = pca_basis(x)
            accuracies = {}
            for name in dict.fromkeys([*cohort.pair, *settings.fields]):
                truth = index[name].to_numpy(str)[rows]
                accuracies[name] = _accuracy(name, x, truth, cohort, splits, settings.regularisation)
            found[encoder.name] = {
                "fingerprint": encoder.fingerprint,
                "cells": [_distances(cell, cohort, x, basis, splits) for cell in cohort.cells],
                "ceilings": accuracies,
            }
    if accelerator.is_main_process:
        used = recorded_settings(settings, out)
        result = encode({"run": run_record(settings.seed, out), "settings": used, "encoders": found})
        result = portable(result, out, [settings.data, Path.home(), Path.cwd()])
        write_sealed(out / "floors.json", result)
        write_for_people(_table(result), out / "floors.csv")
    accelerator.wait_for_everyone()
    return read_sealed(out / "floors.json", "Run `latent-medi floors` again.")[0]


def _open(settings: FloorsSettings) -> _Cohort:
    """The rows of the dataset whose class and site are known, and their cells.

    Raises:
        UserError: As :func:`floors`.
    """
    dataset = PatchDataset.open(settings.data)
    class_field = dataset.schema.class_field
    if class_field is None:
        raise UserError(f"{settings.data} has no class field.", "Name the class when the dataset folder is made.")
    if not settings.site_field:
        index, schema = with_one_site(dataset.index, dataset.schema, dataset.folder)
        dataset = PatchDataset(dataset.folder, dataset.info, schema, index)
    site_field = settings.site_field or NO_SITE
    known = categorical_fields(dataset.schema)
    for name in (site_field, *settings.fields):
        if name not in known:
            raise UserError(
                f"{settings.data} has no categorical field {name!r}; {nearest(name, known)}.",
                "Name the hospital's field with site_field=NAME." if name == site_field else "",
            )
    index = dataset.index
    if synthetic := int((index["origin"] != "real").sum()):
        raise UserError(f"{settings.data} holds {synthetic} synthetic patches; floors are of real patients.")
    pair = [class_field.name, site_field]
    kept = only_mask(index, settings.only, settings.data)
    rows = np.flatnonzero(kept & ~index[pair].astype(str).map(is_missing).any(axis=1).to_numpy(bool))
    patients = index["patient"].to_numpy(str)[rows]
    cells = []
    for values, where in sorted(index.iloc[rows].reset_index().groupby(pair, observed=True).indices.items()):
        combination = dict(zip(pair, map(str, values), strict=True))
        cells.append(_Cell(describe(combination), combination, where, len(set(patients[where]))))
    if not any(cell.n_patients >= _FEWEST for cell in cells):
        raise UserError(
            f"No combination of {' and '.join(pair)} in {settings.data} has {_FEWEST} patients.",
            "A distance between two groups of real patients needs two in each.",
        )
    return _Cohort(dataset, pair, rows, patients, cells)


def _spread(values: list[float], n_patients: int) -> dict[str, Any]:
    """Median and central 95 % over the splits."""
    low, middle, high = np.quantile(values, [(1 - LEVEL) / 2, 0.5, (1 + LEVEL) / 2])
    few = n_patients < MIN_PATIENTS  # two patients can be split in one way only
    return {"value": float(middle), "range": NOT_ESTIMABLE if few else [float(low), float(high)]}


def _distances(cell: _Cell, cohort: _Cohort, x: np.ndarray, basis: Basis, splits: list[Groups]) -> dict[str, Any]:
    """Distances between the two groups of one cell, and to the same class at other sites."""
    record: dict[str, Any] = {"name": cell.name, "combination": cell.combination}
    record |= {"n_patches": len(cell.rows), "n_patients": cell.n_patients}
    if cell.n_patients < _FEWEST:
        few = "one patient" if cell.n_patients == 1 else f"{cell.n_patients} patients"
        return record | {"reason": f"{few}, {_FEWEST} are needed"}
    rng = np.random.default_rng(len(cell.rows))
    tumour, site = cell.values
    others = {c.values[1]: c.rows for c in cohort.cells if c.values[0] == tumour and c.values[1] != site}
    usable = []
    for group_a, group_b in splits:
        groups = [_some_of(np.intersect1d(group, cell.rows), cohort.patients, rng) for group in (group_a, group_b)]
        if all(_two_patients(group, cohort.patients) for group in groups):
            usable.append((groups, group_b))
    if not usable:
        return record | {"reason": "no split has two patients of this combination in both groups"}
    sizes = [min(map(len, groups)) for groups, _ in usable]
    dims = pca_dims(min(sizes), x.shape[1])
    within: dict[str, list[float]] = {"kid": [], "fd_pca": []}
    to_others: dict[str, list[float]] = {name: [] for name in others}
    for ((a, b), group_b), n in zip(usable, sizes, strict=True):
        within["kid"].append(kid(x[a], x[b], cohort.patients[a], cohort.patients[b]))
        equal = (basis.project(x[rng.choice(part, n, replace=False)], dims) for part in (a, b))
        within["fd_pca"].append(frechet_distance(*equal))
        for name, rows in others.items():
            far = _some_of(np.intersect1d(group_b, rows), cohort.patients, rng)
            if _two_patients(far, cohort.patients):
                to_others[name].append(kid(x[a], x[far], cohort.patients[a], cohort.patients[far]))
    medians = {name: float(np.median(values)) for name, values in to_others.items() if values}
    closest = min(medians, key=lambda name: medians[name], default=None)
    record |= {"n": int(np.median(sizes)), "deals": len(usable), "pca_dims": dims}
    record |= {name: _spread(values, cell.n_patients) for name, values in within.items()}
    return record | {"other_site": None if closest is None else {"site": closest, "kid": medians[closest]}}


def _some_of(rows: np.ndarray, patients: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """At most 2,000 of some rows, of as many patients as possible."""
    return rows[patients_in_turn(patients[rows], _MOST, rng)]


def _two_patients(rows: np.ndarray, patients: np.ndarray) -> bool:
    return len(set(patients[rows])) > 1


def _accuracy(
    name: str, x: np.ndarray, truth: np.ndarray, cohort: _Cohort, splits: list[Groups], c: float
) -> dict[str, Any]:
    """Accuracy of linear probes of a field that are trained on one group, on the other group, both ways."""
    patients = cohort.patients
    known = ~pd.Series(truth).map(is_missing).to_numpy(bool)
    values, codes = np.unique(truth, return_inverse=True)
    people, who = np.unique(patients, return_inverse=True)
    scores: list[float] = []
    by_cell: dict[str, list[float]] = {cell.name: [] for cell in cohort.cells}
    in_cell = {cell.name: np.isin(np.arange(len(truth)), cell.rows) for cell in cohort.cells}
    tested_values: set[str] = set()
    turns = [groups[::turn] for groups in splits for turn in (1, -1)]
    for number, (training, tested) in enumerate(progress(turns, desc=f"linear probes of {name}", unit="probes")):
        training = training[known[training]]
        rng = np.random.default_rng([number, 47])
        training = training[whole_patients(patients[training], _MOST_TRAINING, rng)]
        # A value of one group alone cannot be learned, so it says nothing of how accurate a probe can be.
        tested = tested[known[tested] & np.isin(truth[tested], truth[training])]
        if len(set(truth[training])) < 2 or not len(tested):
            continue
        tested_values |= set(truth[tested])
        right = np.zeros(len(truth))
        right[tested] = fit_linear_probe(x[training], truth[training], c).predict(x[tested]) == truth[tested]
        is_tested = np.isin(np.arange(len(truth)), tested)
        masks = {"": is_tested} | {cell: is_tested & here for cell, here in in_cell.items()}
        for cell, keep in masks.items():
            if keep.any():
                table = PatientTable(codes, who, keep, len(values), len(people))
                (by_cell[cell] if cell else scores).append(float(table.mean(right)))
    if not scores:
        return {"value": None, "range": None, "reason": "fewer than two values in a group", "cells": {}}
    n_patients = len(set(patients[known]))
    record = _spread(scores, n_patients) | {"chance": 1 / len(tested_values)}
    record |= {"n_patches": int(known.sum()), "n_patients": n_patients}
    return record | {"cells": {cell: float(np.median(found)) for cell, found in by_cell.items() if found}}


def _bounds(spread: Any) -> tuple[float | None, float | None]:
    return (spread[0], spread[1]) if isinstance(spread, list) else (None, None)


def _words(spread: Any, text: Callable[[float], str] = "{:.2f}".format) -> str:
    low, high = _bounds(spread)
    return "–" if low is None or high is None else f"{text(low)} to {text(high)}"


def _table(result: Mapping[str, Any]) -> pd.DataFrame:
    rows = []
    for encoder, found in result["encoders"].items():
        for cell in found["cells"]:
            row = {"encoder": encoder, **cell["combination"]}
            row |= {key: cell.get(key) for key in ("n_patients", "n_patches", "n")}
            for name in ("kid", "fd_pca"):
                if name in cell:
                    low, high = _bounds(cell[name]["range"])
                    row |= {name: cell[name]["value"], f"{name}_low": low, f"{name}_high": high}
            other = cell.get("other_site") or {}
            row |= {"pca_dims": cell.get("pca_dims"), "other_site": other.get("site")}
            row |= {"other_site_kid": other.get("kid")}
            accuracies = found["ceilings"].items()
            rows.append(row | {f"ceiling_{name}": part["cells"].get(cell["name"]) for name, part in accuracies})
    return pd.DataFrame(rows)


def floors_text(result: Mapping[str, Any]) -> str:
    """The distances and accuracies as tables for a terminal."""
    lines: list[str] = []
    for encoder, found in result["encoders"].items():
        fields = list(found["ceilings"])
        width = max(len(cell["name"]) for cell in found["cells"]) + 2
        heading = f"  {'':<{width}}{'patients':>9}{'patches':>9}{'groups':>9}{'95 % of splits':>20}{'other site':>12}"
        lines.append(f"{encoder} ({KID_UNIT})")
        lines.append(heading + "".join(f"{name:>12}" for name in fields))
        for cell in found["cells"]:
            line = f"  {cell['name']:<{width}}{cell['n_patients']:>9}{cell['n_patches']:>9}"
            if "kid" in cell:
                far = kid_text(cell["other_site"]["kid"]) if cell["other_site"] else "–"
                line += f"{kid_text(cell['kid']['value']):>9}{_words(cell['kid']['range'], kid_text):>20}{far:>12}"
            else:
                line += f"{'–':>9}{'–':>20}{'–':>12}"
            shares = [found["ceilings"][name]["cells"].get(cell["name"]) for name in fields]
            lines.append(line + "".join(f"{'–' if share is None else f'{share:.2f}':>12}" for share in shares))
        for name in fields:
            part = found["ceilings"][name]
            if part["value"] is None:
                lines.append(f"  {name}: no accuracy, {part['reason']}")
                continue
            spread = f"{part['value']:.2f} ({_words(part['range'])})"
            lines.append(f"  {name}: balanced accuracy {spread}, chance {part['chance']:.2f}")
        lines.append("")
    lines.append("groups: between two groups of patients of one combination, about 0; its range over splits is chance.")
    lines.append("other site: to patients of the class at the nearest other site. Under a field's name: accuracy of a")
    lines.append("linear probe that was trained on other patients.")
    return "\n".join(lines)
