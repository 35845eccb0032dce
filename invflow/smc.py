"""Building blocks of sequential Monte Carlo as pure functions: resampling, effective sample size, tempering, k-hat.

All functions work on B observations with N particles each, ``(B, N)``, and none loops over B.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from invflow._core.checks import precise
from invflow._core.random import as_generator

__all__ = [
    "RESAMPLERS", "conditional_ess", "count_distinct", "effective_ancestors", "effective_sample_size",
    "log_mean_weight", "multinomial", "next_temperature", "pareto_k_hat", "precise", "reliable_k_hat", "residual",
    "scale_log", "ssp", "stratified", "systematic",
]

_BISECTIONS = 60
_LEAST_TAIL = 5  # the index of a tail with fewer draws cannot be estimated
_HEAVY_SHARE = 0.1  # a tail that short is degenerate if it exceeds the rest by more than this share of all weight


# -- resampling: (B, N) weights to (B, n) indices ---------------------------------------------------------
#
# In each method particle i appears n w_i / sum(w) times on average, and a particle of weight zero never. The
# weights are at least 0, not all 0, and may have any sum. The indices of one observation are in ascending order,
# except for those of `multinomial` and the drawn part of `residual`.


def multinomial(weights: Tensor, n: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw independently (Gordon, Salmond, Smith 1993): the highest variance and the simplest theory.

    Args:
        weights: Weights ``(B, N)``, at least 0, with any positive sum.
        n: Number of draws for each observation, at least 1.
        generator: Random generator.

    Returns:
        Indices into N, ``(B, n)``.

    Raises:
        ValueError: If the weights have the wrong shape, are negative, not finite or all zero, or if ``n`` is below 1.
    """
    cumulative = _cumulative(weights, n)
    return _invert(cumulative, _uniform((len(weights), n), weights, generator))


def stratified(weights: Tensor, n: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw one uniform number in each of n equal strata (Kitagawa 1996); arguments as in :func:`multinomial`."""
    cumulative = _cumulative(weights, n)
    return _invert(cumulative, _strata(_uniform((len(weights), n), weights, generator), n))


def systematic(weights: Tensor, n: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw one uniform number, shared by all n strata (Kitagawa 1996); arguments as in :func:`multinomial`.

    A particle appears n w times, rounded up or down.

    Example:
        >>> import torch
        >>> from invflow.smc import systematic
        >>> systematic(torch.tensor([[0.5, 0.25, 0.25]]), 4, torch.Generator().manual_seed(0))
        tensor([[0, 0, 1, 2]])
    """
    cumulative = _cumulative(weights, n)
    return _invert(cumulative, _strata(_uniform((len(weights), 1), weights, generator), n))


def residual(weights: Tensor, n: int, generator: torch.Generator | None = None) -> Tensor:
    """Copy each particle floor(n w) times and draw the rest multinomially (Liu and Chen 1998).

    Arguments as in :func:`multinomial`.
    """
    copies, fraction = _whole_copies(_cumulative(weights, n), n)
    # always draw the largest number that could be needed: the count of random numbers then never depends on
    # the weights, so that the draws of one observation do not depend on the others
    uniform = _uniform((len(weights), n), weights, generator)
    drawn = _invert(fraction.cumsum(1), uniform)
    place = torch.arange(n, device=weights.device)
    return torch.where(place < copies.sum(1, keepdim=True), _repeat(copies, n), drawn)


def ssp(weights: Tensor, n: int, generator: torch.Generator | None = None) -> Tensor:
    """Srinivasan's sampling process (2001), as resampling (Gerber, Chopin, Whiteley 2019).

    Arguments as in :func:`multinomial`. A particle appears n w times, rounded up or down. The numbers of
    copies are negatively associated, so the method is consistent for any order of the particles; systematic
    resampling has no such guarantee. It loops over N, for all observations at once, and is slower than the others.
    """
    copies, fraction = _whole_copies(_cumulative(weights, n), n)
    uniform = _uniform(tuple(weights.shape), weights, generator)
    rows = torch.arange(len(weights), device=weights.device)
    # one particle at a time is open, with a fraction of a copy still undecided. It is paired once with every
    # other particle; afterwards one of the two has no fraction left, or a whole copy
    owner, open_fraction = torch.zeros_like(rows), fraction[:, 0]
    for k in range(1, weights.shape[1]):
        other, u = fraction[:, k], uniform[:, k]
        total = open_fraction + other
        whole = total >= 1
        # probabilities that preserve both expectations: of winning the whole copy, or else of staying open
        win = (1 - other) / (2 - total).clamp(min=1e-300)
        stay = open_fraction / total.clamp(min=1e-300)
        first = u < torch.where(whole, win, stay)
        winner = torch.where(first, owner, k)
        copies[rows, winner] += whole
        # the particle that wins a whole copy is decided; otherwise the one that loses its whole fraction is
        owner = torch.where(first ^ whole, owner, k)
        open_fraction = torch.where(whole, total - 1, total)
    copies[rows, owner] += open_fraction > 0.5  # 0 or 1 up to rounding, since the copies add up to n
    return _repeat(copies, n)


#: the resamplers by name
RESAMPLERS: dict[str, Callable[[Tensor, int, torch.Generator | None], Tensor]] = {
    "multinomial": multinomial, "stratified": stratified, "systematic": systematic, "residual": residual,
    "ssp": ssp,
}


def _cumulative(weights: Tensor, n: int) -> Tensor:
    """Cumulative normalised weights ``(B, N)`` in float64; or a clear error."""
    if n < 1:
        raise ValueError(f"resampling draws at least one particle, not n={n}")
    if weights.ndim != 2 or weights.shape[1] == 0:
        raise ValueError(f"weights have shape {tuple(weights.shape)}, expected (B, N): pass weights[None] "
                         "for one observation")
    total = precise(weights).cumsum(1)
    # this also rejects a sum that is NaN or infinite; the check waits for the GPU once per resampling
    valid = (weights >= 0).all(1) & (total[:, -1] > 0) & (total[:, -1] < torch.inf)
    if not bool(valid.all()):
        b = int((~valid).nonzero()[0])
        raise ValueError(f"the weights of observation {b} must be at least 0 with a finite, positive sum, but lie "
                         f"between {float(weights[b].min())} and {float(weights[b].max())}: for log weights "
                         "pass log_weights.softmax(1)")
    return total / total[:, -1:]


def _uniform(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    generator = as_generator(generator)
    device = generator.device
    wide = torch.float32 if device.type == "mps" else torch.float64
    return precise(torch.rand(shape, generator=generator, device=device, dtype=wide).to(like.device))


def _strata(uniform: Tensor, n: int) -> Tensor:
    return (torch.arange(n, device=uniform.device) + uniform) / n


def _invert(cumulative: Tensor, points: Tensor) -> Tensor:
    """Index of the particle whose step of the cumulative weights contains each point of [0, 1)."""
    total = cumulative[:, -1:]
    index = torch.searchsorted(cumulative, (points * total).contiguous(), right=True)
    # a point that rounding moved onto the total belongs to the last particle with positive weight
    return index.minimum(torch.searchsorted(cumulative, total.contiguous()))


def _whole_copies(cumulative: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Integer part and fraction of n w, ``(B, N)`` each."""
    expected = n * cumulative.diff(dim=1, prepend=torch.zeros_like(cumulative[:, :1]))
    # rounding turns 1 into 0.999...: without the margin, equal weights would be drawn at random
    copies = (expected + 1e-9).floor()
    return copies.long(), (expected - copies).clamp(min=0)


def _repeat(copies: Tensor, n: int) -> Tensor:
    """Indices ``(B, n)`` in which particle i appears ``copies[i]`` times."""
    place = torch.arange(n, device=copies.device).expand(len(copies), n).contiguous()
    return torch.searchsorted(copies.cumsum(1), place, right=True).clamp(max=copies.shape[1] - 1)


# -- effective sample size, evidence, ancestors -------------------------------------------------------------


def effective_sample_size(log_weights: Tensor) -> Tensor:
    """Effective sample size (sum w)^2 / sum w^2 (Kong, Liu, Wong 1994).

    Args:
        log_weights: Log weights ``(B, N)``, not necessarily normalised; -inf is a weight of zero.

    Returns:
        ``(B,)``, in particles, from 1 to N; 0 if all weights are zero.

    Example:
        >>> import torch
        >>> from invflow.smc import effective_sample_size
        >>> effective_sample_size(torch.tensor([[0.5, 0.5, 0.0]]).log())
        tensor([2.], dtype=torch.float64)
    """
    log_weights = precise(log_weights)
    ess = (2 * log_weights.logsumexp(1) - (2 * log_weights).logsumexp(1)).exp()
    return ess.nan_to_num(nan=0.0)


def conditional_ess(log_weights: Tensor, log_increments: Tensor) -> Tensor:
    """Conditional effective sample size N (sum W w)^2 / sum W w^2 (Zhou, Johansen, Aston 2016).

    It measures the quality of the increments w alone, as if the particles with weights W were a perfect
    sample of the current distribution. With equal W it equals the effective sample size.

    Args:
        log_weights: Log W, ``(B, N)``, not necessarily normalised.
        log_increments: Log w, ``(B, N)``.

    Returns:
        ``(B,)``, in particles, from 0 to N.
    """
    log_weights, log_increments = precise(log_weights).log_softmax(1), precise(log_increments)
    first = (log_weights + log_increments).logsumexp(1)
    second = (log_weights + 2 * log_increments).logsumexp(1)
    return (log_weights.shape[1] * (2 * first - second).exp()).nan_to_num(nan=0.0)


def log_mean_weight(log_weights: Tensor, log_increments: Tensor) -> Tensor:
    """Log of the mean increment, log sum W w / sum W: the contribution of one step to the log evidence.

    Summed over the steps of an annealed run, it is the log of an estimate of the evidence. That estimate is unbiased
    for a schedule fixed beforehand (Del Moral 2004, "Feynman-Kac Formulae", section 7.4).

    Args:
        log_weights: Log W before the step, ``(B, N)``, not necessarily normalised.
        log_increments: Log w, ``(B, N)``.

    Returns:
        ``(B,)``.
    """
    return (precise(log_weights).log_softmax(1) + precise(log_increments)).logsumexp(1)


def count_distinct(labels: Tensor) -> Tensor:
    """Number of distinct values (such as ancestors) in each row: ``(B, N)`` to ``(B,)``."""
    return 1 + (labels.sort(1).values.diff(dim=1) != 0).sum(1)


def effective_ancestors(ancestors: Tensor, log_weights: Tensor) -> Tensor:
    """Number of independent particles equivalent to those left: 1 / sum s^2 over the ancestors' shares s of the weight.

    The descendants of one ancestor are copies that moved apart, and may all be wrong together. The same shares give
    the variance of a run: 1 / (this number) - 1 / N is about the relative variance of its evidence (Chan and
    Lai 2013, "A general theory of particle filters in hidden Markov models"; Lee and Whiteley 2018, "Variance
    estimation in the particle filter").

    Args:
        ancestors: ``(B, N)``, the index in [0, N) of each particle's ancestor at the beginning.
        log_weights: Log weights ``(B, N)``, not necessarily normalised.

    Returns:
        ``(B,)``, from 1 to the number of different ancestors, and at most the effective sample size.

    Example:
        >>> import torch
        >>> from invflow.smc import effective_ancestors
        >>> effective_ancestors(torch.tensor([[0, 0, 0, 3]]), torch.zeros(1, 4))  # shares of 3/4 and 1/4
        tensor([1.6000], dtype=torch.float64)
    """
    weights = precise(log_weights).softmax(1)
    return 1 / torch.zeros_like(weights).scatter_add(1, ancestors, weights).square().sum(1)


# -- tempering --------------------------------------------------------------------------------------------


def scale_log(scale: Tensor, log_ratio: Tensor) -> Tensor:
    """``scale * log_ratio`` with the convention 0 (-inf) = 0: any weight to the power zero is one."""
    return torch.where(scale == 0, 0.0, scale * log_ratio)


def next_temperature(log_ratio: Tensor, temperature: Tensor, threshold: float,
                     log_weights: Tensor | None = None) -> Tensor:
    """Find the largest temperature whose step keeps enough conditional effective sample size, by bisection.

    The step from temperature a to b has the increments (b - a) log_ratio. Their conditional effective sample
    size falls as b grows. Particles with a log ratio of -inf are lost in any step, however small, and are not
    counted in the share to be kept.

    Args:
        log_ratio: Log of the ratio of final to initial density at the particles, ``(B, N)``.
        temperature: Current temperature, ``(B,)``, in [0, 1].
        threshold: Share of N to be kept, in (0, 1).
        log_weights: Log weights of the particles, ``(B, N)``; None for equal weights.

    Returns:
        ``(B,)``, in (temperature, 1]; 1 where a single step is enough.
    """
    log_ratio, temperature = precise(log_ratio), precise(temperature)
    log_weights = torch.zeros_like(log_ratio) if log_weights is None else precise(log_weights)
    log_weights = log_weights.log_softmax(1)
    attainable = torch.where(log_ratio > -torch.inf, log_weights.exp(), 0.0).sum(1)
    target = threshold * attainable * log_ratio.shape[1]

    def keeps(step: Tensor) -> Tensor:
        return conditional_ess(log_weights, scale_log(step[:, None], log_ratio)) >= target

    low, high = torch.zeros_like(temperature), 1 - temperature
    arrives = keeps(high)
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        enough = keeps(middle)
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    # never a step of zero: rounding could produce one, and it would be repeated forever
    moved = (temperature + low).maximum(torch.nextafter(temperature, torch.ones_like(temperature)))
    return torch.where(arrives, 1.0, moved.clamp(max=1.0))


# -- the tail of the weights --------------------------------------------------------------------------------


def pareto_k_hat(log_weights: Tensor) -> Tensor:
    """Tail index of importance weights, k-hat (Vehtari, Simpson, Gelman, Yao, Gabry 2024, "Pareto smoothed
    importance sampling").

    A generalised Pareto distribution is fitted to the largest min(N / 5, 3 sqrt(N)) weights by the estimator
    of Zhang and Stephens (2009), with the weak prior of ten draws at 0.5. The weights have 1 / k finite
    moments: under 0.5 their variance is finite, over 1 their mean is not; see :func:`reliable_k_hat`.

    Args:
        log_weights: Log weights ``(B, N)``, not necessarily normalised; -inf is a weight of zero.

    Returns:
        ``(B,)``. NaN if N is below 25, which is too few for a tail; 0 if the largest weights are all equal. If fewer
        than five of them exceed the next largest, there is no tail to fit. The result is then inf if their excess is
        over a tenth of all weight, as when one particle holds all of it, and otherwise 0, as for a bounded reward whose
        maximum most particles reach.
    """
    log_weights = precise(log_weights)
    count = log_weights.shape[1]
    tail = math.ceil(min(0.2 * count, 3 * math.sqrt(count)))
    if tail < _LEAST_TAIL:
        return torch.full_like(log_weights[:, 0], torch.nan)
    largest = log_weights.topk(tail + 1, dim=1).values
    weights = (largest - largest[:, :1]).exp().nan_to_num(nan=0.0).flip(1)
    excess = weights[:, 1:] - weights[:, :1]  # (B, tail), ascending; zero where it ties with the threshold
    positive = (excess > 0).sum(1)
    greatest = torch.where(positive > 0, excess[:, -1], 1.0)
    index = _zhang_stephens(excess / greatest[:, None], positive.clamp(min=1))
    index = (positive * index + 10 * 0.5) / (positive + 10)
    total = (log_weights - largest[:, :1]).exp().nan_to_num(nan=0.0).sum(1)
    heavy = excess.sum(1) > _HEAVY_SHARE * total
    index = torch.where(positive < _LEAST_TAIL, torch.where(heavy, torch.inf, 0.0), index)
    return torch.where(positive == 0, 0.0, index)


def _zhang_stephens(excess: Tensor, count: Tensor) -> Tensor:
    """Shape of a generalised Pareto distribution: the mean of a quasi-posterior on a grid.

    Args:
        excess: Excesses ``(B, M)``, ascending, at least 0, at most 1; zeros do not count as observations.
        count: Number of positive excesses, ``(B,)``.
    """
    rows, size = torch.arange(len(excess), device=excess.device), count.to(excess)
    grid = 30 + int(math.sqrt(excess.shape[1]))
    quartile = excess.shape[1] - count + (count / 4 + 0.5).long().clamp(min=1) - 1
    # far below the rounding error of any weight, but its inverse is still finite
    scale = excess[rows, quartile].clamp(min=1e-290)
    step = 1 - (grid / (torch.arange(1, grid + 1, device=excess.device) - 0.5)).sqrt()
    theta = 1 / excess[:, -1:].clamp(min=1e-290) + step.to(excess) / (3 * scale[:, None])  # (B, grid)
    shape = torch.log1p(-theta[..., None] * excess[:, None]).sum(2) / size[:, None]
    profile = size[:, None] * ((-theta / shape).log() - shape - 1)
    # a theta of zero is the exponential distribution, whose formula is the limit of this one
    weights = profile.nan_to_num(nan=-torch.inf, posinf=-torch.inf).softmax(1)
    best = (weights * theta).sum(1, keepdim=True)
    return torch.log1p(-best * excess).sum(1) / size


def reliable_k_hat(count: int) -> float:
    """Highest k-hat at which ``count`` weighted draws are reliable: min(1 - 1 / log10(count), 0.7).

    Vehtari, Simpson, Gelman, Yao, Gabry (2024); at most 0.7, which requires about 2,200 draws.
    """
    return min(1 - 1 / math.log10(count), 0.7) if count > 10 else 0.0
