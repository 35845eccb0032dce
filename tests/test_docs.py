"""The documentation: every Python block runs, page by page, and every command line exists."""

from __future__ import annotations

import importlib.util
import inspect
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^(?P<pad>[ ]*)```(?P<kind>\w+)[^\n]*\n(?P<body>.*?)^(?P=pad)```[ ]*$", re.DOTALL | re.MULTILINE)
#: on the line before a block, with the reason why it does not run, as in <!-- not run: needs a GPU -->
NOT_RUN = re.compile(r"<!-- not run: \w.*-->\s*$")


def blocks(page: Path, kind: str) -> list[tuple[int, str]]:
    """Fenced blocks of one kind: line of the first line of code, and the code, without its indentation."""
    text, found = page.read_text(encoding="utf-8"), []
    for fence in FENCE.finditer(text):
        if fence["kind"] == kind and not NOT_RUN.search(text[: fence.start()].rstrip()):
            body = re.sub(rf"^{fence['pad']}", "", fence["body"], flags=re.MULTILINE)
            found.append((text.count("\n", 0, fence.start("body")) + 1, body))
    return found


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# -- Python ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=name)
@pytest.mark.filterwarnings("ignore::UserWarning")  # solvers warn of few particles, which are few to be quick
def test_python_blocks_run(page, tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    plt.switch_backend("Agg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    namespace: dict[str, object] = {"__name__": "__docs__"}
    for line, code in blocks(page, "python"):
        # blank lines before the code, so that a traceback has the page's own line numbers
        compiled = compile("\n" * (line - 1) + code, str(page), "exec", dont_inherit=True)
        exec(compiled, namespace)
    plt.close("all")


# -- commands --------------------------------------------------------------------------------------------------------


def commands() -> list[tuple[str, str]]:
    """All command lines of bash blocks: page with line, and the words, comments and line breaks taken out."""
    found = []
    for page in PAGES:
        for line, body in blocks(page, "bash"):
            for offset, text in enumerate(body.replace("\\\n", "  ").splitlines()):
                for command in re.split(r"&&|;", text):
                    if shlex.split(command, comments=True):
                        found.append((f"{name(page)}:{line + offset}", " ".join(command.split())))
    return found


def check_invflow(words: list[str], own: set[str]) -> None:
    """Parse an ``invflow`` command as the program would, without running it; names and settings must exist.

    ``own`` are operators that the page itself has the reader write.
    """
    import typer.main

    from invflow.cli.entry import app

    group = typer.main.get_command(app)
    if not words or words[0].startswith("-"):
        group.make_context("invflow", words or ["--help"], resilient_parsing=True)
        return
    command = group.commands[words[0]]
    given = command.make_context(words[0], words[1:]).params
    if words[0] in ("solve", "calibrate"):
        check_problems([given["problem"]])
        problem = given["problem"] or "mnist/denoising"
        check_settings(given["solver"] or "vfm", problem, given["setting"] or [])
    if words[0] == "solve" and given["operator"] and given["operator"] not in own:
        from invflow import operators

        operators.find(given["operator"])
    if words[0] == "compare":
        from invflow.cli.compare import parse_solver

        check_problems(given["problems"])
        for text in given["solver"]:
            parse_solver(text)
            head, _, tail = text.partition(":")
            check_settings(head.rpartition("=")[2], given["problems"][0], [pair for pair in tail.split(",") if pair])
    if words[0] == "train":
        from invflow.training import LoopSettings
        from invflow.training.recipe import load_recipe

        load_recipe(given["name"])
        known = inspect.signature(LoopSettings).parameters
        assert all(pair.partition("=")[0] in known for pair in given["setting"] or [])


def check_problems(names: list[str | None]) -> None:
    from invflow.problem import list_problems

    assert all(n is None or n in list_problems() for n in names), f"no such problem among {names}"


def check_settings(solver: str, problem: str, settings: list[str]) -> None:
    from invflow.registry import find_solver

    target = find_solver(solver).load()
    known = inspect.signature(target).parameters
    for pair in settings:
        key, equals, _ = pair.partition("=")
        assert equals, f"{pair!r} is no NAME=VALUE"
        assert key.replace("-", "_") in known, f"{solver} has no setting {key!r}"


def check(command: str, page: str = "") -> None:
    """One command line: those of the library in full, modules and scripts by their existence."""
    words = shlex.split(command, comments=True)
    if words[0] == "torchrun":
        assert words[1:5] == ["--nproc_per_node", "2", "-m", "invflow"]
        words = ["invflow", *words[5:]]
    if words[0] in ("python", "python3") and words[1] == "-m":
        if words[2] == "invflow":
            words = words[2:]
        else:
            assert importlib.util.find_spec(words[2]) is not None, f"there is no module {words[2]}"
    elif words[0] in ("python", "python3"):
        assert (ROOT / words[1]).is_file(), f"there is no file {words[1]}"
    if words[0] == "invflow":
        from invflow._core.plugins import kebab

        text = (ROOT / page).read_text(encoding="utf-8") if page else ""
        check_invflow(words[1:], {kebab(own) for own in re.findall(r"^class (\w+)\(Operator\)", text, re.MULTILINE)})


@pytest.mark.parametrize(("place", "command"), commands(), ids=lambda value: value if ".md:" in value else "")
def test_commands_exist(place, command):
    check(command, place.partition(":")[0])


@pytest.mark.parametrize("command", [
    "invflow solve mnist/nothing", "invflow solve mnist/denoising --sample 3", "invflow solve --samples many",
    "invflow solve mnist/denoising --solver vfm --set step=4", "invflow compare mnist/denoising --solver vfm:step=4",
    "invflow train mnist --set learning=1", "python -m invflow_problems.nothing", "invflow paint",
    "python docs/nothing.py",
])
def test_wrong_commands_are_found_out(command):
    with pytest.raises(Exception):  # noqa: B017 -- of the parser, of a lookup, of an assertion
        check(command)


# -- the site --------------------------------------------------------------------------------------------------------


def test_pages_name_nothing_of_a_machine():
    leak = re.compile(r"(?<![\w.])/(?:home|root|Users|work|opt|var|mnt)/\w|\b[A-Z]:\\\w|site-packages|localhost")
    for page in PAGES:
        found = leak.search(page.read_text(encoding="utf-8"))
        assert found is None, f"{name(page)} says {found[0]!r}"


def test_public_names_are_in_the_reference():
    import invflow

    reference = "\n".join(p.read_text(encoding="utf-8") for p in (ROOT / "docs" / "api").glob("*.md"))
    listed = {line.rpartition(".")[2] for line in reference.splitlines() if line.startswith("::: ")}
    missing = sorted({*invflow._NAMES, *invflow.training.__all__, *invflow.testing.__all__} - listed)
    assert not missing, f"docs/api lacks {', '.join(missing)}"


def test_pictures_are_small():
    for file in (ROOT / "docs").rglob("*.png"):
        assert file.stat().st_size < 150_000, f"{name(file)} has {file.stat().st_size} bytes"


def site():
    """The configuration of the site, with the navigation as the hooks leave it."""
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    from mkdocs.config import load_config

    config = load_config(str(ROOT / "mkdocs.yml"))
    return config.plugins.on_config(config)


def leaves(nav):
    for item in nav:
        [(title, value)] = item.items()
        yield from leaves(value) if isinstance(value, list) else [(title, value)]


def test_site_has_six_tabs_and_no_two_pages_of_one_name():
    nav = site().nav
    assert [next(iter(tab)) for tab in nav] == ["Start", "Tutorials", "How-to", "Explanation", "Results", "Reference"]
    titles = [title for title, _ in leaves(nav)]
    assert len(set(titles)) == len(titles)
    headings = [page.read_text(encoding="utf-8").partition("\n")[0] for page in PAGES[1:]]
    assert len(set(headings)) == len(headings)


def hook(stem):
    pytest.importorskip("mkdocs")
    pytest.importorskip("latex2mathml")
    spec = importlib.util.spec_from_file_location(f"docs_hook{stem}", ROOT / "docs" / f"{stem}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_notebooks_are_pages_with_their_outputs():
    notebooks = hook("_notebooks")
    listed = [value for _, value in leaves(site().nav)]
    for path in notebooks.notebooks():
        assert f"tutorials/{path.stem}.md" in listed
        text, pictures = notebooks.convert(path)
        saved = path.read_text(encoding="utf-8")
        assert len(pictures) == saved.count('"image/png"') + saved.count('"image/gif"')
        assert all(f"]({path.stem}/{name})" in text for name in pictures)
        assert "<IPython.core.display" not in text
        solutions = text[text.index("\n## Solutions\n"):].splitlines()
        assert solutions[3].startswith("??? ")
        assert all(not line or line.startswith("    ") for line in solutions[4:])


def test_each_class_of_the_reference_has_a_page_with_a_link_to_how_it_is_used():
    pages = hook("_reference").families()
    assert "- [`VFM`](solvers/VFM.md)" in pages["solvers"][0]
    assert "::: invflow.VFM" not in pages["solvers"][0]
    assert "::: invflow.load_prior" in pages["flowmaps"][0]
    for family, (_, classes) in pages.items():
        for name, text in classes.items():
            linked = re.search(r"^How-to: .*\]\(\.\./\.\./([\w/-]+\.md)", text, re.MULTILINE)
            assert linked is not None, f"docs/api/{family}.md: write a line 'How-to: ...' before ::: {name}"
            assert (ROOT / "docs" / linked[1]).is_file()


def test_formulas_become_mathml():
    formulas = hook("_formulas")
    shown = formulas.on_page_content(r'<p><span class="arithmatex">\(e^{r(x)} \mid y\)</span></p>')
    assert "<math" in shown
    assert "arithmatex" not in shown


@pytest.mark.parametrize(("plain", "found"), [
    ("the path x_t = (1 - t) z + t m, with z ~ N(0, I) and m a point", ["x_t = (1 - t) z + t m", r"z \sim N(0, I)"]),
    ("draws from p(x) e^r(x) in one step", ["p(x) e^{r(x)}"]),
    ("X_{s,t} = X_{u,t} o X_{s,u}; a map", [r"X_{s,t} = X_{u,t} \circ X_{s,u}"]),
    ("with weights e^r(f(z)) N(z; 0, I) / q(z), the log evidence", ["e^{r(f(z))} N(z; 0, I) / q(z)"]),
    ("log p(y | x) is a reward", [r"\log  p(y \mid x)"]),
    ("s_t(x) = (t b_t(x) - x) / (1 - t). A score", ["s_t(x) = (t b_t(x) - x) / (1 - t)"]),
    ("I take a (small) sample of N images (B, N, C) in a_long_name or file_name(x)", []),
    ("one of a pair, e.g. a U-Net (2024), is sampled", []),
])
def test_plain_formulas_are_recognised(plain, found):
    formulas = hook("_formulas")
    assert [formulas.tex(match[0]) for match in formulas._EXPRESSION.finditer(plain)] == found


def test_code_links_and_headings_are_left_alone():
    text = "<h2>e^r(x)</h2><p><code>x_t</code> <a href='x_t'>b_t(x)</a></p>"
    assert hook("_formulas").on_page_content(text) == text


def test_raw_tex_and_addresses_of_others_are_noticed(caplog):
    from types import SimpleNamespace

    hooks, page = hook("_hooks"), SimpleNamespace(file=SimpleNamespace(src_uri="page.md"))
    for text in (r"<p>\(x\)</p>", r"<p>$\sigma = 1$</p>", '<span class="arithmatex">x</span>', "<p>X_{s,t}(x)</p>"):
        caplog.clear()
        hooks.on_page_content(text, page)
        assert len(caplog.records) == 1
    caplog.clear()
    hooks.on_page_content(r"<code>$\sigma$</code><p>cost: $5 or $6</p>", page)
    hooks.on_post_page('<link rel="canonical" href="https://a.b/"><a href="https://c.d">x</a><img src="0.png">', page)
    assert not caplog.records
    hooks.on_post_page('<img alt="" src="https://a.b/c.png">', page)
    assert len(caplog.records) == 1


def test_citing_has_an_entry_for_the_software_and_each_article():
    text = hook("_hooks").citing((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert re.findall(r"^@\w+\{(\w+),$", text, re.MULTILINE) == ["invflow", "mammadov2026", "sabour2025"]
    assert "Mammadov, Abbas and Takao, So and" in text
    assert "eprint = {2511.22688}" in text


def test_class_pages_are_not_split_again():
    from types import SimpleNamespace

    reference = hook("_reference")
    page = SimpleNamespace(file=SimpleNamespace(src_uri="api/solvers/VFM.md"))
    text = reference.families()["solvers"][1]["invflow.VFM"]
    assert reference.on_page_markdown(text, page=page) == text
    page.file.src_uri = "api/solvers.md"
    assert reference.on_page_markdown(text, page=page) != text
