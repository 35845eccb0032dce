"""Training: priors, and the adapters and maps of Variational Flow Maps."""

from invflow.training.loop import LoopSettings, Objective, fit
from invflow.training.losses import gaussian_kl, meanflow_loss, sample_times
from invflow.training.prior import MeanFlowObjective, train_prior
from invflow.training.vfm import TrainingProblem, VFMObjective, train_alignment, train_vfm

__all__ = [
    "LoopSettings", "MeanFlowObjective", "Objective", "TrainingProblem", "VFMObjective", "fit", "gaussian_kl",
    "meanflow_loss", "sample_times", "train_alignment", "train_prior", "train_vfm",
]
