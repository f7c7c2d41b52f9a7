"""Whom an evaluation is about: the rows of each part, the held-out combinations, and sets to compare."""
