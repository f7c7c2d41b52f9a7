"""The score of a reading sheet: how often readers recognised real and synthetic patches, and whether that is better
than chance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from scipy.stats import binom, binomtest

from latent_medi.core.errors import UserError, nearest
from latent_medi.metadata.tables import read_table, write_for_people, written_for_people
from latent_medi.report.page import percent, share
from latent_medi.report.reading_sheet import FIELD, KEY_COLUMNS, key_file
from latent_medi.report.settings import ReadingSheetSettings
from latent_medi.statistics.intervals import wilson

_ANSWERS = ("sheet", "reader", "image", "answer")
_WORDS = ("real", "synthetic")
ALPHA = 0.05
SURE = {"1": "a guess", "2": "rather sure", "3": "sure"}


def score_sheet(settings: ReadingSheetSettings) -> dict[str, Any]:
    """Score the answers of one reader or several.

    Returns:
        ``readers``: per reader ``n`` (pictures), ``answered``, ``missing``, ``correct``, ``accuracy``, ``sensitivity``
        (synthetic called synthetic) and ``specificity`` (real called real), each a share with its 95 % Wilson interval
        and n, and ``p_value``: one-sided binomial test of half right. ``majority``: the same for the answer of most
        readers, ties left out, if there are several; readers see the same pictures, so their answers are no
        independent evidence. ``cells`` and ``confidence``: accuracy over all readers' answers.
        ``better_than_chance`` and ``verdict``.

    Raises:
        UserError: The key or the answers cannot be read, are of another sheet, or name an unknown picture.
    """
    if not settings.key and not settings.out:
        raise UserError("The score takes the key of the sheet.", "Set key=sheet.key.csv")
    key = _read(settings.key or key_file(settings), KEY_COLUMNS)
    fields = [c for c in key.columns if c.startswith(FIELD)]
    answers = _answers(settings.score, key)
    table = answers.merge(key.drop(columns="sheet"), on="image", validate="many_to_one")
    table["right"] = table["answer"] == table["origin"]
    readers = [{"reader": str(name)} | _record(part, len(key)) for name, part in table.groupby("reader", sort=True)]
    given = table[table["answer"] != ""]
    if given.empty:
        raise UserError("No picture is answered in these files.", "Ask the readers for the file that they downloaded.")
    majority = _majority(given) if len(readers) > 1 else None
    deciding = majority or readers[0]
    better = deciding["p_value"] is not None and deciding["p_value"] < ALPHA
    result = {
        "n": len(key),
        "readers": readers,
        "majority": majority,
        "cells": [
            {"combination": dict(zip((f.removeprefix(FIELD) for f in fields), name, strict=True))}
            | _record(part, len(part))
            for name, part in given.groupby(fields, sort=True)
        ]
        if fields
        else [],
        "confidence": _confidence(given),
        "better_than_chance": better,
        "verdict": _verdict(deciding, better, len(readers)),
    }
    if settings.out and Path(settings.out).suffix == ".csv":
        write_for_people(_flat(readers + ([{"reader": "majority"} | majority] if majority else [])), settings.out)
    return result


def _read(path: str | Path, columns: Sequence[str]) -> pd.DataFrame:
    table = read_table(path)
    if lacking := [c for c in columns if c not in table.columns]:
        raise UserError(f"{path} lacks the column {lacking[0]!r}; it has {', '.join(map(str, table.columns))}.")
    return written_for_people(table)


def _answers(files: Sequence[str], key: pd.DataFrame) -> pd.DataFrame:
    """Every reader's answers, checked against the key; a reader without a name gets the file's."""
    tables = []
    for file in files:
        table = _read(file, _ANSWERS)
        table["answer"] = table["answer"].str.strip().str.lower()
        table["reader"] = table["reader"].str.strip().replace("", Path(file).stem)
        if other := sorted(set(table["sheet"]) - set(key["sheet"])):
            raise UserError(f"{file} answers the sheet {other[0]!r}; the key is of {key['sheet'].iloc[0]!r}.")
        if unknown := sorted(set(table["image"]) - set(key["image"])):
            raise UserError(f"{file}: the key has no picture {unknown[0]!r}; {nearest(unknown[0], key['image'])}.")
        if wrong := sorted(set(table["answer"]) - {*_WORDS, ""}):
            raise UserError(f"{file}: an answer is real, synthetic or empty, not {wrong[0]!r}.")
        tables.append(table[[c for c in (*_ANSWERS, "confidence") if c in table.columns]])
    result = pd.concat(tables, ignore_index=True)
    if (twice := result.duplicated(["reader", "image"])).any():
        first = result[twice].iloc[0]
        raise UserError(
            f"Picture {first['image']} is answered twice by {first['reader']!r}.",
            "Give each file once; two readers need two names.",
        )
    return result


def _share(right: pd.Series) -> dict[str, Any]:
    n, hits = len(right), int(right.sum())
    return {"value": hits / n if n else None, "n": n, "interval": wilson(hits, n)}


def _record(table: pd.DataFrame, n: int) -> dict[str, Any]:
    given = table[table["answer"] != ""]
    right = given["right"].astype(bool)
    synthetic = given["origin"] == "synthetic"
    return {
        "n": n,
        "answered": len(given),
        "missing": n - len(given),
        "correct": int(right.sum()),
        "accuracy": _share(right),
        "sensitivity": _share(right[synthetic]),
        "specificity": _share(right[~synthetic]),
        "p_value": float(binomtest(int(right.sum()), len(given), 0.5, alternative="greater").pvalue)
        if len(given)
        else None,
    }


def _majority(given: pd.DataFrame) -> dict[str, Any]:
    """The answer of most readers for each picture; one answer per picture, so that a binomial test holds."""
    votes = given.groupby("image").agg(
        votes=("answer", lambda a: (a == "synthetic").mean()), origin=("origin", "first")
    )
    ties = votes["votes"] == 0.5
    votes = votes[~ties]
    votes["answer"] = (votes["votes"] > 0.5).map({True: "synthetic", False: "real"})
    votes["right"] = votes["answer"] == votes["origin"]
    return _record(votes, len(votes)) | {"ties": int(ties.sum())}


def _confidence(given: pd.DataFrame) -> list[dict[str, Any]]:
    if "confidence" not in given.columns:
        return []
    return [
        {"confidence": SURE[level]} | _share(given.loc[given["confidence"] == level, "right"].astype(bool))
        for level in SURE
        if (given["confidence"] == level).any()
    ]


def _verdict(record: Mapping[str, Any], better: bool, readers: int) -> str:
    accuracy, n = record["accuracy"], record["answered"]
    who = f"The majority of {readers} readers" if readers > 1 else "The reader"
    text = f"{percent(accuracy)} of {n} pictures right (95 % {share(accuracy, 0)})"
    if not n:
        return f"{who} gave no answer that counts."
    p = f"p = {record['p_value']:.2g}" if record["p_value"] >= 1e-4 else "p < 0.0001"
    if better:
        return f"{who} recognised synthetic patches better than chance: {text}, {p}."
    # The fewest right answers that the test would have called better than chance.
    needed = int(binom.isf(ALPHA, n, 0.5)) + 1
    bar = f"with {n} pictures, {percent(needed / n)} right would be better than chance"
    return f"{who} did not do better than chance: {text}, {p}; {bar if needed <= n else 'there are too few pictures'}."


def _flat(readers: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    rows = []
    for record in readers:
        row = {k: v for k, v in record.items() if not isinstance(v, Mapping)}
        for name in ("accuracy", "sensitivity", "specificity"):
            low, high = record[name]["interval"] or (None, None)
            row |= {name: record[name]["value"], f"{name}_low": low, f"{name}_high": high}
        rows.append(row)
    return pd.DataFrame(rows)


def score_text(result: Mapping[str, Any]) -> str:
    """The score as a table for a terminal, the verdict last."""
    lines = [f"{'':<28}{'right':>14}{'accuracy':>22}{'synthetic found':>24}{'missing':>9}"]

    def line(name: str, r: Mapping[str, Any]) -> str:
        cells = [f"{percent(r[k])} ({share(r[k], 0) or '–'})" for k in ("accuracy", "sensitivity")]
        return f"{name[:27]:<28}{r['correct']:>6} of {r['answered']:>4}{cells[0]:>22}{cells[1]:>24}{r['missing']:>9}"

    lines += [line(r["reader"], r) for r in result["readers"]]
    if result["majority"]:
        lines.append(line(f"majority ({result['majority']['ties']} ties)", result["majority"]))
    if result["cells"]:
        lines += ["", "All readers' answers, per combination"]
        lines += [line(" × ".join(c["combination"].values()), c) for c in result["cells"]]
    for c in result["confidence"]:
        lines.append(f"{c['confidence']}: {percent(c)} of {c['n']} right")
    return "\n".join([*lines, "", result["verdict"]])
