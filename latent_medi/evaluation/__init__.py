"""Whether synthetic patches are right and whether they help, on real patients that no model has seen.

Fidelity (distance to real patches, compared with that between real patients), adherence (whether samples show the
requested values) and accuracy of classifiers, compared with cheap baselines. Synthetic rows are never a reference.
"""
