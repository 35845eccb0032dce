"""The problems of invflow, one family per file; load them with :func:`invflow.load_problem`."""
