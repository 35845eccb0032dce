"""Speed benchmarks as ratios of two timings in one run: ``invflow bench``."""

from invflow.bench.runner import format_results, run
from invflow.bench.timing import Result

__all__ = ["Result", "format_results", "run"]
