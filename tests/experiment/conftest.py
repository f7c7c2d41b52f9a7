"""The planted cohort, written once."""

from __future__ import annotations

from evaluation_world import world

__all__ = ["world"]
