"""The notebooks as pages of the site, with their saved outputs: nothing runs when the site is built."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
_TITLE = re.compile(r'title\(?=?f?"((?:[^"\\]|\\.)+)"')


def notebooks() -> list[Path]:
    """All of them, by their numbers."""
    return sorted(FOLDER.glob("[0-9][0-9]*.ipynb"), key=lambda path: path.stem.partition("_")[0])


def number(path: Path) -> str:
    """What the notebook is called in text: ``2b`` for ``02b_learn_a_flow_map``."""
    return path.stem.partition("_")[0].lstrip("0") or "0"


def on_files(files: Any, config: Any) -> Any:
    """Add a page, its pictures and the notebook itself for each notebook."""
    for path in notebooks():
        text, pictures = convert(path, config.repo_url or "")
        files.append(File.generated(config, f"tutorials/{path.stem}.md", content=text))
        files.append(File.generated(config, f"tutorials/{path.name}", abs_src_path=str(path)))
        for name, data in pictures.items():
            files.append(File.generated(config, f"tutorials/{path.stem}/{name}", content=data))
    return files


def convert(path: Path, repository: str = "") -> tuple[str, dict[str, bytes]]:
    """The Markdown of a notebook, and its pictures by name. Its solutions stay folded until the reader opens them."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    folded: list[str] | None = None
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            before, solutions, after = (source + "\n").partition("## Solutions\n")
            if solutions:
                parts.append(link_notebooks(before))
                folded, source = [], after
            (parts if folded is None else folded).append(link_notebooks(source))
        else:
            (parts if folded is None else folded).extend(code_cell(cell, source, path.stem, pictures))
    parts.insert(1, header(path, repository))
    if folded is not None:
        inside = "\n\n".join(folded)
        indented = "\n".join(f"    {line}" if line.strip() else "" for line in inside.splitlines())
        parts.append(f'## Solutions\n\n??? question "Try the exercises first, then open this"\n\n{indented}')
    return "\n\n".join(parts) + "\n", pictures


def header(path: Path, repository: str) -> str:
    """Where the notebook can be had."""
    text = (f"This page shows the notebook with its saved outputs. [Download {path.name}]({path.name}), or run "
            f"`notebooks/{path.name}` in a clone of the repository.")
    address = repository.removesuffix("/").removesuffix(".git")
    owner = address.partition("https://github.com/")[2]
    colab = f"https://colab.research.google.com/github/{owner}/blob/main/notebooks/{path.name}"
    install = f"%pip install 'invflow[notebooks] @ git+{address}'"
    return text + (f" [Open it in Colab]({colab}); there, first run `{install}` in a cell of its own." if owner else "")


def code_cell(cell: dict[str, Any], source: str, stem: str, pictures: dict[str, bytes]) -> list[str]:
    """The code, and what it printed and drew."""
    parts = [f"```python\n{source}\n```"]
    titles = _TITLE.findall(source)
    for output in cell["outputs"]:
        data = output.get("data", {})
        kind = next((kind for kind in ("png", "gif") if f"image/{kind}" in data), None)
        if kind is not None:
            name = f"{len(pictures)}.{kind}"
            pictures[name] = base64.b64decode("".join(data[f"image/{kind}"]))
            alt = re.sub(r"\\n|[\[\]$\\{}]", " ", titles[-1]) if titles else "Figure drawn by the code above"
            parts.append(f"![{' '.join(alt.split())}]({stem}/{name})")
        else:
            text = "".join(output.get("text", data.get("text/plain", ""))).rstrip()
            parts.append(f"```text\n{text}\n```")
    return parts


def link_notebooks(text: str) -> str:
    """Turn ``notebook 6`` into a link to its page."""
    pages = {number(path): f"{path.stem}.md" for path in notebooks()}
    return re.sub(r"\b[Nn]otebook (\d+[a-z]?)\b", lambda found: f"[{found[0]}]({pages[found[1]]})", text)
