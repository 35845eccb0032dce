"""The version, which everything that is written to disk names."""

VERSION = "0.1.0"
