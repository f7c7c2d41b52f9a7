"""Classifiers of patches' pixels: their data and augmentation, their training, their scores and their use."""
