"""``invflow solve``: draw posterior samples for a problem's test images, or for a user's own file."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from invflow.cli.options import PRIOR_HELP, Device, Seed, find_problem, parse_settings, refuse_processes, say

if TYPE_CHECKING:
    from torch import Tensor

    from invflow.cli.image_task import ImageTask
    from invflow.cli.results import Written
    from invflow.posterior import Posterior

__all__ = ["solve"]

SMALL = 64  # longest side in pixels of a file that is treated as a digit if no prior is named


def solve(
    problem: Annotated[str | None, typer.Argument(help="Name of a problem, such as mnist/box-inpainting.")] = None,
    images: Annotated[list[Path] | None, typer.Option(
        "--image", metavar="PATH", help="Your own image file, instead of a problem.")] = None,
    operator: Annotated[str | None, typer.Option(
        help="With --image: name of the operator, see invflow list operators.")] = None,
    operator_setting: Annotated[list[str] | None, typer.Option(
        "--operator-set", metavar="NAME=VALUE",
        help="With --image: setting of the operator, such as std=2; may be repeated.")] = None,
    sigma: Annotated[float | None, typer.Option(
        help="With --image: standard deviation of the noise [default: 0.05; estimated with --observed].")] = None,
    observed: Annotated[bool, typer.Option(
        "--observed", help="With --image: the file is the measurement; do not degrade it.")] = False,
    mask: Annotated[Path | None, typer.Option(
        help="With --image: mask, light (1) where observed and dark (0) elsewhere; an image, .npy or .txt.")] = None,
    mask_hides: Annotated[str | None, typer.Option(
        help="With --image: colour of the mask's hidden pixels, white or black.")] = None,
    kernel: Annotated[Path | None, typer.Option(
        help="With --image: blur kernel; an image, .npy or .txt.")] = None,
    factor: Annotated[int | None, typer.Option(
        min=1, help="With --image: factor of super-resolution [default: 4].")] = None,
    filter_name: Annotated[str | None, typer.Option(
        "--filter", metavar="NAME", help="With --image: filter of super-resolution's downsampling: average, bilinear, "
                                         "bicubic, lanczos or gaussian [default: average; bicubic with --observed].",
    )] = None,
    prior: Annotated[str | None, typer.Option(
        help=f"{PRIOR_HELP[:-2]}; for an image file photos, or mnist if no side exceeds 64 pixels].")] = None,
    resize: Annotated[bool, typer.Option(
        "--resize", help="With --image: crop the centre of the image and scale it to the prior's size.")] = False,
    invert: Annotated[bool, typer.Option(
        "--invert", help="With --image: exchange dark and light, as for ink on paper.")] = False,
    solver: Annotated[str | None, typer.Option(
        help="Name of a solver, see invflow list solvers [default: vfm; fmtt for a reward].")] = None,
    samples: Annotated[int | None, typer.Option(
        min=1, help="Posterior samples for each observation [default: 64; 16 for images over "
                    "128 x 128; 1024 for images of up to 16 values].")] = None,
    observations: Annotated[int | None, typer.Option(
        min=1, help="Number of observations, starting with the first test image [default: 4].")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Number of solver steps [default: the solver's].")] = None,
    setting: Annotated[list[str] | None, typer.Option(
        "--set", metavar="NAME=VALUE", help="Another setting of the solver; may be repeated.")] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    compile_first: Annotated[bool, typer.Option(
        "--compile", help="Compile the networks first (tens of seconds each); on a GPU they then run as CUDA "
                          "graphs.")] = False,
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("invflow-results"),
    write_samples: Annotated[int | None, typer.Option(
        min=0, help="With --image: number of samples written as samples/0.png and so on [default: 4].")] = None,
    keep_posterior: Annotated[bool, typer.Option(
        "--keep-posterior", help="With --image: write posterior.safetensors even if it takes over 1 GB.")] = False,
) -> None:
    """Draw posterior samples for a problem's test images, or for your own file.

    Writes figure.png, posterior.safetensors (read it with invflow.Posterior.load) and metrics.json. For your own file
    it also writes restored.png (posterior mean), std.png (posterior standard deviation) and samples. A prior such as
    photos accepts files of any size; other priors need --resize.
    """
    from invflow.cli.image_task import ImageTask

    refuse_processes("solve", "start it without torchrun; invflow compare and train share their work")
    task: ImageTask | None = None
    if filter_name is not None:
        operator_setting = [*(operator_setting or []), f"filter={filter_name}"]
    own = {"--operator": operator, "--sigma": sigma, "--observed": observed or None, "--mask": mask,
           "--mask-hides": mask_hides,
           "--kernel": kernel, "--factor": factor, "--filter": filter_name, "--resize": resize or None,
           "--invert": invert or None,
           "--operator-set": operator_setting or None, "--write-samples": write_samples,
           "--keep-posterior": keep_posterior or None}
    image = _one(images)
    if image is not None:
        if problem is not None:
            raise ValueError(f"pass a problem ({problem}) or --image, not both")
        if operator is None:
            raise ValueError("--image needs --operator NAME; invflow list operators shows the names")
        if observations is not None:
            raise ValueError("--observations belongs to a problem: an image file is one observation")
        task = ImageTask(image, operator, sigma, observed, mask, kernel, factor, resize, invert,
                         parse_settings(None, operator_setting or [], "--operator-set", "std=2"), mask_hides)
    elif problem is None:
        raise ValueError("pass a problem, such as mnist/box-inpainting, or --image FILE --operator NAME; "
                         "invflow list shows the names")
    elif Path(problem).is_file():
        raise ValueError(f"{problem} is a file, not a problem: pass --image {problem} --operator NAME, or "
                         f"invflow restore {problem}")
    else:
        for option, value in own.items():
            if value is not None:
                raise ValueError(f"{option} belongs to --image; the problem {problem!r} has its own")
    settings = parse_settings(steps, setting or [])
    pictures = 4 if write_samples is None else write_samples
    _solve(problem, task, prior, solver, settings, samples, observations or 4, seed, device, output, pictures,
           keep_posterior, compile_first)


def _solve(problem: str | None, task: ImageTask | None, prior: str | None, solver_name: str | None,
           settings: dict[str, Any], samples: int | None, observations: int, seed: int, device: str, output: Path,
           pictures: int, keep: bool, compile_first: bool) -> None:
    import torch

    from invflow._core.files import check_writable
    from invflow.cli.image_task import compile_solver
    from invflow.cli.options import check_device
    from invflow.cli.results import write_results, write_tilted_results
    from invflow.evaluation.summary import format_table, summarise, summarise_tilted
    from invflow.registry import solver_by_name
    from invflow.reward import RepeatedReward

    truth: Tensor | None
    likelihood: Any
    place, posed, own = check_device(device), None, None
    generator = torch.Generator().manual_seed(seed)
    if task is None:
        assert problem is not None
        posed = find_problem(problem)
        solver_name = solver_name or posed.usual_solver
        posed = posed if prior is None else posed.with_prior(prior)
        solver = solver_by_name(solver_name, posed, **settings)
        truth, likelihood = posed.simulate(observations, generator=generator, shuffle=False)
        what = problem
    else:
        solver_name = solver_name or "vfm"
        solver = solver_by_name(solver_name, prior or _usual_prior(task, solver_name), **settings)
        own = task.pose(solver, generator, say)
        solver, truth, likelihood = own.solver, own.truth, own.likelihood
        what = f"{task.file.name}, {task.operator}"
    solver.to(place)
    if compile_first:
        compile_solver(solver)
    likelihood = likelihood.to(place)
    if samples is None:
        shape = likelihood.operator.image_shape if own is not None else ()
        samples = 16 if math.prod(shape[1:]) > 128**2 else 64
        if posed is not None and math.prod(posed.image_shape) <= 16:
            samples = 1024  # a sample has only a few values, so samples are cheap
    check_writable(output)
    posterior = solver.sample(likelihood, samples, generator=generator, progress=True)
    if own is not None:
        posterior, likelihood = own.finish(posterior), own.shown.to(place)
    posterior.settings |= {
        "problem": what, "solver_name": solver_name, "seed": seed, "device": str(place),
    }
    if posed is not None and isinstance(likelihood, RepeatedReward):
        with _kept(posterior, output):
            summary = summarise_tilted(posterior, likelihood, posed.quantities, posed.expectations)
        typer.echo(f"{what}, {solver_name}\n\n{format_table(summary)}\n")
        _tell(write_tilted_results(output, posterior, posed, likelihood, summary,
                                   _title(what, solver_name, posterior), generator))
        return
    posterior.settings |= {"operator": repr(likelihood.operator), "sigma": likelihood.sigma.tolist()}
    with _kept(posterior, output):
        summary = summarise(posterior, likelihood, truth, progress=True)
    typer.echo(f"{what}, {solver_name}, sigma {_levels(likelihood.sigma.tolist())}\n")
    typer.echo(format_table(summary) + "\n")
    _tell(write_results(output, posterior, likelihood, truth, summary, _title(what, solver_name, posterior),
                        pictures=None if own is None else pictures, keep=keep or own is None, say=say))


def _one(images: list[Path] | None) -> Path | None:
    """The single image that was passed, if any."""
    several = images is not None and len(images) > 1
    if images and (several or images[0].is_dir()):
        what = f"--image was passed {len(images)} times" if several else f"--image {images[0]} is a folder"
        raise ValueError(f"{what}, but solve takes one file; invflow restore takes a folder")
    return images[0] if images else None


def _usual_prior(task: ImageTask, solver_name: str) -> str:
    """The default prior for a file: photographs, unless the file is as small as a digit or will be resized to it."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(task.file) as image:
            side = max(image.size) if _is_grey(image) or task.resize else SMALL + 1
    except (OSError, UnidentifiedImageError, ValueError):  # not an image: reading it will raise the error
        return "mnist"
    # the linear estimate needs weights for one image size, and they are shipped only for digits
    prior = "mnist" if task.resize or side <= SMALL or solver_name == "lmmse" else "photos"
    say(f"no --prior given: using {prior!r}")
    return prior


def _is_grey(image: Any) -> bool:
    """Whether an open image file has no colour, like a digit."""
    if max(image.size) > SMALL or image.mode in ("1", "L", "LA", "I", "F", "I;16"):
        return True  # not needed for a large file
    red, green, blue = image.convert("RGB").split()
    return bool(red.tobytes() == green.tobytes() == blue.tobytes())


def _title(what: str, solver_name: str, posterior: Posterior) -> str:
    calls = posterior.nfe
    if calls.forward == 0 and calls.backward == 0:
        cost = "no network calls"
    else:
        cost = f"{calls.forward:.3g} network calls per sample"
        cost += f" and {calls.backward:.3g} backward" if calls.backward else ""
    return f"{what}: {solver_name}, {cost}"


def _levels(sigma: list[float]) -> str:
    low, high = min(sigma), max(sigma)
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"


@contextmanager
def _kept(posterior: Posterior, folder: Path) -> Iterator[None]:
    """Write the posterior before an error is passed on."""
    try:
        yield
    except BaseException:
        posterior.save(folder / "posterior.safetensors")
        say(f"wrote {folder / 'posterior.safetensors'}")
        raise


def _tell(written: Written) -> None:
    """Print the files that were written, and raise an error that names those that were not."""
    if written.files:
        typer.echo("wrote " + ", ".join(map(str, written.files)))
    written.check()
