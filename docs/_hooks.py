"""What mkdocs runs besides its plugins: formulas become MathML, which browsers show without a script or a network."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

_INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
_BLOCK = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    """Convert the formulas of a page that has been rendered."""
    content = _INLINE.sub(lambda found: mathml(found[1], "inline"), content)
    return _BLOCK.sub(lambda found: f'<div class="formula">{mathml(found[1], "block")}</div>', content)


def mathml(formula: str, display: str) -> str:
    """One formula, from LaTeX; the source stays readable as its title."""
    source = " ".join(html.unescape(formula).split())
    return convert(source, display=display).replace("<math ", f'<math aria-label="{html.escape(source)}" ', 1)
