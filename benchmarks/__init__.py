"""Tables and release tools. They are not installed: run them from a clone of the repository."""
