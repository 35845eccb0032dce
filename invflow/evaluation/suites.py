"""Named suites: problems whose exact posterior is known, and the solvers that are compared on them."""

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
    """What ``invflow compare --suite`` runs.

    Attributes:
        description: one line.
        problems: their names.
        solvers: as the command line takes them, ``[label=]name[:setting=value,...]``.
        observations: of each problem.
        samples: for each observation.
        part_size: observations that a solver gets at a time: what a killed run loses, and what a shard gets.
    """

    description: str
    problems: tuple[str, ...]
    solvers: tuple[str, ...]
    observations: int
    samples: int
    part_size: int = 8
    #: labels of solvers that are left out of a problem, whose flow map is too dear for them
    skips: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def solver(self, label: str, build: Callable[[Problem], Solver]) -> Callable[[Problem], Solver]:
        """What builds a solver, but for the problems that it is left out of, where it says so."""

        def chosen(problem: Problem) -> Solver:
            if label in self.skips.get(problem.name, ()):
                raise ValueError("left out of this suite: it jumps through the flow map at each step, which takes "
                                 "hours on this problem")
            return build(problem)

        return chosen


#: about a hundred calls a sample where a setting decides it, but for the solvers that choose their own number
_SOLVERS = (
    "exact", "noise-smc", "smc-from-rto=noise-smc:start=rto", "noise-rto", "fmtt",
    "fmtt-denoiser=fmtt:look_ahead=denoiser", "tds",
    "noise-langevin=noise-langevin:steps=100",
    "d-flow-sgld=noise-langevin:preconditioner=rmsprop,step_size=0.01,steps=100",
    "daps=daps:steps=20,sigma_max=20,step_size=0.001", "flow-dps=flow-dps:step_size=1", "dpnp=dpnp:iterations=20",
    "pnp-flow=pnp-flow:steps=20", "flower", "d-flow",
)

#: the solvers that jump from noise to data, or look ahead by the map, at each of many steps
_JUMPING = ("noise-smc", "smc-from-rto", "noise-rto", "fmtt", "noise-langevin", "d-flow-sgld")

SUITES = {
    "quick": Suite("six exact problems in ten minutes on two CPU cores",
                   ("gaussian/linear", "mixture/25-8-1", "curved/banana", "curved/funnel", "bipsda/inpainting",
                    "atoms/mnist-super-resolution"),
                   tuple(s for s in _SOLVERS if not s.startswith(("smc-from-rto", "d-flow"))), 8, 64, 4,
                   {"atoms/mnist-super-resolution": _JUMPING}),
    "full": Suite("all families of exact problems, meant for a night on two CPU cores",
                  ("gaussian/linear", "mixture/25-8-1", "mixture/25-80-2", "curved/banana", "curved/funnel",
                   "bipsda/inpainting", "bipsda/x-ray", "bipsda/phase-retrieval", "atoms/mnist-super-resolution",
                   "atoms/mnist-box-inpainting", "levy/gauss-convolution", "levy/gauss-fourier"),
                  _SOLVERS, 16, 128, 4,
                  {name: _JUMPING for name in ("atoms/mnist-super-resolution", "atoms/mnist-box-inpainting")}),
}


def find_suite(name: str) -> Suite:
    """A suite by its name.

    Raises:
        ValueError: for an unknown name, with those that there are.
    """
    if name not in SUITES:
        raise ValueError(f"there is no suite {name!r}: " + "; ".join(
            f"{known}, {suite.description}" for known, suite in SUITES.items()))
    return SUITES[name]
