"""Checks that a likelihood is the density of its simulated measurements: normalised, summed, of the right width."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from invflow._core.shapes import only_observed, with_axes
from invflow.likelihood import Likelihood
from invflow.testing._tools import expect, expect_close, rounding

__all__ = ["check_density"]

#: number of simulated values of a measurement, and the most at a time
_SIMULATED, _VALUES = 200_000, 3_000_000
#: extent of a grid over one entry of the measurement in standard deviations, and its largest resolution
_REACH, _POINTS = 20.0, 5_000
_STANDARD_ERRORS = 5.0


def check_density(likelihood: Likelihood, x: Tensor, seed: int) -> None:
    """Check that a likelihood is a normalised density, and that ``simulate`` draws from it.

    For y drawn from p(. | c), the ratio p(y | c') / p(y | c) has mean one for every c'. This holds for counts and
    real numbers, for smooth densities and others, and fails if the draws have another width or mean, or if
    the score is a multiple of a log density. The check runs for each entry, with c = A(x); for a likelihood that is not
    a product over entries (its ``log_density`` raises NotImplementedError), for whole measurements.

    Args:
        likelihood: Likelihood in float64.
        x: ``(B, N, *image_shape)``.
        seed: Random seed of measurements and directions.

    Raises:
        AssertionError: For a deviation beyond five standard errors.
    """
    name, clean = type(likelihood).__name__, likelihood.predict(x)
    try:
        terms = likelihood.log_density(likelihood.y[:, None].to(clean), clean)
    except NotImplementedError:
        _check_whole(likelihood, x, seed)
        return
    expect(terms.shape == clean.shape,
           f"{name}: log_density has shape {tuple(terms.shape)}, expected (B, N, *measurement_shape) = "
           f"{tuple(clean.shape)}, one number for each entry")
    _check_sum(likelihood, x, terms)
    _check_integral(likelihood, clean)
    _check_entries(likelihood, x, clean, seed)


def _check_sum(likelihood: Likelihood, x: Tensor, terms: Tensor) -> None:
    """Check that the score is the sum over the observed entries, not their mean or a multiple."""
    name, observed = type(likelihood).__name__, likelihood.operator.observed()
    kept = only_observed(terms, observed)
    total, score = kept.flatten(2).sum(2), likelihood(x)
    entries = likelihood.count_observed().expand(len(x))[:, None].to(total)
    averaged = bool(((score * entries - total).abs() <= 1e-6 * total.abs()).all() and (entries > 1).any())
    advice = "A likelihood is the log density of the whole measurement: the sum, without further factors"
    if averaged:
        advice = (f"It is averaged over the {int(entries.max())} observed entries, a mean instead of a sum, which "
                  "tempers the posterior by their number")
    expect_close(score, total, 10 * rounding(x.dtype),
                 f"{name}: the score, against the sum of log_density over the observed entries", advice)


def _check_integral(likelihood: Likelihood, clean: Tensor) -> None:
    """Integral of e^log_density over each entry of one measurement, for the first image of each observation."""
    name, clean = type(likelihood).__name__, clean[:, :1]
    draws = torch.cat([likelihood.draw(clean, torch.Generator().manual_seed(k)) for k in range(64)], 1)
    counts = bool((draws == draws.round()).all())
    centre, spread = draws.mean(1, keepdim=True), draws.std(1)
    reach = _REACH * float(spread.max())
    if counts:
        centre, step = centre.round(), 1.0
        offsets = torch.arange(-int(reach) - 20, int(reach) + 21, dtype=clean.dtype, device=clean.device)
    else:
        # the trapezoidal rule needs steps much smaller than the narrowest entry's standard deviation
        points = 32 * int(reach / float(spread.clamp(min=reach / _POINTS).min()) + 1) + 1
        offsets = torch.linspace(-reach, reach, points, dtype=clean.dtype, device=clean.device)
        step = float(offsets[1] - offsets[0])
    total = torch.zeros_like(clean)
    for part in offsets.split(max(1, _VALUES // clean.numel())):
        y = centre + with_axes(part[None], clean.ndim)
        density = likelihood.log_density(y.clamp(min=0) if counts else y, clean).exp()
        total += (torch.where(y < 0, 0.0, density) if counts else density).sum(1, keepdim=True) * step
    worst = float(total.flatten()[int((total - 1).abs().argmax())])
    what = "sums to one over the counts" if counts else "integrates to one over the entry"
    expect(abs(worst - 1) <= 5e-3,
           f"{name}: e^log_density of an entry sums to {worst:.4g}, but a density {what}. It is not normalised: look "
           "for missing terms, such as -log(sigma sqrt(2 pi)) or -log(y!), and at factors before the exponent")


def _check_entries(likelihood: Likelihood, x: Tensor, clean: Tensor, seed: int) -> None:
    observed = likelihood.operator.observed()
    seen = torch.ones_like(clean, dtype=torch.bool) if observed is None else observed[:, None].expand_as(clean)
    repeats = max(4, min(500, _SIMULATED // clean.numel()))
    generator = torch.Generator().manual_seed(seed)
    y = torch.stack([likelihood.simulate(x, generator) for _ in range(repeats)])  # (repeats, B, N, *measurement_shape)

    def log_density(h: float) -> Tensor:
        return torch.stack([likelihood.log_density(part, clean + h) for part in y])[:, seen].double()

    _expect_ratios(type(likelihood).__name__, log_density, "the entries of a measurement", clean.expand_as(y)[:, seen])


def _check_whole(likelihood: Likelihood, x: Tensor, seed: int) -> None:
    count, size = len(x), max(1, x[0, 0].numel(), likelihood.y[0].numel())
    repeats = max(8, min(3000, _VALUES // size) // count)
    generator = torch.Generator().manual_seed(seed)
    runs = likelihood.select(torch.arange(count).repeat_interleave(repeats))
    image = x[:, :1].repeat_interleave(repeats, 0)
    runs.y = runs.simulate(image, generator)[:, 0]
    direction = torch.randn(image.shape, generator=generator, dtype=image.dtype)

    def log_density(h: float) -> Tensor:
        return runs(image + h * direction)[:, 0]

    _expect_ratios(type(likelihood).__name__, log_density, "whole measurements")


@torch.no_grad()
def _expect_ratios(name: str, log_density: Callable[[float], Tensor], what: str, clean: Tensor | None = None) -> None:
    """Check that e^(l(h) - l(0)) averages one, for h such that l(h) - l(0) varies by about 0.7.

    If the noiseless measurement is given, bright and dark entries are checked separately: noise that does not grow as
    the density states can be too strong for one and too weak for the other, and right on average.
    """
    here, small = log_density(0.0), 1e-4
    ends = log_density(small), log_density(-small)
    slope, bend = (ends[0] - ends[1]) / (2 * small), (ends[0] + ends[1] - 2 * here) / small**2
    h = 0.7 / max(float(slope.square().mean().sqrt()), 1e-12)
    # upwards only: lower intensities may be impossible, as for counts
    difference = log_density(h) - here
    if not bool(difference.isfinite().all()):  # the density is not positive everywhere: the identity does not hold
        return
    bright = torch.ones_like(here, dtype=torch.bool) if clean is None else clean > clean.median()
    for some, which in ((bright, "" if clean is None else ", bright ones"), (~bright, ", dark ones")):
        if int(some.sum()) < 100:
            continue
        ratio = difference[some].exp()
        off, error = float(ratio.mean() - 1), float(ratio.std() / ratio.numel() ** 0.5)
        width = float(slope[some].var()) / max(-float(bend[some].mean()), 1e-12)
        _expect_one(f"{name}: for {what}{which}", off, error, width)


def _expect_one(what: str, off: float, error: float, width: float) -> None:
    expect(abs(off) <= _STANDARD_ERRORS * error + 1e-6,
           f"{what} drawn by simulate at A(x), the density at another point over that at A(x) averages "
           f"{1 + off:.3g}, {abs(off) / error:.0f} standard errors from 1: simulate does not draw from the density "
           f"that the score states. Either its noise has about {width**0.5:.3g} times the standard deviation of "
           f"the density (1: look for an offset), or the score is about {width:.3g} times a log density")
