"""Whether synthetic patches help a classifier on real test patients, against the cheap rivals."""
