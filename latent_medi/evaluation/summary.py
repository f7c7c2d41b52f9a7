"""The few numbers that matter, as one flat record, as a table for the terminal, and as a sentence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from latent_medi.evaluation.cohort.comparison_sets import REAL
from latent_medi.evaluation.fidelity.records import DistanceTable
from latent_medi.evaluation.results import Metrics

ARMS = ("real", "oversample", "stain_transfer", "cls", "medi", "oracle")
FURTHER_RIVALS = {
    "stain_augmentation": "stain augmentation",
    "nearest_site": "patches from the nearest site",
    "reweight": "reweighting",
}
RIVALS = {"stain_transfer": "stain transfer", "oversample": "oversampling", "real": "the real patches alone"}
CLASSIFIERS = {"probe": "a linear probe", "cnn": "a small network"}
_SUFFIX = ":haematoxylin"


def headline(metrics: Metrics, seconds: Mapping[str, float] | None = None) -> dict[str, Any]:
    """The headline record of ``metrics.json``.

    Args:
        metrics: Its content as far as it is known.
        seconds: Times of all stages; the evaluation's own total is added if it is not among them.

    Returns:
        ``fd_unseen``, ``fd_unseen_colour_free`` and ``fd_per_class``: medi, cls, floor, ratio = (medi − floor) / (cls
        − floor) and the metric ("fd", or "kid" where there are too few samples); ``accuracy_shift`` by arm, and the
        same for ``accuracy_in_distribution``, ``accuracy_seen`` and ``accuracy_unseen``;
        ``accuracy_shift_difference`` (medi minus each rival, with interval); ``further_arms`` (of every other arm
        ``accuracy_shift``, ``accuracy_unseen``, ``medi_minus`` and its ``interval``); ``recovery_unseen``,
        ``recovery_ceiling``; ``encoder`` and ``classifier`` that judged; ``n`` and ``seconds`` by stage;
        ``warnings``, sentences that the verdict must not be read
        without. What is not available is None. The distances also have ``left_out``: the combinations of which a side
        is not judged, and why.
    """
    names = list(metrics.encoders)
    plain = next(n for n in names if not n.endswith(_SUFFIX))
    colour_free = plain + _SUFFIX
    record: dict[str, Any] = {
        "fd_unseen": _distances(metrics, plain, "unseen"),
        "fd_unseen_colour_free": _distances(metrics, colour_free, "unseen"),
        "fd_per_class": _distances(metrics, plain, "per_class"),
    }
    comparison = metrics.downstream.get(plain, {})
    for score in ("accuracy_shift", "accuracy_in_distribution", "accuracy_seen", "accuracy_unseen"):
        record[score] = {arm: _value(comparison, "arms", arm, score) for arm in ARMS}
    record["accuracy_shift_difference"] = {
        rival: {
            "value": _value(comparison, "differences", f"medi - {rival}", "accuracy_shift"),
            "interval": _interval_of(comparison, f"medi - {rival}"),
        }
        for rival in (*RIVALS, "cls")
    }
    record["further_arms"] = {
        arm: {
            "accuracy_shift": _value(entry, "accuracy_shift"),
            "accuracy_unseen": _value(entry, "accuracy_unseen"),
            "medi_minus": _value(comparison, "differences", f"medi - {arm}", "accuracy_shift"),
            "interval": _interval_of(comparison, f"medi - {arm}"),
        }
        for arm, entry in comparison.get("arms", {}).items()
        if arm not in ARMS
    }
    found = metrics.adherence.get(plain)
    fields = {"site": metrics.dataset.site_field, "class": metrics.dataset.class_field}
    recoveries = {k: found.fields[f] for k, f in fields.items() if found and f in found.fields}
    samples = {k: r.synthetic["medi"].value for k, r in recoveries.items() if "medi" in r.synthetic}
    record["recovery_unseen"] = {k: samples.get(k) for k in fields}
    record["recovery_ceiling"] = {k: recoveries[k].real.value if k in recoveries else None for k in fields}
    shift = comparison.get("arms", {}).get("real", {}).get("accuracy_shift", {})
    record["n"] = {"test_patches": shift.get("n_patches"), "test_patients": shift.get("n_patients")}
    record["encoder"] = plain
    record["classifier"] = CLASSIFIERS[comparison.get("classifier", "probe")]
    own = {} if "evaluate" in (seconds or {}) else {"evaluate": round(sum(metrics.seconds.values()), 3)}
    record["seconds"] = dict(seconds or {}) | own
    chances: dict[str, float | None] = {k: recoveries[k].chance if k in recoveries else None for k in fields}
    record["warnings"] = [*metrics.warnings, *_unlike(record, chances)]
    return record


def _unlike(record: Mapping[str, Any], chances: Mapping[str, float | None]) -> list[str]:
    """What MeDi's samples do not show although a probe finds it in real patches: less than halfway from chance."""
    told = []
    for key, chance in chances.items():
        found, ceiling = record["recovery_unseen"][key], record["recovery_ceiling"][key]
        # A probe that hardly finds it in real patches cannot tell.
        if None in (found, ceiling, chance) or ceiling - chance < 0.1 or found >= (chance + ceiling) / 2:
            continue
        told.append(
            f"MeDi's samples of unseen combinations show the {key} that was asked for in {found:.0%}, real patches in "
            f"{ceiling:.0%}: whatever they do to a classifier, they are not what they are named."
        )
    return told


def _value(record: Any, *path: str) -> float | None:
    for key in path:
        record = record.get(key) if isinstance(record, Mapping) else None
    return record.get("value") if isinstance(record, Mapping) else None


def _interval_of(comparison: Mapping[str, Any], pair: str) -> Any:
    return comparison.get("differences", {}).get(pair, {}).get("accuracy_shift", {}).get("interval")


def _distances(metrics: Metrics, encoder: str, section: Literal["unseen", "per_class"]) -> dict[str, Any]:
    found = metrics.fidelity.get(encoder)
    if found is None:
        return dict.fromkeys(("medi", "cls", "floor", "ratio", "metric")) | {"left_out": {}}
    table: DistanceTable = getattr(found, section)
    sources = {"medi": "medi", "cls": "cls", "floor": REAL}
    values = {k: table.means[source].value if source in table.means else None for k, source in sources.items()}
    return values | {"ratio": table.ratio.value, "metric": table.metric, "left_out": table.left_out}


def useful(record: Mapping[str, Any]) -> bool | None:
    """Whether MeDi beats every rival under shift: stain transfer, oversampling, the real patches alone, and stain
    augmentation, the nearest site's patches and reweighting where they were tried; None if unknown, which it is
    without stain transfer, the rival that costs nothing, unless another rival is as good already.
    """
    medi, rivals = record["accuracy_shift"].get("medi"), _rivals(record)
    if medi is None or not rivals:
        return None
    beaten = all(medi > r for r in rivals.values())
    return None if beaten and RIVALS["stain_transfer"] not in rivals else beaten


def _rivals(record: Mapping[str, Any]) -> dict[str, float]:
    """Accuracy under shift of the rivals that were tried, by their names for people."""
    scores = {RIVALS[r]: record["accuracy_shift"].get(r) for r in RIVALS}
    others = record.get("further_arms", {})
    scores |= {text: others.get(r, {}).get("accuracy_shift") for r, text in FURTHER_RIVALS.items()}
    return {text: value for text, value in scores.items() if value is not None}


def verdict(record: Mapping[str, Any]) -> str:
    """One sentence: whether MeDi is useful here, which takes beating stain transfer and the other rivals."""
    score = record["accuracy_shift"].get("medi")
    answer = useful(record)
    rivals = _rivals(record)
    if score is None or not rivals:
        return "Whether MeDi is useful cannot be said: there is no downstream comparison with its samples."
    tried = RIVALS["stain_transfer"] in rivals
    lead = RIVALS["stain_transfer"] if tried else max(rivals, key=lambda name: rivals[name])
    intervals = _rival_intervals(record)
    start = (
        f"accuracy under shift is {score:.3f}, {score - rivals[lead]:+.3f} against {lead}"
        f"{_interval(intervals.get(lead))}"
    )
    if answer is None:
        return f"Whether MeDi is useful cannot be said, since stain transfer was not tried: {start}."
    if not answer:
        ahead = [text for text, value in rivals.items() if value >= score]
        return (
            f"MeDi is not useful here: {start}; {_list(ahead)} {'does' if len(ahead) == 1 else 'do'} at least as well."
        )
    chance = [text for text in rivals if not (isinstance(intervals.get(text), list) and intervals[text][0] > 0)]
    word = "is useful here"
    if chance:
        word = "may be useful here, though the evidence does not exclude chance"
        if chance != [lead]:
            word += f" against {_list(chance)}"
    return f"MeDi {word}: {start}."


def _rival_intervals(record: Mapping[str, Any]) -> dict[str, Any]:
    """Interval of MeDi's difference from each rival, by its name for people."""
    others = record.get("further_arms", {})
    found = {text: record["accuracy_shift_difference"].get(r, {}).get("interval") for r, text in RIVALS.items()}
    return found | {text: others.get(r, {}).get("interval") for r, text in FURTHER_RIVALS.items()}


def _interval(bounds: Any) -> str:
    if isinstance(bounds, list):
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


def headline_text(record: Mapping[str, Any]) -> str:
    """The headline as a table for a terminal, the verdict last."""
    lines = ["Distance to real patches of other patients (lower is better)"]
    lines.append(f"  {'':<32}{'metric':>8}{'MeDi':>10}{'CLS':>10}{'floor':>10}{'ratio':>10}")
    titles = {
        "fd_unseen": "unseen combinations",
        "fd_unseen_colour_free": "unseen, colour-free",
        "fd_per_class": "per class, all sites",
    }
    for key, title in titles.items():
        row = record[key]
        if row["metric"] is None or not (row["left_out"] or any(row[k] for k in ("medi", "cls", "floor"))):
            continue
        cells = "".join(f"{distance_text(row[k]):>10}" for k in ("medi", "cls", "floor"))
        cells += f"{_number(row['ratio'], 2):>10}"
        lines.append(f"  {title:<32}{(row['metric'] or '–').upper():>8}{cells}")
        lines += [f"    not judged: {name} ({why})" for name, why in row["left_out"].items()]
    lines += ["  ratio = (MeDi − floor) / (CLS − floor): 0 is real, 1 is no better than class alone"]
    lines += _accuracies(record) + _recoveries(record)
    times = ", ".join(f"{stage} {value:.0f} s" for stage, value in record["seconds"].items())
    lines += ["", f"Time: {times}", "", *(f"Warning: {text}" for text in record["warnings"]), verdict(record)]
    return "\n".join(lines)


def _accuracies(record: Mapping[str, Any]) -> list[str]:
    if not any(value is not None for value in record["accuracy_shift"].values()):
        return []
    lines = [""]
    lines.append(f"Balanced accuracy of {record.get('classifier', CLASSIFIERS['probe'])} (higher is better)")
    lines.append(
        f"  {'':<32}" + "".join(f"{name:>10}" for name in ("real", "oversamp.", "stain", "CLS", "MeDi", "oracle"))
    )
    titles = {
        "accuracy_shift": "under shift (all classes)",
        "accuracy_in_distribution": "at sites without a gap",
        "accuracy_seen": "seen combinations",
        "accuracy_unseen": "unseen combinations",
    }
    for key, title in titles.items():
        lines.append(f"  {title:<32}" + "".join(f"{_number(record[key][arm]):>10}" for arm in ARMS))
    n = record["n"]
    if n["test_patches"] is not None:
        lines.append(f"  under shift: {n['test_patches']} test patches of {n['test_patients']} patients")
    return lines


def _recoveries(record: Mapping[str, Any]) -> list[str]:
    if not any(value is not None for value in record["recovery_ceiling"].values()):
        return []
    lines = ["", "Requested value found in MeDi's samples of unseen combinations (ceiling: in real patches of these)"]
    for key in ("site", "class"):
        found, ceiling = record["recovery_unseen"][key], record["recovery_ceiling"][key]
        lines.append(f"  {key:<32}{_number(found):>10}  (ceiling {_number(ceiling)})")
    return lines
