"""The command line."""

from invflow.cli.entry import app, main

__all__ = ["app", "main"]
