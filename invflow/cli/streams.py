"""Standard streams that may be closed: a command continues without them."""

from __future__ import annotations

import contextlib
import io
import os
import sys

__all__ = ["keep_streams"]


def keep_streams() -> None:
    """Keep the program running if standard error cannot be written, so that a lost note never stops hours of work.

    Streams that were closed before the program started are opened to the null device. Otherwise the first file that
    is opened would get their number, and their output.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # uses the lowest free number
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 -- open as long as the program runs
    sys.stderr = io.TextIOWrapper(io.BufferedWriter(_Forgiving()), encoding=getattr(sys.stderr, "encoding", "utf-8"),
                                  errors="backslashreplace", line_buffering=True, write_through=True)


class _Forgiving(io.FileIO):
    """Standard error that silently drops output that cannot be written."""

    def __init__(self) -> None:
        super().__init__(2, "w", closefd=False)

    def write(self, data: object) -> int:
        """Write everything as long as the stream can be written."""
        view = memoryview(data).cast("B")  # type: ignore[arg-type]
        with contextlib.suppress(OSError):
            written = 0
            while written < len(view):
                written += os.write(2, view[written:])
        return len(view)
