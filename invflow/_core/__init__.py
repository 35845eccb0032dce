"""Helpers that do not depend on the library's main classes."""
