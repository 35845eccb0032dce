"""Rows worked on in chunks: how many at a time, and halved where one does not fit in memory."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    pass

__all__ = ["ROWS", "ChunkSize", "check_chunk_size", "is_out_of_memory"]

T = TypeVar("T")

#: rows at a time on a CPU, where more bring nothing
ROWS = 256

# what RuntimeErrors say of failed allocations: CUDA and MPS, the CPU's allocator, the libraries of CUDA
_SIGNS = ("out of memory", "can't allocate memory", "cannot allocate memory", "alloc_failed")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is a failed allocation, on any device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS)


def check_chunk_size(chunk_size: int | None) -> int | None:
    """A chunk size as it was passed, once it is one: at least 1, or None.

    Raises:
        ValueError: for under one row.
    """
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size}: at least 1 row at a time, or None to choose by the free memory")
    return chunk_size


class ChunkSize:
    """How many rows are worked on at a time; halved, with a warning, when so many do not fit in memory.

    What has once failed is not tried again: one object serves all chunks and steps of a call. Random numbers are drawn
    before, for all rows, so that the results are those of a smaller chunk size, equal to rounding.

    Args:
        rows: at a time, at least 1.
        name: of the solver or the map, for what is said.
        shrink: called where a single row does not fit, with what the allocator said: makes the work on a row smaller,
            says so, and returns True; or returns False, where nothing is left to do. Default: nothing is.

    Attributes:
        rows: at a time, by now.

    Raises:
        ValueError: for under one row.

    Example:
        >>> import torch
        >>> from invflow._core.chunks import ChunkSize
        >>> ChunkSize(2, "squares").map(torch.square, torch.arange(5.0))
        tensor([ 0.,  1.,  4.,  9., 16.])
    """

    def __init__(self, rows: int, name: str, shrink: Callable[[str], bool] | None = None) -> None:
        if rows < 1:
            raise ValueError(f"chunk_size={rows}: at least 1 row at a time")
        self.rows, self._asked, self._name, self._shrink = rows, rows, name, shrink

    def over(self, total: int, work: Callable[[slice], T]) -> Iterator[tuple[slice, T]]:
        """Work on rows 0 to ``total - 1``, in order.

        Args:
            total: number of rows.
            work: done for each slice of them; where it fails for want of memory, once more for smaller ones.

        Yields:
            The slices, and what the work gave.

        Raises:
            torch.OutOfMemoryError: if a single row does not fit.
        """
        start = 0
        while start < total:
            part = slice(start, min(start + self.rows, total))
            done = self.attempt(part.stop - part.start, partial(work, part))
            if done is not None:
                yield part, done[0]
                start = part.stop

    def map(self, work: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """A function of rows ``(n, ...)``, chunk by chunk: ``(n, ...)``."""
        return torch.cat([out for _, out in self.over(len(x), lambda part: work(x[part]))])

    def stream(self, total: int, work: Callable[[slice], Iterator[T]]) -> Iterator[T]:
        """As :meth:`over` for work that yields as it goes; work that runs out of memory begins again, in halves."""
        start = 0
        while start < total:
            part = slice(start, min(start + self.rows, total))
            steps = work(part)
            while (done := self.attempt(part.stop - part.start, partial(next, steps, None))) is not None:
                if done[0] is None:  # the end
                    start = part.stop
                    break
                yield done[0]

    def attempt(self, count: int, work: Callable[[], T]) -> tuple[T] | None:
        """Work on ``count`` rows: ``(what it gave,)``, or None where they do not fit and fewer are to be tried."""
        try:
            return (work(),)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            said = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            if count <= 1 and not (self._shrink is not None and self._shrink(said)):
                raise torch.OutOfMemoryError(
                    f"{self._name}: a single row does not fit in memory, where chunk_size={self._asked} was asked "
                    f"for: {said}. Take smaller images, a smaller network, or another device"
                ) from error
        # only here, with the error gone, does nothing hold on to the tensors of the attempt any more
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if count <= 1:
            return None
        self.rows = min(self.rows, -(-count // 2))
        warnings.warn(
            f"{self._name}: {count} rows at a time do not fit in memory ({said}): continuing with {self.rows}, with "
            f"the same random numbers; chunk_size={self.rows} avoids the attempt", stacklevel=2)
        return None
