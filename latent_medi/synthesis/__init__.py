"""Synthesis: the plan of what to generate, and the generation of a dataset folder from it.

A plan is a table that a person can edit; the same plan and model give the same pixels on any number of processes and
after any kill.
"""
