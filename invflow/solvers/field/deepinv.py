"""Former module of the samplers that deepinv implements too; kept for its import path."""

from __future__ import annotations

from invflow.solvers.field.ddrm import DDRM
from invflow.solvers.field.diffpir import DiffPIR
from invflow.solvers.field.dps import DPS
from invflow.solvers.field.moment_matching import MomentMatching
from invflow.solvers.field.pigdm import PiGDM

__all__ = ["DDRM", "DPS", "DiffPIR", "MomentMatching", "PiGDM"]
