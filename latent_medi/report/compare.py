"""Two or more evaluations in columns, and which of their numbers may be compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from latent_medi.core.counting import counted
from latent_medi.core.errors import UserError
from latent_medi.core.files import HTML, check_file, write_text
from latent_medi.core.records import encode
from latent_medi.evaluation.downstream.registry import (
    KINDS,
    REAL,
    baseline_kinds,
    label_of,
    names_of,
    style_of,
    summarised,
)
from latent_medi.evaluation.results import Metrics, metrics_file, read_metrics
from latent_medi.evaluation.summary import conclusions
from latent_medi.report import figures
from latent_medi.report.page import (
    DASH,
    accuracies,
    bounds,
    differences,
    encoder_name,
    environment,
    flat,
    kid,
    number,
    percent,
    share,
)
from latent_medi.statistics.intervals import Estimate
from latent_medi.statistics.kernel_distance import KID_UNIT

_LONGEST = 160  # characters of a setting on the page
MISSING = "missing in one run"


@dataclass(frozen=True)
class Number:
    """One number of a run.

    Args:
        kind: How it is written.
        estimate: The number.
        headline: Whether it belongs to the headline.
    """

    kind: Literal["distance", "ratio", "number", "percent"]
    estimate: Estimate
    headline: bool = True


@dataclass(frozen=True)
class Entry:
    """A number as a table shows it.

    Args:
        value: The number.
        bounds: Its interval.
        n: Its patches and patients.
        difference: The difference to the first run; empty for the first run, or where there is a reason.
        reasons: Why the number is not compared with the first run's.
        marks: Letters of the table's notes that say so; empty where a note holds for all numbers.
    """

    value: str
    bounds: str
    n: str
    difference: str
    reasons: list[str]
    marks: str = ""


@dataclass(frozen=True)
class Row:
    """One number of all runs.

    Args:
        name: What it is.
        entries: One per run.
    """

    name: str
    entries: list[Entry]


@dataclass(frozen=True)
class Table:
    """Numbers of all runs.

    Args:
        title: What they have in common.
        rows: The numbers.
        notes: Of each run, why numbers of it are not compared with the first run's, each reason once: its mark, and the
            reason with the numbers that it holds for.
    """

    title: str
    rows: list[Row]
    notes: list[list[tuple[str, str]]]


def render_comparison(metrics: Sequence[str | Path], out: str | Path, title: str = "") -> Path:
    """Write a page with the numbers of several evaluations, their differences to the first, and what else differs.

    Two numbers are not subtracted where the encoder, the number of patches or the real data differ; the page says why.

    Args:
        metrics: Two or more ``metrics.json`` or folders of runs.
        out: The HTML file.
        title: Heading.

    Returns:
        The path of the page.

    Raises:
        UserError: Fewer than two, or one that is no evaluation's.
    """
    if len(metrics) < 2:
        raise UserError("A comparison takes two runs or more.", "latent-medi report --compare runs/a runs/b")
    runs = [read_metrics(path) for path in metrics]
    names = run_names([metrics_file(path) for path in metrics])
    tables = compare(runs)
    page = (
        environment()
        .get_template("compare.html")
        .render(
            title=title or "Comparison of evaluations",
            names=names,
            summaries=[
                (n, m.headline, conclusions(m, m.headline)) for n, m in zip(names, runs, strict=True) if m.headline
            ],
            tables=tables,
            warnings=_warnings(runs, names, tables),
            figures=_figures(runs, names),
            differences=differing(runs),
            runs=[m.run for m in runs],
        )
    )
    write_text(check_file(out, "page", HTML), page)
    return Path(out)


def run_names(files: Sequence[Path]) -> list[str]:
    """Short names of runs: their folders' names, with as many parents as it takes to make them different."""
    parts = [f.resolve().parent.parts if f.name == "metrics.json" else f.resolve().with_suffix("").parts for f in files]
    for depth in range(1, max(len(p) for p in parts) + 1):
        names = ["/".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{names[0]} ({i + 1})" for i in range(len(files))]  # the same file twice


def numbers(run: Metrics, encoder: str) -> dict[str, Number]:
    """The numbers of one encoder that are compared between runs, by what they are."""
    found: dict[str, Number] = {}
    if fidelity := run.fidelity.get(encoder):
        tables = {
            "unseen combinations": fidelity.unseen,
            "per class": fidelity.per_class,
            "per site": fidelity.per_site,
        }
        if fidelity.training:
            tables["per class, training images"] = fidelity.training.per_class
        for title, table in tables.items():
            headline = table is not fidelity.per_site
            for source, mean in table.means.items():
                name = f"{KID_UNIT}, {title}: {figures.source_name(source, title.endswith('training images'))}"
                found[name] = Number("distance", mean, headline)
            found[f"ratio, {title}"] = Number("ratio", table.ratio, headline)
    for name, accuracy in accuracies(run, encoder).items():
        found[f"accuracy under shift: {label_of(name)}"] = Number("number", accuracy)
    gains = differences(run, encoder, run.roles.candidate)
    for kind in summarised(baseline_kinds()):
        if gain := gains.get(kind.name):
            found[f"accuracy under shift: {label_of(run.roles.candidate)} − {kind.label}"] = Number("number", gain)
    if adherence := run.adherence.get(encoder):
        for field, recovery in adherence.fields.items():
            for name, share_found in recovery.synthetic.items():
                found[f"{field} found: {label_of(name)}"] = Number("percent", share_found, headline=False)
            found[f"{field} found: real patches"] = Number("percent", recovery.real, headline=False)
    if memorisation := run.memorisation.get(encoder):
        for name, copies in memorisation.synthetic.items():
            found[f"copy rate: {label_of(name)}"] = Number("percent", copies.copy_rate)
    return {name: each for name, each in found.items() if each.estimate.value is not None}


def compare(runs: Sequence[Metrics]) -> list[Table]:
    """Tables with each run's number, interval and n, and the difference to the first run.

    The first table has the headline numbers, in the feature space of each run's own headline. Another one follows for
    each encoder that several runs have.
    """
    own = [m.headline.encoder if m.headline else next(iter(m.encoders), "") for m in runs]
    tables = [_table("the headline, in the feature space of each run's own headline", _rows(runs, own, headline=True))]
    for encoder in dict.fromkeys(n for m in runs for n in m.encoders):
        if sum(encoder in m.encoders for m in runs) > 1:
            tables.append(_table(f"features: {encoder_name(encoder)}", _rows(runs, [encoder] * len(runs))))
    return [t for t in tables if t.rows]


def _table(title: str, rows: list[Row]) -> Table:
    """The table with its notes: a reason that holds for every number of a run has no mark, any other has a letter."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    notes: list[list[tuple[str, str]]] = []
    entries = [list(row.entries) for row in rows]
    for run in range(len(rows[0].entries) if rows else 0):
        found = [{_kind(reason) for reason in row[run].reasons} for row in entries]
        notes.append([])
        for kind in dict.fromkeys(_kind(reason) for row in entries for reason in row[run].reasons):
            n = sum(kind in each for each in found)
            mark = "" if n == len(found) else letters[sum(bool(m) for part in notes for m, _ in part) % len(letters)]
            notes[run].append((mark, f"{kind} ({f'all {n}' if not mark else f'{n} of {len(found)}'} numbers)"))
            if mark:
                for i, row in enumerate(entries):
                    if kind in found[i]:
                        row[run] = replace(row[run], marks=row[run].marks + mark)
    return Table(title, [Row(row.name, each) for row, each in zip(rows, entries, strict=True)], notes)


def _kind(reason: str) -> str:
    """A reason without the numbers of its row."""
    return "another number of patches or patients" if reason.startswith("n = ") else reason


def _rows(runs: Sequence[Metrics], encoders: Sequence[str], headline: bool = False) -> list[Row]:
    found = [numbers(run, encoder) for run, encoder in zip(runs, encoders, strict=True)]
    names = dict.fromkeys(n for each in found for n, one in each.items() if one.headline or not headline)
    rows = []
    for name in names:
        columns = [each.get(name) for each in found]
        entries = []
        for i, (run, encoder, one) in enumerate(zip(runs, encoders, columns, strict=True)):
            why = reasons(runs[0], encoders[0], columns[0], run, encoder, one) if i else None
            entries.append(_entry(one, columns[0], why))
        rows.append(Row(name, entries))
    return rows


def reasons(
    first_run: Metrics, first_encoder: str, first: Number | None, run: Metrics, encoder: str, other: Number | None
) -> list[str]:
    """Why a number cannot be compared with the first run's; empty if it can."""
    if first is None or other is None:
        return [MISSING]
    found = []
    if first_run.encoders[first_encoder].fingerprint != run.encoders[encoder].fingerprint:
        found.append("another encoder")
    a, b = first.estimate, other.estimate
    for before, after, unit in ((a.n_patches, b.n_patches, "patches"), (a.n_patients, b.n_patients, "patients")):
        if before != after:
            found.append(f"n = {after} instead of {before} {unit}")
    if _real_data(first_run) != _real_data(run):
        found.append("other real data")
    return found


def differing(runs: Sequence[Metrics]) -> list[tuple[str, list[str]]]:
    """Settings, encoders, data, models and versions that are not the same in all runs: name and text per run."""
    described = [_described(m) for m in runs]
    keys = list(dict.fromkeys(k for d in described for k in d))
    return [(k, [_clip(d.get(k, DASH)) for d in described]) for k in keys if len({d.get(k) for d in described}) > 1]


def _described(run: Metrics) -> dict[str, str]:
    encoders = {
        n: {"fingerprint": e.fingerprint, "preprocessing": e.preprocessing, "dim": e.dim}
        for n, e in run.encoders.items()
    }
    samples = {n: {"n": s.n_patches, "fields": s.fields, **s.provenance} for n, s in run.synthetic.items()}
    parts = {
        "settings": encode(run.settings),
        "real data": _real_data(run) | {"folder": run.dataset.folder},
        "encoder": encoders,
        "samples": samples,
        "run": encode(run.run),
    }
    return flat(parts)


def _real_data(run: Metrics) -> dict[str, Any]:
    # As text, so that tables of counts are compared whole instead of being counted.
    data = {k: v for k, v in asdict(run.dataset).items() if k not in ("folder", "class_field", "site_field")}
    return data | {"counts": str(data["counts"])}


def _clip(text: str) -> str:
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "…"


def _entry(one: Number | None, first: Number | None, reason: list[str] | None) -> Entry:
    """A number as text.

    Args:
        one: The number; ``None`` if the run does not have it.
        first: The first run's.
        reason: Why the two cannot be compared; ``None`` for the first run itself.
    """
    if one is None:
        return Entry(DASH, "", "", "", reason or [])
    record = one.estimate
    texts = {
        "distance": (kid(record), bounds(record, None)),
        "ratio": (number(record, 2), bounds(record, 2)),
        "number": (number(record), bounds(record)),
        "percent": (percent(record, 1), share(record)),
    }
    value, interval = texts[one.kind]
    difference = ""
    if reason == [] and first is not None and record.value is not None and first.estimate.value is not None:
        gap = record.value - first.estimate.value
        difference = {
            "distance": ("+" if gap > 0 else "") + kid(gap),
            "ratio": number(gap, 2, sign=True),
            "number": number(gap, sign=True),
            "percent": f"{number(100 * gap, 1, sign=True)} points",
        }[one.kind]
    n = f"n = {record.n_patches}" if record.n_patches else ""
    if n and record.n_patients:
        n += f", {counted(record.n_patients, 'patient')}"
    return Entry(value, interval, n, difference, reason or [])


def _warnings(runs: Sequence[Metrics], names: Sequence[str], tables: Sequence[Table]) -> list[str]:
    """One sentence per run on what keeps numbers from being compared with those of the first run."""
    texts = []
    entries = [row.entries for table in tables for row in table.rows]
    prints = [{e.fingerprint for e in run.encoders.values()} for run in runs]
    for i, name in enumerate(names[1:], 1):
        without = [row[i].reasons for row in entries if row[i].reasons]
        kinds = dict.fromkeys(_kind(reason) for reasons in without for reason in reasons)
        pair = f"{name} and {names[0]}"
        if without:
            texts.append(
                f"{pair}: {len(without)} of {len(entries)} numbers cannot be compared ({', '.join(kinds)}); they are "
                "shown without a difference."
            )
        if not prints[0] & prints[i]:
            texts.append(f"{pair} have no encoder in common: distances and accuracies are of two kinds.")
    return texts


def _figures(runs: Sequence[Metrics], names: Sequence[str]) -> list[dict[str, str]]:
    """Accuracy under shift of each run, a plot per encoder."""
    result = []
    prints = dict.fromkeys((n, e.fingerprint) for m in runs for n, e in m.encoders.items())
    for encoder, fingerprint in prints:
        rows = []
        for name, run in zip(names, runs, strict=True):
            # Two sets of weights under one name are two encoders, whose accuracies have no axis in common.
            if encoder not in run.encoders or run.encoders[encoder].fingerprint != fingerprint:
                continue
            found = accuracies(run, encoder)
            kinds = [kind for kind in KINDS if kind is REAL or kind.decisive or kind.role == "candidate"]
            chosen = [n for n in names_of(kinds, run.roles) if n in found]
            rows += [(name, n, style_of(n, run.roles), found[n]) for n in chosen]
        uri = figures.runs(rows, "balanced accuracy under shift")
        if uri:
            alone = sum(name == encoder for name, _ in prints) == 1
            weights = "" if alone else f" (weights {fingerprint[:8]})"
            result.append({"encoder": encoder_name(encoder) + weights, "uri": uri})
    return result
