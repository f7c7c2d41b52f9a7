"""Roles of synthetic sets: the candidate, about which an evaluation gives its verdict, and its baselines."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from latent_medi.core.errors import UserError, nearest

CANDIDATE = "medi"
"""Name that makes a synthetic set the candidate where the settings choose none."""
BASELINE = "cls"
"""Name that makes a synthetic set the first baseline."""
LABELS = {CANDIDATE: "MeDi", BASELINE: "CLS"}


@dataclass(frozen=True)
class Roles:
    """Which synthetic set is the candidate and which are its baselines.

    Args:
        candidate: Name of the candidate.
        baselines: Names of all other synthetic sets; the ratio of distances is taken to the first.
    """

    candidate: str
    baselines: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        """Names of all synthetic sets, the candidate last and the first baseline before it. Without any set these two
        names are given all the same.
        """
        return [*reversed(self.baselines or (BASELINE,)), self.candidate]

    @property
    def baseline(self) -> str:
        """Name of the first baseline."""
        return self.baselines[0] if self.baselines else BASELINE


def synthetic_roles(names: Iterable[str], candidate: str = "") -> Roles:
    """The roles of synthetic sets.

    Args:
        names: Names of the synthetic sets.
        candidate: Name of the candidate; empty takes "medi" if there is such a set, otherwise the first set.

    Raises:
        UserError: There is no set with the candidate's name.
    """
    names = list(names)
    if candidate and candidate not in names:
        raise UserError(
            f"candidate is {candidate!r}, which is no synthetic set; {nearest(candidate, names)}.",
            f"Choose one of {', '.join(names)}." if names else "Give it a folder under synthetic.",
        )
    chosen = candidate or (CANDIDATE if CANDIDATE in names or not names else names[0])
    others = [name for name in names if name != chosen]
    return Roles(chosen, tuple(sorted(others, key=lambda name: name != BASELINE)))
