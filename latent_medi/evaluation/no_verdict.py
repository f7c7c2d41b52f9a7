"""Reasons for which an evaluation gives no verdict: what the numbers cannot carry, whatever they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from latent_medi.core.counting import counted
from latent_medi.evaluation.downstream.records import Downstream
from latent_medi.evaluation.results import Metrics
from latent_medi.evaluation.verdict import TO_SEE, above, in_words, patients_needed
from latent_medi.statistics.differences import Difference
from latent_medi.statistics.intervals import MIN_PATIENTS
from latent_medi.statistics.kernel_distance import KID_UNIT, kid_text


def no_verdict_reasons(metrics: Metrics, encoder: str, differences: Mapping[str, Difference]) -> list[str]:
    """Each reason as a clause; empty where a verdict is due.

    Args:
        metrics: The evaluation.
        encoder: Name of the encoder that the summary is about.
        differences: Of the candidate from the baselines that were compared.
    """
    downstream = metrics.downstream.get(encoder)
    if downstream is None or not differences:
        return []
    found = [
        _few_patients(downstream, differences, patient_group(metrics, downstream)),
        _oracle_without_help(downstream, differences),
        far_from_tissue(metrics, encoder),
        *(_not_recovered(metrics, encoder, f) for f in (metrics.dataset.site_field, metrics.dataset.class_field)),
    ]
    return [reason for reason in found if reason]


def patient_group(metrics: Metrics, downstream: Downstream | None) -> str:
    """Of what a number of patients is needed: of each class, at the sites where these count if that is said easily."""
    fields = {metrics.dataset.class_field, metrics.dataset.site_field}
    if downstream is None or any(set(c.combination) != fields for c in downstream.combinations):
        return "of each class"
    return f"per class at {in_words(downstream.affected_sites)}"


def _few_patients(downstream: Downstream, differences: Mapping[str, Difference], group: str) -> str:
    few = {value: n for value, n in downstream.test_patients.items() if 0 < n < MIN_PATIENTS}
    if not few:
        return ""
    listed = in_words([f"{counted(n, 'test patient')} of {value}" for value, n in few.items()])
    needed = max(patients_needed(difference) for difference in differences.values())
    more = f", and about {needed} {group} to see a difference of {TO_SEE:g}" if needed > MIN_PATIENTS else ""
    where = ", ".join(downstream.affected_sites)
    verb = "is" if [*few.values()] == [1] else "are"
    return f"{listed} at {where} {verb} too few: {MIN_PATIENTS} are needed for an interval{more}"


def _oracle_without_help(downstream: Downstream, differences: Mapping[str, Difference]) -> str:
    """Where the oracle does not help, or where nobody can say and the candidate is not ahead of all beyond chance."""
    pair = downstream.differences.get("oracle", {}).get("real")
    gain = pair.accuracy_shift if pair else None
    if gain is None or gain.value is None:
        return ""
    likely = gain.likely
    interval = f", 80 % interval {likely[0]:+.3f} to {likely[1]:+.3f}" if isinstance(likely, tuple) else ""
    numbers = f"(oracle {gain.value:+.3f} against the real patches alone{interval})"
    if gain.value <= 0:
        return f"real patches of the unseen combinations do not help the classifier {numbers}"
    unsure = isinstance(likely, tuple) and likely[0] <= 0
    if unsure and not all(above(difference.interval) for difference in differences.values()):
        return f"it is not shown that real patches of the unseen combinations help the classifier {numbers}"
    return ""


def far_from_tissue(metrics: Metrics, encoder: str, readable: bool = False) -> str:
    """That the candidate's samples are far from tissue, as a clause; empty if they are not.

    Args:
        metrics: The evaluation.
        encoder: Name of the encoder.
        readable: Write distances in thousandths, for people; otherwise as files have them.
    """
    unit = KID_UNIT if readable else "KID"
    text: Callable[[float], str] = kid_text if readable else "{:.3g}".format
    fidelity, candidate = metrics.fidelity.get(encoder), metrics.roles.candidate
    found = fidelity.tissue.get(candidate) if fidelity else None
    if found is None or found.value < found.other_combinations:
        return ""
    return (
        f"its samples are no nearer to real patches of the unseen combinations ({unit} {text(found.value)}) than "
        f"real patches of other combinations are ({text(found.other_combinations)})"
    )


def _not_recovered(metrics: Metrics, encoder: str, name: str) -> str:
    """Where the linear probe finds a field that was asked for less than half of the way from chance to real patches."""
    record = metrics.adherence[encoder].fields.get(name) if encoder in metrics.adherence else None
    found = record.synthetic.get(metrics.roles.candidate) if record else None
    if record is None or found is None or found.value is None or record.real.value is None or not found.conditioned:
        return ""
    if record.says_nothing or found.value >= (record.chance + record.real.value) / 2:
        return ""
    return (
        f"its samples of unseen combinations show the requested {name} in {found.value:.0%}, real patches in "
        f"{record.real.value:.0%}"
    )
