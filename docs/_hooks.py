"""What mkdocs runs besides its plugins: the pages that are files of the repository, and two checks of every page."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import yaml
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
_LOG = logging.getLogger("mkdocs.hooks.invflow")
_RAW = re.compile(r"arithmatex|\\\(|\\\[|\$\$|\$[^$<>\n]*\\[a-z]+[^$<>\n]*\$|\w*[_^]\{[^<>\n]*")
_CODE = re.compile(r"<(pre|code|math)\b.*?</\1>", re.DOTALL)
_LOADED = re.compile(r'<(?:script|img|iframe|source|video|link(?! rel="(?:canonical|prev|next)"))\b[^>]*?'
                     r'\b(?:src|href)="((?:https?:)?//[^"]+)"')


def on_config(config: Any) -> Any:
    """Edit links to the branch main, where the repository has an address."""
    if config.repo_url and config.edit_uri == "edit/master/docs/":  # mkdocs's guess
        config.edit_uri = "edit/main/docs/"
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are files of the repository."""
    for name in ("CHANGELOG.md", "CONTRIBUTING.md"):
        files.append(File.generated(config, name.lower(), content=(ROOT / name).read_text(encoding="utf-8")))
    cff = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    files.append(File.generated(config, "citing.md", content=citing(cff)))
    return files


def on_page_content(content: str, page: Any, **_: Any) -> str:
    """Warn of formulas that were left as they were written."""
    raw = _RAW.search(_CODE.sub("", content))
    if raw is not None:
        _LOG.warning("%s shows raw TeX: %s", page.file.src_uri, raw[0])
    return content


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Warn of whatever a browser would load from elsewhere."""
    for address in _LOADED.findall(output):
        _LOG.warning("%s loads %s", page.file.src_uri, address)
    return on_post_template(output)


def on_post_template(output: str, **_: Any) -> str:
    """Keep the theme from asking the repository's host for its stars."""
    return output.replace(' data-md-component="source"', "")


def citing(cff: str) -> str:
    """The page on citing, from CITATION.cff: BibTeX of the software and of the methods' articles."""
    work = yaml.safe_load(cff)
    entries = [bibtex("software", "invflow", [a.get("name", "") for a in work["authors"]], work["title"],
                      {"version": str(work["version"])})]
    uses = []
    for article in work["references"]:
        authors = [f"{author['family-names']}, {author['given-names']}" for author in article["authors"]]
        [identifier] = article["identifiers"]
        number = identifier["value"].partition(":")[2]
        key = article["authors"][0]["family-names"].lower() + str(article["year"])
        entries.append(bibtex("misc", key, authors, article["title"],
                              {"year": str(article["year"]), "eprint": number, "archiveprefix": "arXiv"}))
        uses.append(f"- {article['title']} ({article['year']}), [arXiv {number}](https://arxiv.org/abs/{number}): "
                    f"{identifier['description']}.")
    return "\n".join([
        "# Citing", "", f"{work['message']} This page is made from `CITATION.cff`. Every solver's page names its "
        "source under *Reference*.", "", *uses, "", "```bibtex", "\n\n".join(entries), "```", ""])


def bibtex(kind: str, key: str, authors: list[str], title: str, fields: dict[str, str]) -> str:
    """One entry."""
    names = " and ".join(f"{{{name}}}" if "," not in name else name for name in authors)
    lines = [f"  {name} = {{{value}}}," for name, value in fields.items()]
    return "\n".join([f"@{kind}{{{key},", f"  author = {{{names}}},", f"  title = {{{{{title}}}}},", *lines, "}"])
