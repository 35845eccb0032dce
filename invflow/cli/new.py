"""``invflow new``: a plug-in package, ready to install."""

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

__all__ = ["new", "write_operator_package"]

_TEMPLATES = Path(__file__).parents[1] / "templates" / "operator"
#: each template and the file that is made of it
_FILES = {
    "pyproject.toml.template": "pyproject.toml",
    "README.md.template": "README.md",
    "gitignore.template": ".gitignore",
    "module.py.template": "src/$package/__init__.py",
    "test.py.template": "tests/test_$package.py",
}


def new(
    kind: Annotated[str, typer.Argument(help="What to make: operator.")],
    name: Annotated[str, typer.Argument(help="Of the class, such as Radon or line-sensor.")],
    output: Annotated[Path | None, typer.Option(
        help="The package's folder, which must not exist yet [default: ./invflow-NAME].")] = None,
) -> None:
    """Write a plug-in package: pyproject.toml with its entry point, a working example, a test and a README."""
    if kind != "operator":
        raise ValueError(f"invflow new makes no {kind!r}: it makes an operator, as in invflow new operator {name}; the "
                         "other kinds need no package, see the documentation on extending")
    folder, command = write_operator_package(name, output)
    typer.echo(f"wrote {folder}\n\nnext:\n  pip install -e '{folder}[test]'\n  pytest {folder}\n  invflow list "
               f"operators\n  invflow solve --image IMAGE --operator {command} --solver noise-rto")


def write_operator_package(name: str, output: Path | None = None) -> tuple[Path, str]:
    """Write a package with an operator, its entry point, a test and a README.

    Args:
        name: of the class, in words of ASCII letters and digits: "LineSensor", "line-sensor" or "line_sensor".
        output: the package's folder; default ``./invflow-NAME``.

    Returns:
        folder: that was written.
        command: the name under which the command line knows the operator.

    Raises:
        ValueError: for a name that is no identifier, or is taken.
        FileExistsError: if the folder exists.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from invflow.cli.new import write_operator_package
        >>> with tempfile.TemporaryDirectory() as place:
        ...     folder, command = write_operator_package("LineSensor", Path(place) / "sensor")
        ...     sorted(file.name for file in folder.iterdir()), command
        (['.gitignore', 'README.md', 'pyproject.toml', 'src', 'tests'], 'line-sensor')
    """
    names = _names(name)
    folder = Path(f"invflow-{names['command']}") if output is None else output
    if folder.exists() or folder.is_symlink():
        raise FileExistsError(f"{folder} exists: pass another folder with --output, or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    # written beside its place and then renamed, so that nothing half-written is left
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for template, target in _FILES.items():
            file = draft / string.Template(target).substitute(names)
            file.parent.mkdir(parents=True, exist_ok=True)
            text = (_TEMPLATES / template).read_text(encoding="utf-8")
            file.write_text(string.Template(text).substitute(names), encoding="utf-8")
        mask = os.umask(0)
        os.umask(mask)
        draft.chmod(0o777 & ~mask)  # mkdtemp lets nobody else in
        draft.rename(folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return folder, names["command"]


def _names(name: str) -> dict[str, str]:
    """Class, package, distribution and command of a name, if it can be all of these and is not taken."""
    from invflow import operators
    from invflow._core.plugins import kebab

    parts = [part for part in re.split(r"[-_ ]", name) if part]
    class_name = "".join(part[0].upper() + part[1:] for part in parts)
    if not (class_name.isascii() and class_name.isidentifier()) or keyword.iskeyword(class_name):
        raise ValueError(f"{name!r} names no class: pass letters and digits, a letter first, such as LineSensor or "
                         "line-sensor")
    command = kebab(class_name)
    package = "invflow_" + command.replace("-", "_")
    taken = {known.lower(): known for known in operators.names()}
    if class_name.lower() in taken:
        raise ValueError(f"there is an operator {taken[class_name.lower()]} already: pass another name")
    if package in ("invflow_operators", "invflow_problems") or importlib.util.find_spec(package) is not None:
        raise ValueError(f"a package {package} is installed already: pass another name")
    return {"class_name": class_name, "command": command, "package": package, "distribution": f"invflow-{command}"}
