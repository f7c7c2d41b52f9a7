"""What the check of the demo's headline says of figures that are good, bad, or not there."""

from __future__ import annotations

import copy

import pytest
from check_headline import shortfalls

GOOD = {
    "accuracy_shift": {"real": 0.74, "stain_transfer": 0.76, "cls": 0.75, "medi": 0.82, "oracle": 0.87},
    "accuracy_seen": {"real": 0.9, "medi": 0.89},
    "accuracy_in_distribution": {"real": 0.9},
    "recovery_unseen": {"site": 1.0, "class": 0.9},
    "distance_unseen": {"metric": "kid", "ratio": 0.1},
    "distance_unseen_colour_free": {"metric": "kid", "ratio": 0.1},
    "distance_per_class": {"metric": "kid", "ratio": 0.2},
}


def test_good_figures_and_a_bad_one() -> None:
    assert shortfalls(GOOD) == []
    bad = copy.deepcopy(GOOD)
    bad["distance_unseen"]["ratio"] = 0.9
    assert shortfalls(bad) == ["ratio MeDi/CLS, unseen"]


@pytest.mark.parametrize(
    ("group", "key", "missed"),
    [
        ("distance_unseen", "ratio", ["ratio MeDi/CLS, unseen"]),
        ("recovery_unseen", "class", ["class recovered"]),
        (
            "accuracy_shift",
            "oracle",
            ["oracle above real", "stain transfer below oracle", "share of the gap that MeDi closes"],
        ),
        ("accuracy_shift", "stain_transfer", ["stain transfer below oracle"]),
    ],
)
def test_what_is_not_there_is_missed(
    group: str, key: str, missed: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    without = copy.deepcopy(GOOD)
    without[group][key] = None
    assert shortfalls(without) == missed
    assert f"MISS {missed[0]}: none (must be" in capsys.readouterr().out
