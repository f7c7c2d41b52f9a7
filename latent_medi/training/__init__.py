"""Training: the order of the samples, the updates, running averages of the weights, checkpoints, and fine-tuning.

Everything that happens at an update is a pure function of the settings and of the number of images seen. To resume a
run, repeat its command.
"""
