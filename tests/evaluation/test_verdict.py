"""The rule of the verdict."""

import pytest

from latent_medi.evaluation.verdict import answer
from latent_medi.statistics.differences import Difference
from latent_medi.statistics.intervals import NOT_ESTIMABLE


def difference(value, interval, likely):
    return Difference(value, 100, 20, interval, likely=likely)


CLEAR = difference(0.06, (0.01, 0.11), (0.03, 0.09))
PROBABLE = difference(0.04, (-0.01, 0.09), (0.01, 0.07))
OPEN = difference(0.02, (-0.03, 0.07), (-0.01, 0.05))
BEHIND = difference(-0.01, (-0.06, 0.04), (-0.04, 0.02))
FEW = difference(0.3, NOT_ESTIMABLE, NOT_ESTIMABLE)


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([CLEAR, CLEAR], "useful"),
        ([CLEAR, PROBABLE], "may be useful"),
        ([PROBABLE, OPEN], "not shown"),
        ([CLEAR, BEHIND], "not useful"),
        ([CLEAR, FEW], "not shown"),
        ([FEW, BEHIND], "not useful"),
        ([CLEAR, difference(0.0, (-0.1, 0.1), (-0.05, 0.05))], "not useful"),
        ([CLEAR, difference(0.01, (0.0, 0.02), (0.0, 0.02))], "not shown"),
    ],
)
def test_the_weakest_difference_decides(differences, expected):
    assert answer(differences) == expected
    assert answer(differences[::-1]) == expected


@pytest.mark.parametrize("differences", [[], [CLEAR, difference(None, None, None)]])
def test_no_answer_without_differences(differences):
    with pytest.raises(ValueError, match="at least one difference"):
        answer(differences)
