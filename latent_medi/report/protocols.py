"""MeDi's downstream protocol on the page: accuracy against the share of synthetic patches, and against the sites."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from latent_medi.core.counting import counted
from latent_medi.evaluation.cohort.comparison_sets import REAL
from latent_medi.evaluation.cohort.roles import Roles
from latent_medi.evaluation.downstream.protocol_tables import set_label
from latent_medi.evaluation.downstream.records import MediProtocol, MediProtocolRow, MediTask
from latent_medi.evaluation.downstream.registry import style_of
from latent_medi.report import figures
from latent_medi.statistics.seeds import MeanOverSeeds


@dataclass(frozen=True)
class PageTask:
    """One task of the protocol.

    Args:
        name: Its name; empty for all classes.
        record: Its classes and patches.
        seeds: Number of seeds.
        plots: Plot and caption of each sweep.
        columns: Training sets in words.
        table: Sites, real patches and ratio in words, and the balanced accuracy of each training set; None where there
            is none.
        rows: Training set in words, and result.
    """

    name: str
    record: MediTask
    seeds: int
    plots: list[tuple[str, str]]
    columns: list[str]
    table: list[tuple[str, list[MeanOverSeeds | None]]]
    rows: list[tuple[str, MediProtocolRow]]


def page_tasks(record: MediProtocol | None, roles: Roles) -> list[PageTask]:
    """The tasks of MeDi's protocol as the page shows them; none without the protocol."""
    if record is None:
        return []
    tasks = []
    for name, task in record.tasks.items():
        rows = [row for row in record.rows if row.task == name]
        seeds = len(rows[0].mcc.by_seed)
        labelled = [(set_label(row), row) for row in rows]
        tasks.append(PageTask(name, task, seeds, _plots(rows, roles), *_table(rows), labelled))
    return tasks


def _table(rows: Sequence[MediProtocolRow]) -> tuple[list[str], list[tuple[str, list[MeanOverSeeds | None]]]]:
    """Training sets as columns, and a row with their accuracies for each choice of sites, real patches and ratio."""
    columns = list(dict.fromkeys(map(set_label, rows)))
    keys = list(dict.fromkeys((row.sites, row.max_real, row.ratio) for row in rows))
    found = {((row.sites, row.max_real, row.ratio), set_label(row)): row.balanced_accuracy for row in rows}
    table = []
    for sites, most, ratio in keys:
        words = f"{counted(sites, 'site')}, {f'at most {most}' if most else 'all'} real patches of a class"
        words += f", {ratio:g} synthetic per real" if ratio else ""
        table.append((words, [found.get(((sites, most, ratio), column)) for column in columns]))
    return columns, table


def _plots(rows: Sequence[MediProtocolRow], roles: Roles) -> list[tuple[str, str]]:
    """Accuracy against the ratio with most sites and real patches, and against either of these at the largest ratio."""
    sites = max(row.sites for row in rows)
    most = max((row.max_real for row in rows), key=lambda n: n or float("inf"))
    ratio = max(row.ratio for row in rows)
    amount = f"at most {most} real patches of a class" if most else "all their real patches"
    every = counted(sites, "site")
    by_ratio = [row for row in rows if row.sites == sites and row.max_real == most]
    largest = [row for row in rows if row.ratio in (0, ratio)]
    by_sites = [row for row in largest if row.max_real == most]
    by_number = [row for row in largest if row.sites == sites]
    sweeps = [
        (by_ratio, lambda row: row.ratio, "synthetic patches per real one", f"{every}, {amount}"),
        (by_sites, lambda row: row.sites, "training sites", f"{ratio:g} synthetic patches per real one, {amount}"),
        (
            by_number,
            lambda row: max(row.n_real),
            "real training patches",
            f"{ratio:g} synthetic patches per real one, {every}",
        ),
    ]
    found = []
    for chosen, at, xlabel, caption in sweeps:
        plot = _sweep(chosen, at, xlabel, roles)
        if plot:
            found.append((plot, caption))
    return found


def _sweep(
    rows: Sequence[MediProtocolRow], at: Callable[[MediProtocolRow], float], xlabel: str, roles: Roles
) -> str | None:
    """A line per training set. Where the real patches alone have one place, lines of samples begin there if they have
    none (a ratio of 0), and otherwise the real patches run through.
    """
    places = sorted({at(row) for row in rows})
    alone = [row for row in rows if row.training_set == REAL]
    others = {at(row) for row in rows if row.training_set != REAL}
    first = {at(row): row.balanced_accuracy for row in alone if at(row) not in others} if len(alone) == 1 else {}
    lines: list[figures.SweepLine] = []
    for label in dict.fromkeys(map(set_label, rows)):
        own = sorted((row for row in rows if set_label(row) == label), key=at)
        points = {at(row): row.balanced_accuracy for row in own}
        if own[0].training_set != REAL:
            points = first | points
        elif len(points) == 1:
            points = dict.fromkeys(places, own[0].balanced_accuracy)
        style = style_of(own[0].training_set, roles)
        errors = [point.sem for point in points.values()]
        means = [point.mean for point in points.values()]
        lines.append(figures.SweepLine(label, style, list(points), means, errors, own[0].pool == "separate"))
    return figures.sweep(lines, xlabel, "balanced accuracy") if len(places) > 1 else None
