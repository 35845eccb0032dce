"""Evaluation of solvers: certificates of calibration, comparisons, and the page that shows them."""
