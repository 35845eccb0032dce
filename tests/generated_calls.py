"""Thousands of generated calls of operators, rewards, solvers and metrics: ``python tests/generated_calls.py 5000``.

Runs the property-based tests (``tests/test_properties_*.py``) with as many examples as it takes, drawn afresh, and
counts them. Each example is a call of the library with its own shapes, types, batches and settings, compared with the
same call in another form (in chunks, in a loop, in another order). A failure is printed with how to repeat it.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

#: examples of one run of the tests as they are
EXAMPLES = 460


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int, nargs="?", default=5000)
    parser.add_argument("options", nargs="*", help="of pytest, after --")
    arguments = parser.parse_args()
    os.environ["INVFLOW_PROPERTIES"] = str(max(2, -(-arguments.count // EXAMPLES)))
    sys.path.insert(0, str(Path(__file__).parent))
    import property_tools  # reads the variable
    import pytest

    files = sorted(map(str, Path(__file__).parent.glob("test_properties_*.py")))
    status = pytest.main([*files, "-q", "-p", "no:cacheprovider", *arguments.options])
    total = sum(property_tools.CALLS.values())
    for name, calls in property_tools.CALLS.most_common():
        print(f"{calls:7} {name}")
    print(f"{total:7} generated calls")
    return int(status) or int(total < arguments.count)


if __name__ == "__main__":
    raise SystemExit(main())
