"""Helpers that know none of the library's nouns."""
