"""The parts of benchmarks/gpu.py: what each tries (plan), how it is started within its time (runner), and its rows."""
