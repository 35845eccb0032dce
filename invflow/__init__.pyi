"""Made by ``python -m benchmarks.release.make_stub`` from ``__init__.py``: do not edit."""

from invflow import datasets as datasets
from invflow import metrics as metrics
from invflow import operators as operators
from invflow import plugins as plugins
from invflow import problems as problems
from invflow import smc as smc
from invflow import testing as testing
from invflow import training as training
from invflow.deepinv_bridge import as_reconstructor as as_reconstructor
from invflow.deepinv_bridge import metric_from_deepinv as metric_from_deepinv
from invflow.evaluation.calibrate import calibrate as calibrate
from invflow.evaluation.certificate.certificate import Certificate as Certificate
from invflow.evaluation.compare import compare as compare
from invflow.evaluation.comparison import Comparison as Comparison
from invflow.flowmap import FlowMap as FlowMap
from invflow.likelihood import GaussianLikelihood as GaussianLikelihood
from invflow.likelihood import Likelihood as Likelihood
from invflow.likelihood import PoissonLikelihood as PoissonLikelihood
from invflow.models.adapter import Adapter as Adapter
from invflow.models.average_velocity import from_average_velocity as from_average_velocity
from invflow.models.compiled import compile_networks as compile_networks
from invflow.models.consistency import from_consistency as from_consistency
from invflow.models.diffusers.prior import from_diffusers as from_diffusers
from invflow.models.epsilon import from_epsilon as from_epsilon
from invflow.models.latent import LatentFlowMap as LatentFlowMap
from invflow.models.mixture import GaussianMixtureFlow as GaussianMixtureFlow
from invflow.models.neural import NeuralFlowMap as NeuralFlowMap
from invflow.models.neural import load_prior as load_prior
from invflow.models.wrappers import from_deepinv as from_deepinv
from invflow.models.wrappers import from_velocity as from_velocity
from invflow.operator import Operator as Operator
from invflow.posterior import NFE as NFE
from invflow.posterior import Posterior as Posterior
from invflow.problem import Problem as Problem
from invflow.problem import load_problem as load_problem
from invflow.reward import FunctionReward as FunctionReward
from invflow.reward import RepeatedReward as RepeatedReward
from invflow.reward import Reward as Reward
from invflow.rewards.images import ClassReward as ClassReward
from invflow.rewards.images import MaskMatchReward as MaskMatchReward
from invflow.rewards.images import MirrorReward as MirrorReward
from invflow.rewards.images import RotationReward as RotationReward
from invflow.rewards.vision import ImageTextReward as ImageTextReward
from invflow.rewards.vision import YesNoReward as YesNoReward
from invflow.solver import Solver as Solver
from invflow.solvers.baselines.block_matching import BM3D as BM3D
from invflow.solvers.baselines.classical import Bicubic as Bicubic
from invflow.solvers.baselines.classical import Wiener as Wiener
from invflow.solvers.baselines.lmmse import LinearMMSE as LinearMMSE
from invflow.solvers.baselines.plug_and_play import PlugAndPlay as PlugAndPlay
from invflow.solvers.baselines.total_variation import TotalVariation as TotalVariation
from invflow.solvers.exact import ExactPosterior as ExactPosterior
from invflow.solvers.field.daps import DAPS as DAPS
from invflow.solvers.field.ddrm import DDRM as DDRM
from invflow.solvers.field.diamond import WeightedDiamondMaps as WeightedDiamondMaps
from invflow.solvers.field.diffpir import DiffPIR as DiffPIR
from invflow.solvers.field.dpnp import DPnP as DPnP
from invflow.solvers.field.dps import DPS as DPS
from invflow.solvers.field.flow_dps import FlowDPS as FlowDPS
from invflow.solvers.field.flower import Flower as Flower
from invflow.solvers.field.langevin import ULA as ULA
from invflow.solvers.field.moment_matching import MomentMatching as MomentMatching
from invflow.solvers.field.pigdm import PiGDM as PiGDM
from invflow.solvers.field.pnp_flow import PnPFlow as PnPFlow
from invflow.solvers.noise.d_flow import DFlow as DFlow
from invflow.solvers.noise.langevin import NoiseLangevin as NoiseLangevin
from invflow.solvers.noise.rto import NoiseRTO as NoiseRTO
from invflow.solvers.noise.tempered import NoiseSMC as NoiseSMC
from invflow.solvers.search import BeamSearch as BeamSearch
from invflow.solvers.search import BestOfN as BestOfN
from invflow.solvers.search import TopKSearch as TopKSearch
from invflow.solvers.tilting.fmtt import FMTT as FMTT
from invflow.solvers.tilting.twisted_diffusion import TwistedDiffusion as TwistedDiffusion
from invflow.solvers.vfm import VFM as VFM
from invflow.datasets import files as imageio

__version__: str
__all__ = [
    "__version__",
    "FlowMap",
    "GaussianMixtureFlow",
    "NeuralFlowMap",
    "compile_networks",
    "from_velocity",
    "from_average_velocity",
    "from_consistency",
    "from_epsilon",
    "from_deepinv",
    "from_diffusers",
    "as_reconstructor",
    "metric_from_deepinv",
    "LatentFlowMap",
    "Adapter",
    "Operator",
    "Reward",
    "FunctionReward",
    "GaussianLikelihood",
    "Likelihood",
    "PoissonLikelihood",
    "RepeatedReward",
    "ClassReward",
    "MaskMatchReward",
    "MirrorReward",
    "RotationReward",
    "ImageTextReward",
    "YesNoReward",
    "Posterior",
    "NFE",
    "Solver",
    "VFM",
    "NoiseSMC",
    "NoiseRTO",
    "ExactPosterior",
    "FMTT",
    "TopKSearch",
    "BeamSearch",
    "BestOfN",
    "LinearMMSE",
    "DPS",
    "PiGDM",
    "MomentMatching",
    "DiffPIR",
    "DDRM",
    "ULA",
    "PnPFlow",
    "Flower",
    "DAPS",
    "FlowDPS",
    "DPnP",
    "DFlow",
    "WeightedDiamondMaps",
    "NoiseLangevin",
    "TwistedDiffusion",
    "Bicubic",
    "Wiener",
    "TotalVariation",
    "BM3D",
    "PlugAndPlay",
    "Problem",
    "load_problem",
    "Comparison",
    "compare",
    "load_prior",
    "calibrate",
    "Certificate",
    "operators",
    "problems",
    "plugins",
    "testing",
    "metrics",
    "training",
    "datasets",
    "smc",
    "imageio",
]
