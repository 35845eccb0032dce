"""The operators of invflow, one family per file; import them from :mod:`invflow.operators`."""
