r"""Formulas as MathML, which browsers show without a script or a network.

Pages write them as ``$...$`` and docstrings with ``:math:``. Short ones in plain text, such as x_t = (1 - t) z + t m,
p(x) e^r(x) or z ~ N(0, I), are recognised too: docstrings are read in terminals, where TeX does not help.
"""

from __future__ import annotations

import html
import itertools
import re
from typing import Any

from latex2mathml.converter import convert

_INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
_BLOCK = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)
_OPERATORS = {"&#x0007E;": "&#x0223C;", "&#x02032;": "&#x02032;", ";": ";", ":": ":"}
_FUNCTION = re.compile(r'<mi>(?:log|exp|det|max|min)</mi>(?!<mo stretchy="false">&#x00028;)')
_BAR = re.compile(r'<mo stretchy="false">&#x0007C;</mo>')

# -- formulas in plain text ------------------------------------------------------------------------------------------

_GREEK = "alpha|beta|eps|lambda|mu|phi|pi|psi|rho|sigma|tau|theta|xi"
_NAME = rf"(?<![\w\\.'`])(?:{_GREEK}|[A-Za-z])"
_END = r"(?![\w(\[])"
_INNER = rf"(?:{_GREEK}|grad|log|sqrt|[A-Za-z](?![a-z])|[\d\s,;|+*/.'^_{{}}-])*?"
_ARGUMENTS = rf"\((?:{_INNER}\({_INNER}(?:\({_INNER}\){_INNER})?\))*{_INNER}\)"
_SUB, _SUP = r"_(?:\{[^{}<>]*\}|[A-Za-z0-9](?![A-Za-z0-9_]))", r"\^(?:\{[^{}<>]*\}|r\(x\)|-?\d+|[A-Za-z](?![A-Za-z]))"
_MARKED = rf"{_NAME}(?:{_SUB}(?:{_SUP})?|{_SUP})'?(?:{_ARGUMENTS})?"
_LAW = (rf"(?<!\w)(?:log )?(?:N\((?:[^()<>]|\([^()<>]*\))*?, (?:[^()<>]|\([^()<>]*\))*?\)|[fghpqru]'?{_ARGUMENTS}"
        r"|E\[[^\[\]<>]{1,40}\])")
_ATOM = rf"(?:{_MARKED}|{_LAW})(?!\w)"
_PLAIN = rf"(?:{_NAME}|\d+(?:\.\d+)?)'?{_END}"
_GROUP = rf"(?:log |sqrt)?{_ARGUMENTS}"
_TERM = rf"(?:{_ATOM}|{_GROUP}|{_PLAIN})"
_AFTER = r"(?= [=+~-] |[,.;:)]|\s*\Z| (?:and|with|from|to|in|of)\b)"
_FACTOR = rf"(?:{_ATOM}|{_GROUP} (?={_ATOM}|{_PLAIN})|(?!a\b){_PLAIN}{_AFTER})"
_SIGN = r"(?:[=+~/-]|o) "
_EXPRESSION = re.compile(
    rf"(?:{_TERM} (?:{_SIGN}|(?={_ATOM}|\()))*{_ATOM}(?: {_SIGN}{_TERM}(?: {_FACTOR})*| {_FACTOR})*")
_SKIPPED = re.compile(r"(<(pre|code|math|script|style|h\d|a|summary)\b.*?</\2>|<[^>]*>)", re.DOTALL)
_WORD = re.compile(rf"\b(?!(?:{_GREEK}|Sigma|log|grad|sqrt|diag)(?:\b|_))[A-Za-z]{{3,}}(?:_[a-z]+)*")
_TEX = [(r"e\^r(\((?:[^()]|\([^()]*\))*\))", r"e^{r\1}"), (r"\beps(?=\b|_)", r"\\epsilon "),
        (rf"\b(?!eps)({_GREEK}|Sigma)(?=\b|_)", r"\\\1 "), (r"\bgrad\b", r"\\nabla "),
        (r"\bsqrt\(([^()]*)\)", r"\\sqrt{\1}"), (r"\blog\b", r"\\log "), (r" ~ ", r" \\sim "), (r" \| ", r" \\mid "),
        (r" o ", r" \\circ "), (r"\bdiag\b", r"\\operatorname{diag}")]


def on_page_content(content: str, **_: Any) -> str:
    """Convert the formulas of a page that has been rendered."""
    content = _INLINE.sub(lambda found: mathml(found[1], "inline"), content)
    content = _BLOCK.sub(lambda found: f'<div class="formula">{mathml(found[1], "block")}</div>', content)
    pieces = _SKIPPED.split(content)  # text, what is skipped, the name of its tag, text, ...
    for at in range(0, len(pieces), 3):
        pieces[at] = _EXPRESSION.sub(lambda found: mathml(tex(found[0]), "inline"), pieces[at])
    return "".join("" if at % 3 == 2 else piece or "" for at, piece in enumerate(pieces))


def tex(plain: str) -> str:
    """LaTeX of a formula in plain text."""
    formula = html.unescape(plain).replace(" given ", " | ")
    formula = _WORD.sub(lambda found: rf"\mathrm{{{found[0].replace('_', ' ')}}}", formula)
    for pattern, replacement in _TEX:
        formula = re.sub(pattern, replacement, formula)
    return formula


def mathml(formula: str, display: str) -> str:
    """One formula, from LaTeX; the source stays readable as its title."""
    source = " ".join(html.unescape(formula).split())
    shown = convert(source, display=display).replace("<math ", f'<math aria-label="{html.escape(source)}" ', 1)
    for name, operator in _OPERATORS.items():  # as operators they get the space that they need
        shown = shown.replace(f"<mi>{name}</mi>", f"<mo>{operator}</mo>")
    shown = _FUNCTION.sub(r'\g<0><mspace width="0.167em" />', shown)
    opens = itertools.cycle((True, False))  # of a pair of bars, one belongs to what follows, one to what precedes
    return _BAR.sub(lambda _: _bar("prefix" if next(opens) else "postfix"), shown)


def _bar(form: str) -> str:
    return f'<mo stretchy="false" form="{form}" lspace="0" rspace="0">|</mo>'
