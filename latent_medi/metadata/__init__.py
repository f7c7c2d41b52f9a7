"""What is known of a patch: fields and their vocabularies, tables, splits by patient, and the audit of what a dataset
lacks.
"""
