"""Training objectives as pure functions: MeanFlow, flow matching, and what an adapter adds to them.

Time runs from noise (t = 0) to data (t = 1); the papers run it the other way.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from invflow.flowmap import expand_time

__all__ = [
    "PATCH", "SCALES", "TANGENTS", "average_velocity_jvp", "gaussian_kl", "meanflow_loss", "normalise", "pair_score",
    "patch_score", "sample_between", "sample_times", "scale_gradient", "semigroup_average",
]

#: what the loss compares an average velocity with, where s < t; see :func:`meanflow_loss`
TANGENTS = ("map", "path", "semigroup")

#: side of the patches that samples are scored by, and the factors that images are averaged down by before
PATCH, SCALES = 7, (1, 2, 4)

AverageVelocity = Callable[[Tensor, Tensor, Tensor], Tensor]


def sample_times(n: int, *, distinct: float = 0.5, one_step: float = 1 / 3, generator: torch.Generator,
                 device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, int]:
    """Draw pairs of times s <= t for the MeanFlow loss.

    Args:
        n: rows.
        distinct: share of rows with s < t; the others have s = t, plain flow matching.
        one_step: share of the distinct rows with (s, t) = (0, 1), the jump that one-step samplers make.
        generator: source of randomness.
        device: where the times are wanted.

    Returns:
        s and t, each ``(n,)``, and how many rows are distinct: those come first.

    Raises:
        ValueError: for shares outside [0, 1].
    """
    if not (0 <= distinct <= 1 and 0 <= one_step <= 1):
        raise ValueError(f"distinct={distinct} and one_step={one_step} are shares: pass numbers in [0, 1]")
    num_distinct = round(n * distinct)
    num_one = round(num_distinct * one_step)
    draws = torch.rand(n, 2, generator=generator, device=generator.device)
    s, t = draws.min(dim=1).values, draws.max(dim=1).values
    s[num_distinct:] = t[num_distinct:] = draws[num_distinct:, 0]
    s[:num_one], t[:num_one] = 0.0, 1.0
    return s.to(device), t.to(device), num_distinct


def sample_between(s: Tensor, t: Tensor, generator: torch.Generator) -> Tensor:
    """Times drawn uniformly between s and t, each ``(n,)``, on their device."""
    return torch.lerp(s, t, torch.rand(len(s), generator=generator, device=generator.device).to(s))


def average_velocity_jvp(u: AverageVelocity, x: Tensor, s: Tensor, t: Tensor, v: Tensor) -> Tensor:
    """Total derivative (d/ds) u(x_s, s, t) along dx = v ds: the Jacobian-vector product along (v, 1, 0).

    Args:
        u: average velocity, ``(n, *shape), (n,), (n,) -> (n, *shape)``.
        x: ``(n, *shape)``, states at time s.
        s: ``(n,)``.
        t: ``(n,)``.
        v: ``(n, *shape)``, velocity of the path.

    Returns:
        ``(n, *shape)``, without a graph.
    """
    with torch.no_grad():
        tangent: Tensor = torch.func.jvp(lambda a, b: u(a, b, t), (x, s), (v, torch.ones_like(s)))[1]
    return tangent.detach()


def semigroup_average(u: AverageVelocity, x: Tensor, s: Tensor, t: Tensor, middle: Tensor) -> Tensor:
    """Average velocity from s to t of two jumps, s to r and r to t: for an exact flow map, u(x, s, t) itself.

    That is the semigroup identity X_{s,t} = X_{r,t} o X_{s,r} (Frans et al. 2024 train on it with r half-way; Boffi et
    al. 2025 compare it with the derivatives).

    Args:
        u: average velocity, ``(n, *shape), (n,), (n,) -> (n, *shape)``.
        x: ``(n, *shape)``, states at time s.
        s: ``(n,)``.
        t: ``(n,)``, above s.
        middle: r, ``(n,)``, between s and t.

    Returns:
        ``(n, *shape)``, without a graph.
    """
    with torch.no_grad():
        first = u(x, s, middle)
        second = u(x + expand_time(middle - s, x) * first, middle, t)
        # in single precision one pair of draws in sixteen million is the same time twice, where both averages agree
        share = torch.where(t > s, (middle - s) / (t - s), 0.5)
        return torch.lerp(second, first, expand_time(share, x).to(first.dtype))


def meanflow_loss(u: AverageVelocity, noise: Tensor, data: Tensor, s: Tensor, t: Tensor,
                  num_distinct: int | None = None, middle: Tensor | None = None, *,
                  tangent: str = "path") -> Tensor:
    r"""MeanFlow loss of each row, summed over the state (Geng et al. 2025).

    With v = m - z and :math:`x_s = (1 - s) z + s m`, u(x_s, s, t) regresses on v + (t - s) sg[du/ds]; where s = t
    that is conditional flow matching. The Jacobian-vector product is computed for the rows with s < t alone.
    Gradients reach ``noise`` through x_s and v, which is how the loss shapes an adapter.

    The derivative along the path is linear in its direction, so that v and its mean b_s(x_s) lead to the same
    regression. With the map's own velocity u(x_s, s, s) for b, one more call, the target's noise is v - b; with v it is
    that times the Jacobian of the jump, which an exact map contracts but a network still in training roughens: on MNIST
    the loss was several times larger.

    ``tangent="semigroup"`` takes no derivative: where s < t, u(x_s, s, t) regresses on sg[the average velocity of two
    jumps through a time between], and where s = t on v as before. That target has no noise at all, and averaging
    damps errors where a derivative amplifies the fast ones: on the checkerboard, whose map has sharp edges, it reached
    in a fifth of the steps what the path's tangent did. Its price is that errors at small gaps are carried on to large
    ones. The rows with s < t then say nothing about the noise, which the others alone shape.

    Args:
        u: average velocity, ``(n, *shape), (n,), (n,) -> (n, *shape)``.
        noise: z, ``(n, *shape)``, the end of the path at time 0.
        data: m, ``(n, *shape)``, the end of the path at time 1.
        s: ``(n,)``.
        t: ``(n,)``, not below s.
        num_distinct: how many rows have s < t, if those come first; None looks.
        middle: ``(n,)``, times between s and t, such as :func:`sample_between` draws; for ``"semigroup"`` alone.
        tangent: direction of the derivative, ``"path"`` for v, ``"map"`` for u(x_s, s, s); or ``"semigroup"``.

    Returns:
        ``(n,)``.

    Raises:
        ValueError: for an unknown tangent, or the semigroup without its times.
    """
    if tangent not in TANGENTS:
        raise ValueError(f"there is no tangent {tangent!r}: pass one of {', '.join(TANGENTS)}")
    if tangent == "semigroup" and middle is None:
        raise ValueError("tangent='semigroup' jumps through times between s and t: pass middle=sample_between(s, t, g)")
    column = expand_time(s, data)
    v = data - noise
    x = (1 - column) * noise + column * data
    rows = torch.nonzero(s != t)[:, 0] if num_distinct is None else slice(0, num_distinct)
    target = v
    if tangent == "semigroup" and middle is not None:
        apart = torch.zeros(len(s), dtype=torch.bool, device=s.device)
        apart[rows] = True
        apart = apart.view_as(column)
        x = torch.where(apart, x.detach(), x)
        if s[rows].numel():
            average = torch.zeros_like(v)
            average[rows] = semigroup_average(u, x[rows].detach(), s[rows], t[rows], middle[rows]).to(v.dtype)
            target = torch.where(apart, average, v)
    elif s[rows].numel():
        if tangent == "map":
            with torch.no_grad():
                direction = u(x[rows], s[rows], s[rows]).to(v.dtype)
        else:
            direction = v[rows].detach()
        derivative = average_velocity_jvp(u, x[rows].detach(), s[rows], t[rows], direction)
        correction = torch.zeros_like(v)
        correction[rows] = (expand_time(t, v) - column)[rows] * derivative.to(v.dtype)
        target = v + correction
    return (u(x, s, t) - target).square().flatten(1).sum(dim=1)


def gaussian_kl(mean: Tensor, log_std: Tensor) -> Tensor:
    """KL(N(mean, diag std^2) || N(0, I)) of each row, summed: ``(n, *shape)`` twice to ``(n,)``."""
    return 0.5 * (mean.square() + (2 * log_std).exp() - 1 - 2 * log_std).flatten(1).sum(dim=1)


def pair_score(first: Tensor, second: Tensor, truth: Tensor) -> Tensor:
    """Fair CRPS of two independent samples, summed over pixels, ``(n,)``: least for the margins of the posterior.

    (|a - x| + |b - x| - |a - b|) / 2 has the mean of the CRPS of the law that a and b are drawn from (Ferro 2014), a
    proper score (Gneiting and Raftery 2007): a generator trained by it meets each pixel's whole law, not its mean alone
    (engression, Shen and Meinshausen 2024).

    Args:
        first: ``(n, *shape)``.
        second: ``(n, *shape)``, independent of the first given the observation.
        truth: ``(n, *shape)``.
    """
    return 0.5 * ((first - truth).abs() + (second - truth).abs() - (first - second).abs()).flatten(1).sum(dim=1)


def patch_score(first: Tensor, second: Tensor, truth: Tensor) -> Tensor:
    """Fair energy score of two independent samples over patches and scales, ``(n,)``, of the size of a CRPS's sum.

    The CRPS of :func:`pair_score` knows each pixel's law by itself: a sample that is right in all of them, with pixels
    that go together where they should not, costs nothing. Here the absolute value is the Euclidean norm of patches of
    7 x 7 pixels, all channels together (Gneiting and Raftery 2007; over patches, Pacchiardi et al. 2024), which tells
    laws of patches apart. The same of images averaged over 2 x 2 and 4 x 4 pixels reaches further. Patches are right
    in law where the score is least; what goes beyond a patch is not looked at.

    Args:
        first: ``(n, C, H, W)``; vectors ``(n, d)`` are one patch.
        second: the same shape, independent of the first given the observation.
        truth: the same shape.
    """
    if first.ndim != 4:
        first, second, truth = (x.flatten(1)[:, None, None] for x in (first, second, truth))
    size, total = math.prod(truth.shape[1:]), truth.new_zeros(len(truth))
    scales = [k for k in SCALES if min(truth.shape[2:]) >= k]
    for k in scales:
        a, b, x = (avg_pool2d(image, k) if k > 1 else image for image in (first, second, truth))
        sides = tuple(min(PATCH, side) if truth.shape[2] > 1 else side for side in x.shape[2:])

        def norms(difference: Tensor) -> Tensor:
            patches = avg_pool2d(difference.square().mean(1, keepdim=True), sides, 1)  # noqa: B023
            return (patches + 1e-8).sqrt().flatten(1).mean(1)  # a root has no gradient at 0

        total = total + norms(a - x) + norms(b - x) - norms(a - b)
    return 0.5 * size / len(scales) * total


def normalise(loss: Tensor, power: float = 1.0, offset: float = 0.01) -> Tensor:
    """Divide a batch's loss by its own detached size, L / sg(L + c)^p: one scalar for the batch.

    Applied to each image it would move the regression off the velocity; applied to the batch it sets the size of the
    step. Not quite alone: the size is the batch's own, so that batches of small loss weigh more, and what a small batch
    is pulled towards lies a little off the mean's optimum. The bias falls as 1 / batch.
    """
    return loss / (loss.detach().abs() + offset) ** power


def scale_gradient(x: Tensor, factor: Tensor) -> Tensor:
    """``x`` itself, whose gradient is multiplied by ``factor`` (broadcast against x) on the way back."""
    return x * factor + (x * (1 - factor)).detach()
