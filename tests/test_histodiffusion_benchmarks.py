"""benchmarks/histodiffusion_*.py: the draws of biopsies, and what a command that was killed leaves."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pandas as pd
import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

from histodiffusion_parts import experiments
from histodiffusion_parts.experiments import QUICK, Benchmark, draws_of

from latent_medi.core.errors import UserError

CELLS = {("benign", "a"): 12, ("gleason3", "b"): 6, ("gleason4", "a"): 3, ("gleason4", "b"): 3}


@pytest.fixture
def manifest() -> pd.DataFrame:
    rows = [(f"{c}{s}{i}", c, s) for (c, s), count in CELLS.items() for i in range(count) for _ in range(2)]
    table = pd.DataFrame(rows, columns=["patient", "class", "site"])
    return table.assign(image=[f"images/{i}.jpeg" for i in range(len(table))])


def test_no_biopsy_teaches_and_tests_in_a_draw(manifest: pd.DataFrame) -> None:
    table = draws_of(manifest, 5).set_index("patient")
    where = manifest.drop_duplicates("patient").set_index("patient")
    for draw in range(5):
        one, two, pool = (table[f"split_draw{draw}_{name}"] for name in ("one", "two", "pool"))
        tests = pool == "test"
        assert ((one == "test") == tests).all()
        assert ((two == "test") == tests).all()
        assert (pool[~tests] == "train").all()
        assert (two[one == "train"] == "train").all(), "the first labelled biopsy is labelled in both"
        for name, count in (("one", 1), ("two", 2)):
            taught = (
                where.loc[table.index[table[f"split_draw{draw}_{name}"] == "train"]].groupby(["class", "site"]).size()
            )
            assert taught.to_dict() == dict.fromkeys(CELLS, count)
        tested = where.loc[tests.index[tests]].groupby(["class", "site"]).size().to_dict()
        assert tested == {cell: max(1, round(0.3 * count)) for cell, count in CELLS.items()}
    with pytest.raises(UserError, match="in 36 ways, not 37"):
        draws_of(manifest, 37)


def test_latents_that_were_copied_by_half_are_copied_again(
    manifest: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = tmp_path / "shared"
    for name in ("consep", "oral"):
        (shared / "data" / "unlabelled" / name).mkdir(parents=True)
    (shared / "data" / "prostate" / "images").mkdir(parents=True)
    manifest.to_csv(shared / "data" / "prostate" / "manifest.csv", index=False)
    benchmark = Benchmark(shared, tmp_path / "out", QUICK)
    (benchmark.latents / "data").mkdir(parents=True)
    (benchmark.latents / "latents.json").write_text("{}")
    monkeypatch.setattr(experiments, "command", lambda *words: None)
    monkeypatch.setattr(experiments.PatchDataset, "open", lambda _: benchmark)
    monkeypatch.setattr(benchmark, "splits", [c.removeprefix("split_") for c in benchmark.parts], raising=False)
    copy = Path(benchmark.pretrainings()[0].settings["latents"])

    def killed(source: Path, target: Path) -> None:
        target.mkdir()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "copytree", killed)
        with pytest.raises(KeyboardInterrupt):
            benchmark.prepare()
    benchmark.prepare()
    assert sorted(path.name for path in copy.iterdir()) == ["data", "latents.json"]
