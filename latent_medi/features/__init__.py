"""Encoders and their one preprocessing path, the feature cache, stain arithmetic and the statistics of feature sets.

Everything that compares real with synthetic patches goes through this room, so both kinds take the same route from
stored bytes to a feature vector.
"""
