"""The file's schema is the dataclasses: what they encode decodes to the same, and nothing else is read."""

from __future__ import annotations

import copy
import importlib.util
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluation_world import World
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mistyped import changed, changes

from latent_medi.core.errors import UserError
from latent_medi.core.records import Mismatch, decode, encode
from latent_medi.evaluation.adherence.records import Adherence
from latent_medi.evaluation.fidelity.records import Distance, DistanceTable
from latent_medi.evaluation.results import METRICS_VERSION, metrics_json, metrics_of, read_metrics
from latent_medi.experiment.damaged_outputs import damaged_metrics

DOCS = Path(__file__).parents[2] / "docs"


def test_what_is_written_is_read(world: World, metrics: dict[str, Any]) -> None:
    assert metrics["metrics_version"] == METRICS_VERSION
    assert metrics_json(read_metrics(world.root / "full")) == metrics
    assert metrics_json(metrics_of(json.loads(json.dumps(metrics)))) == metrics


@pytest.mark.parametrize(
    ("place", "value", "named"),
    [
        (("fidelity", "filters", "unseen", "dim"), 1.5, "fidelity.filters.unseen.dim"),
        (("dataset", "counts", "patches", "train"), [[1, "2"]], r"dataset.counts.patches.train\[0\]\[1\]"),
        (("adherence", "filters", "fields", "site", "real", "interval"), [0.1], "fields.site.real.interval"),
        (("settings", "seed"), True, "settings.seed"),
        (("run", "hostname"), "x", "run.hostname is unknown"),
    ],
)
def test_a_field_of_another_type_is_named(
    metrics: dict[str, Any], place: tuple[str, ...], value: Any, named: str
) -> None:
    changed = copy.deepcopy(metrics)
    inner = changed
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    with pytest.raises(UserError, match=named):
        metrics_of(changed)


def test_a_missing_field_is_named(metrics: dict[str, Any]) -> None:
    changed = copy.deepcopy(metrics)
    del changed["run"]["seed"]
    with pytest.raises(UserError, match=r"run\.seed is missing"):
        metrics_of(changed)


@pytest.mark.parametrize(
    ("version", "remedy"), [(1, "feature cache"), (2, "feature cache"), (METRICS_VERSION + 1, "Update latent-medi")]
)
def test_other_versions_are_refused_with_the_remedy(metrics: dict[str, Any], version: int, remedy: str) -> None:
    with pytest.raises(UserError, match=f"metrics_version {version}.*\n?.*{remedy}"):
        metrics_of(metrics | {"metrics_version": version})


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_changed_record_is_refused_or_read(metrics: dict[str, Any], data: st.DataObject) -> None:
    whole = {"adherence": metrics["adherence"]["filters"], "unseen": metrics["fidelity"]["filters"]["unseen"]}
    other = changed(whole, data.draw(changes(whole)))
    for record, name in ((Adherence, "adherence"), (DistanceTable, "unseen")):
        with suppress(Mismatch):
            decode(record, other.get(name) if isinstance(other, dict) else other)


def test_records_are_plain_json() -> None:
    value = {"a": np.float64("nan"), 1: (np.int64(3), np.array([1.5, np.inf])), "b": np.bool_(True)}
    assert encode(value) == {"a": None, "1": [3, [1.5, None]], "b": True}
    found = Distance(0.5, 30, 20, (0.4, 0.6), fd=None, fd_pca=2.0, mix_mismatch=0.0)
    written = encode(found)
    assert written["fd"] is None  # it has no default
    assert "smallest_group" not in written  # it is None by default
    assert decode(Distance, written) == found
    with pytest.raises(Mismatch, match="mix_mismatch"):
        decode(Distance, written | {"mix_mismatch": None})


def test_the_page_of_fields_is_that_of_the_dataclasses() -> None:
    spec = importlib.util.spec_from_file_location("metrics_page", DOCS / "metrics.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = module.page()
    assert (DOCS / "metrics.md").read_text(encoding="utf-8") == text, "run python docs/metrics.py"
    undescribed = [line for line in text.splitlines() if line.startswith("| `") and line.endswith("|  |")]
    assert undescribed == []


def test_an_experiment_evaluates_again_what_an_earlier_version_wrote(metrics: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "metrics.json"
    assert damaged_metrics(file) == [file]
    for version, damaged in ((METRICS_VERSION, []), (1, [file])):
        file.write_text(json.dumps(metrics | {"metrics_version": version}))
        assert damaged_metrics(file) == damaged
