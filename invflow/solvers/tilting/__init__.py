"""Flow Map Trajectory Tilting: dynamics, look-ahead, kernels, schedules and weights."""

from invflow.solvers.tilting.look_ahead import BaseStep, Look, LookAhead
from invflow.solvers.tilting.schedules import (
    AnnealedVariance,
    Grid,
    Schedule,
    logit_grid,
    make_times,
    measured_gain,
    schedule_values,
    uniform_grid,
)

__all__ = ["AnnealedVariance", "BaseStep", "Grid", "Look", "LookAhead", "Schedule", "logit_grid", "make_times",
           "measured_gain", "schedule_values", "uniform_grid"]
