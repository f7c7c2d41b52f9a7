"""Parts of histodiffusion_prostate.py: its experiments, how they run, and what their results say."""
