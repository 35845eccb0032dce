"""Recipes of the shipped weights, with their names in ``invflow train``."""
