"""Classifiers trained with synthetic patches, with baselines and with an oracle, scored on real test patients."""
