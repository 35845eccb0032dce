"""What makes the shipped weights and samples: ``python -m benchmarks.release.NAME`` from a clone of the repository."""
