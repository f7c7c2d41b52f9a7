"""Whether a dataset folder is undamaged, and which of its patches show the same picture."""
