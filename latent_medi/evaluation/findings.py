"""What an evaluation without a downstream comparison found, in sentences: they stand where the verdict would."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean

from latent_medi.evaluation.class_distances import HELD_OUT_PATIENTS, TRAINING, distance_text, references
from latent_medi.evaluation.cohort.comparison_sets import REAL
from latent_medi.evaluation.downstream.protocol_tables import score_text, set_label
from latent_medi.evaluation.downstream.records import MediProtocol, MediProtocolRow
from latent_medi.evaluation.downstream.registry import label_of
from latent_medi.evaluation.fidelity.records import DistanceTable, Fidelity
from latent_medi.evaluation.results import Metrics
from latent_medi.evaluation.verdict import in_words
from latent_medi.statistics.kernel_distance import KID_UNIT, kid_text


def findings(metrics: Metrics, encoder: str) -> list[str]:
    """Distances of candidate and baseline first, then the main row of each task of MeDi's protocol.

    Args:
        metrics: The evaluation.
        encoder: Name of the encoder that the summary is about.

    Returns:
        Sentences; none with a downstream comparison, whose verdict is what the evaluation is about.
    """
    if encoder in metrics.downstream:
        return []
    found = distances_found(metrics, encoder)
    protocol = metrics.protocols.medi.get(encoder)
    names = [metrics.roles.candidate, metrics.roles.baseline]
    return [*([found] if found else []), *(_tasks(protocol, names) if protocol else [])]


def distances_found(metrics: Metrics, encoder: str, readable: bool = False) -> str:
    """Distances of candidate and baseline in a sentence; empty without samples.

    Args:
        metrics: The evaluation.
        encoder: Name of the encoder.
        readable: Write distances in thousandths, for people; otherwise as files have them.
    """
    if encoder not in metrics.fidelity:
        return ""
    names = [metrics.roles.candidate, metrics.roles.baseline]
    return _distances(metrics.fidelity[encoder], names, *(KID_UNIT, kid_text) if readable else ("KID", distance_text))


def _distances(fidelity: Fidelity, names: list[str], unit: str, text: Callable[[float | None], str]) -> str:
    """Of unseen combinations if there are any, and of each class against each reference; empty without samples."""
    tables = [(f"real patches of {HELD_OUT_PATIENTS}", "unseen combinations", fidelity.unseen)]
    by_class = references(fidelity)
    for reference in (TRAINING, HELD_OUT_PATIENTS):
        if reference in by_class:
            tables.append((reference, "classes", by_class[reference]))
    if compared := [clause for each in tables if (clause := _compared(*each, names, text))]:
        pair = f"{label_of(names[0])} against {label_of(names[1])}"
        return f"Kernel distance ({unit}, lower is better) of {pair}: {'; '.join(compared)}."
    alone = [clause for each in tables if (clause := _alone(*each, names[0], unit, text))]
    return f"{label_of(names[0])} is {'; '.join(alone)}." if alone else ""


def _compared(
    reference: str, unit: str, table: DistanceTable, names: list[str], text: Callable[[float | None], str]
) -> str:
    """Means over the combinations that both have, and on how many the candidate is nearer; empty without such."""
    both = [[each.sources[n].value for n in names] for each in table.combinations if {*names} <= {*each.sources}]
    pairs = [(a, b) for a, b in both if a is not None and b is not None]
    if not pairs:
        return ""
    nearer = sum(a < b for a, b in pairs)
    means = [text(fmean(values)) for values in zip(*pairs, strict=True)]
    bounds, ratio = table.ratio.interval, ""
    if table.ratio.value is not None and isinstance(bounds, tuple):
        ratio = f", ratio {table.ratio.value:.2f} [{bounds[0]:.2f}, {bounds[1]:.2f}]"
    return f"{means[0]} against {means[1]} to {reference} (lower on {nearer} of {len(pairs)} {unit}{ratio})"


def _alone(
    reference: str, of: str, table: DistanceTable, name: str, unit: str, text: Callable[[float | None], str]
) -> str:
    """The candidate's mean; empty without samples."""
    n = sum(name in each.sources and each.sources[name].value is not None for each in table.combinations)
    return f"at a mean {unit} of {text(table.means[name].value)} from {reference} over {n} {of}" if n else ""


def _tasks(record: MediProtocol, names: list[str]) -> list[str]:
    """Balanced accuracies of each task with most sites and real patches and at the largest ratio of samples."""
    sentences = []
    for task in record.tasks:
        rows = [row for row in record.rows if row.task == task]
        sites = max(row.sites for row in rows)
        most = max((row.max_real for row in rows), key=lambda n: n or float("inf"))
        rows = [row for row in rows if (row.sites, row.max_real) == (sites, most)]
        ratio = max(row.ratio for row in rows)
        pool = next((row.pool for row in rows if row.ratio == ratio), "")
        chosen = [row for row in rows if row.ratio == ratio and row.pool == pool and row.training_set in names]
        chosen.sort(key=lambda row: names.index(row.training_set))
        chosen += [row for row in rows if row.training_set == REAL][:1]
        if not chosen:
            continue
        scores = [f"{score_text(row.balanced_accuracy)} {_trained_on(row)}" for row in chosen]
        title = f"MeDi's protocol{f', {task}' if task else ''} ({sites} sites, ratio {ratio:g})"
        sentences.append(f"{title}: balanced accuracy {in_words(scores)}.")
    return sentences


def _trained_on(row: MediProtocolRow) -> str:
    return "from real patches alone" if row.training_set == REAL else f"with samples of {set_label(row)}"
