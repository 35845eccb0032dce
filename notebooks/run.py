"""Run the notebooks: ``python notebooks/run.py [NAMES] [--write] [--limit SECONDS]``.

Each notebook runs top to bottom in a fresh kernel, in the folder of the notebooks; an error in any cell, or a notebook
over its time limit, fails the run. Without ``--write`` no file changes. Needs ``pip install -e '.[notebooks]'``.

``python notebooks/run.py --student FOLDER [NAMES]`` runs nothing: it writes copies without outputs and without
solutions, for a class.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
LIMIT = 300.0
FOLDED = "jp-MarkdownHeadingCollapsed"  # of the heading "Solutions": JupyterLab folds what follows until asked


def choose(names: list[str]) -> list[Path]:
    """The notebooks whose names begin with one of these, such as ``02`` or ``02_flows``; all where none is given.

    Raises:
        SystemExit: for a name that no notebook begins with.
    """
    everything = sorted(FOLDER.glob("[0-9][0-9]*.ipynb"), key=lambda path: path.stem.split("_")[0])
    chosen = set()
    for name in names:
        found = [path for path in everything if path.name.startswith(Path(name).name)]
        if not found:
            raise SystemExit(f"no notebook begins with {name!r}: there are {', '.join(p.stem for p in everything)}")
        chosen.update(found)
    return [path for path in everything if path in chosen] if names else everything


def execute(path: Path, limit: float) -> Any:
    """The notebook with fresh outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: where a cell raises.
        TimeoutError: past the limit, in seconds for the whole notebook.
    """
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellTimeoutError

    notebook = nbformat.read(path, as_version=4)
    end = time.monotonic() + limit
    client = NotebookClient(notebook, kernel_name="python3", record_timing=False, coalesce_streams=True,
                            extra_arguments=["--log-level=ERROR"],  # else it warns of what sandboxes lack
                            timeout_func=lambda cell: max(1, int(end - time.monotonic())),
                            resources={"metadata": {"path": str(FOLDER)}})
    try:
        client.execute()
    except CellTimeoutError as error:
        raise TimeoutError(f"{path.name} took over {limit:g} s") from error
    return notebook


def strip(notebook: Any) -> None:
    """Leave out what changes from run to run or from machine to machine (times, versions), and shrink the figures."""
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
                         "language_info": {"name": "python"}}
    for cell in notebook.cells:
        cell.metadata = {key: value for key, value in cell.metadata.items() if key in ("tags", FOLDED)}
        for output in cell.get("outputs", []):
            if "metadata" in output:
                output.metadata = {}
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = shrink(output.data["image/png"])


def shrink(png: str, colors: int = 64) -> str:
    """A figure, as PNG in base64, with a palette: lines need few colours."""
    from PIL import Image

    with Image.open(io.BytesIO(base64.b64decode(png))) as picture:
        small, stream = picture.convert("RGB").quantize(colors, dither=Image.Dither.NONE), io.BytesIO()
    small.save(stream, "PNG", optimize=True)
    return base64.b64encode(stream.getvalue()).decode() + "\n"


def find_leaks(notebook: Any) -> list[str]:
    """Lines of output that name a folder of this machine, or the address of an object in memory."""
    places = {str(Path.home()), str(FOLDER.parent), sys.prefix, sys.base_prefix, tempfile.gettempdir()} - {"/", ""}
    pattern = re.compile("|".join([*(re.escape(place + os.sep) for place in sorted(places)), r"\b0x[0-9a-f]{8,}"]))
    texts = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            texts += [output.get("text", ""), data.get("text/plain", ""), data.get("text/html", "")]
    return [line for text in texts for line in text.splitlines() if pattern.search(line)]


def student(path: Path) -> Any:
    """The notebook for a class: up to its solutions, with an empty cell for them, and without outputs."""
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    ends = [k for k, cell in enumerate(notebook.cells)
            if cell.cell_type == "markdown" and cell.source.startswith("## Solutions")]
    notebook.cells = notebook.cells[:ends[0]] if ends else notebook.cells
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    notebook.cells.append(nbformat.v4.new_code_cell("# your solutions", id="yours"))
    return notebook


def write_students(paths: list[Path], folder: Path) -> None:
    """Write the copies for a class into a folder.

    Raises:
        SystemExit: for the folder of the notebooks themselves.
    """
    import nbformat

    if folder.resolve() == FOLDER:
        raise SystemExit("that is the folder of the notebooks themselves, which would lose its solutions: name another")
    folder.mkdir(parents=True, exist_ok=True)
    for path in paths:
        notebook = student(path)
        nbformat.validate(notebook)
        nbformat.write(notebook, folder / path.name)
        print(folder / path.name)


def main(arguments: list[str] | None = None) -> int:
    """Do what the command line asks for; returns 1 where any notebook failed."""
    parser = argparse.ArgumentParser(description="Run the notebooks top to bottom.")
    parser.add_argument("names", nargs="*", help="beginnings of names, such as 02; default: all")
    parser.add_argument("--write", action="store_true", help="save the outputs")
    parser.add_argument("--limit", type=float, default=LIMIT, help=f"seconds for each notebook, default {LIMIT:g}")
    parser.add_argument("--student", type=Path, metavar="FOLDER", help="only write copies without solutions there")
    options = parser.parse_args(arguments)
    if options.student is not None:
        write_students(choose(options.names), options.student)
        return 0
    # the arrays are small: more threads gain nothing, and where cores are shared their barriers cost minutes
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ["INVFLOW_STATIC"] = "1"  # pictures are saved, not sliders
    os.environ.setdefault("PYTHONWARNINGS", "ignore:IProgress not found")  # tqdm, where there are no widgets
    failed = False
    for path in choose(options.names):
        began = time.monotonic()
        try:
            notebook = execute(path, options.limit)
        except Exception as error:  # whatever a cell raises: go on with the next notebook
            print(f"{path.name}: failed\n{error}", file=sys.stderr, flush=True)
            failed = True
            continue
        strip(notebook)
        leaks = find_leaks(notebook)
        if leaks:
            print(f"{path.name}: outputs name this machine:\n" + "\n".join(leaks[:5]), file=sys.stderr, flush=True)
            failed = True
            continue
        if options.write:
            import nbformat

            nbformat.validate(notebook)
            nbformat.write(notebook, path)
        print(f"{path.name}: {time.monotonic() - began:.0f} s", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
