"""What is measured and limited around a part of a comparison: its peak memory, and how long it may take."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

__all__ = ["PeakMemory", "check_timeout", "time_limit"]


class PeakMemory:
    """Peak memory of a span of code above what was in use when it began; None where the system does not tell."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._before = device, None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
            return
        try:
            _give_back_freed_memory()
            Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is in use now
            self._before = _resident("VmRSS")
        except OSError:
            pass

    def read(self) -> float | None:
        """Bytes."""
        if self._before is None:
            return None
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else _resident("VmHWM")
        return float(max(0, peak - self._before))


def _give_back_freed_memory() -> None:
    """Ask the C library, so that what an earlier solver has freed does not hide what this one takes."""
    import ctypes

    with contextlib.suppress(OSError, AttributeError):  # of another C library: the peak is then a lower bound
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(name)))


def check_timeout(seconds: float | None) -> None:
    """Refuse a time limit that cannot be kept.

    Raises:
        ValueError: if it is not over 0, or where nothing can interrupt the code: outside the main thread, on Windows.
    """
    if seconds is None:
        return
    if not 0 < seconds < float("inf"):
        raise ValueError(f"timeout={seconds}: pass seconds over 0, or None for no limit")
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        raise ValueError("timeout= interrupts the main thread, on Linux and macOS: pass timeout=None here")


@contextlib.contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Interrupt the block after so many seconds, between two operations of Python; None never does.

    Raises:
        TimeoutError: if it took longer.
    """
    if seconds is None:
        yield
        return
    running = True

    def stop(number: int, frame: Any) -> None:
        if running:
            raise TimeoutError(f"stopped after {seconds:g} s, the time limit of a part")

    previous = signal.signal(signal.SIGALRM, stop)
    # again each second, for code that goes on after whichever error
    delay, interval = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        running = False
        signal.signal(signal.SIGALRM, previous)
        signal.setitimer(signal.ITIMER_REAL, delay, interval)
