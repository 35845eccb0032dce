"""Checks that a velocity matches the law of its map's samples, or given images: time, sign and range."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from invflow.flowmap import FlowMap, expand_time
from invflow.testing._readings import data_readings, network_readings
from invflow.testing._tools import expect

__all__ = ["check_law", "check_regression"]

_STANDARD_ERRORS = 5.0
#: number of state values for averages in Stein's identities, and the most states
_VALUES, _ROWS = 2**14, 1024


@torch.no_grad()
def check_law(prior: FlowMap, seed: int) -> None:
    """Check Stein's identities of the score s_t under the law of X_{0,t}(z), at the middle of the path.

    Integration by parts gives E[s(x)] = 0 and E[(x - c) . s(x)] = -d for s the score of any law of x.

    Args:
        prior: Map with an exact jump, trained with independent noise.
        seed: Random seed of the noise.

    Raises:
        AssertionError: For a deviation of more than a tenth and five standard errors.
    """
    t, rows = 0.5, max(32, min(_ROWS, _VALUES // prior.dimension))
    noise = prior.noise(rows, generator=torch.Generator().manual_seed(seed))
    x = torch.cat([prior.jump(part, 0.0, t) for part in noise.split(256)])
    score = torch.cat([(t * prior.velocity(part, t) - part) / (1 - t) for part in x.split(256)])
    x, score = x.flatten(1).double(), score.flatten(1).double()
    advice = ("The velocity does not belong to x_t = (1 - t) z + t m with the data m at t = 1. Is its time "
              "reversed (data at 0: pass -v(x, 1 - t), or invflow.from_velocity(..., convention='data-at-0')), is t in "
              "other units, or does a network of images receive states?")
    mean, error = score.mean(0), score.std(0) / rows**0.5
    scale = float(score.square().mean().sqrt())
    excess = (mean.abs() - (_STANDARD_ERRORS + 1) * error) / scale
    worst = int(excess.argmax())
    expect(float(excess[worst]) <= 0.1,
           f"{type(prior).__name__}: the score at t = {t} averages {float(mean[worst]):.3g} over states from the map "
           f"(value {worst}; its root mean square is {scale:.3g}, the standard error "
           f"{float(error[worst]):.2g}), expected 0. {advice}")
    products = ((x - x.mean(0)) * score).mean(1)
    average, error_ = float(products.mean()), float(products.std() / rows**0.5)
    expect(abs(average + 1) <= 0.1 + _STANDARD_ERRORS * error_,
           f"{type(prior).__name__}: x . score / d at t = {t} averages {average:.3g} over states from the map, "
           f"with a standard error of {error_:.2g}, expected -1. {advice}")


@torch.no_grad()
def check_regression(prior: FlowMap, images: Tensor, seed: int) -> None:
    """Check that the map predicts m - z of given images (or m, for jumps to data) best with its stated conventions.

    Other conventions for its network are tried on the same states: time, sign, time scale, path, prediction, second
    argument of an average velocity; then other data, in other ranges. The correct prediction is the mean given the
    state, which is optimal. An alternative is reported if it is better by four standard errors, over rows, and by a few
    hundredths.

    Args:
        prior: Any flow map.
        images: ``(n, *image_shape)``, n at least 16.
        seed: Random seed of the noise.

    Raises:
        AssertionError: If other conventions predict better, or the network explains nothing.
        ValueError: For images of the wrong shape.
    """
    name = type(prior).__name__
    if tuple(images.shape[1:]) != tuple(prior.image_shape) or len(images) < 16:
        raise ValueError(f"images have shape {tuple(images.shape)}, expected (n, *image_shape) = "
                         f"(n, {', '.join(map(str, prior.image_shape))}) with n at least 16")
    images = images.to(device=prior.device, dtype=prior.dtype)
    rows = max(len(images), min(512, 8 * len(images)))
    images = images[torch.arange(rows, device=images.device) % len(images)]
    data = prior.encode(images)
    noise = prior.noise(rows, generator=torch.Generator().manual_seed(seed))
    # away from both ends, where all conventions agree
    low, high = (0.15, 0.85) if prior.has_velocity else (0.5, 0.95)
    t = torch.linspace(low, high, rows, dtype=data.dtype, device=data.device).flip(0)
    target = "m - z of the images" if prior.has_velocity else "the images that it jumps to"

    def errors(evaluate: Callable[[Tensor, Tensor], Tensor], states: Tensor) -> Tensor:
        time = expand_time(t, states)
        x = (1 - time) * noise + time * states
        made = torch.cat([evaluate(part, at) for part, at in zip(x.split(256), time.split(256))])
        wanted = states - noise if prior.has_velocity else states
        return (made - wanted).double().square().flatten(1).mean(1).nan_to_num(nan=torch.inf)

    def stated(x: Tensor, at: Tensor) -> Tensor:
        return prior.velocity(x, at.flatten()) if prior.has_velocity else prior.jump(x, at.flatten(), 1.0)

    own = errors(stated, data)
    line = float(linear_errors(data, t, prior.has_velocity).mean())
    share = float(own.mean()) / line
    better = []
    for reading in network_readings(prior):
        try:
            difference = own - errors(reading.evaluate, data)
        except (RuntimeError, ValueError, TypeError):  # conventions that the network does not support
            continue
        gain, error = float(difference.mean()), float(difference.std()) / rows**0.5
        if gain > 4 * error and gain > 0.03 * float(own.mean()):
            better.append((share - gain / line, reading.what, reading.fix))
    for what, fix, states in data_readings(prior, images) if share > 1.1 else ():
        # errors on other data have other units: each is relative to a linear predictor on the same data
        other = float(errors(stated, states).mean() / linear_errors(states, t, prior.has_velocity).mean())
        if other < min(0.8 * share, 1.5):
            better.append((other, what, fix))
    if better:
        least, what, fix = min(better)
        raise AssertionError(
            f"{name}: its network predicts {target} best {what} (squared error relative to a linear predictor "
            f"{least:.3g}, as stated {share:.3g}). Here time runs from noise at t = 0 to data at t = 1, on the "
            f"path (1 - t) z + t m: {fix}")
    wanted = (data - noise if prior.has_velocity else data - data.mean(0)).double().square().flatten(1).mean()
    part = float(own.mean() / wanted)
    expect(part < 0.9,
           f"{name}: its network explains nothing of {target}: squared error {part:.3g} relative to "
           f"{'zero' if prior.has_velocity else 'their mean'}. Check decode and encode (states in the range that the "
           "network was trained in), and the units of its time")


def linear_errors(states: Tensor, t: Tensor, velocity: bool) -> Tensor:
    """Mean squared error of the best predictor that is linear in each value, ``(n,)``.

    For m given x = (1 - t) z + t m the error is s^2 (1 - t)^2 / g with g = (1 - t)^2 + t^2 s^2 and s the spread of m;
    for m - z = (m - x) / (1 - t) it is that divided by (1 - t)^2.
    """
    spread = states.double().std(0).square().flatten()[None]
    time = t.double()[:, None]
    error = spread / ((1 - time) ** 2 + time**2 * spread)
    return (error if velocity else error * (1 - time) ** 2).mean(1).clamp(min=1e-12)
