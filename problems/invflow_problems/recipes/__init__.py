"""Recipes of the shipped weights, as ``invflow train`` names them."""
