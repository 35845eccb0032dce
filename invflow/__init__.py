"""Posterior sampling for imaging inverse problems with flow-map priors.

Names are imported when first used, so that ``import invflow`` costs little more than ``import torch``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_NAMES = {
    "FlowMap": "invflow.flowmap",
    "GaussianMixtureFlow": "invflow.mixture",
    "NeuralFlowMap": "invflow.neural",
    "compile_networks": "invflow.compiled",
    "from_velocity": "invflow.wrappers",
    "from_deepinv": "invflow.wrappers",
    "from_diffusers": "invflow.diffusers_prior",
    "as_reconstructor": "invflow.deepinv_bridge",
    "metric_from_deepinv": "invflow.deepinv_bridge",
    "LatentFlowMap": "invflow.latent",
    "Adapter": "invflow.adapter",
    "Operator": "invflow.operator",
    "Reward": "invflow.reward",
    "FunctionReward": "invflow.reward",
    "GaussianLikelihood": "invflow.reward",
    "PoissonLikelihood": "invflow.reward",
    "RepeatedReward": "invflow.repeated",
    "ClassReward": "invflow.image_rewards",
    "MaskMatchReward": "invflow.image_rewards",
    "MirrorReward": "invflow.image_rewards",
    "RotationReward": "invflow.image_rewards",
    "ImageTextReward": "invflow.vision_rewards",
    "YesNoReward": "invflow.vision_rewards",
    "Posterior": "invflow.posterior",
    "NFE": "invflow.posterior",
    "Solver": "invflow.solvers.base",
    "VFM": "invflow.solvers.vfm",
    "NoiseSMC": "invflow.solvers.noise_smc",
    "NoiseRTO": "invflow.solvers.noise_rto",
    "ExactPosterior": "invflow.solvers.exact",
    "FMTT": "invflow.solvers.fmtt",
    "TopKSearch": "invflow.solvers.search",
    "BeamSearch": "invflow.solvers.search",
    "BestOfN": "invflow.solvers.search",
    "LinearMMSE": "invflow.solvers.lmmse",
    "DPS": "invflow.solvers.deepinv_samplers",
    "PiGDM": "invflow.solvers.deepinv_samplers",
    "MomentMatching": "invflow.solvers.deepinv_samplers",
    "DiffPIR": "invflow.solvers.deepinv_samplers",
    "DDRM": "invflow.solvers.deepinv_samplers",
    "ULA": "invflow.solvers.deepinv_langevin",
    "PnPFlow": "invflow.solvers.pnp_flow",
    "Flower": "invflow.solvers.flower",
    "TwistedDiffusion": "invflow.solvers.twisted_diffusion",
    "Bicubic": "invflow.solvers.classical",
    "Wiener": "invflow.solvers.classical",
    "TotalVariation": "invflow.solvers.total_variation",
    "BM3D": "invflow.solvers.block_matching",
    "PlugAndPlay": "invflow.solvers.plug_and_play",
    "Problem": "invflow.problem",
    "load_problem": "invflow.problem",
    "Comparison": "invflow.comparison",
    "compare": "invflow.comparison",
    "load_prior": "invflow.neural",
    "calibrate": "invflow.calibration",
}
_MODULES = ("operators", "problems", "testing", "metrics", "training", "datasets")

__all__ = ["__version__", *_NAMES, *_MODULES]

if TYPE_CHECKING:  # so that type checkers see what __getattr__ finds
    from invflow.adapter import Adapter  # noqa: F401
    from invflow.calibration import calibrate  # noqa: F401
    from invflow.comparison import Comparison, compare  # noqa: F401
    from invflow.compiled import compile_networks  # noqa: F401
    from invflow.deepinv_bridge import as_reconstructor, metric_from_deepinv  # noqa: F401
    from invflow.diffusers_prior import from_diffusers  # noqa: F401
    from invflow.flowmap import FlowMap  # noqa: F401
    from invflow.image_rewards import ClassReward, MaskMatchReward, MirrorReward, RotationReward  # noqa: F401
    from invflow.latent import LatentFlowMap  # noqa: F401
    from invflow.mixture import GaussianMixtureFlow  # noqa: F401
    from invflow.neural import NeuralFlowMap, load_prior  # noqa: F401
    from invflow.operator import Operator  # noqa: F401
    from invflow.posterior import NFE, Posterior  # noqa: F401
    from invflow.problem import Problem, load_problem  # noqa: F401
    from invflow.repeated import RepeatedReward  # noqa: F401
    from invflow.reward import FunctionReward, GaussianLikelihood, PoissonLikelihood, Reward  # noqa: F401
    from invflow.solvers.base import Solver  # noqa: F401
    from invflow.solvers.block_matching import BM3D  # noqa: F401
    from invflow.solvers.classical import Bicubic, Wiener  # noqa: F401
    from invflow.solvers.deepinv_langevin import ULA  # noqa: F401
    from invflow.solvers.deepinv_samplers import DDRM, DPS, DiffPIR, MomentMatching, PiGDM  # noqa: F401
    from invflow.solvers.exact import ExactPosterior  # noqa: F401
    from invflow.solvers.flower import Flower  # noqa: F401
    from invflow.solvers.fmtt import FMTT  # noqa: F401
    from invflow.solvers.lmmse import LinearMMSE  # noqa: F401
    from invflow.solvers.noise_rto import NoiseRTO  # noqa: F401
    from invflow.solvers.noise_smc import NoiseSMC  # noqa: F401
    from invflow.solvers.plug_and_play import PlugAndPlay  # noqa: F401
    from invflow.solvers.pnp_flow import PnPFlow  # noqa: F401
    from invflow.solvers.search import BeamSearch, BestOfN, TopKSearch  # noqa: F401
    from invflow.solvers.total_variation import TotalVariation  # noqa: F401
    from invflow.solvers.twisted_diffusion import TwistedDiffusion  # noqa: F401
    from invflow.solvers.vfm import VFM  # noqa: F401
    from invflow.vision_rewards import ImageTextReward, YesNoReward  # noqa: F401
    from invflow.wrappers import from_deepinv, from_velocity  # noqa: F401


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        value = getattr(importlib.import_module(_NAMES[name]), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return importlib.import_module(f"invflow.{name}")
    raise AttributeError(f"module 'invflow' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
