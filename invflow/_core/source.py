"""Digest of the library's own code, which distinguishes results of a changed source from earlier ones."""

from __future__ import annotations

import dis
import functools
import hashlib
import importlib.machinery
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType

__all__ = ["code_digest"]

#: packages whose code computes no numbers: it displays, requests, times or checks them
_SILENT = frozenset({"bench", "cli", "templates", "testing", "views"})
#: flag of a function's code since Python 3.13; before, a function's first constant was its docstring or None
_DOCSTRING = 0x4000000
_PACKAGES = ("invflow", "invflow_operators", "invflow_problems")


@functools.cache
def code_digest(*without: str) -> str:
    """Digest of this library's code without comments and docstrings: 16 hexadecimal digits.

    It is the same until the source changes. It is computed once per process, from the source at that time. Python's
    compiled files are used if they are up to date, so that this takes a fraction of a second.

    Args:
        without: Further packages, such as ``"metrics"``, that do not affect the numbers in question.
    """
    found, silent = hashlib.blake2b(digest_size=8), _SILENT.union(without)
    for name in _PACKAGES:
        spec = importlib.util.find_spec(name)
        for folder in sorted(spec.submodule_search_locations or ()) if spec else ():
            for file in sorted(Path(folder).rglob("*.py")):
                place = file.relative_to(folder)
                if name != "invflow" or place.parts[0] not in silent:
                    found.update(f"{name}/{place.as_posix()}".encode())
                    found.update(_digest(_code(file)))
    return found.hexdigest()


def _code(file: Path) -> CodeType:
    code = importlib.machinery.SourceFileLoader(file.stem, str(file)).get_code(file.stem)
    assert code is not None
    return code


def _digest(code: CodeType) -> bytes:
    """Digest of what code does, without line numbers and docstrings."""
    text = _docstring(code)
    found = hashlib.blake2b(code.co_code, digest_size=16)
    found.update(repr((code.co_name, code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars,
                       code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount,
                       code.co_flags & ~_DOCSTRING)).encode())
    for place, constant in enumerate(code.co_consts):
        # constants may be frozen sets, which have no order
        plain = sorted(map(repr, constant)) if isinstance(constant, frozenset) else repr(constant)
        found.update(_digest(constant) if isinstance(constant, CodeType) else b"" if place == text else
                     f"{type(constant).__name__} {plain}".encode())
        found.update(b";")
    return found.digest()


def _docstring(code: CodeType) -> int | None:
    """Index of the docstring among the constants: a module or class stores it as ``__doc__``; a function has it first.
    """
    if code.co_flags & inspect.CO_NEWLOCALS:  # its names are locals: a function
        has = not code.co_name.startswith("<") and (code.co_flags & _DOCSTRING or sys.version_info < (3, 13))
        return 0 if has and code.co_consts and isinstance(code.co_consts[0], str) else None
    return next(_documented(code), None)


def _documented(code: CodeType) -> Iterator[int]:
    before = None
    for step in dis.get_instructions(code):
        if step.opname == "STORE_NAME" and step.argval == "__doc__" and before is not None and before.opname == (
                "LOAD_CONST"):
            yield before.arg  # type: ignore[misc]
            return
        if step.opname not in ("LOAD_CONST", "RESUME", "STORE_NAME", "LOAD_NAME", "NOP", "COPY_FREE_VARS", "MAKE_CELL"):
            return
        before = step
