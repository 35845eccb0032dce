"""Shared parts of the tables: options, rows in CSV files, means with standard errors, lines of markdown."""

from __future__ import annotations

import argparse
import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from invflow.plugins import write_text

__all__ = ["Rows", "append_rows", "cell", "head", "line", "mean_and_error", "parser", "plus_minus", "read_rows",
           "write_rows"]

Rows = list[dict[str, str]]


def parser(table: str, doc: str | None, **numbers: int) -> argparse.ArgumentParser:
    """A parser for ``python -m benchmarks.tables.TABLE``, with an option of each number, such as ``seed=0``."""
    made = argparse.ArgumentParser(prog=f"python -m benchmarks.tables.{table}", description=doc,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in numbers.items():
        made.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=f"default: {default}")
    return made


def read_rows(file: Path) -> Rows:
    """Rows of a CSV; none if it does not exist."""
    if not file.exists():
        return []
    with file.open(newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def append_rows(file: Path, rows: Iterable[Mapping[str, Any]], fields: Iterable[str]) -> None:
    """Add rows to a CSV, which is rewritten as a whole: a stopped run leaves no incomplete row."""
    write_rows(file, [*read_rows(file), *rows], fields)


def write_rows(file: Path, rows: Iterable[Mapping[str, Any]], fields: Iterable[str]) -> None:
    """Write a CSV; values that a row lacks are empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(fields), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(file, text.getvalue())


def mean_and_error(values: Sequence[float] | Tensor) -> tuple[float, float]:
    """Mean and its standard error; NaN for the error of a single value.

    Example:
        >>> mean_and_error([1.0, 2.0, 3.0])
        (2.0, 0.5773502691896258)
    """
    numbers = torch.as_tensor(values, dtype=torch.float64)
    return float(numbers.mean()), float(numbers.std() / math.sqrt(len(numbers))) if len(numbers) > 1 else math.nan


def plus_minus(mean: float, error: float, digits: int, sign: str = "") -> str:
    """A number with its error, ``0.12 ± 0.01``; without one that is unknown."""
    return f"{mean:{sign}.{digits}f}" + ("" if math.isnan(error) else f" ± {error:.{digits}f}")


def cell(values: Sequence[float] | Tensor, digits: int, sign: str = "") -> str:
    """Mean of values with its standard error; empty for none."""
    return plus_minus(*mean_and_error(values), digits, sign) if len(values) else ""


def line(*cells: Any) -> str:
    """A line of a markdown table."""
    return "|" + "".join(f" {text} |" if (text := str(each)) else " |" for each in cells)


def head(*titles: Any) -> str:
    """The first two lines of a markdown table."""
    return line(*titles) + "\n" + "|---" * len(titles) + "|"
