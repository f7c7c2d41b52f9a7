"""Two runs side by side: numbers, differences, what differs, and a warning where numbers cannot be compared."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from latent_medi import cli
from latent_medi.core.errors import UserError
from latent_medi.evaluation.results import metrics_of
from latent_medi.report.compare import compare, differing, render_comparison, run_names


def _row(runs: list[dict[str, Any]], name: str, table: int = 0) -> list[dict[str, Any]]:
    rows = compare([metrics_of(run) for run in runs])[table].rows
    return [asdict(entry) for entry in next(row for row in rows if row.name == name).entries]


SHIFT = "accuracy under shift: MeDi"
DISTANCE = "KID × 10³, unseen combinations: MeDi"


def test_numbers_are_those_of_the_files_and_differences_their_difference(evaluated: dict[str, Any]) -> None:
    other = copy.deepcopy(evaluated)
    record = other["downstream"]["filters"]["training_sets"]["medi"]["accuracy_shift"]
    old = record["value"]
    record["value"] = old - 0.125
    first, second = _row([evaluated, other], SHIFT)
    assert (first["value"], first["difference"]) == (f"{old:.3f}", "")
    assert (second["value"], second["difference"], second["reasons"]) == (f"{old - 0.125:.3f}", "−0.125", [])
    assert f"n = {record['n_patches']}" in second["n"]


def test_what_cannot_be_compared_has_no_difference(evaluated: dict[str, Any]) -> None:
    def second(change: Any, name: str = DISTANCE) -> dict[str, Any]:
        other = copy.deepcopy(evaluated)
        change(other)
        cell = _row([evaluated, other], name)[1]
        assert (cell["difference"] == "") == bool(cell["reasons"])
        return cell

    assert second(lambda m: None)["reasons"] == []
    assert second(lambda m: m["encoders"]["filters"].update(fingerprint="x"))["reasons"] == ["another encoder"]
    unseen = evaluated["fidelity"]["filters"]["unseen"]
    n = unseen["means"]["medi"]["n_patches"]
    changed = second(lambda m: m["fidelity"]["filters"]["unseen"]["means"]["medi"].update(n_patches=n - 1))
    assert changed["reasons"] == [f"n = {n - 1} instead of {n} patches"]
    assert second(lambda m: m["dataset"].update(n_patients=1), SHIFT)["reasons"] == ["other real data"]
    assert second(lambda m: m["downstream"].clear(), SHIFT)["reasons"] == ["missing in one run"]


def test_runs_with_other_encoders_meet_in_the_headline_alone(evaluated: dict[str, Any], tmp_path: Path) -> None:
    other = json.loads(json.dumps(evaluated).replace("filters", "others"))
    for encoder in other["encoders"].values():
        encoder["fingerprint"] = "x"
    tables = compare([metrics_of(evaluated), metrics_of(other)])
    assert len(tables) == 1
    assert all(row.entries[1].reasons for row in tables[0].rows)
    for name, metrics in (("a", evaluated), ("b", other)):
        (tmp_path / f"{name}.json").write_text(json.dumps(metrics))
    text = render_comparison([tmp_path / "a.json", tmp_path / "b.json"], tmp_path / "c.html").read_text()
    assert "no encoder in common" in text
    assert "Not comparable." in text
    # Said once, not in each row.
    assert text.count("another encoder") == 2


def test_what_is_not_compared_is_said_once(evaluated: dict[str, Any]) -> None:
    other = copy.deepcopy(evaluated)
    other["dataset"]["n_patients"] += 1
    other["fidelity"]["filters"]["unseen"]["means"]["medi"]["n_patches"] -= 1
    (table, *_) = compare([metrics_of(evaluated), metrics_of(other)])
    first, second = table.notes
    n = len(table.rows)
    assert first == []
    assert set(second) == {
        ("", f"other real data (all {n} numbers)"),
        ("a", f"another number of patches or patients (1 of {n} numbers)"),
    }
    marks = {row.name: row.entries[1].marks for row in table.rows if row.entries[1].marks}
    assert marks == {DISTANCE: "a"}


def test_what_differs_is_listed(evaluated: dict[str, Any]) -> None:
    other = copy.deepcopy(evaluated)
    other["settings"]["seed"] = 7
    other["synthetic"]["medi"]["provenance"]["model"] = "another"
    rows = dict(differing([metrics_of(evaluated), metrics_of(other)]))
    assert rows["settings.seed"] == ["0", "7"]
    assert rows["samples.medi.model"] == ["perfect", "another"]
    assert len(rows) == 2
    assert differing([metrics_of(evaluated)] * 2) == []


def test_compare_as_typed(evaluated: dict[str, Any], tmp_path: Path) -> None:
    for name in ("runA", "runB"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(json.dumps(evaluated))
    runs = [str(tmp_path / "runA"), str(tmp_path / "runB")]
    assert cli.run_verb(["report", "--compare", *runs]) == 0
    text = (tmp_path / "runA" / "comparison.html").read_text()
    assert "Not comparable." not in text
    assert "Nothing: settings, encoders, data, models and versions are the same." in text
    assert cli.run_verb(["report", "--compare", *runs, f"out={tmp_path / 'c.html'}", "--title", "Two seeds"]) == 0
    assert "<h1>Two seeds</h1>" in (tmp_path / "c.html").read_text()
    assert cli.run_verb(["report", f"compare={runs}".replace("'", ""), f"out={tmp_path / 'd.html'}"]) == 0


def test_bad_input_is_refused(evaluated: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="two runs or more"):
        render_comparison([tmp_path], tmp_path / "c.html")
    with pytest.raises(UserError, match="does not exist"):
        cli.run_verb(["report", "--compare", str(tmp_path / "a"), str(tmp_path / "b")])
    (tmp_path / "metrics.json").write_text("{}")
    with pytest.raises(UserError, match=r"metrics\.json"):
        cli.run_verb(["report", "--compare", str(tmp_path), str(tmp_path)])


def test_runs_have_names_that_tell_them_apart() -> None:
    names = run_names([Path("/r/one/demo/metrics.json"), Path("/r/two/demo/metrics.json")])
    assert names == ["one/demo", "two/demo"]
    assert run_names([Path("/r/a/metrics.json"), Path("/r/b.json")]) == ["a", "b"]
    assert len(set(run_names([Path("/r/a/metrics.json")] * 2))) == 2
