"""``invflow new``: write a plug-in package, ready to install."""

from __future__ import annotations

import importlib.util
import keyword
import os
import re
import shutil
import string
import tempfile
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["new", "write_operator_package", "write_package"]

_TEMPLATES = Path(__file__).parents[1] / "templates"
#: each template and the file written from it; the last two depend on the kind
_FILES = {
    "package/pyproject.toml.template": "pyproject.toml",
    "package/README.md.template": "README.md",
    "package/gitignore.template": ".gitignore",
    "$kind/module.py.template": "src/$package/__init__.py",
    "$kind/test.py.template": "tests/test_$package.py",
}
#: kinds of plug-ins, and the commands that use them
_KINDS = {
    "operator": "solve --image IMAGE --operator $command --solver noise-rto --output out",
    "solver": "solve gaussian/linear --solver $command --output out",
    "prior": "solve --image IMAGE --operator denoising --sigma 0.1 --prior $command --solver noise-rto --output out",
    "problem": "solve $command --solver exact --output out\ninvflow train $command --output trained\n"
               "invflow solve $command --prior trained/prior --solver noise-rto --output again",
}


def new(
    kind: Annotated[str, typer.Argument(help="Kind of plug-in: operator, solver, prior or problem.")],
    name: Annotated[str, typer.Argument(help="Name of the plug-in, such as Radon or line-sensor.")],
    output: Annotated[Path | None, typer.Option(
        help="Folder of the package, which must not exist yet [default: ./invflow-NAME].")] = None,
) -> None:
    """Write a plug-in package: pyproject.toml with its entry point, a working example, a test and a README."""
    folder, command = write_package(kind, name, output)
    use = string.Template(_KINDS[kind]).substitute(command=command).replace("\n", "\n  ")
    typer.echo(f"wrote {folder}\n\nnext:\n  pip install -e '{folder}[test]'\n  pytest {folder}\n  invflow list "
               f"{kind}s\n  invflow {use}")


def write_operator_package(name: str, output: Path | None = None) -> tuple[Path, str]:
    """Same as :func:`write_package`, for an operator."""
    return write_package("operator", name, output)


def write_package(kind: str, name: str, output: Path | None = None) -> tuple[Path, str]:
    """Write a package with an operator, a solver, a prior or a problem, its entry points, a test and a README.

    Args:
        kind: "operator", "solver", "prior" or "problem"; a problem includes the training of a prior for it.
        name: Name of the class or the problem, in words of ASCII letters and digits: "LineSensor", "line-sensor" or
            "line_sensor".
        output: Folder of the package; default ``./invflow-NAME``.

    Returns:
        folder: The folder that was written.
        command: Name of the plug-in on the command line.

    Raises:
        ValueError: If the kind is unknown, or if the name is not an identifier or is taken.
        FileExistsError: If the folder exists.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from invflow.cli.new import write_package
        >>> with tempfile.TemporaryDirectory() as place:
        ...     folder, command = write_package("operator", "LineSensor", Path(place) / "sensor")
        ...     sorted(file.name for file in folder.iterdir()), command
        (['.gitignore', 'README.md', 'pyproject.toml', 'src', 'tests'], 'line-sensor')
    """
    if kind not in _KINDS:
        raise ValueError(f"invflow new cannot write a {kind!r}: it writes an operator, a solver, a prior or a problem, "
                         f"as in invflow new operator {name}; a reward needs no package, see the documentation on "
                         "extending")
    names = _names(kind, name)
    folder = Path(f"invflow-{names['command']}") if output is None else output
    if folder.exists() or folder.is_symlink():
        raise FileExistsError(f"{folder} exists: pass another folder with --output, or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    # written next to its final place and then renamed, so that no partial package is left
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for template, target in _FILES.items():
            file = draft / string.Template(target).substitute(names)
            file.parent.mkdir(parents=True, exist_ok=True)
            text = (_TEMPLATES / string.Template(template).substitute(names)).read_text(encoding="utf-8")
            file.write_text(string.Template(text).substitute(names), encoding="utf-8")
        mask = os.umask(0)
        os.umask(mask)
        draft.chmod(0o777 & ~mask)  # mkdtemp denies access to others
        draft.rename(folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return folder, names["command"]


def _names(kind: str, name: str) -> dict[str, str]:
    """Values for the templates, if the name can name a class, a package and a command, and is not taken."""
    from invflow._core.plugins import kebab

    parts = [part for part in re.split(r"[-_ ]", name) if part]
    class_name = "".join(part[0].upper() + part[1:] for part in parts)
    if not (class_name.isascii() and class_name.isidentifier()) or keyword.iskeyword(class_name):
        raise ValueError(f"{name!r} cannot name a class: pass letters and digits, first a letter, such as LineSensor "
                         "or line-sensor")
    command = kebab(class_name)
    package = "invflow_" + command.replace("-", "_")
    article = "an operator" if kind == "operator" else f"a {kind}"
    taken = {_plain(known): known for known in _known(kind)}
    if _plain(class_name) in taken:
        raise ValueError(f"there is {article} {taken[_plain(class_name)]} already: pass another name")
    if package in ("invflow_operators", "invflow_problems") or importlib.util.find_spec(package) is not None:
        raise ValueError(f"a package {package} is installed already: pass another name")
    commands = f"invflow list {kind}s\ninvflow {string.Template(_KINDS[kind]).substitute(command=command)}"
    groups = [f"invflow.{kind}s", *(["invflow.recipes"] if kind == "problem" else [])]
    entries = "\n\n".join(f'[project.entry-points."{group}"]\n{package} = "{package}"' for group in groups)
    return {"kind": kind, "article": article, "entries": entries, "class_name": class_name,
            "attribute": f"{command.replace('-', '_')}_problem", "command": command, "package": package,
            "distribution": f"invflow-{command}", "commands": commands}


def _plain(name: str) -> str:
    """A name without hyphens and capitals, for comparing names."""
    return name.lower().replace("-", "").replace("_", "")


def _known(kind: str) -> list[str]:
    """Names of this kind that are already taken."""
    from invflow import operators
    from invflow._core.folders import shipped_names
    from invflow.models.registered import list_priors
    from invflow.problem import list_problems
    from invflow.registry import list_solvers
    from invflow.training.recipe import list_recipes

    if kind == "problem":
        return [*list_problems(), *list_recipes()]
    if kind == "operator":
        return operators.names()
    return list(list_solvers()) if kind == "solver" else [*shipped_names(), *list_priors()]
