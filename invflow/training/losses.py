"""Training losses as pure functions: MeanFlow, flow matching, and the terms of an adapter.

Time runs from noise (t = 0) to data (t = 1); the papers use the opposite direction.
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

#: kinds of target for an average velocity with s < t; see :func:`meanflow_loss`
TANGENTS = ("map", "path", "semigroup")

#: side of the patches of the score, and factors by which images are downsampled first
PATCH, SCALES = 7, (1, 2, 4)

AverageVelocity = Callable[[Tensor, Tensor, Tensor], Tensor]


def sample_times(n: int, *, distinct: float = 0.5, one_step: float = 1 / 3, generator: torch.Generator,
                 device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, int]:
    """Draw pairs of times s <= t for the MeanFlow loss.

    Args:
        n: Number of rows.
        distinct: Share of rows with s < t; the others have s = t, plain flow matching.
        one_step: Share of the distinct rows with (s, t) = (0, 1), the jump of one-step samplers.
        generator: Source of randomness.
        device: Device of the times.

    Returns:
        s and t, each ``(n,)``, and the number of distinct rows, which come first.

    Raises:
        ValueError: For shares outside [0, 1].
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
    """Times drawn uniformly between s and t, each ``(n,)``, on the same device."""
    return torch.lerp(s, t, torch.rand(len(s), generator=generator, device=generator.device).to(s))


def average_velocity_jvp(u: AverageVelocity, x: Tensor, s: Tensor, t: Tensor, v: Tensor) -> Tensor:
    """Total derivative (d/ds) u(x_s, s, t) along dx = v ds: the Jacobian-vector product along (v, 1, 0).

    Args:
        u: Average velocity, ``(n, *shape), (n,), (n,) -> (n, *shape)``.
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
    """Average velocity from s to t of two jumps, s to r and r to t; equals u(x, s, t) for an exact flow map.

    This is the semigroup identity X_{s,t} = X_{r,t} o X_{s,r} (Frans et al. 2024 train on it with r half-way; Boffi et
    al. 2025 compare it with the derivatives).

    Args:
        u: Average velocity, ``(n, *shape), (n,), (n,) -> (n, *shape)``.
        x: ``(n, *shape)``, states at time s.
        s: ``(n,)``.
        t: ``(n,)``, t > s.
        middle: r, ``(n,)``, between s and t.

    Returns:
        ``(n, *shape)``, without a graph.
    """
    with torch.no_grad():
        first = u(x, s, middle)
        second = u(x + expand_time(middle - s, x) * first, middle, t)
        # in single precision one pair of draws in sixteen million has equal times, where both averages agree
        share = torch.where(t > s, (middle - s) / (t - s), 0.5)
        return torch.lerp(second, first, expand_time(share, x).to(first.dtype))


def meanflow_loss(u: AverageVelocity, noise: Tensor, data: Tensor, s: Tensor, t: Tensor,
                  num_distinct: int | None = None, middle: Tensor | None = None, *,
                  tangent: str = "path") -> Tensor:
    r"""MeanFlow loss of each row, summed over the state (Geng et al. 2025).

    With v = m - z and :math:`x_s = (1 - s) z + s m`, u(x_s, s, t) regresses on v + (t - s) sg[du/ds]; for s = t
    this is conditional flow matching. The Jacobian-vector product is computed only for the rows with s < t.
    Gradients reach ``noise`` through x_s and v, and this is how the loss trains an adapter.

    The derivative along the path is linear in its direction, so v and its mean b_s(x_s) lead to the same
    regression. With the map's own velocity u(x_s, s, s) for b, at the cost of one more call, the target's noise is
    v - b. With v it is v - b times the Jacobian of the jump, which is a contraction for an exact map but not
    for a network in training: on MNIST the loss was several times larger.

    ``tangent="semigroup"`` takes no derivative: for s < t, u(x_s, s, t) regresses on sg[the average velocity of two
    jumps through a time in between], and for s = t on v as before. This target has no noise, and averaging
    damps errors, while a derivative amplifies the fast ones. On the checkerboard, whose map has sharp edges, it needed
    a fifth of the steps of the path's tangent. The price is that errors at small gaps propagate to large
    ones. Rows with s < t then have no gradient for the noise; only the others train it.

    Args:
        u: Average velocity, ``(n, *shape), (n,), (n,) -> (n, *shape)``.
        noise: z, ``(n, *shape)``, the end of the path at time 0.
        data: m, ``(n, *shape)``, the end of the path at time 1.
        s: ``(n,)``.
        t: ``(n,)``, t >= s.
        num_distinct: Number of rows with s < t, if those come first; None counts them.
        middle: ``(n,)``, times between s and t, as from :func:`sample_between`; only for ``"semigroup"``.
        tangent: Direction of the derivative, ``"path"`` for v, ``"map"`` for u(x_s, s, s); or ``"semigroup"``.

    Returns:
        ``(n,)``.

    Raises:
        ValueError: For an unknown tangent, or ``"semigroup"`` without ``middle``.
    """
    if tangent not in TANGENTS:
        raise ValueError(f"tangent={tangent!r} is unknown: pass one of {', '.join(TANGENTS)}")
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
    """Fair CRPS of two independent samples, summed over pixels, ``(n,)``; minimal for the posterior's marginals.

    (|a - x| + |b - x| - |a - b|) / 2 has the same mean as the CRPS of the law of a and b (Ferro 2014), a
    proper score (Gneiting and Raftery 2007). A generator trained with it learns the law of each pixel, not only its
    mean (engression, Shen and Meinshausen 2024).

    Args:
        first: ``(n, *shape)``.
        second: ``(n, *shape)``, independent of the first given the observation.
        truth: ``(n, *shape)``.
    """
    return 0.5 * ((first - truth).abs() + (second - truth).abs() - (first - second).abs()).flatten(1).sum(dim=1)


def patch_score(first: Tensor, second: Tensor, truth: Tensor) -> Tensor:
    """Fair energy score of two independent samples over patches and scales, ``(n,)``, scaled like a summed CRPS.

    The CRPS of :func:`pair_score` only sees the law of each pixel: it does not penalise samples with correct marginals
    but wrong correlations between pixels. Here the absolute value is replaced by the Euclidean norm of patches of
    7 x 7 pixels, all channels together (Gneiting and Raftery 2007; over patches, Pacchiardi et al. 2024), so the score
    depends on the law of patches. The same score for images averaged over 2 x 2 and 4 x 4 pixels has a longer range.
    The score is minimal if patches have the right law; it ignores dependence beyond a patch.

    Args:
        first: ``(n, C, H, W)``; vectors ``(n, d)`` are one patch.
        second: Sample of the same shape, independent of the first given the observation.
        truth: Truth, of the same shape.
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
            return (patches + 1e-8).sqrt().flatten(1).mean(1)  # a square root has no gradient at 0

        total = total + norms(a - x) + norms(b - x) - norms(a - b)
    return 0.5 * size / len(scales) * total


def normalise(loss: Tensor, power: float = 1.0, offset: float = 0.01) -> Tensor:
    """Divide a batch's loss by a power of its own detached value, L / sg(L + c)^p: one scalar for the batch.

    Applied to each image, this would bias the regression away from the velocity. Applied to the batch, it mainly sets
    the size of the step. A small bias remains: batches with a small loss weigh more, so a small batch is pulled
    slightly away from the optimum of the mean. The bias falls as 1 / batch.
    """
    return loss / (loss.detach().abs() + offset) ** power


def scale_gradient(x: Tensor, factor: Tensor) -> Tensor:
    """Return ``x``, with its gradient multiplied by ``factor`` (broadcast against x) in the backward pass."""
    return x * factor + (x * (1 - factor)).detach()
