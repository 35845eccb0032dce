"""The app served by ``invflow app``: paint a hole into an image and look at posterior samples."""

from __future__ import annotations

from invflow.app.server import serve

__all__ = ["serve"]
