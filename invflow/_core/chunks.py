"""Processing of rows in chunks, whose size is halved when a chunk does not fit in memory."""

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

#: rows at a time on a CPU, where more give no speed-up
ROWS = 256

# texts of RuntimeErrors for failed allocations: CUDA and MPS, the CPU's allocator, the CUDA libraries
_SIGNS = ("out of memory", "can't allocate memory", "cannot allocate memory", "alloc_failed")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is a failed allocation, on any device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS)


def check_chunk_size(chunk_size: int | None) -> int | None:
    """Check a chunk size and return it: at least 1, or None.

    Raises:
        ValueError: For less than one row.
    """
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size}: pass at least 1 row, or None to choose it from the free memory")
    return chunk_size


class ChunkSize:
    """Number of rows processed at a time. It is halved, with a warning, when a chunk does not fit in memory.

    A size that has failed is not tried again: one object serves all chunks and steps of a call. Random numbers are
    drawn beforehand for all rows, so a smaller chunk size gives the same results up to rounding.

    Args:
        rows: Number of rows at a time, at least 1.
        name: Name of the solver or the map, for messages.
        shrink: Function called with the allocator's message when a single row does not fit. It makes the work on a row
            smaller, reports that, and returns True; or it returns False if that is impossible. Default: it is
            impossible.

    Attributes:
        rows: Current number of rows at a time.

    Raises:
        ValueError: For less than one row.

    Example:
        >>> import torch
        >>> from invflow._core.chunks import ChunkSize
        >>> ChunkSize(2, "squares").map(torch.square, torch.arange(5.0))
        tensor([ 0.,  1.,  4.,  9., 16.])
    """

    def __init__(self, rows: int, name: str, shrink: Callable[[str], bool] | None = None) -> None:
        if rows < 1:
            raise ValueError(f"chunk_size={rows}: pass at least 1 row at a time")
        self.rows, self._asked, self._name, self._shrink = rows, rows, name, shrink

    def over(self, total: int, work: Callable[[slice], T]) -> Iterator[tuple[slice, T]]:
        """Process rows 0 to ``total - 1``, in order.

        Args:
            total: Number of rows.
            work: Function called for each slice of rows, and again for smaller slices if it runs out of memory.

        Yields:
            Each slice and its result.

        Raises:
            torch.OutOfMemoryError: If a single row does not fit.
        """
        start = 0
        while start < total:
            part = slice(start, min(start + self.rows, total))
            done = self.attempt(part.stop - part.start, partial(work, part))
            if done is not None:
                yield part, done[0]
                start = part.stop

    def map(self, work: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Apply a function to rows ``(n, ...)`` in chunks: ``(n, ...)``."""
        return torch.cat([out for _, out in self.over(len(x), lambda part: work(x[part]))])

    def stream(self, total: int, work: Callable[[slice], Iterator[T]]) -> Iterator[T]:
        """Same as :meth:`over` for work that yields results. If it runs out of memory, it restarts with half the rows.
        """
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
        """Process ``count`` rows: ``(result,)``, or None if they do not fit and fewer rows should be tried."""
        try:
            return (work(),)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            said = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            if count <= 1 and not (self._shrink is not None and self._shrink(said)):
                raise torch.OutOfMemoryError(
                    f"{self._name}: a single row does not fit in memory (chunk_size={self._asked} was requested): "
                    f"{said}. Use smaller images, a smaller network, or another device"
                ) from error
        # the error is gone only here, so the tensors of the attempt are no longer referenced
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if count <= 1:
            return None
        self.rows = min(self.rows, -(-count // 2))
        warnings.warn(
            f"{self._name}: {count} rows at a time do not fit in memory ({said}): continuing with {self.rows} and "
            f"the same random numbers; chunk_size={self.rows} avoids the attempt", stacklevel=2)
        return None
