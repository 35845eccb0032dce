"""Training recipes, including those of the shipped weights, for ``invflow train NAME``."""
