"""Docstrings as mkdocs reads them: an extension of griffe, for the roles of Sphinx that the sources use.

Maths becomes ``$...$``, a reference a link where the site has its target, and ``Example:`` a section of examples.
"""

from __future__ import annotations

import contextlib
import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?P<role>class|func|meth|mod|data|attr|exc):`(?P<target>[^`]+)`")
_MATH = re.compile(r":math:`([^`]+)`", re.DOTALL)
_BLOCK = re.compile(r"^(?P<pad>[ ]*)\.\. math:: (?P<first>.+)\n(?P<rest>(?:(?P=pad)[ ]{2,}\S.*\n?)*)", re.MULTILINE)


class SphinxRoles(griffe.Extension):
    """Rewrites each docstring before it is parsed."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Of a module, a class, a function or an attribute."""
        if obj.docstring is not None:
            obj.docstring.value = convert(obj.docstring.value + "\n", obj).rstrip("\n")


def convert(text: str, obj: griffe.Object) -> str:
    """A docstring in the markup of the sources to one in Markdown."""
    def block(found: re.Match[str]) -> str:
        lines = [found["first"], *found["rest"].splitlines()]
        formula = " ".join(line.strip() for line in lines)
        return f"\n{found['pad']}$$\n{found['pad']}{formula}\n{found['pad']}$$\n"

    text = _BLOCK.sub(block, text)
    text = _MATH.sub(lambda found: f"${' '.join(found[1].split())}$", text)
    text = _ROLE.sub(lambda found: reference(found["target"], obj), text)
    return re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)


def reference(target: str, obj: griffe.Object) -> str:
    """A link to what a role names, in code; only code where the site has no such anchor."""
    short = target.startswith("~")
    target = target.lstrip("~")
    shown = target.rpartition(".")[2] if short else target
    first, dot, rest = target.partition(".")
    if not first.startswith("invflow"):  # a name as the code around the docstring knows it
        with contextlib.suppress(griffe.NameResolutionError):
            target = obj.resolve(first) + dot + rest
    return f'<autoref identifier="{target}" optional><code>{shown}</code></autoref>'
