"""Version of the library, recorded in everything that is written to disk."""

VERSION = "0.1.0"
