"""Patches into a dataset folder: shards with their records, then the index; and writing a folder again."""
