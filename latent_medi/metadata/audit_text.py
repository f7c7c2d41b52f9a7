"""The audit as text for a terminal, and advice on what to do about its findings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from latent_medi.core.counting import counted
from latent_medi.metadata.estimability import VERDICTS, rounded_down
from latent_medi.metadata.suspect_values import are_tcga_codes

_STRONG = 0.8  # Cramér's V above which the advice warns of shortcut learning
_SEPARATES = 0.9  # AUROC over patients from which the advice says that a continuous field separates two classes
_MOST_HELD_OUT = 3  # combinations that are listed
_MUCH_MISSING = 0.2  # share of unknown values above which the advice mentions the field


def advice(result: Mapping[str, Any], class_field: str, repeated: Sequence[tuple[str, str, bool]] = ()) -> list[str]:
    """Sentences that say what to do about an audit's findings, the most important first.

    Args:
        result: The result of :func:`latent_medi.metadata.audit.audit`.
        class_field: The class field; ``""`` if there is none.
        repeated: Fields that repeat another field than the class: the field, the other, and whether each value of the
            other has one value of the field; else it is the reverse.
    """
    site_field, groups = result["site_field"], result["groups"]
    lines = _questions(result)
    if (shared := result["shared_patients"])["count"]:
        first = shared["examples"][0]
        lines.append(
            f"{counted(shared['count'], 'patient')} with patches at several {site_field}s, such as "
            f"{first['patient']!r} at {some(first['sites'], 4)}. If they are different people with the same "
            f"number, add the {site_field} to the patient in the table ({first['sites'][0]}-{first['patient']}) and "
            "make the dataset again. Until then each counts as one patient and is held out as one."
        )
    if len(groups) > 1:
        codes = [site for group in groups for site in group["sites"]]
        if are_tcga_codes(codes):
            remedy = "Map them to institutions with tss_table=… (GDC's table of tissue source sites), and audit again."
            if site_field == "tss" and "site" in result["fields"]:
                remedy = "The institutions are in the field site: audit again with site_field=site."
            lines.append(
                f"The values of {site_field} look like TCGA codes, each of which stands for a hospital and a study. "
                + remedy
            )
        else:
            lines.append(
                f"No model can separate the effects of {class_field} and {site_field} across the groups. Add patients "
                f"of a second {class_field} at some {site_field} of each group, merge {site_field}s that are one "
                "hospital, or study each group by itself."
            )
    strong = result["cramers_v"].get(site_field)
    if strong is not None and strong >= _STRONG:
        lines.append(
            f"{site_field} nearly determines the {class_field} (Cramér's V {strong:.2f}): a classifier can learn the "
            f"{site_field} instead. Test it at held-out {site_field}s or combinations."
        )
    lines += _entangled(result, class_field)
    for name, other, coarser in repeated:
        how = f"each {other} has one {name}" if coarser else f"each {name} has one {other}"
        lines.append(f"{name} repeats {other} ({how}): no model can separate their effects. Leave {name} out.")
    for name, share in result["missing"].items():
        if share >= _MUCH_MISSING:
            lines.append(f"{name} is unknown for {share:.0%} of the patches: complete it, or leave the field out.")
    counts = result["verdict_counts"]
    if counts["thin"]:
        lines.append(
            f"{counted(counts['thin'], 'combination')} with, or resting on, fewer than {result['thin_patients']} "
            "patients: collect more, above all of the combinations that link them to others; merge rare values, or "
            "plan them with care."
        )
    if counts["both margins seen"]:
        lines.append(
            f"{counted(counts['both margins seen'], 'combination')} without a patch can be generated: "
            "`latent-medi plan goal=fill_unseen`."
        )
    return lines


def _entangled(result: Mapping[str, Any], class_field: str) -> list[str]:
    """Fields whose effect no model can separate from that of the class."""
    lines = []
    for name, by in result["repeats_class"].items():
        if name == result["site_field"]:
            continue  # it cannot be left out; the strong association is reported
        how = {
            "both": f"each {class_field} has its own {name}",
            "class": f"each {class_field} has one {name}",
            "field": f"each {name} has one {class_field}",
        }[by]
        lines.append(
            f"{name} repeats the {class_field} ({how}): no model can separate their effects. Leave {name} out."
        )
    for name, found in result["class_separation"].items():
        if found and found["auroc"] >= _SEPARATES:
            high, low = found["classes"]
            lines.append(
                f"{name} separates {high} from {low} (AUROC {found['auroc']:.2f} over patients): what depends on "
                f"{name} and what on the {class_field} cannot be separated there. Leave {name} out, or add patients "
                f"of both with like {name}."
            )
    return lines


def _questions(result: Mapping[str, Any]) -> list[str]:
    """Questions about values that differ in spelling only, or look like a word for missing."""
    lines = []
    for name, groups in result["spelled_alike"].items():
        spellings = [" / ".join(f"{value!r} ({count})" for value, count in group.items()) for group in groups]
        lines.append(
            f"Is this one {name}, spelled in several ways? {some(spellings, 6)}. If so, spell it in one way in the "
            "table: now each spelling counts as a value."
        )
    for name, words in result["looks_missing"].items():
        values = [f"{value!r} ({count})" for value, count in words.items()]
        remedy = "give each row its patient" if name == "patient" else "write unknown, or leave the cell empty"
        lines.append(f"Does this mean missing in {name}? {some(values, 8)}. If so, {remedy}: now each is a {name}.")
    return lines


def some(words: Sequence[str], most: int = 12) -> str:
    """The first words, and the number of all if there are more."""
    return ", ".join(words[:most]) + (f" … ({len(words)} in all)" if len(words) > most else "")


def _held_out(result: Mapping[str, Any]) -> list[str]:
    """The combinations that can test the generation of unseen ones; if there is none, what the nearest lack."""
    candidates, thin = result["held_out_candidates"], result["thin_patients"]
    if not candidates:
        return []
    ready = [entry for entry in candidates if entry["enough"]]
    if ready:
        lines = [f"{counted(len(ready), 'combination')} can be held out as a test of unseen ones:"]
    else:
        lines = [
            f"no combination can be held out as a test of unseen ones: it takes {thin} patients of its own, and "
            f"{thin} effective ones without them; the nearest:"
        ]
    for entry in (ready or candidates)[:_MOST_HELD_OUT]:
        own = f"  {' × '.join(entry['combination'].values())}: {counted(entry['patients'], 'patient')}"
        lines.append(f"{own}; without them it rests on {rounded_down(entry['effective_patients'])} effective ones")
    if len(ready) > _MOST_HELD_OUT:
        lines.append(f"  … and {len(ready) - _MOST_HELD_OUT} more")
    return lines


def audit_text(result: Mapping[str, Any], most: int = 40) -> str:
    """The audit as plain text for a terminal; lists at most ``most`` combinations that are not seen."""
    counts = result["counts"]
    unit = "rows" if "table" in result else "patches"
    nouns = {"patches": "row" if "table" in result else "patch", "slides": "slide", "patients": "patient"}
    lines = [", ".join(counted(counts[name], noun) for name, noun in nouns.items())]
    if result["split"]:
        lines[0] += f" ({result['split']})"
    for name, margin in result["margins"].items():
        ranked = sorted(margin.items(), key=lambda item: -item[1]["patients"]) if len(margin) > most else margin.items()
        words = [f"{value} {c['patients']}" for value, c in ranked]
        lines.append(f"{name} ({len(margin)} values; patients): {some(words, most)}")
    for name, summary in result["continuous"].items():
        if summary["patches"]:
            spread = f"mean {summary['mean']:.4g}, from {summary['min']:.4g} to {summary['max']:.4g}"
            lines.append(f"{name}: {summary['patches']} {unit}, {spread}")
    lines += [f"{name}: {share:.1%} of {unit} unknown" for name, share in result["missing"].items() if share]
    for name, value in result["cramers_v"].items():
        shown = "not defined (too few patients, or one value)" if value is None else f"{value:.2f}"
        lines.append(f"association of class and {name} (Cramér's V over patients, bias-corrected, 0 to 1): {shown}")
    if mapped := result.get("institutions"):
        lines.append(
            f"{mapped['codes']} codes in {mapped['components_of_codes']} components become {mapped['institutions']} "
            f"institutions in {'one' if result['components'] == 1 else result['components']} "
            f"({mapped['source_sites']} names in the code table, {mapped['source_sites_with_several_classes']} with "
            f"several classes; {', '.join(f'{count} {kind}' for kind, count in mapped['kinds'].items())})"
        )
    components = result["groups"]
    if len(components) > 1:
        lines.append(
            f"class and {result['site_field']} fall into {len(components)} separate groups: "
            "their effects cannot be separated across groups"
        )
        lines += [
            f"  {some(c['classes'])} at {some(c['sites'])} ({counted(c['patients'], 'patient')})"
            for c in components[:most]
        ]
    elif components:
        lines.append(f"class and {result['site_field']} are linked by seen combinations throughout")
    lines.append("combinations: " + ", ".join(f"{n} {word}" for word, n in result["verdict_counts"].items()))
    # Unidentifiable combinations last: there are often many.
    listed = [v for v in result["verdicts"] if v["verdict"] != "seen"]
    listed.sort(key=lambda v: VERDICTS.index(v["verdict"]))
    for entry in listed[:most]:
        combination = " × ".join(entry["combination"].values())
        lines.append(f"  {combination}: {entry['verdict']} ({entry['reason']})")
    if len(listed) > most:
        lines.append(f"  … and {len(listed) - most} more")
    lines += _held_out(result)
    lines += [f"→ {sentence}" for sentence in result["advice"]]
    return "\n".join(lines)
