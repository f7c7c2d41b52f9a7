"""The summary of an evaluation: as a record, and as a table for the terminal with the verdict last."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from latent_medi.core.counting import counted
from latent_medi.core.records import encode
from latent_medi.evaluation.cohort.comparison_sets import REAL
from latent_medi.evaluation.cohort.roles import Roles
from latent_medi.evaluation.downstream.protocol_tables import protocol_text
from latent_medi.evaluation.downstream.records import Downstream
from latent_medi.evaluation.downstream.registry import (
    KINDS,
    baseline_kinds,
    label_of,
    names_of,
    summarised,
)
from latent_medi.evaluation.fidelity.records import TRAINING_IMAGES, DistanceTable, Fidelity
from latent_medi.evaluation.findings import distances_found, findings
from latent_medi.evaluation.no_verdict import far_from_tissue, no_verdict_reasons, patient_group
from latent_medi.evaluation.results import Metrics
from latent_medi.evaluation.summary_records import (
    FurtherTrainingSet,
    Headline,
    SummaryClass,
    SummaryDifference,
    SummaryDistances,
    SummaryRecovery,
    SummaryVariety,
)
from latent_medi.evaluation.verdict import Evidence, Verdict, verdict
from latent_medi.statistics.kernel_distance import KID_UNIT, kid_text

CLASSIFIERS = {"linear": "a linear probe", "cnn": "a small network"}
ACCURACIES = ("accuracy_shift", "accuracy_in_distribution", "accuracy_seen", "accuracy_unseen")
_COLOUR_FREE = ":haematoxylin"
_WORDINGS = (far_from_tissue, distances_found)
"""What writes kernel distances into sentences."""
_DISTANCES = {
    "distance_unseen": "unseen combinations",
    "distance_unseen_colour_free": "unseen, colour-free",
    "distance_per_class": "per class, all sites",
    "distance_per_class_training": "per class, to training images",
}


def headline(metrics: Metrics, seconds: Mapping[str, float] | None = None) -> Headline:
    """The summary of an evaluation with its verdict; its own summary is not read.

    Args:
        metrics: The evaluation.
        seconds: Durations of all stages of an experiment; the evaluation's own total is added if it is missing.
    """
    encoder = next(name for name in metrics.encoders if not name.endswith(_COLOUR_FREE))
    roles = metrics.roles
    plain, colour_free = (metrics.fidelity.get(name) for name in (encoder, encoder + _COLOUR_FREE))
    downstream = metrics.downstream.get(encoder)
    results = downstream.training_sets if downstream else {}
    columns = names_of(summarised(KINDS), roles)
    accuracies = {
        score: {n: getattr(results[n], score).value if n in results else None for n in columns} for score in ACCURACIES
    }
    further = {
        name: FurtherTrainingSet(
            result.accuracy_shift.value, result.accuracy_unseen.value, _difference(downstream, roles.candidate, name)
        )
        for name, result in results.items()
        if name not in columns
    }
    shift = next((result.accuracy_shift for result in results.values()), None)
    recoveries = [
        _recovery(metrics, encoder, roles, f) for f in (metrics.dataset.site_field, metrics.dataset.class_field)
    ]
    total = {} if "evaluate" in (seconds or {}) else {"evaluate": round(sum(metrics.seconds.values()), 3)}
    return Headline(
        candidate=roles.candidate,
        baseline=roles.baseline,
        distance_unseen=_distances(plain.unseen if plain else None, roles),
        distance_unseen_colour_free=_distances(colour_free.unseen if colour_free else None, roles),
        distance_per_class=_distances(plain.per_class if plain else None, roles),
        **accuracies,
        accuracy_shift_difference={
            name: _difference(downstream, roles.candidate, name)
            for name in [*(kind.name for kind in summarised(baseline_kinds())), *reversed(roles.names[:-1])]
        },
        further=further,
        recovery_site=recoveries[0],
        recovery_class=recoveries[1],
        n_test_patches=shift.n_patches if shift else None,
        n_test_patients=shift.n_patients if shift else None,
        encoder=encoder,
        classifier=CLASSIFIERS[downstream.classifier.kind if downstream else "linear"],
        seconds=dict(seconds or {}) | total,
        warnings=list(metrics.warnings),
        variety=_variety(metrics, encoder, roles),
        verdict=_verdict(metrics, encoder),
        distance_per_class_training=(_distances(plain.training.per_class, roles) if plain and plain.training else None),
        classes=_classes(plain) if plain and (plain.training or not metrics.dataset.held_out) else [],
        findings=findings(metrics, encoder),
    )


def headline_json(record: Headline) -> dict[str, Any]:
    """The content of ``headline.json``, in which distances and accuracies are named by synthetic set."""
    content: dict[str, Any] = {}
    for name in _DISTANCES:
        row: SummaryDistances | None = getattr(record, name)
        if row is None:
            continue
        values = {record.candidate: row.candidate, record.baseline: row.baseline, REAL: row.real, "metric": "kid"}
        others = ("ratio", "ratio_interval", "frechet_ratio", "frechet_perfect", "left_out")
        content[name] = values | {key: getattr(row, key) for key in others}
    content |= {name: getattr(record, name) for name in (*ACCURACIES, "accuracy_shift_difference")}
    content["further_arms"] = {
        name: {
            "accuracy_shift": entry.accuracy_shift,
            "accuracy_unseen": entry.accuracy_unseen,
            f"{record.candidate}_minus": entry.difference.value,
            "interval": entry.difference.interval,
        }
        for name, entry in record.further.items()
    }
    recoveries = {"site": record.recovery_site, "class": record.recovery_class}
    content["classes"] = record.classes
    content["recovery_unseen"] = {key: recovery.found for key, recovery in recoveries.items()}
    content["recovery_ceiling"] = {key: recovery.real for key, recovery in recoveries.items()}
    content["variety"] = record.variety
    content["verdict"] = record.verdict
    content["findings"] = record.findings
    content["n"] = {"test_patches": record.n_test_patches, "test_patients": record.n_test_patients}
    content |= {name: getattr(record, name) for name in ("encoder", "classifier", "seconds", "warnings")}
    encoded: dict[str, Any] = encode(content)
    return encoded


def _distances(table: DistanceTable | None, roles: Roles) -> SummaryDistances:
    if table is None:
        return SummaryDistances(None, None, None, None, None, None, None, {})
    values = {name: mean.value for name, mean in table.means.items()}
    return SummaryDistances(
        candidate=values.get(roles.candidate),
        baseline=values.get(roles.baseline),
        real=values.get(REAL),
        ratio=table.ratio.value,
        ratio_interval=table.ratio.interval,
        frechet_ratio=table.frechet_ratio.value,
        frechet_perfect=table.frechet_ratio.perfect,
        left_out=table.left_out,
    )


def _classes(fidelity: Fidelity) -> list[SummaryClass]:
    """Each class's distances, in the order of the tables."""
    tables = [fidelity.per_class, *([fidelity.training.per_class] if fidelity.training else [])]
    found = [
        {c.name: {n: c.sources[n].value if n in c.sources else None for n in table.means} for c in table.combinations}
        for table in tables
    ]
    return [SummaryClass(name, found[0][name], found[1][name] if len(found) > 1 else {}) for name in found[0]]


def _difference(downstream: Downstream | None, a: str, b: str) -> SummaryDifference:
    found = downstream.differences.get(a, {}).get(b) if downstream else None
    if found is None:
        return SummaryDifference(None, None)
    return SummaryDifference(found.accuracy_shift.value, found.accuracy_shift.interval)


def _recovery(metrics: Metrics, encoder: str, roles: Roles, field: str) -> SummaryRecovery:
    record = metrics.adherence[encoder].fields.get(field) if encoder in metrics.adherence else None
    if record is None:
        return SummaryRecovery(None, None)
    found = record.synthetic.get(roles.candidate)
    return SummaryRecovery(found.value if found else None, record.real.value)


def _variety(metrics: Metrics, encoder: str, roles: Roles) -> SummaryVariety:
    overall = metrics.fidelity[encoder].overall if encoder in metrics.fidelity else {}
    found, real = overall.get(roles.candidate), overall.get(REAL)
    return SummaryVariety(
        recall=found.recall if found else None,
        recall_real=real.recall if real else None,
        coverage=found.coverage if found else None,
        coverage_real=real.coverage if real else None,
    )


def _verdict(metrics: Metrics, encoder: str) -> Verdict:
    """The verdict on the candidate, in one encoder's features."""
    candidate, downstream = metrics.roles.candidate, metrics.downstream.get(encoder)
    found = downstream.differences.get(candidate, {}) if downstream else {}
    compared = [kind for kind in baseline_kinds() if kind.name in found]
    # Of those compared a decisive one is shown first, then the best.
    compared.sort(key=lambda kind: (not kind.decisive, found[kind.name].accuracy_shift.value or 0.0))
    differences = {kind.phrase: found[kind.name].accuracy_shift for kind in compared}
    differences = {name: difference for name, difference in differences.items() if difference.value is not None}
    result = downstream.training_sets.get(candidate) if downstream else None
    evidence = Evidence(
        candidate=label_of(candidate),
        score=result.accuracy_shift.value if result else None,
        differences=differences,
        missing=[kind.phrase for kind in KINDS if kind.decisive and kind.phrase not in differences],
        reasons=no_verdict_reasons(metrics, encoder, differences),
        group=patient_group(metrics, downstream),
    )
    return verdict(evidence)


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def evaluation_text(metrics: Metrics, record: Headline) -> str:
    """All that a terminal shows of an evaluation: the tables of a published protocol, then the summary."""
    protocol = protocol_text(metrics.protocols)
    summary = headline_text(metrics, record)
    return f"{protocol.lstrip()}\n\n{summary}" if protocol else summary


def conclusions(metrics: Metrics, record: Headline) -> list[str]:
    """The verdict's sentence, or what was found instead, for people: with distances in thousandths, which the files
    have as they are.
    """
    written = [(wording(metrics, record.encoder), wording(metrics, record.encoder, True)) for wording in _WORDINGS]
    shown = record.findings or [record.verdict.sentence]
    for stored, readable in written:
        if stored:
            shown = [sentence.replace(stored, readable) for sentence in shown]
    return shown


def headline_text(metrics: Metrics, record: Headline) -> str:
    """The summary as a table for a terminal, the verdict last, or what was found instead."""
    names = [label_of(name)[:9] for name in (record.candidate, record.baseline)]
    lines = [f"Kernel distance ({KID_UNIT}) to real patches (lower is better)"]
    lines.append(f"  {'':<32}" + "".join(f"{name:>10}" for name in (*names, "real", "ratio")))
    for name, title in _DISTANCES.items():
        row: SummaryDistances | None = getattr(record, name)
        if row is None:
            continue
        values = (row.candidate, row.baseline, row.real)
        if not (row.left_out or any(values)):
            continue
        cells = "".join(f"{kid_text(value):>10}" for value in values)
        bounds = row.ratio_interval
        interval = f"  {bounds[0]:.2f} to {bounds[1]:.2f}" if isinstance(bounds, tuple) else ""
        lines.append(f"  {title:<32}{cells}{_number(row.ratio, 2):>10}{interval}")
        if row.frechet_ratio is not None:
            perfect = f"a perfect generator gets {_number(row.frechet_perfect, 2)}"
            lines.append(f"    {'ratio of Fréchet distances':<60}{row.frechet_ratio:>10.2f}  ({perfect})")
        lines += [f"    not compared: {each} ({why})" for each, why in row.left_out.items()]
    lines.append(f"  ratio = {names[0]} / {names[1]}: 0 is as near as real patients, 1 is no nearer than {names[1]}")
    lines += _class_lines(record, names)
    lines += _accuracies(record) + _recoveries(record)
    times = ", ".join(f"{stage} {value:.0f} s" for stage, value in record.seconds.items())
    lines += ["", f"Time: {times}", "", *(f"Warning: {text}" for text in record.warnings)]
    lines += conclusions(metrics, record)
    return "\n".join(lines)


def _class_lines(record: Headline, names: Sequence[str]) -> list[str]:
    """Distances of candidate and baseline in each class, to training images and to held-out patients."""
    if not record.classes:
        return []
    columns = [(record.candidate, "held_out"), (record.baseline, "held_out")]
    title = f"{'held-out patients':>20}"
    if record.distance_per_class_training:
        columns = [(record.candidate, "training"), (record.baseline, "training"), *columns]
        title = f"{'training images':>20}{title}"
    lines = ["", f"Kernel distance ({KID_UNIT}) by class", f"  {'':<32}{title}"]
    lines.append(f"  {'':<32}" + "".join(f"{name:>10}" for name in [*names] * (len(columns) // 2)))
    for row in record.classes:
        values = [getattr(row, reference).get(source) for source, reference in columns]
        lines.append(f"  {row.name[:31]:<32}" + "".join(f"{kid_text(value):>10}" for value in values))
    if record.distance_per_class_training:
        lines += textwrap.wrap(TRAINING_IMAGES, 100, initial_indent="  ", subsequent_indent="  ")
    return lines


def _accuracies(record: Headline) -> list[str]:
    if not any(value is not None for value in record.accuracy_shift.values()):
        return []
    titles = ("under shift", "other sites", "seen", "unseen")
    lines = ["", f"Balanced accuracy of {record.classifier} (higher is better)"]
    lines.append(f"  {'':<32}" + "".join(f"{title:>13}" for title in titles))
    for name in record.accuracy_shift:
        values = [getattr(record, score)[name] for score in ACCURACIES]
        lines.append(f"  {label_of(name)[:31]:<32}" + "".join(f"{_number(value):>13}" for value in values))
    if record.n_test_patches is not None and record.n_test_patients is not None:
        patches, patients = counted(record.n_test_patches, "test patch"), counted(record.n_test_patients, "patient")
        lines.append(f"  under shift: {patches} of {patients}")
    return lines


def _recoveries(record: Headline) -> list[str]:
    rows = {"site": record.recovery_site, "class": record.recovery_class}
    if all(row.real is None for row in rows.values()):
        return []
    lines = ["", f"Requested value found in {label_of(record.candidate)}'s samples of unseen combinations, and variety"]
    lines.append(f"  {'':<32}{'samples':>10}{'real':>10}")
    variety = record.variety
    numbers = {f"{key} found": (row.found, row.real) for key, row in rows.items()} | {
        "recall, all patches": (variety.recall, variety.recall_real),
        "coverage, all patches": (variety.coverage, variety.coverage_real),
    }
    return lines + [f"  {key:<32}{_number(a):>10}{_number(b):>10}" for key, (a, b) in numbers.items()]
