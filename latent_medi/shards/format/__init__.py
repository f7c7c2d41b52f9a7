"""The format of a dataset folder: images, tar members, ``dataset.json``, the index and its columns."""
