"""Write the type stub of ``invflow``: ``python -m benchmarks.release.make_stub``."""

from __future__ import annotations

from pathlib import Path

import invflow

STUB = Path(invflow.__file__).with_suffix(".pyi")
_NAMES, _MODULES, _MOVED = (vars(invflow)[name] for name in ("_NAMES", "_MODULES", "_MOVED"))


def stub() -> str:
    """The text of ``invflow/__init__.pyi``, generated from the tables of names in ``invflow/__init__.py``."""
    lines = ['"""Made by ``python -m benchmarks.release.make_stub`` from ``__init__.py``: do not edit."""', ""]
    lines += sorted(f"from invflow import {name} as {name}" for name in _MODULES if name not in _MOVED)
    lines += sorted(f"from {places.split()[0]} import {name} as {name}" for name, places in _NAMES.items())
    modules = (f"from {_full(name)} import {_last(name)} as {name}" for name in _MODULES if name in _MOVED)
    names = ["", "__version__: str", "__all__ = [", *(f'    "{name}",' for name in invflow.__all__), "]", ""]
    return "\n".join([*lines, *modules, *names])


def _full(name: str) -> str:
    return f"invflow.{_MOVED[name].split()[0]}".rpartition(".")[0]


def _last(name: str) -> str:
    result: str = _MOVED[name].split()[0].rpartition(".")[2]
    return result


def main() -> None:
    """Write the stub."""
    STUB.write_text(stub(), encoding="utf-8")


if __name__ == "__main__":
    main()
