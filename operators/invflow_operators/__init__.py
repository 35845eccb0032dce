"""The operators that come with invflow, one family per file; import them from :mod:`invflow.operators`."""
