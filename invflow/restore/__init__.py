"""Restoration of image files, for ``invflow restore``."""

from __future__ import annotations

from invflow.restore.posterior import in_colour
from invflow.restore.task import Restoration, Restored, each, files_in, restore_file

__all__ = ["Restoration", "Restored", "each", "files_in", "in_colour", "restore_file"]
