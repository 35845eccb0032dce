"""The problems that come with invflow, one family per file; found by :func:`invflow.load_problem`."""
