"""Distances of synthetic patches to real ones, compared with those between real patients."""
