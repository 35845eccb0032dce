"""Tables and release tools, which are not installed: run them from a clone of the repository."""
