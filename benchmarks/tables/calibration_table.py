"""Certificates of all kinds of solvers: ``python -m benchmarks.tables.calibration_table OUTPUT``, by simulation.

Truths are drawn from each solver's own prior, so that an exact solver passes (:func:`invflow.calibrate`). Three parts:

``mixtures``: Gaussian mixtures in 2, 8 and 80 dimensions, 200 simulations, 99 ranks. The closed form and NoiseSMC pass;
DPS with its default and DDRM are rejected.

``digits``: NoiseSMC on MNIST averaged to 14 x 14 pixels (:mod:`invflow_problems.small_digits`), 100 simulations.

``vfm``: the shipped VFM in one step and in four, on the six problems of MNIST, 200 simulations, 99 ranks.

Every certificate has its own folder and grows by chunks of simulations, so the same command resumes a killed run.
``table.md`` and ``table.csv`` are written after each certificate.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import invflow
from benchmarks.tables.shared import head, line, parser, plus_minus, write_rows
from invflow.evaluation.calibrate import Certificate
from invflow.models.mixture import GaussianMixtureFlow
from invflow.plugins import write_text
from invflow.problem import Problem
from invflow.registry import solver_by_name
from invflow.solver import Solver
from invflow_problems import images, small_digits
from invflow_problems.gaussian import gaussian_linear
from invflow_problems.mixture25 import mixture25_8_1, mixture25_80_2

__all__ = ["CASES", "Case", "format_markdown", "main", "run", "summary"]

#: number of steps of a mixture's jump for NoiseSMC, each with six velocities. With few steps, the jump is another map,
#: which has its own posterior
JUMP_STEPS = 4
#: many temperatures with few moves: the weights vary less than for few temperatures with many moves
MIXTURE_SMC: dict[str, Any] = {"num_moves": 6, "ess_threshold": 0.9, "max_temperatures": 200,
                               "chunk_size": 1 << 13}
#: one Hamiltonian move of ten steps at each temperature: with equal calls, Langevin moves leave particles more alike
DIGITS_SMC: dict[str, Any] = {"moves": "hamiltonian", "num_moves": 1, "ess_threshold": 0.8, "max_temperatures": 200,
                              "chunk_size": 1 << 11}
FIELDS = ("part", "problem", "solver", "simulations", "ranks", "particles", "verdict", "rejected", "checks", "worst",
          "least_p", "coverage", "coverage_error", "spread_skill", "spread_skill_error", "forward", "backward")


@dataclass(frozen=True)
class Case:
    """One certificate.

    Attributes:
        part: Part of the table.
        problem: Name of the problem.
        solver: Name of the solver in the table.
        build: Function that builds the solver for the problem.
        simulations: Number of truths.
        ranks: Number of samples that each truth is ranked among.
        particles: Number of particles from which these samples are resampled; None: the same number.
    """

    part: str
    problem: Problem
    solver: str
    build: Callable[[Problem], Solver]
    simulations: int = 200
    ranks: int = 99
    particles: int | None = None

    @property
    def title(self) -> str:
        """Problem and solver, as used by ``--only``."""
        return f"{self.problem.name} {self.solver}"


def _jumping(problem: Problem) -> Solver:
    """NoiseSMC with the mixture's flow map in few steps, which is a map with its own posterior."""
    mixture = problem.prior
    assert isinstance(mixture, GaussianMixtureFlow)
    prior = GaussianMixtureFlow(mixture.means, std=mixture.std, weights=mixture.weights, steps=JUMP_STEPS)
    return invflow.NoiseSMC(prior, **MIXTURE_SMC)


def _diffusion(name: str, half_width: float) -> Callable[[Problem], Solver]:
    """A sampler for images in [0, 1], with the range of the data; all other settings have their defaults."""
    return lambda problem: solver_by_name(name, problem, value_range=(-half_width, half_width), chunk_size=1 << 11)


def _named(name: str, **settings: Any) -> Callable[[Problem], Solver]:
    return lambda problem: solver_by_name(name, problem, **settings)


def _mixture_cases(problem: Problem, half_width: float) -> list[Case]:
    return [
        Case("mixtures", problem, "ExactPosterior", lambda p: p.exact_posterior()),
        Case("mixtures", problem, "NoiseSMC", _jumping, particles=990),
        Case("mixtures", problem, "DPS", _diffusion("dps", half_width)),
        Case("mixtures", problem, "DDRM", _diffusion("ddrm", half_width)),
    ]


CASES: tuple[Case, ...] = (
    *_mixture_cases(gaussian_linear, 4.0), *_mixture_cases(mixture25_8_1, 20.0), *_mixture_cases(mixture25_80_2, 20.0),
    *(Case("digits", problem, "NoiseSMC", _named("noise-smc", **DIGITS_SMC), simulations=100, ranks=19, particles=190)
      for problem in (small_digits.mnist_14_denoising, small_digits.mnist_14_super_resolution,
                      small_digits.mnist_14_box_inpainting)),
    *(Case("vfm", problem, f"VFM, {steps} step{'s' * (steps > 1)}", _named("vfm", steps=steps))
      for problem in (images.mnist_denoising, images.mnist_random_inpainting, images.mnist_box_inpainting,
                      images.mnist_super_resolution, images.mnist_gaussian_blur, images.mnist_motion_blur)
      for steps in (1, 4)),
)


def run(case: Case, output: Path, *, simulations: int | None = None, ranks: int | None = None,
        seed: int = 0) -> Certificate:
    """Make one certificate, or resume it.

    Args:
        case: What to calibrate.
        output: Folder of the table; the certificate is in a subfolder.
        simulations: Number of simulations, instead of the case's own.
        ranks: Number of ranks, instead of the case's own; the number of particles is scaled in proportion.
        seed: Random seed.

    Returns:
        The certificate.
    """
    count = ranks or case.ranks
    particles = count * ((case.particles or case.ranks) // case.ranks)
    solver = case.build(case.problem)
    folder = output / case.title.replace("/", "-").replace(",", "").replace(" ", "-").lower()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # they concern single observations; the ranks test all of them
        return invflow.calibrate(solver, case.problem, num_simulations=simulations or case.simulations,
                                 num_samples=count, num_particles=particles, output=folder,
                                 generator=torch.Generator().manual_seed(seed))


def summary(case: Case, certificate: Certificate) -> dict[str, Any]:
    """A row of the table, one value for each of :data:`FIELDS`; calls are per particle."""
    checks = certificate.judgement.checks
    worst = min(checks, key=lambda check: (check.p_adjusted, check.p_value))
    coverage, error = certificate.coverage[0.9]
    j = certificate.judgement
    return {
        "part": case.part, "problem": case.problem.name, "solver": case.solver, "rejected":
        sum(not check.passed for check in checks), "checks": len(checks), "verdict": certificate.verdict,
        "simulations": certificate.num_simulations, "ranks": certificate.num_samples,
        "particles": certificate.num_particles, "worst": f"{worst.name}: {worst.reading}" if worst.reading else "",
        "least_p": worst.p_adjusted, "coverage": coverage, "coverage_error": error, "spread_skill": j.spread_skill,
        "spread_skill_error": j.spread_skill_error,
        **{key: value / certificate.num_particles for key, value in certificate.calls.items()},
    }


def format_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table as markdown."""
    lines = [head("problem", "solver", "simulations x ranks (particles)", "verdict", "checks that reject",
                  "least corrected p", "90% intervals cover", "spread / skill", "calls a particle, forward + backward")]
    for r in rows:
        worst = f" ({r['worst']})".replace("|", "\\|") if r["worst"] else ""
        p = f"{r['least_p']:.3f}" if r["least_p"] >= 1e-3 else "< 0.001"
        lines.append(line(
            r["problem"], r["solver"], f"{r['simulations']} x {r['ranks']} ({r['particles']})", r["verdict"],
            f"{r['rejected']} of {r['checks']}{worst}", p, f"{r['coverage']:.1%} ± {r['coverage_error']:.1%}",
            plus_minus(r["spread_skill"], r["spread_skill_error"], 3), f"{r['forward']:.4g} + {r['backward']:.4g}"))
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None, say: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Make all requested certificates, and print their table."""
    command = parser("calibration_table", __doc__, seed=0, threads=1)
    command.add_argument("output", type=Path, help="folder of the certificates, table.md and table.csv")
    parts = list(dict.fromkeys(case.part for case in CASES))
    command.add_argument("--parts", nargs="+", choices=parts, default=parts)
    command.add_argument("--only", nargs="+", metavar="TEXT",
                        help="certificates whose problem and solver contain one of these, such as 'DPS'")
    command.add_argument("--simulations", type=int, help="number of simulations, instead of each certificate's own")
    command.add_argument("--ranks", type=int, help="number of ranks; the number of particles is scaled in proportion")
    options = command.parse_args(arguments)
    torch.set_num_threads(options.threads)
    chosen = [case for case in CASES if case.part in options.parts
              and (options.only is None or any(text in case.title for text in options.only))]
    if not chosen:
        command.error(f"no certificate contains {options.only}: they are " + "; ".join(case.title for case in CASES))
    rows: list[dict[str, Any]] = []
    for case in chosen:
        certificate = run(case, options.output, simulations=options.simulations, ranks=options.ranks,
                          seed=options.seed)
        say(certificate.sentence)
        rows.append(summary(case, certificate))
        write_text(options.output / "table.md", format_markdown(rows))
        write_rows(options.output / "table.csv", rows, FIELDS)
    say("\n" + format_markdown(rows))
    return rows


if __name__ == "__main__":
    main()
