"""Standard streams that may be closed: a command goes on without them."""

from __future__ import annotations

import contextlib
import io
import os
import sys

__all__ = ["keep_streams"]


def keep_streams() -> None:
    """Let nothing that is said on standard error end the program: progress is not worth hours of work.

    Streams that were closed before the program started are opened onto nothing, or the first file that is written
    would take their number, and what is meant for them.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 -- open as long as the program runs
    sys.stderr = io.TextIOWrapper(io.BufferedWriter(_Forgiving()), encoding=getattr(sys.stderr, "encoding", "utf-8"),
                                  errors="backslashreplace", line_buffering=True, write_through=True)


class _Forgiving(io.FileIO):
    """Standard error, where what cannot be written is lost without an error."""

    def __init__(self) -> None:
        super().__init__(2, "w", closefd=False)

    def write(self, data: object) -> int:
        """Write all, as far as there is somebody who reads it."""
        view = memoryview(data).cast("B")  # type: ignore[arg-type]
        with contextlib.suppress(OSError):
            written = 0
            while written < len(view):
                written += os.write(2, view[written:])
        return len(view)
