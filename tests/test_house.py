"""The rule of the house: imports run one way, including lazy imports and those for types only.

A name in ``invflow`` imports only names to its left in :data:`ORDER`. The plug-in packages (``operators/``,
``problems/``) and ``benchmarks/`` use public names alone.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").is_file())

#: limits that only fall: comments for the type checker, lines of a function's body
MOST_IGNORES, LONGEST_BODY = 64, 60
#: files of over 400 lines
LONG = {"invflow/datasets/files.py", "invflow/operator.py", "invflow/problem.py"}
#: what is in invflow/, from what knows nothing to what knows everything
ORDER = [
    "_core", "plugins",
    "views", "nets", "datasets", "smc", "flowmap", "operator", "reward",
    "likelihood", "posterior", "rewards",
    "solver", "linear", "metrics",
    "models",
    "solvers",
    "problem", "training",
    "registry", "operators", "problems", "deepinv_bridge", "testing", "bench",
    "evaluation", "restore", "convert",
    "__init__",
    "teaching", "app",
    "cli", "__main__",
]
PLUG_INS = {"invflow_operators": ROOT / "operators", "invflow_problems": ROOT / "problems", "benchmarks": ROOT}


def modules(package: str, above: Path) -> dict[str, Path]:
    """The modules of a package by their dotted names."""
    found = {}
    for path in sorted((above / package).rglob("*.py")):
        parts = path.relative_to(above).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


INVFLOW = modules("invflow", ROOT)


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """What a file imports, wherever in the file, as dotted names with their lines; ``from a import b`` is ``a.b``."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} is a relative import"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def target(dotted: str, known: dict[str, Path]) -> str | None:
    """The module that an import loads: the longest beginning that is one."""
    parts = dotted.split(".")
    return next((name for n in range(len(parts), 0, -1) if (name := ".".join(parts[:n])) in known), None)


def arrows(known: dict[str, Path]) -> Iterator[tuple[str, str, str]]:
    """Every import of a module in ``known`` by another, with the place that it stands at."""
    for module, path in known.items():
        for dotted, line in imports(path):
            found = target(dotted, known)
            if found is not None and found != module:
                yield module, found, f"{path.name}:{line}"


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def upward(known: dict[str, Path]) -> list[str]:
    """Imports of what does not stand to the left."""
    return [f"{place}, imports {b}, which does not stand to the left of {room(a)}" for a, b, place in arrows(known)
            if room(a) != room(b) and ORDER.index(room(b)) > ORDER.index(room(a))]


def circles(known: dict[str, Path]) -> list[list[str]]:
    """Groups of modules that reach each other. A package's own list of names (``__init__``) counts as a module."""
    after: dict[str, set[str]] = {name: set() for name in known}
    for a, b, _ in arrows(known):
        after[a].add(b)
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:  # Tarjan (1972)
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in after[node]:
            if other not in index:
                visit(other)
            if other in stack:
                low[node] = min(low[node], low[other])
        if low[node] == index[node]:
            group = [stack.pop()]
            while group[-1] != node:
                group.append(stack.pop())
            if len(group) > 1:
                found.append(sorted(group))

    for node in known:
        if node not in index:
            visit(node)
    return found


def test_every_module_has_its_place() -> None:
    assert {room(module) for module in INVFLOW} <= set(ORDER)


def test_imports_run_one_way() -> None:
    assert not upward(INVFLOW), "\n".join(upward(INVFLOW))


def test_rooms_of_solvers_do_not_know_each_other() -> None:
    rooms = ("tilting", "noise", "field", "baselines")

    def inner(module: str) -> str:
        parts = module.split(".")
        return parts[2] if len(parts) > 2 and parts[1] == "solvers" and parts[2] in rooms else ""

    assert not [place for a, b, place in arrows(INVFLOW) if inner(a) and inner(b) and inner(a) != inner(b)]


def test_there_is_no_circle() -> None:
    assert circles(INVFLOW) == []


def test_the_hall_is_small() -> None:
    hall = [name for name, path in INVFLOW.items() if path.parent.name == "invflow" and path.name != "__init__.py"]
    assert len(hall) <= 20, hall


def bodies(path: Path) -> Iterator[tuple[str, int]]:
    """Functions of a file with the lines of their bodies, without signature and docstring."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            if body:
                yield f"{path.relative_to(ROOT)}: {node.name}", (body[-1].end_lineno or 0) - body[0].lineno + 1


@pytest.mark.parametrize("package", ["invflow", *PLUG_INS])
def test_functions_are_short(package: str) -> None:
    own = modules(package, PLUG_INS.get(package, ROOT)).values()
    long = [f"{name} has {lines} lines" for path in own for name, lines in bodies(path) if lines > LONGEST_BODY]
    assert not long, "\n".join(long)


def test_files_are_short() -> None:
    own = [path for package in ("invflow", *PLUG_INS)
           for path in modules(package, PLUG_INS.get(package, ROOT)).values()]
    long = {str(path.relative_to(ROOT)) for path in own if len(path.read_text(encoding="utf-8").splitlines()) > 400}
    assert long <= LONG, sorted(long - LONG)


@pytest.mark.parametrize("package", PLUG_INS)
def test_plug_ins_and_benchmarks_use_public_names(package: str) -> None:
    own = modules(package, PLUG_INS[package])
    private = [f"{path.relative_to(ROOT)}:{line} imports {dotted}" for path in own.values()
               for dotted, line in imports(path)
               if dotted.split(".")[0] in {"invflow", *PLUG_INS} - {package}
               and any(part.startswith("_") for part in dotted.split("."))]
    assert not private, "\n".join(private)


def test_no_private_name_is_imported_from_another_package() -> None:
    """``_core`` is open to all of invflow; any other name that begins with an underscore stays in its package."""
    private = []
    for module, path in INVFLOW.items():
        for dotted, line in imports(path):
            parts = dotted.split(".")
            if parts[0] == "invflow" and any(p.startswith("_") for p in parts[1:] if p != "_core") and (
                    room(module) != room(dotted)):
                private.append(f"{path.relative_to(ROOT)}:{line} imports {dotted}")
    assert not private, "\n".join(private)


def test_nothing_below_imports_a_plug_in() -> None:
    """The library knows no particular operator and no particular problem but for the types that its doors give."""
    doors, plug_ins = {"invflow.operators", "invflow.problems"}, set(PLUG_INS)
    wrong = [f"{path.relative_to(ROOT)}:{line} imports {dotted}" for module, path in INVFLOW.items()
             for dotted, line in imports(path)
             if dotted.split(".")[0] in plug_ins and module not in doors]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(("module", "line"), [
    ("invflow._core.checks", "from invflow.reward import Reward"),
    ("invflow.flowmap", "from invflow.models.mixture import GaussianMixtureFlow"),
    ("invflow.reward", "import invflow.solver"),
])
def test_an_arrow_turned_round_is_seen(tmp_path: Path, module: str, line: str) -> None:
    known = dict(INVFLOW)
    known[module] = tmp_path / "changed.py"
    text = INVFLOW[module].read_text(encoding="utf-8")
    known[module].write_text(f"{text}\n\ndef late():\n    {line}\n", encoding="utf-8")
    assert len(upward(known)) == 1
    assert circles(known)


def test_ignored_type_errors_are_few_and_named() -> None:
    """``mypy`` runs strictly; what it is told to pass over has a code, and its number only falls."""
    lines = [line for package, above in (("invflow", ROOT), *PLUG_INS.items())
             for path in modules(package, above).values()
             for line in path.read_text(encoding="utf-8").splitlines() if "type: ignore" in line]
    assert all("type: ignore[" in line for line in lines)
    assert len(lines) <= MOST_IGNORES
