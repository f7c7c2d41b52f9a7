"""``latent-medi shards demo``: the cohort as a dataset folder, made once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from latent_medi.cli import main
from latent_medi.demo import cohort
from latent_medi.demo.settings import CohortSettings
from latent_medi.shards.dataset import PatchDataset


def test_a_rerun_keeps_the_shards_and_other_settings_replace_them(tmp_path: Path) -> None:
    words = ["shards", "demo", f"out={tmp_path}", "probe_patients=1", "test_patients=1", "patches_per_patient=1"]
    shards = []
    for patients in (1, 1, 2):
        assert main([*words, f"train_patients={patients}"]) == 0
        dataset = PatchDataset.open(tmp_path)
        assert not dataset.verify()
        of = dataset.index[dataset.index["split_main"] == "train"].groupby(["class", "site"], observed=True)
        assert set(of["patient"].nunique()) == {patients}
        shards.append({path.name: path.stat().st_ino for path in (tmp_path / "data").iterdir()})
    assert shards[0] == shards[1]
    assert not set(shards[1].values()) & set(shards[2].values())


def broken_off(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_what_a_broken_off_cohort_of_other_settings_left_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = CohortSettings(train_patients=1, probe_patients=1, test_patients=1, patches_per_patient=1)
    with monkeypatch.context() as patch:
        patch.setattr(cohort, "finish_dataset", broken_off)
        with pytest.raises(KeyboardInterrupt):
            cohort.build(tmp_path / "a", settings, jobs=1)
    left = {path.name: path.stat().st_ino for path in (tmp_path / "a" / "data").glob("*.tar")}
    assert left
    other = cohort.build(tmp_path / "a", replace(settings, seed=1), jobs=1)
    fresh = cohort.build(tmp_path / "b", replace(settings, seed=1), jobs=1)
    assert [s["sha256"] for s in other.info["shards"]] == [s["sha256"] for s in fresh.info["shards"]]


def test_a_folder_is_that_of_the_call_whatever_an_earlier_call_left_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = CohortSettings(train_patients=1, probe_patients=1, test_patients=1, patches_per_patient=1)
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        assert not cohort.build(Path("data"), settings, jobs=2).verify()
