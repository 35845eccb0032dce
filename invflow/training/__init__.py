"""Training: priors, and the adapters and maps of Variational Flow Maps."""

from invflow.training.consolidation import ConsolidationObjective, consolidate_vfm
from invflow.training.distillation import (
    DistillationObjective,
    distill,
    lagrangian_distillation_loss,
    meanflow_distillation_loss,
)
from invflow.training.loop import LoopSettings, Objective, fit
from invflow.training.losses import gaussian_kl, meanflow_loss, sample_times
from invflow.training.objective import VFMObjective
from invflow.training.prior import MeanFlowObjective, train_prior
from invflow.training.settings import ObjectiveSettings, TrainingProblem
from invflow.training.vfm import train_alignment, train_vfm

__all__ = [
    "ConsolidationObjective", "DistillationObjective", "LoopSettings", "MeanFlowObjective", "Objective",
    "ObjectiveSettings", "TrainingProblem", "VFMObjective", "consolidate_vfm", "distill", "fit", "gaussian_kl",
    "lagrangian_distillation_loss", "meanflow_distillation_loss", "meanflow_loss", "sample_times", "train_alignment",
    "train_prior", "train_vfm",
]
