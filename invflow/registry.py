"""Solvers by name, for the command line and for tables of results."""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from invflow._core.plugins import nearest
from invflow.flowmap import FlowMap
from invflow.models.neural import load_prior
from invflow.problem import Problem
from invflow.solvers.exact import ExactPosterior

if TYPE_CHECKING:
    from invflow.solver import Solver

    Source: TypeAlias = Problem | FlowMap | str | os.PathLike[str]

__all__ = ["SOLVERS", "SolverEntry", "solver_by_name"]


@dataclass(frozen=True)
class SolverEntry:
    """How a named solver is built.

    Attributes:
        description: one line.
        target: gives the class or function that builds it; its keyword parameters are the settings it knows.
        argument: turns the problem, prior or name into that one's positional arguments.
    """

    description: str
    target: Callable[[Any], Callable[..., Solver]]
    argument: Callable[[Any], tuple[Any, ...]]


def _class(place: str) -> Any:
    """A solver's class, imported when it is asked for; its place is written ``"tilting.fmtt:FMTT"``."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(f"invflow.solvers.{module}"), name)


def _pretrained(place: str, description: str) -> SolverEntry:
    """A solver with weights of its own, which its ``load`` finds by the prior's name."""
    return SolverEntry(description, lambda _: _class(place).load, lambda s: (_name(s),))


def _on_prior(place: str, description: str) -> SolverEntry:
    """A solver that works with any prior."""
    return SolverEntry(description, lambda _: _class(place), lambda s: (_prior(s),))


def _classical(place: str, description: str) -> SolverEntry:
    """A solver that has no prior of its own, nor takes one."""
    return SolverEntry(description, lambda _: _class(place), lambda _: ())


def _exact_target(source: Any) -> Callable[..., Solver]:
    """A problem may bring an exact posterior of its own; any other source must be a mixture."""
    return source.exact_posterior if isinstance(source, Problem) else ExactPosterior


#: one line for each solver
SOLVERS: dict[str, SolverEntry] = {
    "vfm": _pretrained("vfm:VFM", "one network call for each sample; trained for certain problem classes"),
    "fmtt": _on_prior("tilting.fmtt:FMTT", "iterative tilting along the path, with exact weights; needs no training"),
    "lmmse": _pretrained("baselines.lmmse:LinearMMSE", "best linear estimate and its Gaussian, a baseline"),
    "noise-smc": _on_prior("noise.tempered:NoiseSMC", "sequential Monte Carlo in noise space, exact as particles grow"),
    "noise-rto": _on_prior(
        "noise.rto:NoiseRTO", "randomise-then-optimise in noise space, independent draws for sharp rewards"
    ),
    "dps": _on_prior("field.deepinv:DPS", "diffusion posterior sampling, through deepinv; a baseline"),
    "pigdm": _on_prior("field.deepinv:PiGDM", "pseudoinverse-guided diffusion, through deepinv; a baseline"),
    "moment-matching": _on_prior(
        "field.deepinv:MomentMatching", "guided diffusion with the denoiser's covariance, through deepinv"
    ),
    "diffpir": _on_prior("field.deepinv:DiffPIR", "plug-and-play diffusion restoration, through deepinv; a baseline"),
    "ddrm": _on_prior(
        "field.deepinv:DDRM", "restoration in the operator's singular vectors, through deepinv; a baseline"
    ),
    "ula": _on_prior("field.langevin:ULA", "plug-and-play unadjusted Langevin chains, through deepinv; a baseline"),
    "pnp-flow": _on_prior("field.pnp_flow:PnPFlow", "plug-and-play restoration with the flow's denoiser; a baseline"),
    "flower": _on_prior("field.flower:Flower", "denoise, condition a Gaussian, add noise back; a baseline"),
    "tds": _on_prior(
        "tilting.twisted_diffusion:TwistedDiffusion", "twisted diffusion sampling, exact as particles grow; a baseline"
    ),
    "top-k": _on_prior("search:TopKSearch", "tilted dynamics that keep the best particles: optimisation, not sampling"),
    "beam": _on_prior(
        "search:BeamSearch", "branches along the path, of which the best go on: optimisation, not sampling"
    ),
    "best-of-n": _on_prior("search:BestOfN", "the best of many prior draws: optimisation, not sampling"),
    "bicubic": _classical("baselines.classical:Bicubic", "bicubic interpolation: one image, no posterior; a baseline"),
    "wiener": _classical(
        "baselines.classical:Wiener", "Wiener filter with the spectrum of photographs: one image; a baseline"
    ),
    "tv": _classical(
        "baselines.total_variation:TotalVariation", "total variation: one image, no posterior; a baseline"
    ),
    "bm3d": _classical(
        "baselines.block_matching:BM3D", "block matching, for noise and circular blurs: one image; a baseline"
    ),
    "plug-and-play": _on_prior(
        "baselines.plug_and_play:PlugAndPlay", "splitting with the prior's denoiser: one image; a baseline"
    ),
    "exact": SolverEntry(
        "closed form, for Gaussian mixtures and problems that know theirs", _exact_target,
        lambda source: () if isinstance(source, Problem) else (_prior(source),),
    ),
}


def _name(source: Source) -> str | os.PathLike[str]:
    if isinstance(source, Problem):
        if source.prior_name is None:
            raise ValueError(f"nothing was trained for the problem {source.name!r}: use --solver exact, "
                         "fmtt or noise-smc")
        return source.prior_name
    if isinstance(source, FlowMap):
        raise ValueError(
            f"a trained solver is found by the name of its prior, not by a {type(source).__name__}: pass "
            "a name such as 'mnist', or a folder"
        )
    return source


def _prior(source: Source) -> FlowMap:
    if isinstance(source, Problem):
        return source.prior
    return source if isinstance(source, FlowMap) else load_prior(source)


def solver_by_name(name: str, source: Source, **settings: Any) -> Solver:
    """Build a solver by its name.

    Args:
        name: a key of :data:`SOLVERS`, such as ``"vfm"``.
        source: the problem to solve, or the prior: its name, its folder, or the flow map itself.
        **settings: of the solver, such as ``steps=4``.

    Returns:
        The solver, on the CPU.

    Raises:
        ValueError: for an unknown name (with the nearest known one), or a setting that it does not know.

    Example:
        >>> from invflow.problem import load_problem
        >>> from invflow.registry import solver_by_name
        >>> solver_by_name("exact", load_problem("gaussian/linear"))  # doctest: +SKIP
    """
    entry = SOLVERS.get(name.lower())
    if entry is None:
        raise ValueError(f"there is no solver {name!r}: {nearest(name, list(SOLVERS))}")
    arguments = entry.argument(source)
    target = entry.target(source)
    parameters = inspect.signature(target).parameters.items()
    known = [key for key, parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    unknown = sorted(set(settings) - set(known))
    if unknown:
        knows = f"it knows {', '.join(known)}" if known else "it has none"
        raise ValueError(f"the solver {name!r} has no setting {unknown[0]!r}: {knows}")
    return target(*arguments, **settings)
