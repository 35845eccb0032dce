"""Named suites: problems with known exact posteriors, and the solvers that are compared on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from invflow.problem import Problem
    from invflow.solver import Solver

__all__ = ["SUITES", "Suite", "find_suite"]


@dataclass(frozen=True)
class Suite:
    """A fixed comparison for ``invflow compare --suite``.

    Attributes:
        description: Description in one line.
        problems: Names of the problems.
        solvers: Solvers as on the command line, ``[label=]name[:setting=value,...]``.
        observations: Number of observations of each problem.
        samples: Number of samples for each observation.
        part_size: Number of observations per part. A killed run loses at most its current part, and shards consist of
            whole parts.
    """

    description: str
    problems: tuple[str, ...]
    solvers: tuple[str, ...]
    observations: int
    samples: int
    part_size: int = 8
    #: labels of solvers that are left out of a problem because its flow map is too expensive for them
    skips: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def solver(self, label: str, build: Callable[[Problem], Solver]) -> Callable[[Problem], Solver]:
        """A builder for a solver; it raises an error for the problems from which the solver is left out."""

        def chosen(problem: Problem) -> Solver:
            if label in self.skips.get(problem.name, ()):
                raise ValueError("left out of this suite: it jumps through the flow map at each step, which takes "
                                 "too long on this problem")
            return build(problem)

        return chosen


#: about a hundred calls per sample where a setting determines the number; some solvers choose it themselves
_SOLVERS = (
    "exact", "noise-smc", "smc-from-rto=noise-smc:start=rto", "noise-rto", "fmtt",
    "fmtt-denoiser=fmtt:look_ahead=denoiser", "tds",
    "noise-langevin=noise-langevin:steps=100",
    "d-flow-sgld=noise-langevin:preconditioner=rmsprop,step_size=0.01,steps=100",
    "daps=daps:steps=20,sigma_max=20,step_size=0.001", "flow-dps=flow-dps:step_size=1", "dpnp=dpnp:iterations=20",
    "pnp-flow=pnp-flow:steps=20", "flower", "diamond", "d-flow",
)

#: solvers that jump from noise to data, or look ahead with the map, at each of many steps
_JUMPING = ("noise-smc", "smc-from-rto", "noise-rto", "fmtt", "noise-langevin", "d-flow-sgld", "diamond")

SUITES = {
    "quick": Suite("six exact problems in ten minutes on two CPU cores",
                   ("gaussian/linear", "mixture/25-8-1", "curved/banana", "curved/funnel", "bipsda/inpainting",
                    "atoms/mnist-super-resolution"),
                   tuple(s for s in _SOLVERS if not s.startswith(("smc-from-rto", "d-flow"))), 8, 64, 4,
                   {"atoms/mnist-super-resolution": _JUMPING, "bipsda/inpainting": ("diamond",)}),
    "full": Suite("all families of exact problems, meant for a night on two CPU cores",
                  ("gaussian/linear", "mixture/25-8-1", "mixture/25-80-2", "curved/banana", "curved/funnel",
                   "bipsda/inpainting", "bipsda/x-ray", "bipsda/phase-retrieval", "atoms/mnist-super-resolution",
                   "atoms/mnist-box-inpainting", "levy/gauss-convolution", "levy/gauss-fourier"),
                  _SOLVERS, 16, 128, 4,
                  {name: _JUMPING for name in ("atoms/mnist-super-resolution", "atoms/mnist-box-inpainting")}),
}


def find_suite(name: str) -> Suite:
    """Find a suite by its name.

    Raises:
        ValueError: If the name is unknown; the message lists all names.
    """
    if name not in SUITES:
        raise ValueError(f"there is no suite {name!r}: " + "; ".join(
            f"{known}, {suite.description}" for known, suite in SUITES.items()))
    return SUITES[name]
