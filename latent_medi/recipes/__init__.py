"""Recipes: one module per public dataset, each of which makes a dataset folder from the dataset's own layout."""
