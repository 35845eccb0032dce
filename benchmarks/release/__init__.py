"""Tools that make the shipped weights and samples: ``python -m benchmarks.release.NAME`` from a clone."""
