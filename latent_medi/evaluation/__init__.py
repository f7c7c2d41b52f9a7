"""Whether synthetic patches are right and whether they help, judged on real patients that no model has seen.

Fidelity (distance to real patches beside the distance between real patients), adherence (does a sample show what was
asked for) and downstream accuracy against the cheap rivals. Synthetic rows are never a reference.
"""
