"""The last stage of VFM training: the map in several steps teaches itself one step."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from invflow._core.random import draw_noise
from invflow._core.shapes import with_axes
from invflow.models.adapter import Adapter
from invflow.models.neural import NeuralFlowMap
from invflow.solvers.vfm import VFM
from invflow.training.loop import LoopSettings, Sampler, batches_of, fit
from invflow.training.objective import VFMObjective
from invflow.training.settings import TrainingProblem
from invflow.training.vfm import finish

__all__ = ["ConsolidationObjective", "consolidate_vfm"]


class ConsolidationObjective(VFMObjective):
    r"""Regression of a map's jumps on the multi-step path of a fixed copy.

    In joint training, the target of a long jump moves with the map, and its gradient is weak compared with the noise of
    the velocity's target. For a map with sharp edges, long jumps then lag behind short ones. Here the target is fixed
    and has no noise. A fixed copy of the map goes from 0 to 1 in ``jumps`` equal steps through
    :math:`x_0, \ldots, x_K`, started from the adapter's z with probability alpha, otherwise from fresh noise. A share
    ``one_step`` of the rows then regresses on the whole path, (a, b) = (0, K), the others on a random part of it:

    .. math:: |u(x_a, s_a, s_b) - (x_b - x_a) / (s_b - s_a)|^2

    The samples approach the law of the copy in K steps, no better; the adapter does not change.

    Args:
        teacher: The jointly trained map; its weights are not changed.
        prior: The map to train.
        adapter: The adapter; its weights are not changed.
        problems: Problem classes of the observations.
        jumps: Number of steps of the copy, K >= 2.
        alpha: Share of rows that start from the adapter's noise.
        one_step: Share of rows with (0, K).
    """

    def __init__(self, teacher: NeuralFlowMap, prior: NeuralFlowMap, adapter: Adapter,
                 problems: Sequence[TrainingProblem], *, jumps: int = 8, alpha: float = 0.5,
                 one_step: float = 0.5) -> None:
        super().__init__(prior, adapter, problems, alpha=alpha, one_step=one_step)
        if jumps < 2:
            raise ValueError(f"jumps={jumps}: pass at least 2")
        self.adapter = adapter.requires_grad_(False)
        self.teacher = teacher.requires_grad_(False)
        self.jumps = jumps

    def trained(self) -> dict[str, nn.Module]:
        """The map."""
        return {"map": self.prior}

    @torch.no_grad()
    def _noise(self, data: Tensor, generator: torch.Generator) -> Tensor:
        groups = self._observe(data, generator)
        mean, log_std, *_ = self._propose(groups, len(data), data.device)
        fresh = draw_noise(tuple(mean.shape), generator).to(mean)
        joint = torch.rand(len(mean), generator=generator, device=generator.device) < self.settings.alpha
        joint = joint.to(mean.device)
        proposed = self.adapter.to_state(mean + log_std.exp() * fresh)
        return torch.where(with_axes(joint, mean.ndim), proposed, fresh)

    @torch.no_grad()
    def _path(self, z: Tensor) -> Tensor:
        """The copy's states, ``(K + 1, n, *state_shape)``."""
        states = [z]
        for i in range(self.jumps):
            states.append(self.teacher.jump(states[-1], i / self.jumps, (i + 1) / self.jumps))
        return torch.stack(states)

    def forward(self, data: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a batch of images ``(n, *image_shape)``, used only for their measurements; and its parts."""
        path = self._path(self._noise(data, generator))
        n, device = len(data), data.device
        # two different nodes of the path, in order
        first = torch.randint(self.jumps + 1, (n,), generator=generator, device=generator.device)
        second = torch.randint(self.jumps, (n,), generator=generator, device=generator.device)
        second = second + (second >= first)
        a, b = torch.minimum(first, second), torch.maximum(first, second)
        whole = round(n * self.settings.one_step)
        order = torch.randperm(n, generator=generator, device=generator.device)  # rows are ordered by problem class
        a[order[:whole]], b[order[:whole]] = 0, self.jumps
        a, b, rows = a.to(device), b.to(device), torch.arange(n, device=device)
        start, end = path[a, rows], path[b, rows]
        s, t = a.to(start) / self.jumps, b.to(start) / self.jumps
        gap = with_axes(t - s, start.ndim)
        u = self.prior.average_velocity(start, s, t)
        loss = (u - (end - start) / gap).square().flatten(1).sum(dim=1)
        whole_rows = order[:whole].to(device)
        return loss.mean(), {"consolidation": loss.detach().mean() / self.prior.dimension,
                             "whole": loss.detach()[whole_rows].mean() / self.prior.dimension}


def consolidate_vfm(vfm: VFM, data: Tensor | Sampler, problems: Sequence[TrainingProblem], settings: LoopSettings,
                    folder: str | os.PathLike[str], *, jumps: int = 8, alpha: float = 0.5, one_step: float = 0.5,
                    progress: bool = True, stop_at: int | None = None) -> VFM:
    """Teach a VFM's map to do its several steps in one; resumes if the folder holds a checkpoint.

    Args:
        vfm: Solver from :func:`~invflow.training.train_vfm`; it is not changed.
        data: Images ``(n, *image_shape)``, floats in [0, 1] or bytes; or a function ``(n, generator)`` that makes them.
        problems: Problem classes that the adapter was trained for.
        settings: Settings of the loop. The targets have no noise: an averaging decay of 0.99 is slow enough.
        folder: Folder for the checkpoint, the metrics and, when done, the VFM (``folder/vfm``).
        jumps: Number of steps of the path that the map learns from; more help as long as the map's own samples improve.
        alpha: Share of rows that start from the adapter's noise, the others from fresh noise.
        one_step: Share of rows that learn the whole path; the others preserve the shorter jumps.
        progress: Whether to show a progress bar.
        stop_at: Step at which to stop, with a checkpoint.

    Returns:
        The solver, with averaged weights.

    Raises:
        ValueError: If the problems are not those of the adapter, or ``jumps`` is under 2.
    """
    classes = [problem.operator.problem_class for problem in problems]
    if list(vfm.adapter.classes) != classes:
        raise ValueError(f"the adapter knows {list(vfm.adapter.classes)}, but the problems are {classes}")
    image_map, adapter = copy.deepcopy(vfm.prior).train(), copy.deepcopy(vfm.adapter)
    objective = ConsolidationObjective(copy.deepcopy(vfm.prior), image_map, adapter, problems, jumps=jumps,
                                       alpha=alpha, one_step=one_step)
    done = fit(objective, batches_of(data, settings), settings, folder, progress=progress, stop_at=stop_at)
    return finish(image_map, adapter, False, done, folder)
