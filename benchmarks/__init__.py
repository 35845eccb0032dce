"""Programs that make the published tables, the shipped weights and samples; run them from a clone of the repository."""
