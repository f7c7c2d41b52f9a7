"""One self-contained HTML page about an evaluation.

It renders ``metrics.json`` and patches of the datasets as they are, and computes nothing.
"""
