"""Solvers in noise space: tempered sequential Monte Carlo, and randomise-then-optimise."""
