"""``metrics.json``: its content as a dataclass, with one writer and one reader."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from latent_medi.core.checksums import read_result
from latent_medi.core.errors import UserError
from latent_medi.core.files import write_sealed
from latent_medi.core.records import Mismatch, decode, encode
from latent_medi.evaluation.adherence.records import Adherence, Stain
from latent_medi.evaluation.cohort.roles import Roles, synthetic_roles
from latent_medi.evaluation.downstream.records import Downstream, MediProtocol, MediTask, Protocols
from latent_medi.evaluation.fidelity.records import Fidelity, Memorisation, Projection
from latent_medi.evaluation.provenance import EncoderRecord, RealDataset, RunRecord, SyntheticRecord, portable
from latent_medi.evaluation.settings import EvaluateSettings
from latent_medi.evaluation.summary_records import Headline

METRICS_VERSION = 3
_AGAIN = "Run `latent-medi evaluate` again."


@dataclass(frozen=True)
class Metrics:
    """Everything that an evaluation found. Sections by encoder are empty where a stage was left out.

    Args:
        run: How the numbers were made.
        settings: The evaluation's settings, paths relative to the result's folder.
        dataset: The real dataset.
        synthetic: Synthetic sets by name.
        encoders: Feature spaces by name; the first gives the headline.
        fidelity: Distances to real patches, by encoder.
        adherence: Recovery of the requested values, by encoder.
        stain: Stain of the samples; null without a synthetic set.
        memorisation: Copies of training patches, by encoder (not of the colour-free ones: the pixels are the same).
        downstream: Accuracy of classifiers, by encoder.
        protocols: Results of published protocols, by encoder.
        projection: Points in a plane, by encoder.
        notes: What a reader must know about the cohort.
        warnings: What the verdict must not be read without.
        seconds: Duration by stage.
        headline: The few numbers that matter, and the verdict.
    """

    run: RunRecord
    settings: EvaluateSettings
    dataset: RealDataset
    synthetic: dict[str, SyntheticRecord]
    encoders: dict[str, EncoderRecord]
    fidelity: dict[str, Fidelity]
    adherence: dict[str, Adherence]
    stain: Stain | None
    memorisation: dict[str, Memorisation]
    downstream: dict[str, Downstream]
    protocols: Protocols
    projection: dict[str, Projection]
    notes: list[str]
    warnings: list[str]
    seconds: dict[str, float]
    headline: Headline | None

    @property
    def roles(self) -> Roles:
        """Which synthetic set is the candidate and which are its baselines."""
        return synthetic_roles(self.synthetic, self.settings.candidate)


def metrics_json(metrics: Metrics) -> dict[str, Any]:
    """The content of ``metrics.json`` as JSON."""
    result: dict[str, Any] = {"metrics_version": METRICS_VERSION} | encode(metrics)
    return result


def write_metrics(path: Path, metrics: Metrics, folders: Iterable[str | Path] = ()) -> None:
    """Write ``metrics.json`` with a checksum. Paths of this machine become relative to its folder.

    Args:
        path: The file.
        metrics: Its content.
        folders: As ``known`` of :func:`~latent_medi.evaluation.provenance.portable`.
    """
    content = portable(metrics_json(metrics), path.parent, folders)
    metrics_of(content, path)  # nothing is written that cannot be read
    write_sealed(path, content)


def metrics_file(path: str | Path) -> Path:
    """The ``metrics.json`` of a run's folder, or the file itself."""
    return Path(path) / "metrics.json" if Path(path).is_dir() else Path(path)


def read_metrics(path: str | Path) -> Metrics:
    """The content of a ``metrics.json``.

    Args:
        path: The file, or the folder of a run that has it.

    Raises:
        UserError: There is none, it is damaged, of another version, or not an evaluation's.
    """
    file = metrics_file(path)
    return metrics_of(read_result(file, _AGAIN), file)


def metrics_of(content: Mapping[str, Any], where: str | Path = "The metrics") -> Metrics:
    """:class:`Metrics` of decoded JSON.

    Raises:
        UserError: Of another version, or a field is missing, unknown or of another type.
    """
    version = content.get("metrics_version")
    if not isinstance(version, int) or not {"dataset", "encoders", "headline"} <= content.keys():
        raise UserError(f"{where}: these are not an evaluation's metrics.", f"Give a metrics.json. {_AGAIN}")
    if version < METRICS_VERSION:
        raise UserError(
            f"{where} was made by an earlier version (metrics_version {version}, not {METRICS_VERSION}).",
            f"{_AGAIN} The feature cache makes it quick.",
        )
    if version > METRICS_VERSION:
        raise UserError(
            f"{where} was made by a later version (metrics_version {version}, not {METRICS_VERSION}).",
            "Update latent-medi, or run `latent-medi evaluate` again.",
        )
    try:
        return _with_tasks(decode(Metrics, {k: v for k, v in content.items() if k not in ("metrics_version", "seal")}))
    except Mismatch as problem:
        raise UserError(f"{where} is damaged or was not written by this program: {problem}.", _AGAIN) from None


def _with_tasks(metrics: Metrics) -> Metrics:
    """The same with the one task of all classes in results of MeDi's protocol from before there were tasks."""

    def completed(record: MediProtocol) -> MediProtocol:
        if record.tasks or not record.rows:
            return record
        n_train = sum(map(sum, metrics.dataset.counts.patches.get(metrics.settings.train_value, [])))
        sites = max(row.sites for row in record.rows)
        return replace(record, tasks={"": MediTask(metrics.dataset.classes, sites, n_train, record.test, {}, [])})

    medi = {encoder: completed(record) for encoder, record in metrics.protocols.medi.items()}
    return replace(metrics, protocols=replace(metrics.protocols, medi=medi))
