"""What the experiment derives from its data."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from parts import make_cohort

from latent_medi.experiment import ExperimentSettings, _plan


def test_few_patients_are_not_unseen(tmp_path: Path) -> None:
    """A combination with a training patch is generated as a seen one, however few its patients are."""
    make_cohort(tmp_path / "data", ("aster", "birch", "cedar"))
    _plan(ExperimentSettings(seen_per_cell=3, unseen_per_cell=50), tmp_path)
    plan = pd.read_csv(tmp_path / "plan-medi.csv", keep_default_na=False)
    assert set(plan["verdict"]) == {"thin"}
    assert set(plan["count"]) == {3}
