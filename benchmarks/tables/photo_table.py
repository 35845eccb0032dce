"""The table of photographs: ``python -m benchmarks.tables.photo_table OUTPUT`` compares the VFM with classical methods.

The photographs are held-out ones and scikit-image's; none was used for training. The table has PSNR and SSIM of the
posterior mean, CRPS (for a single image, its mean absolute error), coverage of 90% intervals (for solvers that have
intervals; they need 19 samples), and seconds. It has means over photographs with standard errors, and the paired
differences of the VFM from each other solver. Every cell is a file, so a stopped run can be resumed. The output also
has sheets of windows at full resolution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.tables.photo_parts import (
    SOLVERS,
    TASKS,
    Picture,
    build,
    cell_path,
    held_out,
    observe,
    run_cell,
    scikit_image,
    window,
)
from benchmarks.tables.shared import cell, head, line, mean_and_error, parser, plus_minus
from invflow.plugins import write_atomically, write_text
from invflow.solver import Solver

__all__ = ["difference", "main", "markdown", "run", "sheet"]

MAIN_TASKS = tuple(TASKS)[:6]
#: columns: title, decimals
COLUMNS = {"psnr": ("PSNR", 2), "ssim": ("SSIM", 3), "crps": ("CRPS", 4), "coverage": ("90% coverage", 3),
           "seconds": ("seconds", 1)}
Cells = dict[tuple[str, str, str], dict[str, Any]]


def difference(cells: Cells, task: str, first: str, second: str, column: str) -> tuple[float, float] | None:
    """Mean and standard error of first minus second, over photographs that both have; None if there are none."""
    pairs = [(cells[name, task, first][column], cells[name, task, second][column]) for name, t, s in cells
             if t == task and s == first and column in cells[name, task, first]
             and column in cells.get((name, task, second), {})]
    return mean_and_error([a - b for a, b in pairs]) if pairs else None


def run(output: Path, pictures: Sequence[Picture], tasks: Sequence[str], solvers: Sequence[str], *, samples: int,
        seed: int, vfm: str = "photos", prior: str = "photos", say: Callable[[str], None] = print) -> Cells:
    """All cells, by picture, task and solver.

    Args:
        output: Folder of the cells; existing ones are not computed again.
        pictures: Truths.
        tasks: Some of :data:`benchmarks.tables.photo_parts.TASKS`.
        solvers: Some of :data:`benchmarks.tables.photo_parts.SOLVERS`; one that cannot be built is skipped.
        samples: Samples of each posterior.
        seed: Random seed of observations and solvers.
        vfm, prior: Names or folders of the VFM and of the prior whose denoiser plug-and-play uses.
        say: Function called with a message for each cell, and for each skipped solver.
    """
    cells: Cells = {}
    for name in solvers:
        try:
            solver: Solver = build(name, vfm, prior)
        except (ImportError, ValueError) as error:
            say(f"{name} is skipped: {' '.join(str(error).split())}")
            continue
        setup = {"seed": seed, "samples": samples, "solver": solver.settings(), "content": solver.fingerprint()}
        for task in tasks:
            for picture in pictures:
                found = run_cell(output, picture, task, name, lambda solver=solver: solver, setup)  # type: ignore[misc]
                if "failure" in found:
                    if picture is pictures[0]:
                        say(f"{task}, {name}: {found['failure']}")
                    continue
                say(f"{picture.name}, {task}, {name}: PSNR {found['psnr']:.2f}, {found['seconds']:.1f} s")
                cells[picture.name, task, name] = found
    return cells


def markdown(cells: Cells, tasks: Sequence[str], solvers: Sequence[str], first: str = "vfm") -> str:
    """Two tables: means with standard errors, and differences of the first solver, if present, from the others."""
    lines = [head("problem", "solver", *(title for title, _ in COLUMNS.values()), "photographs")]
    for task in tasks:
        for solver in solvers:
            own = [found for (_, t, s), found in cells.items() if t == task and s == solver]
            if own:
                shown = [cell([c[key] for c in own if key in c], decimals) for key, (_, decimals) in COLUMNS.items()]
                lines.append(line(task, solver, *shown, len(own)))
    others = [s for s in solvers if s != first and any(key[2] == s for key in cells)]
    if any(key[2] == first for key in cells) and others:
        lines += ["", f"Differences, {first} minus the other, paired over photographs:", "",
                  head("problem", "other", "PSNR", "SSIM", "CRPS")]
        for task in tasks:
            for other in others:
                found = [difference(cells, task, first, other, key) for key in ("psnr", "ssim", "crps")]
                if any(found):
                    shown = ["" if f is None else plus_minus(*f, d, "+") for f, d in zip(found, (2, 3, 4), strict=True)]
                    lines.append(line(task, other, *shown))
    return "\n".join(lines) + "\n"


# -- pictures --------------------------------------------------------------------------------------------------------


def sheet(output: Path, pictures: Sequence[Picture], task: str, solvers: Sequence[str], seed: int) -> Path | None:
    """Draw windows of truth, observation and each solver's mean, at full resolution, one row per photograph.

    For a posterior, a sample is included. The file is ``sheet-TASK.png``.

    Returns:
        The file, or None if no cell has an image.
    """
    from PIL import Image, ImageDraw

    columns = ["truth", "observation"]
    for solver in solvers:
        for ending, title in (("", solver), ("__sample", f"{solver}, sample")):
            if any(_file(output, picture, task, solver, ending).is_file() for picture in pictures):
                columns.append(title)
    if len(columns) == 2:
        return None
    rows: list[list[Image.Image | None]] = []
    for picture in pictures:
        shown = window(picture)
        likelihood = observe(picture, task, seed)
        looks = likelihood.operator.embed(likelihood.y)[0]
        row: list[Image.Image | None] = [_image(picture.image[:, shown[0], shown[1]]),
                                         _image(looks[:, shown[0], shown[1]])]
        for title in columns[2:]:
            solver, _, sample = title.partition(", ")
            file = _file(output, picture, task, solver, "__sample" if sample else "")
            row.append(Image.open(file).convert("RGB") if file.is_file() else None)
        rows.append(row)
    side, gap, head = max(image.height for row in rows for image in row if image), 4, 16
    canvas = Image.new("RGB", (len(columns) * (side + gap) - gap, head + len(rows) * (side + gap) - gap), "white")
    pen = ImageDraw.Draw(canvas)
    for j, title in enumerate(columns):
        pen.text((j * (side + gap) + 2, 2), title, fill="black")
        for i, row in enumerate(rows):
            image = row[j]
            if image is not None:
                canvas.paste(image, (j * (side + gap), head + i * (side + gap)))
    path = output / f"sheet-{task}.png"
    write_atomically(path, lambda name: canvas.save(name, format="PNG"))
    return path


def _file(output: Path, picture: Picture, task: str, solver: str, ending: str) -> Path:
    path = cell_path(output, picture.name, task, solver)
    return path.with_name(f"{path.name}{ending}.png")


def _image(image: Tensor) -> Any:
    from PIL import Image

    return Image.fromarray((image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    command = parser("photo_table", __doc__, seed=0)
    command.add_argument("output", type=Path, help="folder for the results; an unfinished one is resumed")
    command.add_argument("--images", type=Path, nargs="+", default=[], help="folders with the held-out photographs, or "
                        "with your own; default: the crops that come with the problems")
    command.add_argument("--sets", nargs="+", choices=["held-out", "scikit-image"],
                         default=["held-out", "scikit-image"])
    command.add_argument("--solvers", nargs="+", choices=SOLVERS, default=list(SOLVERS))
    command.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(MAIN_TASKS))
    command.add_argument("--max-side", type=int, default=512,
                         help="longer side in pixels to which larger photographs are scaled down; 0: never")
    command.add_argument("--samples", type=int, default=20, help="samples of each posterior; 90%% intervals need 19")
    command.add_argument("--vfm", default="photos", help="name or folder of the VFM")
    command.add_argument("--prior", default="photos", help="name or folder of the prior for plug-and-play")
    options = command.parse_args(arguments)
    side = options.max_side or None
    pictures = held_out(options.images, side) if "held-out" in options.sets else []
    pictures += scikit_image(side) if "scikit-image" in options.sets else []
    if not pictures:
        command.error("there are no photographs: add held-out to --sets, or install scikit-image")
    (options.output / "cells").mkdir(parents=True, exist_ok=True)
    cells = run(options.output, pictures, options.tasks, options.solvers, samples=options.samples, seed=options.seed,
                vfm=options.vfm, prior=options.prior, say=lambda text: print(text, flush=True))
    table = markdown(cells, options.tasks, options.solvers)
    write_text(options.output / "table.md", table)
    for task in options.tasks:
        sheet(options.output, pictures, task, options.solvers, options.seed)
    print("\n" + table)


if __name__ == "__main__":
    main()
