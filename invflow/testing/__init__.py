"""Checks of the contracts of plug-ins, for the tests of their authors."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_NAMES = {
    "check_flow_map": "invflow.testing.flowmaps",
    "check_operator": "invflow.testing.operators",
    "check_problem": "invflow.testing.problems",
    "check_reward": "invflow.testing.rewards",
    "check_solver": "invflow.testing.solvers",
}

__all__ = ["check_flow_map", "check_operator", "check_problem", "check_reward", "check_solver"]

if TYPE_CHECKING:
    from invflow.testing.flowmaps import check_flow_map
    from invflow.testing.operators import check_operator
    from invflow.testing.problems import check_problem
    from invflow.testing.rewards import check_reward
    from invflow.testing.solvers import check_solver


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    raise AttributeError(f"module 'invflow.testing' has no attribute {name!r}")
