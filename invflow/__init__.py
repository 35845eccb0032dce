"""Posterior sampling for imaging inverse problems with flow-map priors.

Names are imported when first used, so that ``import invflow`` takes little longer than ``import torch``. The stub for
type checkers, ``__init__.pyi``, is generated from the tables below: ``python -m benchmarks.release.make_stub``.
"""

from __future__ import annotations

import importlib
from typing import Any

from invflow._core.aliases import install
from invflow._core.version import VERSION as __version__

#: public names and their modules
_NAMES = {
    "FlowMap": "invflow.flowmap",
    "GaussianMixtureFlow": "invflow.models.mixture",
    "NeuralFlowMap": "invflow.models.neural",
    "compile_networks": "invflow.models.compiled",
    "from_velocity": "invflow.models.wrappers",
    "from_average_velocity": "invflow.models.average_velocity",
    "from_consistency": "invflow.models.consistency",
    "from_epsilon": "invflow.models.epsilon",
    "from_deepinv": "invflow.models.wrappers",
    "from_diffusers": "invflow.models.diffusers.prior",
    "as_reconstructor": "invflow.deepinv_bridge",
    "metric_from_deepinv": "invflow.deepinv_bridge",
    "LatentFlowMap": "invflow.models.latent",
    "Adapter": "invflow.models.adapter",
    "Operator": "invflow.operator",
    "Reward": "invflow.reward",
    "FunctionReward": "invflow.reward",
    "GaussianLikelihood": "invflow.likelihood",
    "Likelihood": "invflow.likelihood",
    "PoissonLikelihood": "invflow.likelihood",
    "RepeatedReward": "invflow.reward",
    "ClassReward": "invflow.rewards.images",
    "MaskMatchReward": "invflow.rewards.images",
    "MirrorReward": "invflow.rewards.images",
    "RotationReward": "invflow.rewards.images",
    "ImageTextReward": "invflow.rewards.vision",
    "YesNoReward": "invflow.rewards.vision",
    "Posterior": "invflow.posterior",
    "NFE": "invflow.posterior",
    "Solver": "invflow.solver",
    "VFM": "invflow.solvers.vfm",
    "NoiseSMC": "invflow.solvers.noise.tempered",
    "NoiseRTO": "invflow.solvers.noise.rto",
    "ExactPosterior": "invflow.solvers.exact",
    "FMTT": "invflow.solvers.tilting.fmtt",
    "TopKSearch": "invflow.solvers.search",
    "BeamSearch": "invflow.solvers.search",
    "BestOfN": "invflow.solvers.search",
    "LinearMMSE": "invflow.solvers.baselines.lmmse",
    "DPS": "invflow.solvers.field.dps",
    "PiGDM": "invflow.solvers.field.pigdm",
    "MomentMatching": "invflow.solvers.field.moment_matching",
    "DiffPIR": "invflow.solvers.field.diffpir",
    "DDRM": "invflow.solvers.field.ddrm",
    "ULA": "invflow.solvers.field.langevin",
    "PnPFlow": "invflow.solvers.field.pnp_flow",
    "Flower": "invflow.solvers.field.flower",
    "DAPS": "invflow.solvers.field.daps",
    "FlowDPS": "invflow.solvers.field.flow_dps",
    "DPnP": "invflow.solvers.field.dpnp",
    "DFlow": "invflow.solvers.noise.d_flow",
    "WeightedDiamondMaps": "invflow.solvers.field.diamond",
    "NoiseLangevin": "invflow.solvers.noise.langevin",
    "TwistedDiffusion": "invflow.solvers.tilting.twisted_diffusion",
    "Bicubic": "invflow.solvers.baselines.classical",
    "Wiener": "invflow.solvers.baselines.classical",
    "TotalVariation": "invflow.solvers.baselines.total_variation",
    "BM3D": "invflow.solvers.baselines.block_matching",
    "PlugAndPlay": "invflow.solvers.baselines.plug_and_play",
    "Problem": "invflow.problem",
    "load_problem": "invflow.problem",
    "Comparison": "invflow.evaluation.comparison",
    "compare": "invflow.evaluation.compare",
    "load_prior": "invflow.models.neural",
    "calibrate": "invflow.evaluation.calibrate",
    "Certificate": "invflow.evaluation.certificate.certificate",
}
#: public modules
_MODULES = ("operators", "problems", "plugins", "testing", "metrics", "training", "datasets", "smc", "imageio")

#: former and present locations of modules, both without "invflow."; the former names still work
_MOVED = {
    "adapter": "models.adapter",
    "bench_compiled": "bench.compiled",
    "bench_particles": "bench.particles",
    "bench_throughput": "bench.throughput",
    "calibration": "evaluation.calibrate",
    "cli_calibrate": "cli.calibrate",
    "cli_compare": "cli.compare",
    "cli_new": "cli.new",
    "combined": "reward",
    "comparison": "evaluation.compare",
    "compiled": "models.compiled",
    "composed": "operator",
    "counting": "_core.counting",
    "diffusers_prior": "models.diffusers.prior",
    "html_report": "evaluation.page.page",
    "image_rewards": "rewards.images",
    "imageio": "datasets.files",
    "latent": "models.latent",
    "mixture": "models.mixture",
    "neural": "models.neural",
    "noise": "likelihood",
    "plot": "views.figure",
    "plot_plane": "views.plane",
    "pretrained": "_core.folders _core.records",
    "repeated": "reward",
    "report": "evaluation.summary",
    "solve": "cli.image_task cli.options solver",
    "solvers.annealing": "solvers.tilting.annealing",
    "solvers.base": "solver",
    "solvers.block_matching": "solvers.baselines.block_matching",
    "solvers.classical": "solvers.baselines.classical",
    "solvers.conjugate": "solvers.tilting.conjugate linear.structure",
    "solvers.deepinv_langevin": "solvers.field.langevin",
    **dict.fromkeys(("solvers.deepinv_samplers", "solvers.field.deepinv"), "solvers.field.ddrm solvers.field.diffpir "
                    "solvers.field.dps solvers.field.moment_matching solvers.field.pigdm"),
    "solvers.drawn": "solvers.exact",
    "solvers.flower": "solvers.field.flower",
    "solvers.fmtt": "solvers.tilting.fmtt",
    "solvers.kernels": "solvers.tilting.kernels",
    "solvers.lmmse": "solvers.baselines.lmmse",
    "solvers.noise_chains": "solvers.noise.chains",
    "solvers.noise_convergence": "solvers.noise.convergence",
    "solvers.noise_hamiltonian": "solvers.noise.hamiltonian",
    "solvers.noise_lbfgs": "solvers.noise.lbfgs",
    "solvers.noise_metric": "solvers.noise.metric",
    "solvers.noise_moves": "solvers.noise.moves _core.shapes",
    "solvers.noise_rto": "solvers.noise.rto solvers.noise.perturbed",
    "solvers.noise_rto_weights": "solvers.noise.rto_weights",
    "solvers.noise_smc": "solvers.noise.tempered",
    "solvers.noise_state": "solvers.noise.state",
    "solvers.noise_target": "solvers.noise.target reward",
    "solvers.plug_and_play": "solvers.baselines.plug_and_play",
    "solvers.pnp_flow": "solvers.field.pnp_flow",
    "solvers.point": "solvers.baselines.point _core.shapes",
    "solvers.registry": "registry",
    "solvers.total_variation": "solvers.baselines.total_variation",
    "solvers.twisted_diffusion": "solvers.tilting.twisted_diffusion",
    "spectral": "linear.spectral",
    "spectral_adapter": "models.spectral_adapter",
    "vision_rewards": "rewards.vision",
    "wrappers": "models.wrappers",
}
#: former modules whose names are now spread over others
_LENT = {"reward": "likelihood", "solvers.exact": "linear.structure", "operator": "_core.conjugate_gradients",
         "evaluation.summary": "evaluation.measures"}


def _full(table: dict[str, str]) -> dict[str, list[str]]:
    return {f"invflow.{old}": [f"invflow.{new}" for new in places.split()] for old, places in table.items()}


install(_full(_MOVED), _full(_LENT))

__all__ = ["__version__", *_NAMES, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        value = getattr(importlib.import_module(_NAMES[name]), name)
        globals()[name] = value
        return value
    if name in _MODULES or name in _MOVED:
        return importlib.import_module(f"invflow.{name}")
    import difflib

    named = {known.lower(): known for known in [*__all__, *_MODULES]}
    near = difflib.get_close_matches(name.lower(), list(named), n=1)
    hint = f": did you mean invflow.{named[near[0]]}?" if near and not name.startswith("_") else ""
    raise AttributeError(f"module 'invflow' has no attribute {name!r}{hint}")


def __dir__() -> list[str]:
    return sorted(__all__)
