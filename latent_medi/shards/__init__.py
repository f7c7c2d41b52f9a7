"""Pixels at rest: images in, a folder of reproducible WebDataset tars out, and the reader with random access."""
