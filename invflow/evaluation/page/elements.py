"""Elements of an HTML page: text is escaped unless it is markup, and pictures are embedded."""

from __future__ import annotations

import base64
import html
import io
import json
from typing import Any

import torch
from torch import Tensor

__all__ = ["Cell", "Markup", "data_uri", "element", "embedded_json", "image_uri", "sortable"]

_VOID = {"img", "input", "meta", "br"}


class Markup(str):
    """A string that is HTML already. Whatever is not one of these gets escaped."""

    __slots__ = ()


class Cell:
    """One cell of a table.

    Args:
        content: shown; a string is escaped.
        value: that rows are sorted by; None goes last.
        **attributes: of the element.
    """

    def __init__(self, content: str, value: float | str | None = None, **attributes: Any) -> None:
        self.content, self.value, self.attributes = content, value, attributes


def element(name: str, /, *children: str, **attributes: Any) -> Markup:
    """An element with its content.

    Args:
        name: of the tag.
        *children: content; a :class:`Markup` as it is, any other string escaped.
        **attributes: of the tag, ``class_`` for ``class`` and ``data_value`` for ``data-value``; None and False leave
            one out, True writes its name alone.

    Example:
        >>> element("p", "1 < 2 ", element("b", "true"), class_="note")
        '<p class="note">1 &lt; 2 <b>true</b></p>'
    """
    parts = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        parts.append(key if value is True else f'{key}="{html.escape(str(value))}"')
    head = f"<{' '.join(parts)}>"
    if name in _VOID:
        return Markup(head)
    inner = "".join(c if isinstance(c, Markup) else html.escape(c) for c in children)
    return Markup(f"{head}{inner}</{name}>")


def sortable(head: list[Cell], rows: list[list[Cell]], label: str, **attributes: Any) -> Markup:
    """A table in a box of its own that scrolls sideways; a click on a column's head sorts by it.

    Args:
        head: column heads; the attribute ``data_first="descending"`` makes the first click sort downwards.
        rows: cells; the first of each row is its head.
        label: says what the table is, for those who cannot see it.
        **attributes: of the table.
    """
    heads = [element("th", element("button", cell.content, type="button", title=cell.attributes.pop("note", None)),
                     scope="col", **cell.attributes) for cell in head]
    body = []
    for row in rows:
        cells = []
        for i, cell in enumerate(row):
            own = dict(cell.attributes)
            if cell.value is not None:
                own["data_value"] = _exact(cell.value) if isinstance(cell.value, float) else cell.value
            cells.append(element("td" if i else "th", cell.content, scope=None if i else "row", **own))
        body.append(element("tr", *cells))
    table = element("table", element("thead", element("tr", *heads)), element("tbody", *body),
                    class_="sortable", **attributes)
    return element("div", table, class_="scroll", tabindex=0, role="region", aria_label=label)


def _exact(value: float) -> str:
    """All digits, in the words of scripts."""
    return repr(value).replace("inf", "Infinity")


def embedded_json(value: Any, **attributes: Any) -> Markup:
    """Data for scripts, which cannot end the element that it stands in."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return element("script", Markup(text), type="application/json", **attributes)


def data_uri(content: bytes, kind: str = "image/png") -> str:
    """Bytes as an address that needs no network."""
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def image_uri(picture: Tensor, palette: list[tuple[int, int, int]] | None = None) -> str:
    """A picture as PNG at its own resolution.

    Args:
        picture: ``(H, W)`` or ``(H, W, 3)`` in [0, 1], clipped to it; with a palette, ``(H, W)`` whole numbers.
        palette: colours that the numbers stand for.
    """
    from PIL import Image

    if palette is not None:
        image = Image.fromarray(picture.to(torch.uint8).contiguous().numpy(), mode="P")
        image.putpalette([level for colour in palette for level in colour])
    else:
        levels = (picture.double().nan_to_num(0.0).clamp(0, 1) * 255).round().to(torch.uint8).contiguous()
        image = Image.fromarray(levels.numpy())
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True, **({} if palette is None else {"bits": _bits(len(palette))}))
    return data_uri(buffer.getvalue())


def _bits(colours: int) -> int:
    return next(bits for bits in (1, 2, 4, 8) if colours <= 2**bits)
