"""Encoders and their one preprocessing path, the feature cache, stain arithmetic, copies by their pixels.

Everything that compares real with synthetic patches goes through this room, so both kinds take the same route from
stored bytes to a feature vector.
"""
