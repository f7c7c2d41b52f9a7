"""Estimates of the memory and speed of a run, and measurements on GPUs."""
