"""The app: paint a hole into a picture and look at what could be there; what ``invflow app`` serves."""

from __future__ import annotations

from invflow.app.server import serve

__all__ = ["serve"]
