"""The last stage of a VFM's training: its map in several steps teaches the same map in one."""

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
    r"""Regression of a map's jumps on the path that a fixed copy of it takes in several steps.

    In joint training the target of a long jump moves with the map, and beside the noise of the velocity's target its
    gradient is faint: a map with sharp edges is left behind by its own short jumps. Here the target stands still and
    has no noise. From the adapter's z with probability alpha, else from fresh noise, a fixed copy of the map goes from
    0 to 1 in ``jumps`` equal steps through :math:`x_0, \ldots, x_K`; a share ``one_step`` of the rows then regresses
    on the whole way, (a, b) = (0, K), the others on a random part of it:

    .. math:: |u(x_a, s_a, s_b) - (x_b - x_a) / (s_b - s_a)|^2

    The law of the samples becomes that of the copy in K steps, no better; the adapter stays as it is.

    Args:
        teacher: the jointly trained map; its weights are not changed.
        prior: the map that is trained.
        adapter: its weights are not changed.
        problems: what to observe.
        jumps: steps of the copy, K >= 2.
        alpha: share of rows that start from the adapter's noise.
        one_step: share of rows with (0, K).
    """

    def __init__(self, teacher: NeuralFlowMap, prior: NeuralFlowMap, adapter: Adapter,
                 problems: Sequence[TrainingProblem], *, jumps: int = 8, alpha: float = 0.5,
                 one_step: float = 0.5) -> None:
        super().__init__(prior, adapter, problems, alpha=alpha, one_step=one_step)
        if jumps < 2:
            raise ValueError(f"jumps={jumps}: a map learns from at least 2 jumps of its copy")
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
        """Loss of a batch of images ``(n, *image_shape)``, of which only the measurements are used; and its parts."""
        path = self._path(self._noise(data, generator))
        n, device = len(data), data.device
        # two different nodes of the path, in order
        first = torch.randint(self.jumps + 1, (n,), generator=generator, device=generator.device)
        second = torch.randint(self.jumps, (n,), generator=generator, device=generator.device)
        second = second + (second >= first)
        a, b = torch.minimum(first, second), torch.maximum(first, second)
        whole = round(n * self.settings.one_step)
        order = torch.randperm(n, generator=generator, device=generator.device)  # rows come ordered by problem class
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
    """Teach a VFM's map to do in one step what it does in several, resuming if the folder holds a checkpoint.

    Args:
        vfm: from :func:`~invflow.training.train_vfm`; it stays as it is.
        data: images ``(n, *image_shape)``, floats in [0, 1] or bytes; or a function ``(n, generator)`` that makes them.
        problems: those that the adapter was trained for.
        settings: of the loop. The targets have no noise: a decay of the average of 0.99 is slow enough.
        folder: for the checkpoint, the metrics and, when done, the VFM (``folder/vfm``).
        jumps: steps of the path that the map learns from; more are better as long as its own samples get better.
        alpha: share of rows that start from the adapter's noise, the others from fresh noise.
        one_step: share of rows that learn the whole way; the others keep the shorter jumps.
        progress: show a progress bar.
        stop_at: stop at this step, with a checkpoint.

    Returns:
        The solver, with averaged weights.

    Raises:
        ValueError: if the problems are not those of the adapter, or ``jumps`` is under 2.
    """
    classes = [problem.operator.problem_class for problem in problems]
    if list(vfm.adapter.classes) != classes:
        raise ValueError(f"the adapter knows {list(vfm.adapter.classes)}, but the problems are {classes}")
    image_map, adapter = copy.deepcopy(vfm.prior).train(), copy.deepcopy(vfm.adapter)
    objective = ConsolidationObjective(copy.deepcopy(vfm.prior), image_map, adapter, problems, jumps=jumps,
                                       alpha=alpha, one_step=one_step)
    done = fit(objective, batches_of(data, settings), settings, folder, progress=progress, stop_at=stop_at)
    return finish(image_map, adapter, False, done, folder)
