"""Whole slides into a dataset folder, a killable process per slide."""
