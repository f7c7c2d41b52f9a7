"""``render_report``: metrics.json and patches in, one HTML file without any external request out."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from latent_medi.core.errors import UserError
from latent_medi.core.files import HTML, check_file, write_text
from latent_medi.core.records import encode
from latent_medi.evaluation.adherence.records import Adherence
from latent_medi.evaluation.class_distances import TRAINING, references
from latent_medi.evaluation.cohort.comparison_sets import REAL
from latent_medi.evaluation.cohort.roles import Roles
from latent_medi.evaluation.downstream.records import Downstream
from latent_medi.evaluation.downstream.registry import KINDS
from latent_medi.evaluation.fidelity.records import DistanceTable, Fidelity, Memorisation, Projection
from latent_medi.evaluation.results import Metrics, metrics_file, read_metrics
from latent_medi.report import figures, patches
from latent_medi.report.answer import answer
from latent_medi.report.classifiers import FOLDER, page_classifiers
from latent_medi.report.colour import colour_table
from latent_medi.report.compare import render_comparison
from latent_medi.report.heat import Matrix, matrix, training_table
from latent_medi.report.page import Contents, accuracies, differences, environment
from latent_medi.report.protocols import PageTask, page_tasks
from latent_medi.report.settings import SECTIONS, ReportSettings
from latent_medi.report.words import Words, glossary
from latent_medi.statistics.intervals import Estimate

_CAPTIONS = {
    "unseen combinations": "Unseen combinations: distance to real test patches of the same combination.",
    "each class": "Each class over all sites; samples of models that were conditioned on the site have the test "
    "patches' mix of sites.",
    "each site": "Each site over all classes.",
    "all patches": "All classes and sites; samples have the test patches' mix.",
}


@dataclass(frozen=True)
class PageEncoder:
    """What the page shows of one encoder.

    Args:
        name: Its name.
        fidelity: Distances; ``None`` if the section is not shown. Likewise the sections that follow.
        bars: Plot of the distances by class; ``None`` unless there is more than one reference or nothing is held out.
        tables: Plots and numbers of the distances.
        downstream: Accuracies.
        tasks: Tasks of MeDi's protocol.
        forest: Plot of the accuracies.
        differences: Plot of their differences.
        adherence: Recovery of the requested values.
        matrices: Requested and found values of each field.
        memorisation: Copies.
        pairs: Samples and the training patches that they are most like.
        hidden_pairs: Listed pairs that are not shown.
        projection: Points.
        projections: Plot of the points by field.
    """

    name: str
    fidelity: Fidelity | None
    bars: str | None
    tables: list[PageDistances]
    downstream: Downstream | None
    tasks: list[PageTask]
    forest: str | None
    differences: str | None
    adherence: Adherence | None
    matrices: list[Matrix]
    memorisation: Memorisation | None
    pairs: list[patches.CopyPair]
    hidden_pairs: int
    projection: Projection | None
    projections: dict[str, str]


@dataclass(frozen=True)
class PageDistances:
    """One table of distances.

    Args:
        title: What the combinations are.
        reference: What their patches are compared with.
        figure: Plot.
        alt: Description of the plot.
        caption: Below the plot.
        note: What else there is to know of the numbers.
        rows: Combination and source, and their distance.
        skipped: Sources that are not compared, and why.
    """

    title: str
    reference: str
    figure: str | None
    alt: str
    caption: str
    note: str
    rows: list[tuple[str, Estimate]]
    skipped: list[str]


def render_report(
    metrics: Metrics | str | Path,
    out: str | Path,
    title: str = "",
    real: str | Path | None = None,
    synthetic: Mapping[str, str | Path] | None = None,
    sections: Sequence[str] = SECTIONS,
    per_cell: int = 4,
    rows_per_class: int = 8,
    seed: int = 0,
    classifiers: str | Path = "",
) -> Path:
    """Write the report of an evaluation. Stages that were left out are left out of the page; nothing is computed.

    Args:
        metrics: The content or the path of ``metrics.json``.
        out: The HTML file.
        title: Heading; the dataset's name if empty.
        real: Folder of the real dataset, by default the evaluated one; without it there are no images of it.
        synthetic: Folder of each synthetic set, likewise.
        sections: Parts to show, from :data:`latent_medi.report.settings.SECTIONS`.
        per_cell: Patches in each image of the grids.
        rows_per_class: Rows of the image grid of a class.
        seed: Seed of the choice of patches.
        classifiers: Folder of a comparison of image classifiers; by default ``image_classifiers`` next to the metrics,
            where there is one.

    Returns:
        The path of the page.

    Raises:
        UserError: The metrics are no evaluation's, there is no such section, or no comparison in ``classifiers``.
    """
    # Without a file, folders are relative to the page's.
    file = Path(out).with_name("metrics.json") if isinstance(metrics, Metrics) else metrics_file(metrics)
    content = metrics if isinstance(metrics, Metrics) else read_metrics(metrics)
    if content.headline is None:
        raise UserError("The metrics have no summary to begin the report with.", "Run `latent-medi evaluate` again.")
    if unknown := sorted(set(sections) - set(SECTIONS)):
        raise UserError(f"There is no report section {unknown[0]!r}.", f"Sections: {', '.join(SECTIONS)}.")
    pictured = {"patches", "memorisation"} & set(sections)
    opened = _datasets(content, file, real, synthetic or {}) if pictured else (None, {})
    grids = patches.grids(content, *opened, per_cell, rows_per_class, seed) if "patches" in sections else []
    first = patches.first_grid(content, *opened, per_cell, seed) if "patches" in sections else None
    compared = None
    if "classifiers" in sections:
        compared = page_classifiers(Path(classifiers or file.parent / FOLDER), wanted=bool(classifiers))
    template = environment().get_template("page.html")
    page = template.render(
        title=title or content.dataset.name or "Evaluation",
        metrics=content,
        settings=encode(content.settings),
        headline=content.headline,
        sections=list(sections),
        colour=colour_table(content),
        classifiers=compared,
        encoders=[_encoder(content, name, sections, *opened) for name in content.encoders],
        counts=training_table(content),
        first=first,
        grids=grids,
        answer=answer(content, compared.sentence if compared else ""),
        word=Words(),
        glossary=glossary(),
        contents=Contents(),
    )
    write_text(check_file(out, "page", HTML), page)
    return Path(out)


def render(settings: ReportSettings) -> Path:
    """Write the report, or the comparison, that the settings describe."""
    if settings.compare:
        if settings.metrics:
            raise UserError("Both metrics and compare are given.", "A page shows one evaluation or compares several.")
        out = settings.out or metrics_file(settings.compare[0]).with_name("comparison.html")
        return render_comparison(settings.compare, out, settings.title)
    if not settings.metrics:
        raise UserError("No metrics are given.", "Set metrics to the metrics.json of an evaluation.")
    return render_report(
        settings.metrics,
        settings.out or metrics_file(settings.metrics).with_name("report.html"),
        settings.title,
        settings.real or None,
        dict(settings.synthetic),
        settings.sections,
        settings.patches_per_cell,
        settings.rows_per_class,
        settings.seed,
        settings.classifiers,
    )


def _encoder(
    metrics: Metrics,
    name: str,
    sections: Sequence[str],
    real: patches.PatchDataset | None,
    synthetic: Mapping[str, patches.PatchDataset],
) -> PageEncoder:
    """What one encoder found, with the plots of the sections that are shown."""
    fidelity = metrics.fidelity.get(name) if "fidelity" in sections else None
    downstream = metrics.downstream.get(name) if "downstream" in sections else None
    adherence = metrics.adherence.get(name) if "adherence" in sections else None
    memorisation = metrics.memorisation.get(name) if "memorisation" in sections else None
    projection = metrics.projection.get(name) if "projection" in sections else None
    fields = [metrics.dataset.class_field, metrics.dataset.site_field]
    pairs, hidden = patches.pairs(memorisation, real, synthetic, fields) if memorisation else ([], 0)
    plots = {}
    if projection:
        plots = {fields[0]: figures.projection(projection, "class"), fields[1]: figures.projection(projection, "site")}
    return PageEncoder(
        name=name,
        fidelity=fidelity,
        bars=_bars(metrics, fidelity) if fidelity else None,
        tables=_distance_tables(fidelity, metrics.roles) if fidelity else [],
        downstream=downstream,
        tasks=page_tasks(metrics.protocols.medi.get(name) if "downstream" in sections else None, metrics.roles),
        forest=figures.forest(accuracies(metrics, name), metrics.roles) if downstream else None,
        differences=figures.differences(_differences(metrics, name), metrics.roles) if downstream else None,
        adherence=adherence,
        matrices=[matrix(field, found) for field, found in adherence.fields.items()] if adherence else [],
        memorisation=memorisation,
        pairs=pairs,
        hidden_pairs=hidden,
        projection=projection,
        projections={field: uri for field, uri in plots.items() if uri},
    )


def _differences(metrics: Metrics, encoder: str) -> dict[str, dict[str, Estimate]]:
    """Differences of the candidate from every other training set, and of the oracle from the real patches alone."""
    oracles = {kind.name: differences(metrics, encoder, kind.name) for kind in KINDS if kind.role == "oracle"}
    gains = {name: {REAL: found[REAL]} for name, found in oracles.items() if REAL in found}
    return {metrics.roles.candidate: differences(metrics, encoder, metrics.roles.candidate)} | gains


def _bars(metrics: Metrics, fidelity: Fidelity) -> str | None:
    """The plot by class, as published, where that is what the evaluation is about."""
    if fidelity.training is None and metrics.dataset.held_out:
        return None
    return figures.class_bars(references(fidelity), metrics.roles)


def _distance_tables(fidelity: Fidelity, roles: Roles) -> list[PageDistances]:
    tables = {
        "unseen combinations": fidelity.unseen,
        "each class": fidelity.per_class,
        "each site": fidelity.per_site,
        "all patches": fidelity.whole,
    }
    pages = [
        _distances(title, table, f"{_CAPTIONS[title]}{_unmatched(table)}", figures.distances(table, roles))
        for title, table in tables.items()
    ]
    if training := fidelity.training:
        for name, table in {"each class": training.per_class, **training.by_fields}.items():
            figure = figures.distances(table, roles, training=True)
            pages.append(_distances(f"{name}, {TRAINING}", table, training.label, figure, TRAINING))
    return pages


def _distances(
    title: str, table: DistanceTable, caption: str, figure: str | None, reference: str = "real test patches"
) -> PageDistances:
    """Plot, caption, what was left out, and every number."""
    frechet = "" if reference == TRAINING else _frechet(table)
    n = max((mean.n_patches for mean in table.means.values()), default=0)
    named = functools.partial(figures.source_name, training=reference == TRAINING)
    skipped = [
        f"{c.name}: " + "; ".join(f"{named(n)}: {why}" if n else why for n, why in c.skipped.items())
        for c in table.combinations
        if c.skipped
    ]
    return PageDistances(
        title=title,
        reference=reference,
        figure=figure,
        alt=f"distance of samples and of real patches to {reference}, {title}; the numbers are listed below",
        caption=caption,
        note=f"At most {n} samples of a source over all.{frechet}",
        rows=[(f"{c.name}: {named(n)}", found) for c in table.combinations for n, found in c.sources.items()],
        skipped=skipped,
    )


def _unmatched(table: DistanceTable) -> str:
    """That samples have another mix than the test patches, in a sentence; nothing where they have theirs."""
    found = {f: None for c in table.combinations for d in c.sources.values() for f in d.unmatched_fields}
    if not found:
        return ""
    return (
        f" Training lacks the test patches’ {' and '.join(found)}, so in these the samples have values that training "
        "patches of their class have."
    )


def _frechet(table: DistanceTable) -> str:
    """What Fréchet distances say, in a sentence."""
    found = table.frechet_ratio
    if found.value is None:
        return f" There is no ratio of Fréchet distances: {found.reason}."
    return (
        f" Ratio of Fréchet distances in {found.dims} principal components, less that between real patients: "
        f"{found.value:.2f}; a perfect generator would get {_signed(found.perfect)}."
    )


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}".replace("-", "−")


def _datasets(
    metrics: Metrics, file: Path, real: str | Path | None, synthetic: Mapping[str, str | Path]
) -> tuple[patches.PatchDataset | None, dict[str, patches.PatchDataset]]:
    """The real dataset and each synthetic set, as far as they are on this machine."""
    made_in = metrics.settings.out
    named = {"": metrics.dataset.folder} | {n: s.folder for n, s in metrics.synthetic.items()}
    folders = {n: patches.locate(f, made_in, file) for n, f in named.items() if f} | dict(synthetic)
    if real:
        folders[""] = real
    opened = {n: patches.open_or_none(f) for n, f in folders.items()}
    return opened.pop("", None), {n: d for n, d in opened.items() if d is not None}
