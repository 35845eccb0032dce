"""Distillation of a velocity into a flow map: one call replaces the solution of an ODE.

Time runs from noise (t = 0) to data (t = 1). The teacher is a deterministic velocity b, not a noisy v = m - z: both
losses are zero for the exact map at any states.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from invflow._core.random import draw_noise
from invflow.flowmap import FlowMap, expand_time
from invflow.models.latent import LatentFlowMap
from invflow.models.neural import NeuralFlowMap
from invflow.training.loop import LoopSettings, Objective, Sampler, batches_of, fit, seeded, speaks_for_all
from invflow.training.losses import (
    AverageVelocity,
    average_velocity_jvp,
    normalise,
    sample_between,
    sample_times,
    semigroup_average,
)
from invflow.training.prior import data_statistics, stationary_statistics

__all__ = ["DistillationObjective", "distill", "lagrangian_distillation_loss", "meanflow_distillation_loss",
           "semigroup_distillation_loss"]

Velocity = Callable[[Tensor, Tensor], Tensor]
LOSSES = ("lagrangian", "meanflow", "semigroup")


def meanflow_distillation_loss(u: AverageVelocity, teacher: Velocity, x: Tensor, s: Tensor, t: Tensor,
                               num_distinct: int | None = None) -> Tensor:
    r"""MeanFlow loss of each row with the teacher's velocity instead of the data's (Geng et al. 2025).

    u(x, s, t) regresses on b_s(x) + (t - s) sg[du/ds], with du/ds along the teacher's path, dx = b ds; for s = t the
    target is b itself. It is the Eulerian equation (d/ds + b . grad) X_{s,t} = 0 of Boffi, Albergo, Vanden-Eijnden
    (2024), with the derivative held fixed. The teacher is called once for each row, at x.

    Args:
        u: Average velocity, ``(n, *shape), (n,), (n,) -> (n, *shape)``.
        teacher: b, ``(n, *shape), (n,) -> (n, *shape)``.
        x: ``(n, *shape)``, states at time s.
        s: ``(n,)``.
        t: ``(n,)``, t >= s.
        num_distinct: Number of rows with s < t, if those come first; None counts them.

    Returns:
        ``(n,)``, summed over the state.
    """
    with torch.no_grad():
        b = teacher(x, s)
    rows = torch.nonzero(s != t)[:, 0] if num_distinct is None else slice(0, num_distinct)
    target = b
    if s[rows].numel():
        derivative = average_velocity_jvp(u, x[rows].detach(), s[rows], t[rows], b[rows])
        correction = torch.zeros_like(b)
        correction[rows] = (expand_time(t, b) - expand_time(s, b))[rows] * derivative.to(b.dtype)
        target = b + correction
    return (u(x, s, t) - target).square().flatten(1).sum(dim=1)


def lagrangian_distillation_loss(u: AverageVelocity, teacher: Velocity, x: Tensor, s: Tensor, t: Tensor,
                                 num_distinct: int | None = None, *, through_teacher: bool = False) -> Tensor:
    r"""Lagrangian map distillation of each row (Boffi, Albergo, Vanden-Eijnden 2024, "Flow map matching").

    The end of the jump moves with the teacher's velocity: with X = x + (t - s) u(x, s, t), the loss is the squared norm
    of dX/dt - b_t(X), with dX/dt = u + (t - s) du/dt. The gradient passes through the derivative in t; for s = t the
    loss is flow matching to b. The teacher is called once for each row, at X.

    Args:
        u, teacher, x, s, t, num_distinct: Same as in :func:`meanflow_distillation_loss`.
        through_teacher: Whether to differentiate b_t(X) in X too, as in the definition; False holds b_t(X) fixed,
            which has the same minimum and needs no backward pass through the teacher.

    Returns:
        ``(n,)``, summed over the state.
    """
    rows = torch.nonzero(s != t)[:, 0] if num_distinct is None else torch.arange(num_distinct, device=s.device)
    others = torch.ones(len(s), dtype=torch.bool, device=s.device)
    others[rows] = False
    residuals = x.new_zeros(x.shape)
    if len(rows):
        first, start, end = x[rows], s[rows], t[rows]
        mean, slope = torch.func.jvp(lambda time: u(first, start, time), (end,), (torch.ones_like(end),))[:2]
        length = expand_time(end, first) - expand_time(start, first)
        landing = first + length * mean.to(first.dtype)
        if through_teacher:
            b = teacher(landing, end)
        else:
            with torch.no_grad():
                b = teacher(landing.detach(), end)
        residuals = residuals.index_copy(0, rows, (mean + length * slope - b).to(x.dtype))
    if bool(others.any()):
        with torch.no_grad():
            b = teacher(x[others], s[others])
        kept = torch.nonzero(others)[:, 0]
        residuals = residuals.index_copy(0, kept, (u(x[others], s[others], t[others]) - b).to(x.dtype))
    return residuals.square().flatten(1).sum(dim=1)


def semigroup_distillation_loss(u: AverageVelocity, teacher: Velocity, x: Tensor, s: Tensor, t: Tensor, middle: Tensor,
                                num_distinct: int) -> Tensor:
    """One jump against two (Frans et al. 2024) for rows with s < t; flow matching to the teacher for s = t.

    It takes no derivative. If a map is steep at small scales, such as one with a spectrum, derivatives amplify the
    contribution of the network. The teacher is called once for each row with s = t, at x.

    Args:
        u, teacher, x, s, t: Same as in :func:`meanflow_distillation_loss`.
        middle: ``(n,)``, between s and t.
        num_distinct: Number of rows with s < t; those come first.

    Returns:
        ``(n,)``, summed over the state.
    """
    k = num_distinct
    with torch.no_grad():
        target = torch.cat([semigroup_average(u, x[:k], s[:k], t[:k], middle[:k]), teacher(x[k:], s[k:])])
    return (u(x, s, t) - target).square().flatten(1).sum(dim=1)


class DistillationObjective(Objective):
    """Objective that teaches a flow map to jump to the end of the teacher's ODE.

    Args:
        student: The map to train.
        teacher: Any flow map with states of the same shape; its jump is only used for the states of its path.
        loss: ``"lagrangian"``, ``"meanflow"`` or ``"semigroup"``.
        from_data: Whether batches are images, whose codes are noised to time s. If False, they are noise, and the
            teacher's own path transports it to time s.
        distinct: Share of rows with s < t.
        one_step: Share of those with (s, t) = (0, 1).
        through_teacher: For the Lagrangian loss; see :func:`lagrangian_distillation_loss`.

    Raises:
        ValueError: For an unknown loss, or states of different shapes.
    """

    def __init__(self, student: NeuralFlowMap, teacher: FlowMap, loss: str = "lagrangian", *, from_data: bool = False,
                 distinct: float = 0.75, one_step: float = 1 / 3, through_teacher: bool = False) -> None:
        super().__init__()
        if loss not in LOSSES:
            raise ValueError(f"distillation loss {loss!r} is unknown: pass one of {', '.join(LOSSES)}")
        if student.state_shape != tuple(teacher.state_shape):
            raise ValueError(f"the student's states have shape {student.state_shape}, the teacher's "
                             f"{tuple(teacher.state_shape)}: pass a student and a teacher with the same state_shape")
        self.student, self.teacher, self.loss, self.from_data = student, teacher, loss, from_data
        self.distinct, self.one_step, self.through_teacher = distinct, one_step, through_teacher

    def trained(self) -> dict[str, nn.Module]:
        """The student."""
        return {"map": self.student}

    def forward(self, data: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a batch of images or noise, and its two parts per value of the state."""
        device = data.device
        s, t, k = sample_times(len(data), distinct=self.distinct, one_step=self.one_step, generator=generator,
                               device=device)
        # only the student may compute in lower precision; the teacher's velocity is the target
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            if self.from_data:
                states = self.teacher.encode(data)
                noise = draw_noise(tuple(states.shape), generator).to(states)
                x = torch.lerp(noise, states, expand_time(s, states))
            else:
                x = data.clone()
                moved = s > 0
                x[moved] = self.teacher.jump(data[moved], 0.0, s[moved])

        def teacher(state: Tensor, time: Tensor) -> Tensor:
            with torch.autocast(device.type, enabled=False):
                return self.teacher.velocity(state, time)

        u = self.student.average_velocity
        if self.loss == "semigroup":
            losses = semigroup_distillation_loss(u, teacher, x, s, t, sample_between(s, t, generator), k)
        elif self.loss == "meanflow":
            losses = meanflow_distillation_loss(u, teacher, x, s, t, k)
        else:
            losses = lagrangian_distillation_loss(u, teacher, x, s, t, k, through_teacher=self.through_teacher)
        per_value = losses.detach() / self.student.dimension
        return normalise(losses.mean()), {"velocity": per_value[k:].mean(), "map": per_value[:k].mean()}


def distill(teacher: FlowMap, settings: LoopSettings, folder: str | os.PathLike[str], *,
            data: Tensor | Sampler | None = None, loss: str = "lagrangian", network: str | None = None,
            options: dict[str, Any] | None = None, start: NeuralFlowMap | None = None, skip: str | None = None,
            distinct: float = 0.75, one_step: float = 1 / 3,
            through_teacher: bool = False, progress: bool = True,
            stop_at: int | None = None) -> NeuralFlowMap | LatentFlowMap:
    """Train a flow map that makes a teacher's jumps in one call; resumes if the folder holds a checkpoint.

    The teacher is any :class:`~invflow.FlowMap`: from ``from_velocity``, ``from_deepinv`` or ``from_diffusers``,
    a mixture, or a latent map. Solvers that run the one-step map many times (NoiseSMC, NoiseRTO, FMTT's look-ahead)
    then need one call for each jump.

    Args:
        teacher: The teacher; it is not changed. For a map that solves an ODE, ``ode_steps`` sets the accuracy.
        settings: Settings of the loop.
        folder: Folder for the checkpoint, the metrics and, when done, the map (``folder/prior``).
        data: Images ``(n, *image_shape)``, floats in [0, 1] or bytes, or a function ``(n, generator)`` that makes
            them: the teacher is then evaluated at their noised states, one velocity per row. None evaluates it along
            its own path: this needs no data, but an ODE to time s for each row. ``data=teacher.generate(n)`` is a
            compromise.
        loss: ``"lagrangian"``, ``"meanflow"`` or ``"semigroup"``.
        network: ``"unet"`` or ``"mlp"``; None means the first for states (C, H, W), the second for vectors.
        options: Options of the network.
        start: Map to start from, which is not changed; None starts from random weights.
        skip: Form of a new map; see :class:`~invflow.NeuralFlowMap`.
        distinct: Share of rows with s < t; the others learn the velocity.
        one_step: Share of those with (s, t) = (0, 1).
        through_teacher: For the Lagrangian loss; see :func:`lagrangian_distillation_loss`.
        progress: Whether to show a progress bar.
        stop_at: Step at which to stop, with a checkpoint.

    Returns:
        The map with averaged weights, in evaluation mode; for a teacher with a decoding that is not affine, a
        :class:`~invflow.LatentFlowMap` of this map and the teacher's decoder.

    Raises:
        ValueError: For an unknown loss, or a ``start`` with states of another shape.

    Example:
        >>> import tempfile, torch, invflow
        >>> from invflow.training import LoopSettings, distill
        >>> teacher = invflow.GaussianMixtureFlow(torch.eye(2), std=0.5)
        >>> settings = LoopSettings(steps=2, batch_size=32, precision="no")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     student = distill(teacher, settings, folder, options={"width": 16, "depth": 2}, progress=False)
        >>> student.generate(3, generator=torch.Generator().manual_seed(0)).shape
        torch.Size([3, 2])
    """
    shape, device = tuple(teacher.state_shape), teacher.device
    if start is None:
        states, spectrum = _states(teacher, data, settings.seed), None
        mean, std = data_statistics(states, (1.0, 0.0))
        if skip == "spectral":
            mean, std, spectrum = stationary_statistics(states, (1.0, 0.0))
        student = NeuralFlowMap(shape, network=network or ("unet" if len(shape) == 3 else "mlp"), options=options,
                                decode_affine=teacher.decode_affine or (1.0, 0.0), mean=mean, std=std,
                                skip=skip, spectrum=spectrum, independent_noise=teacher.independent_noise,
                                generator=seeded(settings.seed, 0, -2))
    else:
        student = copy.deepcopy(start).requires_grad_(True)
    student.train()
    required = [p.requires_grad for p in teacher.parameters()]
    objective = DistillationObjective(student, teacher.requires_grad_(False), loss, from_data=data is not None,
                                      distinct=distinct, one_step=one_step, through_teacher=through_teacher)
    source: Tensor | Sampler = data if data is not None else lambda n, g: draw_noise((n, *shape), g)
    try:
        done = fit(objective, batches_of(source, settings), settings, folder, progress=progress, stop_at=stop_at)
    finally:
        teacher.to(device)
        for parameter, value in zip(teacher.parameters(), required):
            parameter.requires_grad_(value)
    student.cpu().eval().requires_grad_(False)
    if done and speaks_for_all():
        student.save_pretrained(Path(folder) / "prior")
    if teacher.decode_affine is not None:
        return student
    student = student.to(device)
    if isinstance(teacher, LatentFlowMap):
        return teacher.with_latent(student)
    return LatentFlowMap(student, teacher.decode, teacher.encode, image_shape=tuple(teacher.image_shape))


@torch.no_grad()
def _states(teacher: FlowMap, data: Tensor | Sampler | None, seed: int, count: int = 1024) -> Tensor:
    """States for the estimate of mean and standard deviation, on the CPU."""
    if data is None:
        noise = teacher.noise(count, generator=seeded(seed, 0, -3))
        return torch.cat([teacher.flow(z).cpu() for z in noise.split(256)])
    images = data if isinstance(data, Tensor) else data(count, seeded(seed, 0, -3))
    # a data set may be sorted: take rows from all of it
    images = images[torch.linspace(0, len(images) - 1, min(count, len(images))).long()]
    images = images.float() / 255 if images.dtype == torch.uint8 else images
    return torch.cat([teacher.encode(part.to(teacher.device, teacher.dtype)).cpu() for part in images.split(256)])
