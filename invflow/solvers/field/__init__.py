"""Existing posterior samplers from the literature, on the same prior."""
