"""Selection: which synthetic patches are worth keeping, as a column of their dataset."""
