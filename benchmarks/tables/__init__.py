"""All published tables: ``python -m benchmarks.tables.NAME`` from a clone of the repository."""
