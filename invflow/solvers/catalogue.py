"""The built-in solvers by name, for the entry point ``invflow.solvers``."""

from __future__ import annotations

from typing import Any

from invflow.plugins import SolverEntry
from invflow.solver import Solver

__all__ = [
    "beam", "best_of_n", "bicubic", "bm3d", "d_flow", "daps", "ddrm", "diamond", "diffpir", "dpnp", "dps", "exact",
    "flow_dps",
    "flower", "fmtt", "lmmse", "moment_matching", "noise_langevin", "noise_rto", "noise_smc",
    "pigdm", "plug_and_play", "pnp_flow", "tds", "top_k", "tv",
    "ula", "vfm", "wiener",
]


def build_exact(source: Any, *, max_entries: int | None = None) -> Solver:
    """Build the exact posterior of a problem or of a mixture.

    Args:
        source: A problem, or a :class:`~invflow.GaussianMixtureFlow`.
        max_entries: Setting of :class:`~invflow.ExactPosterior`.

    Raises:
        TypeError: If no exact posterior is known.
        ValueError: If ``max_entries`` is passed but the problem has another kind of exact solver.
    """
    from invflow.solvers.exact import ExactPosterior

    known: Solver = source.exact_posterior() if hasattr(source, "exact_posterior") else ExactPosterior(source)
    if max_entries is None:
        return known
    if not isinstance(known, ExactPosterior):
        raise ValueError(f"the exact posterior of {source!r} has no setting 'max_entries': it is not an ExactPosterior")
    return ExactPosterior(known.prior, max_entries=max_entries)


def _entry(name: str, place: str, description: str, takes: Any = "prior") -> SolverEntry:
    return SolverEntry(name, description, f"invflow.solvers.{place}", takes)


vfm = _entry("vfm", "vfm:VFM.load", "one network call for each sample; trained for certain problem classes", "name")
fmtt = _entry("fmtt", "tilting.fmtt:FMTT", "iterative tilting along the path, with weights; needs no training")
lmmse = _entry("lmmse", "baselines.lmmse:LinearMMSE.load", "best linear estimate and its Gaussian; a baseline", "name")
noise_smc = _entry("noise-smc", "noise.tempered:NoiseSMC",
                   "sequential Monte Carlo in noise space; converges as the number of particles grows")
noise_rto = _entry("noise-rto", "noise.rto:NoiseRTO",
                   "randomise-then-optimise in noise space: independent draws for sharp rewards")
dps = _entry("dps", "field.dps:DPS", "diffusion posterior sampling; a baseline")
pigdm = _entry("pigdm", "field.pigdm:PiGDM", "pseudoinverse-guided diffusion; a baseline")
moment_matching = _entry("moment-matching", "field.moment_matching:MomentMatching",
                         "guided diffusion with the denoiser's covariance; a baseline")
diffpir = _entry("diffpir", "field.diffpir:DiffPIR", "plug-and-play diffusion restoration; a baseline")
ddrm = _entry("ddrm", "field.ddrm:DDRM", "restoration in the operator's singular vectors; a baseline")
ula = _entry("ula", "field.langevin:ULA", "plug-and-play unadjusted Langevin chains, through deepinv; a baseline")
pnp_flow = _entry("pnp-flow", "field.pnp_flow:PnPFlow",
                  "plug-and-play restoration with the flow's denoiser; a baseline")
flower = _entry("flower", "field.flower:Flower", "denoise, condition a Gaussian, add noise back; a baseline")
daps = _entry("daps", "field.daps:DAPS", "decoupled annealing: ODE, Langevin steps, fresh noise; a baseline")
flow_dps = _entry("flow-dps", "field.flow_dps:FlowDPS", "Euler steps of the flow with data consistency; a baseline")
dpnp = _entry("dpnp", "field.dpnp:DPnP",
              "split Gibbs sampling: likelihood and prior in turn, at a falling noise level; a baseline")
diamond = _entry("diamond", "field.diamond:WeightedDiamondMaps",
                 "weighted Diamond Maps: guidance by values estimated with the flow map; a baseline")
noise_langevin = _entry("noise-langevin", "noise.langevin:NoiseLangevin",
                        "Langevin chains in noise space, as D-Flow SGLD; a baseline")
d_flow = _entry("d-flow", "noise.d_flow:DFlow",
                "the noise whose image fits the measurement: optimisation, not sampling")
tds = _entry("tds", "tilting.twisted_diffusion:TwistedDiffusion",
             "twisted diffusion sampling; converges as the number of particles grows; a baseline")
top_k = _entry("top-k", "search:TopKSearch", "tilted dynamics that keep the best particles: optimisation, not sampling")
beam = _entry("beam", "search:BeamSearch",
              "branches along the path and keeps the best: optimisation, not sampling")
best_of_n = _entry("best-of-n", "search:BestOfN", "the best of many prior draws: optimisation, not sampling")
bicubic = _entry("bicubic", "baselines.classical:Bicubic",
                 "bicubic interpolation: one image, no posterior; a baseline", "nothing")
wiener = _entry("wiener", "baselines.classical:Wiener",
                "Wiener filter with the spectrum of photographs: one image; a baseline", "nothing")
tv = _entry("tv", "baselines.total_variation:TotalVariation",
            "total variation: one image, no posterior; a baseline", "nothing")
bm3d = _entry("bm3d", "baselines.block_matching:BM3D",
              "block matching, for noise and circular blurs: one image; a baseline", "nothing")
plug_and_play = _entry("plug-and-play", "baselines.plug_and_play:PlugAndPlay",
                       "splitting with the prior's denoiser: one image; a baseline")
exact = _entry("exact", "catalogue:build_exact", "exact posterior of Gaussian mixtures and of problems that provide it",
               "source")
