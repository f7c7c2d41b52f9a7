"""Metadata of patches: fields and their vocabularies, tables, splits by patient, and the audit of a dataset."""
