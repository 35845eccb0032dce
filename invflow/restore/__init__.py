"""Restoring files of any kind, one or a folder of them; what ``invflow restore`` does."""

from __future__ import annotations

from invflow.restore.posterior import in_colour
from invflow.restore.task import Restoration, Restored, each, files_in, restore_file

__all__ = ["Restoration", "Restored", "each", "files_in", "in_colour", "restore_file"]
