"""The classifier of noisy latents: its network, its data, its training and its scores."""
