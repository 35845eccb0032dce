"""One page for each class of the reference: the pages of ``docs/api`` list classes by family, and this splits them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

FOLDER = Path(__file__).resolve().parent / "api"
_DIRECTIVE = re.compile(r"^(?:(?P<lead>How-to: .*)\n\n)?::: (?P<name>\S+)[ ]*\n(?:[ ]{4}.*\n)*", re.MULTILINE)
_LINK = re.compile(r"\[[^\]]+\]\(\.\./[^)]+\)")
_LIST = "\0"  # where the classes are listed


def split(text: str, family: str) -> tuple[str, dict[str, str]]:
    """The page of a family with links in place of its classes, and the page of each class by its full name.

    A directive ``::: package.Name`` is of a class where ``Name`` begins with a capital. The line ``How-to: ...``
    before it goes to the page of the class; without one, that is the first link of the family's introduction.
    """
    link = _LINK.search(text.partition("\n::: ")[0])
    usual = f"How-to: {' '.join(link[0].split())}." if link else ""
    classes: dict[str, str] = {}
    lines: list[str] = []

    def take(found: re.Match[str]) -> str:
        name = found["name"]
        short = name.rpartition(".")[2]
        if not short[0].isupper():
            return found[0]
        lead = found["lead"] or usual
        top = f"{lead.replace('](../', '](../../')} One of the [{family}](../{family}.md)."
        classes[name] = f"# {title(name)}\n\n{top}\n\n::: {name}\n"
        lines.append(f"- [`{short}`]({family}/{short}.md). {found['lead'] or ''}\n")
        return "" if len(lines) > 1 else _LIST

    rest = _DIRECTIVE.sub(take, text + "\n")
    return rest.replace(_LIST, "".join(lines) + "\n"), classes


def families() -> dict[str, tuple[str, dict[str, str]]]:
    """What :func:`split` makes of each page, by the name of its file without the suffix."""
    return {path.stem: split(path.read_text(encoding="utf-8"), path.stem) for path in sorted(FOLDER.glob("*.md"))}


def title(name: str) -> str:
    """How the navigation names a class: in full where that is short."""
    return name if name.count(".") < 3 else f"class {name.rpartition('.')[2]}"


def on_config(config: Any) -> Any:
    """Put the classes under their families in the navigation."""
    pages = families()

    def expand(item: Any) -> Any:
        if not isinstance(item, dict):
            return item
        [(heading, value)] = item.items()
        if isinstance(value, list):
            return {heading: [expand(child) for child in value]}
        family = value.removeprefix("api/").removesuffix(".md")
        if not value.startswith("api/") or not pages[family][1]:
            return item
        children = [{title(name): f"api/{family}/{name.rpartition('.')[2]}.md"} for name in pages[family][1]]
        return {heading: [{f"{heading}: overview": value}, *children]}

    config.nav = [expand(item) for item in config.nav]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages of the classes."""
    for family, (_, classes) in families().items():
        for name, text in classes.items():
            files.append(File.generated(config, f"api/{family}/{name.rpartition('.')[2]}.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Leave links where the classes were."""
    place = Path(page.file.src_uri)
    return split(markdown, place.stem)[0] if place.parent == Path("api") else markdown
