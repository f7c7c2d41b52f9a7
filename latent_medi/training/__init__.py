"""Training: which sample comes when, the loop, its running average, checkpoints that survive a kill, and starting from
another model.

Everything that happens at a step is a pure function of the settings and of the number of images seen, so a resume is
the same command again.
"""
