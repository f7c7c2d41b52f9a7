"""What real patients alone say, before anything is generated: how far apart two groups of them are, how well their
class and site can be told, and so what a generator can be held against in these data.

Patients are dealt into two sides at random, many times, within each combination of class and site. Between the sides
the distances are floors and the probes' accuracies are ceilings: no generator is asked to do better.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
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
from latent_medi.evaluation.cohort.combinations import categorical_fields, describe
from latent_medi.evaluation.cohort.matching import strata
from latent_medi.evaluation.fidelity.real_split_range import MIN_REAL_SPLITS, deals
from latent_medi.evaluation.provenance import finite, portable, recorded_settings, run_record
from latent_medi.evaluation.settings import FloorsSettings
from latent_medi.features.cache import cached_features, content_hash
from latent_medi.features.encoders import ImageEncoder, colour_free, load_encoder
from latent_medi.launch import make_accelerator
from latent_medi.metadata.fields import is_missing
from latent_medi.metadata.tables import write_for_people
from latent_medi.shards.dataset import PatchDataset
from latent_medi.statistics.bootstrap import LEVEL, MIN_PATIENTS, NOT_ESTIMABLE, PatientTable
from latent_medi.statistics.distances import Basis, frechet_distance, kid, pca_basis, pca_dims
from latent_medi.statistics.linear_probe import fit_linear_probe
from latent_medi.statistics.subsampling import whole_patients

log = get_logger(__name__)

_MOST = 2000
_MOST_TRAINING = 10_000
Sides = list[tuple[np.ndarray, np.ndarray]]


def floors(settings: FloorsSettings, encoders: list[ImageEncoder] | None = None) -> dict[str, Any]:
    """Measure floors and ceilings of a real dataset, and write ``floors.json`` and ``floors.csv``.

    Several launched processes share the embedding; the first one does the rest, and all return the same.

    Args:
        settings: The dataset, the encoders and how often patients are dealt.
        encoders: Encoders that are loaded already, instead of ``settings.encoders``.

    Returns:
        The content of ``floors.json``: ``run``, ``settings``, and per encoder ``fingerprint``, ``cells`` and
        ``ceilings``. A cell has ``name``, ``combination``, ``n_patches``, ``n_patients``, and, with two patients or
        more, ``n`` (median patches per side), ``kid`` and ``fd_pca`` (each ``value``, the median of the deals, and
        ``range``, their central 95 %, "not estimable" with fewer than ten patients), ``pca_dims``, and ``other_site``:
        the site whose patches of this class are nearest, and their ``kid``. A ceiling, per field, has ``value`` and
        ``range`` of the balanced accuracy on the side that the probe did not learn from (patients first, then the
        values that it could learn), ``chance``, and ``cells``: accuracy by combination.

    Raises:
        UserError: Fewer than 20 deals, an unknown field, synthetic patches, or no combination with two patients;
            or another job writes the folder.
    """
    accelerator = make_accelerator(cpu=settings.device == "cpu", patient=True)
    with output_lock(settings.out, accelerator):
        return _floors(settings, encoders, accelerator)


def _floors(settings: FloorsSettings, encoders: list[ImageEncoder] | None, accelerator: Accelerator) -> dict[str, Any]:
    device = settings.device or str(accelerator.device)
    with agreed(accelerator) as told:
        refuse_foreign(settings.out, {"floors.json": "encoders"}, ["floors.json", "floors.csv"])
        dataset, pair, rows, cells = _open(settings)
        chosen = list(encoders or [load_encoder(n, settings.weights.get(n), device) for n in settings.encoders])
        if settings.colour_free:
            chosen = [e for encoder in chosen for e in (encoder, colour_free(encoder))]
        told.reads("data", settings.data, lambda: content_hash(dataset))
        told.does(settings, but=("data", "weights", "device", "cache"))
        told.does({encoder.name: encoder.fingerprint for encoder in chosen}, prefix="encoder")
    index = dataset.index
    patients = index["patient"].to_numpy(str)[rows]
    sides = deals(patients, strata(index, rows, pair), 0.5, settings.deals, settings.seed)
    out = Path(settings.out)
    cache = Path(settings.cache) if settings.cache else out / "features"
    found: dict[str, Any] = {}
    with threadpool_limits(1, user_api="blas"):
        for encoder in chosen:
            log.info("Floors and ceilings with %s", encoder.name)
            x = cached_features(dataset, rows, encoder, cache, settings.batch, device, accelerator)
            if not accelerator.is_main_process:
                continue
            basis = pca_basis(x)
            fields = list(dict.fromkeys([*pair, *settings.fields]))
            found[encoder.name] = {
                "fingerprint": encoder.fingerprint,
                "cells": [_distances(cell, cells, x, basis, sides, pair) for cell in cells],
                "ceilings": {
                    name: _ceiling(
                        name, x, index[name].to_numpy(str)[rows], patients, cells, sides, settings.regularisation
                    )
                    for name in fields
                },
            }  # fmt: skip
    if accelerator.is_main_process:
        used = recorded_settings(dataclasses.asdict(settings), ("data", "weights", "cache", "out"), out)
        result = finite({"run": run_record(settings.seed, out), "settings": used, "encoders": found})
        result = portable(result, out, [settings.data, Path.home(), Path.cwd()])
        write_sealed(out / "floors.json", result)
        write_for_people(_table(result), out / "floors.csv")
    accelerator.wait_for_everyone()
    return read_sealed(out / "floors.json", "Run `latent-medi floors` again.")[0]


def _open(settings: FloorsSettings) -> tuple[PatchDataset, list[str], np.ndarray, list[dict[str, Any]]]:
    """The dataset, its class and site field, the rows whose class and site are known, and the combinations of these.

    Raises:
        UserError: As :func:`floors`.
    """
    if settings.deals < MIN_REAL_SPLITS:
        raise UserError(f"deals is {settings.deals}: too few to tell a range from.", f"Give {MIN_REAL_SPLITS} or more.")
    dataset = PatchDataset.open(settings.data)
    if dataset.schema.class_field is None:
        raise UserError(f"{settings.data} has no class field.", "Name the class when the dataset folder is made.")
    class_field = dataset.schema.class_field.name
    known = categorical_fields(dataset.schema)
    for name in (settings.site_field, *settings.fields):
        if name not in known:
            raise UserError(f"{settings.data} has no categorical field {name!r}; {nearest(name, known)}.")
    index = dataset.index
    if synthetic := int((index["origin"] != "real").sum()):
        raise UserError(f"{settings.data} holds {synthetic} synthetic patches; floors are of real patients.")
    pair = [class_field, settings.site_field]
    rows = np.flatnonzero(~index[pair].astype(str).map(is_missing).any(axis=1).to_numpy(bool))
    cells = _cells(index.iloc[rows], pair, index["patient"].to_numpy(str)[rows])
    if not any(cell["n_patients"] >= 2 for cell in cells):
        raise UserError(
            f"No combination of {' and '.join(pair)} in {settings.data} has two patients.",
            "Patients cannot be set against one another; without them there is no floor.",
        )
    return dataset, pair, rows, cells


def _cells(index: pd.DataFrame, pair: list[str], patients: np.ndarray) -> list[dict[str, Any]]:
    result = []
    for values, where in sorted(index.reset_index().groupby(pair, observed=True).indices.items()):
        combination = dict(zip(pair, map(str, values), strict=True))
        result.append(
            {"name": describe(combination), "combination": combination, "rows": where, "n_patches": len(where),
             "n_patients": len(set(patients[where]))}
        )  # fmt: skip
    return result


def _spread(values: list[float], n_patients: int) -> dict[str, Any]:
    low, middle, high = np.quantile(values, [(1 - LEVEL) / 2, 0.5, (1 + LEVEL) / 2])
    few = n_patients < MIN_PATIENTS  # two patients can be dealt in one way only
    return {"value": float(middle), "range": NOT_ESTIMABLE if few else [float(low), float(high)]}


def _distances(
    cell: dict[str, Any], cells: list[dict[str, Any]], x: np.ndarray, basis: Basis, sides: Sides, pair: list[str]
) -> dict[str, Any]:
    """Distances between the two sides of one combination, and to the same class at other sites."""
    record = {name: value for name, value in cell.items() if name != "rows"}
    if cell["n_patients"] < 2:
        return record | {"reason": "one patient"}
    rng = np.random.default_rng(len(cell["rows"]))
    tumour, site = (cell["combination"][name] for name in pair)
    others = [c for c in cells if c["combination"][pair[0]] == tumour and c["combination"][pair[1]] != site]
    pairs = [tuple(np.intersect1d(side, cell["rows"]) for side in both) for both in sides]
    usable = [min(*map(len, both), _MOST) for both in pairs if min(map(len, both)) > 1]
    if not usable:
        return record | {"reason": "the patients of this combination never came to lie on both sides"}
    dims = pca_dims(min(usable), x.shape[1])
    floor: dict[str, list[float]] = {"kid": [], "fd_pca": []}
    apart: dict[str, list[float]] = {c["combination"][pair[1]]: [] for c in others}
    for (first, second), both in zip(pairs, sides, strict=True):
        n = min(len(first), len(second), _MOST)
        if n < 2:
            continue
        a, b = (x[rng.choice(part, n, replace=False)] for part in (first, second))
        floor["kid"].append(kid(a, b, subsets=0)[0])
        floor["fd_pca"].append(frechet_distance(basis.project(a, dims), basis.project(b, dims)))
        for other in others:
            theirs = np.intersect1d(both[1], other["rows"])
            if len(theirs) > 1:
                picked = rng.choice(theirs, min(n, len(theirs)), replace=False)
                apart[other["combination"][pair[1]]].append(kid(a, x[picked], subsets=0)[0])
    medians = {name: float(np.median(values)) for name, values in apart.items() if values}
    closest = min(medians, key=lambda name: medians[name], default=None)
    return record | {
        "n": int(np.median(usable)), "deals": len(usable), "pca_dims": dims,
        **{name: _spread(values, cell["n_patients"]) for name, values in floor.items()},
        "other_site": None if closest is None else {"site": closest, "kid": medians[closest]},
    }  # fmt: skip


def _ceiling(
    name: str,
    x: np.ndarray,
    truth: np.ndarray,
    patients: np.ndarray,
    cells: list[dict[str, Any]],
    sides: Sides,
    c: float,
) -> dict[str, Any]:
    """Accuracy of probes that learn from one side on the other, both ways."""
    known = ~pd.Series(truth).map(is_missing).to_numpy(bool)
    values, codes = np.unique(truth, return_inverse=True)
    people, who = np.unique(patients, return_inverse=True)
    scores: list[float] = []
    by_cell: dict[str, list[float]] = {cell["name"]: [] for cell in cells}
    judged_values: set[str] = set()
    turns = [both[::turn] for both in sides for turn in (1, -1)]
    for number, (learn, judge) in enumerate(progress(turns, desc=f"probes of {name}", unit="probe")):
        learn = learn[known[learn]]
        learn = learn[whole_patients(patients[learn], _MOST_TRAINING, np.random.default_rng([number, 47]))]
        # A value that is on one side alone cannot be learned, so it says nothing of what can be told.
        judge = judge[known[judge] & np.isin(truth[judge], truth[learn])]
        if len(set(truth[learn])) < 2 or not len(judge):
            continue
        judged_values |= set(truth[judge])
        right = np.zeros(len(truth))
        right[judge] = fit_linear_probe(x[learn], truth[learn], c).predict(x[judge]) == truth[judge]

        def mean(keep: np.ndarray, right: np.ndarray = right) -> float:
            return float(PatientTable(codes, who, keep, len(values), len(people)).mean(right)[0])

        judged = np.isin(np.arange(len(truth)), judge)
        scores.append(mean(judged))
        for cell in cells:
            here = judged & np.isin(np.arange(len(truth)), cell["rows"])
            if here.any():
                by_cell[cell["name"]].append(mean(here))
    if not scores:
        return {"value": None, "range": None, "reason": "fewer than two values on a side", "cells": {}}
    return {
        **_spread(scores, len(set(patients[known]))), "chance": 1 / len(judged_values),
        "n_patches": int(known.sum()), "n_patients": len(set(patients[known])),
        "cells": {name: float(np.median(found)) for name, found in by_cell.items() if found},
    }  # fmt: skip


def _bounds(spread: Any) -> tuple[float | None, float | None]:
    return (spread[0], spread[1]) if isinstance(spread, list) else (None, None)


def _words(spread: Any, scale: float = 1.0) -> str:
    low, high = _bounds(spread)
    return "–" if low is None or high is None else f"{low / scale:.2f} to {high / scale:.2f}"


def _table(result: Mapping[str, Any]) -> pd.DataFrame:
    rows = []
    for encoder, found in result["encoders"].items():
        for cell in found["cells"]:
            ceilings = {f"ceiling_{name}": part["cells"].get(cell["name"]) for name, part in found["ceilings"].items()}
            floor: dict[str, float | None] = {}
            for name in ("kid", "fd_pca"):
                if name in cell:
                    low, high = _bounds(cell[name]["range"])
                    floor |= {name: cell[name]["value"], f"{name}_low": low, f"{name}_high": high}
            other = cell.get("other_site") or {}
            rows.append(
                {"encoder": encoder, **cell["combination"], "n_patients": cell["n_patients"],
                 "n_patches": cell["n_patches"], "n": cell.get("n"), **floor, "pca_dims": cell.get("pca_dims"),
                 "other_site": other.get("site"), "other_site_kid": other.get("kid"), **ceilings}
            )  # fmt: skip
    return pd.DataFrame(rows)


def floors_text(result: Mapping[str, Any]) -> str:
    """The floors and ceilings as tables for a terminal."""
    lines: list[str] = []
    for encoder, found in result["encoders"].items():
        fields = list(found["ceilings"])
        unit = max((abs(cell["kid"]["value"]) for cell in found["cells"] if "kid" in cell), default=1.0)
        scale = 10.0 ** (3 * np.floor(np.log10(unit) / 3)) if unit > 0 else 1.0
        width = max(len(cell["name"]) for cell in found["cells"]) + 2
        lines += [f"{encoder} (kernel distance ÷ {scale:g})",
                  f"  {'':<{width}}{'patients':>9}{'patches':>9}{'floor':>9}{'95 % of deals':>18}{'other site':>12}"
                  + "".join(f"{name:>12}" for name in fields)]  # fmt: skip
        for cell in found["cells"]:
            line = f"  {cell['name']:<{width}}{cell['n_patients']:>9}{cell['n_patches']:>9}"
            if "kid" in cell:
                far = f"{cell['other_site']['kid'] / scale:.2f}" if cell["other_site"] else "–"
                line += f"{cell['kid']['value'] / scale:>9.2f}{_words(cell['kid']['range'], scale):>18}{far:>12}"
            else:
                line += f"{'–':>9}{'–':>18}{'–':>12}"
            shares = [found["ceilings"][name]["cells"].get(cell["name"]) for name in fields]
            lines.append(line + "".join(f"{'–' if share is None else f'{share:.2f}':>12}" for share in shares))
        for name in fields:
            part = found["ceilings"][name]
            if part["value"] is None:
                lines.append(f"  {name}: no ceiling, {part['reason']}")
                continue
            lines.append(f"  {name}: balanced accuracy {part['value']:.2f} ({_words(part['range'])}), "
                         f"chance {part['chance']:.2f}")  # fmt: skip
        lines.append("")
    lines += ["floor: between two groups of patients of one combination; other site: to patients of the class",
              "elsewhere; under a field's name: how often a probe from other patients finds its value."]  # fmt: skip
    return "\n".join(lines)
