"""What plug-ins build on beside the nouns: the helpers that the built-in operators, problems and tables use too."""

from __future__ import annotations

from invflow._core.checks import Index, as_index
from invflow._core.counting import Calls, Countable
from invflow._core.folders import SHIPPED, kind_of
from invflow._core.random import as_generator
from invflow._core.records import write_atomically

__all__ = ["SHIPPED", "Calls", "Countable", "Index", "as_generator", "as_index", "kind_of", "write_atomically"]
