"""The summary of an evaluation: as a record, as a table for the terminal, and the verdict as a sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from latent_medi.core.records import encode
from latent_medi.evaluation.cohort.comparison_sets import REAL
from latent_medi.evaluation.cohort.roles import Roles
from latent_medi.evaluation.downstream.records import Downstream
from latent_medi.evaluation.downstream.registry import (
    KINDS,
    TrainingSetKind,
    baseline_kinds,
    label_of,
    names_of,
    summarised,
)
from latent_medi.evaluation.fidelity.records import DistanceTable
from latent_medi.evaluation.results import Metrics
from latent_medi.evaluation.summary_records import (
    FurtherTrainingSet,
    Headline,
    SummaryDifference,
    SummaryDistances,
    SummaryRecovery,
)
from latent_medi.statistics.intervals import Interval

CLASSIFIERS = {"linear": "a linear probe", "cnn": "a small network"}
ACCURACIES = ("accuracy_shift", "accuracy_in_distribution", "accuracy_seen", "accuracy_unseen")
_COLOUR_FREE = ":haematoxylin"


def headline(metrics: Metrics, seconds: Mapping[str, float] | None = None) -> Headline:
    """The summary of an evaluation; its own summary and verdict are not read.

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
        fd_unseen=_distances(plain.unseen if plain else None, roles),
        fd_unseen_colour_free=_distances(colour_free.unseen if colour_free else None, roles),
        fd_per_class=_distances(plain.per_class if plain else None, roles),
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
        warnings=[*metrics.warnings, *_not_recovered(metrics, encoder, roles, recoveries)],
    )


def headline_json(record: Headline) -> dict[str, Any]:
    """The content of ``headline.json``, in which distances and accuracies are named by synthetic set."""
    content: dict[str, Any] = {}
    for name in ("fd_unseen", "fd_unseen_colour_free", "fd_per_class"):
        row: SummaryDistances = getattr(record, name)
        values = {record.candidate: row.candidate, record.baseline: row.baseline, "floor": row.real, "ratio": row.ratio}
        content[name] = values | {"metric": row.metric, "left_out": row.left_out}
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
    content["recovery_unseen"] = {key: recovery.found for key, recovery in recoveries.items()}
    content["recovery_ceiling"] = {key: recovery.real for key, recovery in recoveries.items()}
    content["n"] = {"test_patches": record.n_test_patches, "test_patients": record.n_test_patients}
    content |= {name: getattr(record, name) for name in ("encoder", "classifier", "seconds", "warnings")}
    encoded: dict[str, Any] = encode(content)
    return encoded


def _distances(table: DistanceTable | None, roles: Roles) -> SummaryDistances:
    if table is None:
        return SummaryDistances(None, None, None, None, None, {})
    values = {name: mean.value for name, mean in table.means.items()}
    return SummaryDistances(
        candidate=values.get(roles.candidate),
        baseline=values.get(roles.baseline),
        real=values.get(REAL),
        ratio=table.ratio.value,
        metric=table.metric,
        left_out=table.left_out,
    )


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


def _not_recovered(metrics: Metrics, encoder: str, roles: Roles, recoveries: Sequence[SummaryRecovery]) -> list[str]:
    """What the candidate's samples do not show although the linear probe finds it in real patches: where less than half
    of the way from chance to real patches is found.
    """
    texts = []
    for key, recovery in zip(("site", "class"), recoveries, strict=True):
        if recovery.found is None or recovery.real is None:
            continue
        name = metrics.dataset.site_field if key == "site" else metrics.dataset.class_field
        chance = metrics.adherence[encoder].fields[name].chance
        # A linear probe that hardly finds it in real patches says nothing.
        if recovery.real - chance < 0.1 or recovery.found >= (chance + recovery.real) / 2:
            continue
        texts.append(
            f"{label_of(roles.candidate)}'s samples of unseen combinations show the requested {key} in "
            f"{recovery.found:.0%}, real patches in {recovery.real:.0%}. Whatever the samples do to a classifier, they "
            "are not of the combinations that they are named after."
        )
    return texts


def useful(record: Headline) -> bool | None:
    """Whether the candidate beats every baseline without a generator that was compared.

    None if that is unknown: without a comparison, and without a decisive baseline (stain transfer, which costs
    nothing), unless another baseline is as good already.
    """
    score, baselines = record.accuracy_shift.get(record.candidate), _baselines(record)
    if score is None or not baselines:
        return None
    beaten = all(score > value for _, value, _ in baselines)
    return None if beaten and not _decisive(baselines) else beaten


Compared = list[tuple[TrainingSetKind, float, Interval]]


def _baselines(record: Headline) -> Compared:
    """The baselines that were compared: accuracy under shift, and interval of the candidate's difference from it."""
    found: Compared = []
    for kind in baseline_kinds():
        if kind.name in record.further:
            value, difference = record.further[kind.name].accuracy_shift, record.further[kind.name].difference
        else:
            value = record.accuracy_shift.get(kind.name)
            difference = record.accuracy_shift_difference.get(kind.name, SummaryDifference(None, None))
        if value is not None:
            found.append((kind, value, difference.interval))
    return found


def _decisive(baselines: Compared) -> bool:
    tried = {kind.name for kind, _, _ in baselines}
    return all(kind.name in tried for kind in KINDS if kind.decisive)


def verdict(record: Headline) -> str:
    """One sentence: whether the candidate is useful, which takes beating the baselines without a generator."""
    name, score = label_of(record.candidate), record.accuracy_shift.get(record.candidate)
    baselines = _baselines(record)
    if score is None or not baselines:
        return f"Whether {name} is useful cannot be said: there is no downstream comparison with its samples."
    lead, best, interval = next((b for b in baselines if b[0].decisive), max(baselines, key=lambda b: b[1]))
    start = f"accuracy under shift is {score:.3f}, {score - best:+.3f} against {lead.phrase}{_interval(interval)}"
    answer = useful(record)
    if answer is None:
        missing = _list([kind.phrase for kind in KINDS if kind.decisive])
        return f"Whether {name} is useful cannot be said, since {missing} was not tried: {start}."
    if not answer:
        ahead = [kind.phrase for kind, value, _ in baselines if value >= score]
        verb = "does" if len(ahead) == 1 else "do"
        return f"{name} is not useful here: {start}; {_list(ahead)} {verb} at least as well."
    chance = [kind.phrase for kind, _, bounds in baselines if not (isinstance(bounds, tuple) and bounds[0] > 0)]
    word = "is useful here"
    if chance:
        word = "may be useful here, though the evidence does not exclude chance"
        if chance != [lead.phrase]:
            word += f" against {_list(chance)}"
    return f"{name} {word}: {start}."


def _interval(bounds: Interval) -> str:
    if isinstance(bounds, tuple):
        return f" [{bounds[0]:+.3f}, {bounds[1]:+.3f}]"
    return f" (interval {bounds})" if bounds else ""


def _list(words: list[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def distance_text(value: float | None) -> str:
    """A distance with three significant digits, since its scale depends on the encoder."""
    if value is None:
        return "–"
    if abs(value) < 1e-4:
        return f"{value:.1e}" if value else "0"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def headline_text(record: Headline) -> str:
    """The summary as a table for a terminal, the verdict last."""
    names = [label_of(name)[:9] for name in (record.candidate, record.baseline)]
    lines = ["Distance to real patches of other patients (lower is better)"]
    lines.append(f"  {'':<32}{'metric':>8}" + "".join(f"{name:>10}" for name in (*names, "real", "ratio")))
    rows = {
        "unseen combinations": record.fd_unseen,
        "unseen, colour-free": record.fd_unseen_colour_free,
        "per class, all sites": record.fd_per_class,
    }
    for title, row in rows.items():
        values = (row.candidate, row.baseline, row.real)
        if row.metric is None or not (row.left_out or any(values)):
            continue
        cells = "".join(f"{distance_text(value):>10}" for value in values)
        lines.append(f"  {title:<32}{row.metric.upper():>8}{cells}{_number(row.ratio, 2):>10}")
        lines += [f"    not compared: {name} ({why})" for name, why in row.left_out.items()]
    lines.append(f"  ratio = ({names[0]} − real) / ({names[1]} − real): 0 is real, 1 is no better than {names[1]}")
    lines += _accuracies(record) + _recoveries(record)
    times = ", ".join(f"{stage} {value:.0f} s" for stage, value in record.seconds.items())
    lines += ["", f"Time: {times}", "", *(f"Warning: {text}" for text in record.warnings), verdict(record)]
    return "\n".join(lines)


def _accuracies(record: Headline) -> list[str]:
    if not any(value is not None for value in record.accuracy_shift.values()):
        return []
    titles = ("under shift", "other sites", "seen", "unseen")
    lines = ["", f"Balanced accuracy of {record.classifier} (higher is better)"]
    lines.append(f"  {'':<32}" + "".join(f"{title:>13}" for title in titles))
    for name in record.accuracy_shift:
        values = [getattr(record, score)[name] for score in ACCURACIES]
        lines.append(f"  {label_of(name)[:31]:<32}" + "".join(f"{_number(value):>13}" for value in values))
    if record.n_test_patches is not None:
        lines.append(f"  under shift: {record.n_test_patches} test patches of {record.n_test_patients} patients")
    return lines


def _recoveries(record: Headline) -> list[str]:
    rows = {"site": record.recovery_site, "class": record.recovery_class}
    if all(row.real is None for row in rows.values()):
        return []
    lines = ["", f"Requested value found in {label_of(record.candidate)}'s samples of unseen combinations"]
    lines.append(f"  {'':<32}{'samples':>10}{'real':>10}")
    return lines + [f"  {key:<32}{_number(row.found):>10}{_number(row.real):>10}" for key, row in rows.items()]
