"""``latent-medi shards demo``: the cohort as a dataset folder, made once."""

from __future__ import annotations

from pathlib import Path

from latent_medi.cli import main
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
