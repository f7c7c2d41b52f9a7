"""Whole experiments: the stages of one configuration, each remembered, and the benchmark of shift."""
