"""Procedural tissue with known ground truth, and the two small frozen networks that go with it."""
