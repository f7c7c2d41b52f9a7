"""One self-contained HTML page about an evaluation: it renders ``metrics.json`` and patches of the datasets, nothing else."""
