"""``invflow calibrate``: compute a certificate from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from invflow.cli.options import PRIOR_HELP, Device, Seed, find_problem

__all__ = ["calibrate"]


def calibrate(
    problem: Annotated[str, typer.Argument(help="Name of a problem, such as mnist/denoising.")],
    solver: Annotated[str, typer.Option(help="Name of a solver, see invflow list solvers.")] = "vfm",
    simulations: Annotated[int, typer.Option(min=2, help="Number of simulated truths and measurements.")] = 200,
    samples: Annotated[int, typer.Option(min=3, help="Posterior samples to rank each truth among.")] = 99,
    particles: Annotated[int | None, typer.Option(
        min=3, help="Weighted samples (particles) to resample these from [default: ten times as many for "
                    "solvers with weights].")] = None,
    source: Annotated[str, typer.Option(
        help="Source of the truths: prior (tests the solver) or data (tests the solver and the prior).")] = "prior",
    split: Annotated[str, typer.Option(help="With --source data: split of the images, test or validation.")] = "test",
    setting: Annotated[list[str] | None, typer.Option(
        "--set", metavar="NAME=VALUE", help="Setting of the solver; may be repeated.")] = None,
    prior: Annotated[str | None, typer.Option(help=PRIOR_HELP)] = None,
    chunk_size: Annotated[int | None, typer.Option(min=1, help="Measurements per call of the solver.")] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    output: Annotated[Path, typer.Option(
        help="Folder for the results; an interrupted run resumes from it.")] = Path("invflow-calibration"),
) -> None:
    """Test by simulation whether a solver's posteriors are calibrated.

    Writes a certificate, a report with a verdict: certificate.json and simulations.safetensors (read them
    with invflow.Certificate.load), certificate.md and figure.png. After Ctrl-C, the same command resumes the run.
    """
    import torch

    from invflow._core.files import write_atomically, write_text
    from invflow.cli.options import check_device, parse_settings, refuse_processes
    from invflow.evaluation.calibrate import calibrate as run
    from invflow.registry import solver_by_name

    refuse_processes("calibrate", "start it without torchrun; invflow compare and train share their work")
    place, posed = check_device(device), find_problem(problem)
    posed = posed if prior is None else posed.with_prior(prior)
    settings: dict[str, Any] = parse_settings(None, setting or [])
    built = solver_by_name(solver, posed, **settings)
    built.to(place)
    certificate = run(built, posed, num_simulations=simulations, num_samples=samples, num_particles=particles,
                      source=source, split=split, chunk_size=chunk_size, output=output,
                      generator=torch.Generator().manual_seed(seed), progress=True)
    figure = certificate.plot()
    write_text(output / "certificate.md", certificate.to_markdown())
    write_atomically(output / "figure.png", lambda name: figure.savefig(name, format="png"))
    typer.echo(str(certificate))
    names = ("certificate.json", "simulations.safetensors", "certificate.md", "figure.png")
    typer.echo("\nwrote " + ", ".join(str(output / name) for name in names))
