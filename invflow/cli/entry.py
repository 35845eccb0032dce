"""The command line: registers all commands and defines ``invflow train`` and ``invflow bench``."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from invflow.cli.app import app as serve_app
from invflow.cli.calibrate import calibrate
from invflow.cli.compare import compare
from invflow.cli.examples import examples
from invflow.cli.listing import list_names
from invflow.cli.new import new
from invflow.cli.options import MOST_SEED, Seed, parse_settings, say, user_errors
from invflow.cli.restore import restore
from invflow.cli.solve import solve
from invflow.cli.streams import keep_streams

__all__ = ["app", "main"]


class _Commands(TyperGroup):
    """Group of commands. For a misspelt command or a synonym, the error suggests the right one and lists all."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command named by the first word."""
        word = args[0] if args else ""
        if word and not word.startswith("-") and self.get_command(ctx, word) is None:
            near = "restore" if Path(word).suffix or word in _RESTORES else next(iter(
                difflib.get_close_matches(word, list(self.commands), n=1)), None)
            hint = f": did you mean invflow {near}?" if near else "."
            ctx.fail(f"There is no command {word!r}{hint} There are {', '.join(self.commands)}.")
        return super().resolve_command(ctx, args)


#: other words that users try for restore
_RESTORES = ("denoise", "deblur", "inpaint", "upscale", "enlarge", "superresolution", "sr", "sharpen", "fix", "repair")

app = typer.Typer(
    name="invflow", cls=_Commands, help="Posterior sampling for imaging inverse problems with flow-map priors.",
    epilog="First try: invflow solve mnist/box-inpainting. For photographs, run invflow examples, then a command that "
           "it prints.",
    no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from invflow._core.version import VERSION

        typer.echo(f"invflow {VERSION}")
        raise typer.Exit


@app.callback()
def options(version: Annotated[bool, typer.Option(
        "--version", callback=_print_version, is_eager=True, help="Print the version.")] = False) -> None:
    """Posterior sampling for imaging inverse problems with flow-map priors."""


app.command(short_help="Draw posterior samples for a problem or your own image.")(user_errors(solve))
app.command(short_help="Restore a picture or a folder of pictures.")(user_errors(restore))
app.command(short_help="Compare solvers on the same observations.")(user_errors(compare))
app.command(short_help="Test by simulation whether a solver is calibrated.")(user_errors(calibrate))
app.command("list", short_help="List priors, operators, problems, solvers and trainings.")(user_errors(list_names))
app.command(short_help="Write sample files to try the commands on.")(user_errors(examples))


@app.command(short_help="Train a prior or a VFM, also on your own images.")
@user_errors
def train(
    name: Annotated[str, typer.Argument(help="Name of a training, such as mnist-vfm; see invflow list trainings.")],
    output: Annotated[Path | None, typer.Option(
        help="Folder for checkpoint and result; an interrupted run resumes from it [default: runs/NAME].")] = None,
    data: Annotated[str | None, typer.Option(
        help="Folder of the data set, or the name of a data set to download.")] = None,
    prior: Annotated[str | None, typer.Option(
        help="Prior to start from, if the training needs one: name, folder, or folder of its training.")] = None,
    size: Annotated[int | None, typer.Option(
        min=8, help="For train prior: side length to which images are cropped and scaled [default: 32].")] = None,
    operators: Annotated[list[str] | None, typer.Option(
        metavar="NAME,NAME:SETTING=VALUE",
        help="For train vfm: operators to train for [default: seven kinds].")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Number of optimiser steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Number of images per step.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=MOST_SEED, help="Random seed.")] = None,
    precision: Annotated[str | None, typer.Option(help="Mixed precision: no, bf16 or fp16.")] = None,
    setting: Annotated[list[str] | None, typer.Option(
        "--set", metavar="NAME=VALUE", help="Another setting of the training loop; may be repeated.")] = None,
) -> None:
    """Train a prior or a VFM on a folder of your own images, or run one of the built-in trainings.

    A VFM (Variational Flow Map) is a prior with an adapter, and draws a posterior sample in one step.

    Three commands lead from a folder of images to one-step posterior samples: train prior --data FOLDER, then train
    vfm --prior runs/prior --data FOLDER, then restore FILE --prior runs/vfm. If you have another prior, first distil it
    into a one-step map: train distil --prior NAME.

    Ctrl-C saves the run; the same command resumes it. For two processes, on two GPUs or on the CPU:
    torchrun --nproc_per_node 2 -m invflow train NAME.
    """
    from invflow.training.recipe import load_recipe

    given = {"steps": steps, "batch_size": batch_size, "seed": seed, "precision": precision}
    changes: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    changes |= parse_settings(None, setting or [])
    folder = Path("runs") / name if output is None else output
    named = [part.strip() for text in operators or [] for part in text.split(",") if part.strip()]
    try:
        load_recipe(name)(folder, data=data, prior=prior, size=size, operators=named, say=say, **changes)
    except KeyboardInterrupt as stop:  # its message says what was saved and how to resume
        typer.echo(str(stop) or f"stopped; nothing was saved in {folder} yet", err=True)
        raise typer.Exit(130) from stop
    if os.environ.get("RANK", "0") == "0":  # only one of several processes prints
        typer.echo(f"wrote {folder}")


@app.command(short_help="Measure speed relative to a reference.")
@user_errors
def bench(
    repeats: Annotated[int, typer.Option(min=1, help="Number of timings; the median is reported.")] = 20,
    device: Annotated[str, typer.Option(help="Device.")] = "cpu",
    only: Annotated[list[str] | None, typer.Option(help="Run only this benchmark; may be repeated.")] = None,
    seed: Seed = 0,
) -> None:
    """Measure speed relative to a reference timed in the same run; the exit code is 1 if a limit is exceeded."""
    from invflow.bench.runner import format_results, run
    from invflow.cli.options import check_device

    results = run(repeats=repeats, device=str(check_device(device)), only=only or None, seed=seed)
    typer.echo(format_results(results, device))
    if not all(result.passed for result in results):
        raise typer.Exit(1)


app.command("app", short_help="Serve the app: paint, restore, compare, in a browser.")(user_errors(serve_app))
app.command(short_help="Write a plug-in package, ready to install.")(user_errors(new))


def main() -> None:
    """Run the command line."""
    keep_streams()
    app()


if __name__ == "__main__":
    main()
