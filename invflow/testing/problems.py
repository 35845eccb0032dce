"""The contract of a problem, as one check for any problem."""

from __future__ import annotations

import torch
from torch import Tensor

from invflow._core.checks import looks_like_image
from invflow.flowmap import FlowMap
from invflow.likelihood import GaussianLikelihood
from invflow.metrics import coverage
from invflow.models.mixture import GaussianMixtureFlow
from invflow.operator import Operator
from invflow.problem import SPLITS, Problem, TiltedProblem
from invflow.reward import Reward, score
from invflow.testing._tools import expect, watch_global_seed

__all__ = ["check_problem"]

#: numbers of observations and draws for the check of the exact posterior
_OBSERVATIONS, _DRAWS = 400, 39
#: numbers of draws of a tilted law, and of the prior weighted to it
_TILTED, _WEIGHTED = 2000, 40_000


def check_problem(problem: Problem, *, seed: int = 0) -> None:
    """Check that a problem satisfies the contract that comparisons rely on.

    Checked: name, operator and noise level; shapes and values of simulated truths and measurements; residuals
    of the truth with mean 1 in units of sigma^2; the same draws from the same generator, other draws from another,
    and no use of the global seed; new operator parameters for each observation if they are random;
    splits that do not overlap, draws without replacement, images in order on request, and an error for more
    images than available; if truths are drawn from a law with an exact posterior, the coverage of its
    intervals.

    For a problem with a reward: that prior and reward match; shapes, repeats and reproducibility of its
    simulations; that each quantity gives a number for each image; draws of the tilted law against the known
    expectations and, if the prior is a Gaussian mixture, both against draws of the prior weighted by e^r.

    Args:
        problem: The problem. Its prior is loaded only if its exact posterior or its reward needs it.
        seed: Random seed of the simulations.

    The statistical checks allow at least five standard errors; about one in 100,000 seeds would raise a false alarm.
    A seed that passes always passes.

    Raises:
        AssertionError: At the first failure; the message says what failed, by how much, and what to check.

    Example:
        >>> import invflow
        >>> from invflow.testing import check_problem
        >>> check_problem(invflow.load_problem("gaussian/linear"))
    """
    expect(isinstance(problem, Problem), f"a {type(problem).__name__} is not a Problem: derive it from invflow.Problem")
    expect(bool(problem.name.strip()), "the problem has no name")
    if isinstance(problem, TiltedProblem):
        _check_tilt(f"problem {problem.name!r}", problem, seed)
        return
    expect(isinstance(problem.operator, Operator),
           f"operator is a {type(problem.operator).__name__}: pass an invflow.Operator, or a function that builds one")
    what = f"problem {problem.name!r}"
    before = _measure_grey(problem.operator)
    with watch_global_seed(f"{what}.simulate"):
        for count in (1, 3):
            truth, likelihood = problem.simulate(count, generator=_generator(seed))
            _check_simulation(what, problem, truth, likelihood, count)
        _check_draws(what, problem, seed)
        if problem.has_images:
            _check_images(what, problem, seed)
        else:
            _check_exact_posterior(what, problem, seed)
    off = float((_measure_grey(problem.operator) - before).abs().max())
    expect(off == 0, f"{what}: its operator's measurement of a grey image changes after simulate, by up to {off:.2g}: "
                     "an operator must not change in use, see check_operator")


def _measure_grey(operator: Operator) -> Tensor:
    shape = (operator.num_sets, *operator.image_shape)
    return operator(torch.full(shape, 0.5, device=operator.device, dtype=operator.dtype))


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _check_simulation(what: str, problem: Problem, truth: Tensor, likelihood: GaussianLikelihood,
                      count: int) -> None:
    shape = (count, *problem.image_shape)
    expect(tuple(truth.shape) == shape, f"{what}: truths have shape {tuple(truth.shape)}, expected {shape}")
    expect(truth.is_floating_point() and bool(torch.isfinite(truth).all()),
           f"{what}: truths must be finite floating-point numbers, not {truth.dtype}")
    if looks_like_image(problem.image_shape):
        low, high = float(truth.min()), float(truth.max())
        slack = 0.01 if problem.has_images else 1.0  # draws of a law may overshoot, but not by a whole range
        expect(low >= -slack and high <= 1 + slack, f"{what}: images lie in [{low:.3g}, {high:.3g}], not in [0, 1]")
    expect(likelihood.num_observations == count,
           f"{what}: the likelihood has {likelihood.num_observations} observations, expected {count}")
    if problem.sigma is None:  # another kind of noise
        return
    low, high = problem.sigma if isinstance(problem.sigma, tuple) else (problem.sigma, problem.sigma)
    level = likelihood.sigma
    expect(bool(((level > 0.999 * low) & (level < 1.001 * high)).all()),
           f"{what}: noise levels {level.tolist()} lie outside sigma={problem.sigma}")


def _check_draws(what: str, problem: Problem, seed: int) -> None:
    count = 20 if not problem.has_images else min(20, len(problem.images("test")))
    truth, likelihood = problem.simulate(count, generator=_generator(seed))
    again, same = problem.simulate(count, generator=_generator(seed))
    expect(torch.equal(truth, again) and torch.equal(likelihood.y, same.y),
           f"{what}: the same generator gave other draws: draw everything with it, and keep no state between calls")
    _, other = problem.simulate(count, generator=_generator(seed + 1))
    expect(not torch.equal(likelihood.y, other.y), f"{what}: two generators gave the same measurements")
    if problem.random:
        sets = likelihood.operator.num_sets
        expect(sets == count, f"{what}: the operator is random, but has {sets} parameter sets for {count} observations")
    if not isinstance(likelihood, GaussianLikelihood):
        return
    # the residual of the truth is chi-squared over the entries observed, with standard deviation sqrt(2 /
    # entries)
    entries = likelihood.count_observed().expand(count).double()
    residual = likelihood.chi_square(truth[:, None])[:, 0].double()
    score = float(((residual - 1) * entries).sum() / (2 * entries.sum()).sqrt())
    expect(abs(score) < 6,
           f"{what}: residuals of the truth average {float(residual.mean()):.3f} sigma^2, which is "
           f"{score:.0f} standard errors from 1: noise and likelihood disagree, as if the noise had "
           f"{float(residual.mean())**0.5:.3g} times the level sigma that the likelihood states")


def _check_images(what: str, problem: Problem, seed: int) -> None:
    splits = {split: problem.images(split) for split in SPLITS}
    for split, images in splits.items():
        truth, _ = problem.simulate(len(images), generator=_generator(seed), split=split)
        drawn, every = (len({row.numpy().tobytes() for row in rows.cpu()}) for rows in (truth, images))
        expect(drawn == every,
               f"{what}: {len(images)} draws of {split} images contain {drawn} different ones of {every}: draw "
               "without replacement")
        few = min(3, len(images))
        first, _ = problem.simulate(few, generator=_generator(seed), split=split, shuffle=False)
        expect(torch.equal(first, images[:few]), f"{what}: shuffle=False must return the first {split} images")
        try:
            problem.simulate(len(images) + 1, split=split)
        except ValueError:
            continue
        expect(False, f"{what}: returned more {split} images than the {len(images)} available, without an error")
    shared = {row.numpy().tobytes() for row in splits["test"].cpu()}
    overlap = sum(row.numpy().tobytes() in shared for row in splits["validation"].cpu())
    expect(overlap == 0, f"{what}: {overlap} validation images are also test images")


def _check_exact_posterior(what: str, problem: Problem, seed: int) -> None:
    try:
        solver = problem.exact_posterior()
    except TypeError:
        return
    generator = _generator(seed + 2)
    truth, likelihood = problem.simulate(_OBSERVATIONS, generator=generator)
    samples = solver.sample(likelihood, _DRAWS, generator=generator).samples
    expect(tuple(samples.shape) == (_OBSERVATIONS, _DRAWS, *problem.image_shape),
           f"{what}: its exact posterior returned samples of shape {tuple(samples.shape)}")
    for level in (0.5, 0.9):
        share = coverage(samples, truth, level).double().flatten(1).mean(0)
        worst = float(share[(share - level).abs().argmax()])
        allowed = 5 * (level * (1 - level) / _OBSERVATIONS) ** 0.5
        expect(abs(worst - level) < allowed,
               f"{what}: intervals of its exact posterior at level {level} contain the truth in {worst:.3f} of "
               "cases: it is not the posterior of these truths")


# -- problems with a reward ------------------------------------------------------------------------------------


def _check_tilt(what: str, problem: Problem, seed: int) -> None:
    expect(isinstance(problem.prior, FlowMap), f"{what}: its prior is a {type(problem.prior).__name__}, not a FlowMap")
    expect(isinstance(problem.reward, Reward), f"{what}: its reward is a {type(problem.reward).__name__}, not a Reward")
    expect(problem.reward.num_observations is None,
           f"{what}: its reward has observations of its own: a measurement belongs to an operator and sigma")
    with watch_global_seed(f"{what}.simulate"):
        base = problem.prior.generate(4, generator=_generator(seed))
        for name, values in (("reward", score(problem.reward, base[None])[0]), *_quantities(problem, base).items()):
            expect(tuple(values.shape) == (4,) and not bool(values.isnan().any()),
                   f"{what}: {name} of 4 draws of the prior is {tuple(values.shape)} or NaN, expected 4 numbers")
        truth, reward = problem.simulate(3, generator=_generator(seed))
        expect(reward.num_observations == 3, f"{what}: 3 repeats, but a reward of {reward.num_observations}")
        unknown = set(problem.expectations) - {"reward", *problem.quantities}
        expect(not unknown, f"{what}: expectations of {sorted(unknown)}, which are not among its quantities")
        if truth is None:
            return
        again, _ = problem.simulate(3, generator=_generator(seed))
        other, _ = problem.simulate(3, generator=_generator(seed + 1))
        expect(tuple(truth.shape) == (3, *problem.image_shape),
               f"{what}: truths have shape {tuple(truth.shape)}, expected {(3, *problem.image_shape)}")
        expect(torch.equal(truth, again) and not torch.equal(truth, other),
               f"{what}: truths are not determined by the generator: draw everything with it")
    _check_tilted_law(what, problem, seed)


def _quantities(problem: Problem, x: Tensor) -> dict[str, Tensor]:
    return {name: quantity(x).double() for name, quantity in problem.quantities.items()}


def _check_tilted_law(what: str, problem: Problem, seed: int) -> None:
    """Compare known expectations, draws of the tilted law and weighted prior draws pairwise, within five errors."""
    mixture, known = isinstance(problem.prior, GaussianMixtureFlow), problem.expectations
    if not (mixture or known):
        return
    generator = _generator(seed + 2)
    draws, _ = problem.simulate(_TILTED, generator=generator)
    means = {"draws of the tilted law": _means(problem, draws, torch.zeros(len(draws)))}
    if isinstance(problem.prior, GaussianMixtureFlow):
        base = problem.prior.decode(problem.prior.sample(_WEIGHTED, generator=generator))
        means["draws of the prior weighted by e^r"] = _means(problem, base, score(problem.reward, base[None])[0])
    if known:
        means["expectations"] = {name: (value, 0.0) for name, value in known.items()}
    sources = list(means)
    for i, first in enumerate(sources):
        for second in sources[i + 1 :]:
            for name in means[first].keys() & means[second].keys():
                (a, error), (b, other) = means[first][name], means[second][name]
                expect(abs(a - b) <= 5 * (error**2 + other**2) ** 0.5 + 1e-4 * abs(b),
                       f"{what}: the mean {name} is {a:.4f} by {first} and {b:.4f} by {second}, with standard errors "
                       f"{error:.4f} and {other:.4f}: these are not the same law")


def _means(problem: Problem, x: Tensor, log_weights: Tensor) -> dict[str, tuple[float, float]]:
    """Weighted means of reward and quantities, each with its standard error (of a ratio, by the delta method)."""
    weights = log_weights.double().softmax(0)
    values = {"reward": score(problem.reward, x[None])[0].double(), **_quantities(problem, x)}
    found = {}
    for name, value in values.items():
        mean = (weights * value).sum()
        found[name] = (float(mean), float((weights * (value - mean)).square().sum().sqrt()))
    return found
