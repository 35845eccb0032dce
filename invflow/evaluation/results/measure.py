"""Measures the peak memory of a part of a comparison and limits its time."""

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
    """Peak memory of a block of code above the memory in use at its start; None if the system does not report it."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._before = device, None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
            return
        try:
            _give_back_freed_memory()
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the memory in use now
            self._before = _resident("VmRSS")
        except OSError:
            pass

    def read(self) -> float | None:
        """Read the peak since the start, in bytes."""
        if self._before is None:
            return None
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else _resident("VmHWM")
        return float(max(0, peak - self._before))


def _give_back_freed_memory() -> None:
    """Have the C library return freed memory, so that memory of an earlier solver does not hide that of this one."""
    import ctypes

    with contextlib.suppress(OSError, AttributeError):  # another C library: the peak is then a lower bound
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(name)))


def check_timeout(seconds: float | None) -> None:
    """Check that a time limit can be enforced.

    Raises:
        ValueError: If it is not above 0, or if code cannot be interrupted: outside the main thread, or on Windows.
    """
    if seconds is None:
        return
    if not 0 < seconds < float("inf"):
        raise ValueError(f"timeout={seconds}: pass seconds above 0, or None for no limit")
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        raise ValueError("timeout= works only in the main thread, on Linux and macOS: pass timeout=None here")


@contextlib.contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Interrupt the block after this many seconds, between two operations of Python; None sets no limit.

    Raises:
        TimeoutError: If it took longer.
    """
    if seconds is None:
        yield
        return
    running = True

    def stop(number: int, frame: Any) -> None:
        if running:
            raise TimeoutError(f"stopped after {seconds:g} s, the time limit of a part")

    previous = signal.signal(signal.SIGALRM, stop)
    # repeated each second, for code that catches all errors and continues
    delay, interval = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        running = False
        signal.signal(signal.SIGALRM, previous)
        signal.setitimer(signal.ITIMER_REAL, delay, interval)
