"""Sampling: a dataset folder of synthetic patches from a plan and a model, pictures of samples, and translation.

The same plan and model give the same pixels on any number of processes and after any kill.
"""
