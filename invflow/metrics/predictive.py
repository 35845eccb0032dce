"""A check without a truth: whether a measurement looks like those that a posterior predicts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from invflow._core.random import as_generator
from invflow.likelihood import Likelihood
from invflow.posterior import Posterior

__all__ = ["PredictiveCheck", "predictive_check"]

_LEAST = 1e-12


@dataclass(frozen=True)
class PredictiveCheck:
    """Result of :func:`predictive_check`.

    Attributes:
        p_values: p-values by statistic, each ``(B,)``: ``"residual"`` and, for pictures, ``"regions"`` and
            ``"spectrum"``.
        regions: For pictures, ``(B, rows, columns)``: deviation of each region's mean squared residual from the
            predicted one, in standard deviations; otherwise None.
        bands: For pictures, ``(B, bands)``, the same by frequency, from low to high; otherwise None.
    """

    p_values: dict[str, Tensor]
    regions: Tensor | None = None
    bands: Tensor | None = None

    def passed(self, alpha: float = 0.05) -> Tensor:
        """Whether no p-value of an observation, corrected for their number, is below alpha: ``(B,)``.

        Args:
            alpha: Probability of a false alarm for each observation.
        """
        least = torch.stack(list(self.p_values.values())).amin(0)
        return least * len(self.p_values) > alpha

    def __str__(self) -> str:
        count = len(next(iter(self.p_values.values())))
        lines = [" ".join(["observation", *self.p_values])]
        for b in range(min(count, 20)):
            values = [f"{float(p[b]):{len(name)}.3f}" for name, p in self.p_values.items()]
            lines.append(" ".join([f"{b:11d}", *values]))
        return "\n".join(lines + (["..."] if count > 20 else []))


@torch.no_grad()
def predictive_check(posterior: Posterior, likelihood: Likelihood, *, num_replicates: int = 199, num_draws: int = 1,
                     grid: int = 4, bands: int = 4, generator: torch.Generator | int | None = None) -> PredictiveCheck:
    """Compare a measurement with replicates predicted by a posterior, without knowing the truth.

    For a posterior draw x, replicates y' ~ p(y | x) are simulated, and y is ranked among them by three statistics
    of its residual, each entry in units of its own predicted spread:

    - ``residual``: the mean square of all entries; both too large and too small values count;
    - ``regions``: the region of a picture whose mean square is farthest from the predicted one, which detects a mask, a
      kernel or a prior that is wrong somewhere;
    - ``spectrum``: the same for bands of frequency, which detects structure that was not fitted, such as edges, or
      correlated noise.

    If the model is right and x an exact posterior draw, then y and the replicates are exchangeable given x, so that
    with one draw each p-value is uniform (Johnson 2004; Gosselin 2011); the usual posterior predictive p-value is not.
    With several draws, the result depends less on a single one: twice the mean of their p-values is a p-value, though a
    conservative one (Vovk and Wang 2020). A sampler that overfits fails in the same way as a wrong model.

    Args:
        posterior: Posterior of B observations; weighted samples are resampled.
        likelihood: Likelihood of the measurement, with its noise level.
        num_replicates: Number of replicates per draw; p-values are multiples of about 1 / num_replicates.
        num_draws: Number of posterior draws.
        grid: Number of regions along each side of a picture.
        bands: Number of frequency bands.
        generator: Generator for draws and replicates; an int is a seed.

    Returns:
        P-values, and the deviations of the residual by region and frequency.

    Raises:
        ValueError: If a number is below 1, there are fewer samples than draws, or the numbers of observations differ.

    Example:
        >>> import torch, invflow
        >>> from invflow.metrics import predictive_check
        >>> from invflow.operators import Denoising
        >>> prior = invflow.GaussianMixtureFlow(torch.full((1, 1, 8, 8), 0.5), std=0.1)
        >>> y = 0.5 + 0.3 * torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> likelihood = invflow.GaussianLikelihood(Denoising((1, 8, 8)), y, sigma=0.1)  # the noise is three times that
        >>> posterior = invflow.ExactPosterior(prior).sample(likelihood, 8, generator=0)
        >>> bool(predictive_check(posterior, likelihood, generator=0).passed())
        False
    """
    if min(num_replicates, num_draws, grid, bands) < 1:
        raise ValueError(f"num_replicates={num_replicates}, num_draws={num_draws}, grid={grid} and bands={bands} must "
                         "be at least 1")
    if len(posterior) != likelihood.num_observations:
        raise ValueError(f"a posterior of {len(posterior)} observations and a likelihood of "
                         f"{likelihood.num_observations}: pass the likelihood that was sampled")
    if posterior.num_samples < num_draws:
        raise ValueError(f"{num_draws} draws of {posterior.num_samples} samples: pass num_draws="
                         f"{posterior.num_samples} or fewer")
    generator = as_generator(generator)
    draws = posterior.resample(num_draws, generator=generator).samples
    found: dict[str, list[Tensor]] = {}
    maps: dict[str, list[Tensor]] = {"regions": [], "bands": []}
    for x in draws.unbind(1):
        repeated = x[:, None].expand(-1, num_replicates, *x.shape[1:])
        replicates = torch.cat([likelihood.simulate(part, generator) for part in repeated.split(64, dim=1)], dim=1)
        every = torch.cat([likelihood.y[:, None].to(replicates), replicates], dim=1).double()
        # mean and spread include the measurement itself, like each replicate, which keeps the ranks uniform
        residual = (every - every.mean(1, keepdim=True)) / every.std(1, keepdim=True).clamp(min=_LEAST)
        observed = likelihood.operator.observed()
        mask = torch.ones_like(residual[:, :1]) if observed is None else observed[:, None].to(residual).expand_as(
            residual[:, :1])
        found.setdefault("residual", []).append(_two_sided(residual.flatten(2).square().sum(2)))
        if residual.ndim == 5:
            for name, values, key in (("regions", _by_region(residual, mask, grid), "regions"),
                                      ("spectrum", _by_band(residual, bands), "bands")):
                score = (values - values.mean(1, keepdim=True)) / values.std(1, keepdim=True).clamp(min=_LEAST)
                found.setdefault(name, []).append(_upper(score.abs().flatten(2).amax(2)))
                maps[key].append(score[:, 0])
    p_values = {name: _merged(torch.stack(values, 1)) for name, values in found.items()}
    shown = {key: torch.stack(values).mean(0) if values else None for key, values in maps.items()}
    return PredictiveCheck(p_values, shown["regions"], shown["bands"])


def _upper(statistic: Tensor) -> Tensor:
    """Share of ``(B, 1 + M)`` values at least as large as the first, including the first itself: ``(B,)``."""
    return (statistic >= statistic[:, :1]).double().mean(1)


def _two_sided(statistic: Tensor) -> Tensor:
    lower = (statistic <= statistic[:, :1]).double().mean(1)
    return (2 * torch.minimum(_upper(statistic), lower)).clamp(max=1)


def _merged(p_values: Tensor) -> Tensor:
    """One p-value from several with any dependence: ``(B, S)`` to ``(B,)``."""
    return p_values[:, 0] if p_values.shape[1] == 1 else (2 * p_values.mean(1)).clamp(max=1)


def _by_region(residual: Tensor, mask: Tensor, grid: int) -> Tensor:
    """Mean squares of the observed entries in regions of pictures ``(B, n, C, H, W)``: ``(B, n, r, c)``."""
    pool = torch.nn.functional.adaptive_avg_pool2d
    rows, columns = min(grid, residual.shape[3]), min(grid, residual.shape[4])
    square = pool(residual.square().mean(2).flatten(0, 1), (rows, columns)).unflatten(0, residual.shape[:2])
    share = pool(mask.mean(2).flatten(0, 1), (rows, columns)).unflatten(0, mask.shape[:2])
    return torch.where(share > 0, square / share.clamp(min=_LEAST), torch.zeros_like(square))


def _by_band(residual: Tensor, bands: int) -> Tensor:
    """Mean power of pictures ``(B, n, C, H, W)`` in rings of frequency: ``(B, n, bands)``."""
    power = torch.fft.fft2(residual, norm="ortho").abs().square().mean(2)
    height, width = residual.shape[3:]
    radius = (torch.fft.fftfreq(height)[:, None].square() + torch.fft.fftfreq(width)[None].square()).sqrt()
    ring = (radius / (0.5 + 1e-9) * bands).long().clamp(max=bands - 1).to(power.device)
    found = [power[..., ring == k].mean(-1) for k in range(bands) if bool((ring == k).any())]
    return torch.stack(found, 2)
