"""Whether a velocity belongs to the law that its map makes of noise, or to given images: time, sign and range."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from invflow.flowmap import FlowMap, expand_time
from invflow.testing._readings import data_readings, network_readings
from invflow.testing._tools import expect

__all__ = ["check_law", "check_regression"]

_STANDARD_ERRORS = 5.0
#: values of states on which Stein's identities are averaged, and the most states
_VALUES, _ROWS = 2**14, 1024


@torch.no_grad()
def check_law(prior: FlowMap, seed: int) -> None:
    """Expect Stein's identities of the score s_t under the law of X_{0,t}(z), at the middle of the path.

    Integration by parts gives E[s(x)] = 0 and E[(x - c) . s(x)] = -d for s the score of the law of x, whatever that is.

    Args:
        prior: with an exact jump, trained with independent noise.
        seed: of the noise.

    Raises:
        AssertionError: off by more than a tenth and five standard errors.
    """
    t, rows = 0.5, max(32, min(_ROWS, _VALUES // prior.dimension))
    noise = prior.noise(rows, generator=torch.Generator().manual_seed(seed))
    x = torch.cat([prior.jump(part, 0.0, t) for part in noise.split(256)])
    score = torch.cat([(t * prior.velocity(part, t) - part) / (1 - t) for part in x.split(256)])
    x, score = x.flatten(1).double(), score.flatten(1).double()
    advice = ("The velocity is not that of x_t = (1 - t) z + t m with the data m at t = 1: does its time run the other "
              "way (data at 0: pass -v(x, 1 - t), or invflow.from_velocity(..., convention='data-at-0')), is t in "
              "other units, or is a network of images asked about states?")
    mean, error = score.mean(0), score.std(0) / rows**0.5
    scale = float(score.square().mean().sqrt())
    excess = (mean.abs() - (_STANDARD_ERRORS + 1) * error) / scale
    worst = int(excess.argmax())
    expect(float(excess[worst]) <= 0.1,
           f"{type(prior).__name__}: the score at t = {t} averages {float(mean[worst]):.3g} over states that the map "
           f"makes of noise (value {worst}; its root mean square is {scale:.3g}, the standard error "
           f"{float(error[worst]):.2g}), expected 0. {advice}")
    products = ((x - x.mean(0)) * score).mean(1)
    average, error_ = float(products.mean()), float(products.std() / rows**0.5)
    expect(abs(average + 1) <= 0.1 + _STANDARD_ERRORS * error_,
           f"{type(prior).__name__}: x . score / d at t = {t} averages {average:.3g} over states that the map makes of "
           f"noise, with a standard error of {error_:.2g}, expected -1. {advice}")


@torch.no_grad()
def check_regression(prior: FlowMap, images: Tensor, seed: int) -> None:
    """Expect the map to predict m - z for the given images (or m, where it jumps to data) best in its stated reading.

    Other readings of its network are tried on the same states: time, sign, clock, path, what it predicts, the second
    argument of an average velocity; then other data, in other ranges. The right one is the mean given the state, which
    no other can better; what is named is better by four standard errors, over rows, and by a few hundredths.

    Args:
        prior: learned or not.
        images: ``(n, *image_shape)``, n at least 16.
        seed: of the noise.

    Raises:
        AssertionError: if another reading of the network predicts better, or if it predicts nothing.
        ValueError: for images that do not fit.
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
    # away from both ends, where all readings agree on what is left of noise or data
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
        except (RuntimeError, ValueError, TypeError):  # a network that cannot be read so
            continue
        gain, error = float(difference.mean()), float(difference.std()) / rows**0.5
        if gain > 4 * error and gain > 0.03 * float(own.mean()):
            better.append((share - gain / line, reading.what, reading.fix))
    for what, fix, states in data_readings(prior, images) if share > 1.1 else ():
        # errors on other data have other units: each is weighed by what a straight line predicts of the same data
        other = float(errors(stated, states).mean() / linear_errors(states, t, prior.has_velocity).mean())
        if other < min(0.8 * share, 1.5):
            better.append((other, what, fix))
    if better:
        least, what, fix = min(better)
        raise AssertionError(
            f"{name}: its network predicts {target} best {what} (squared error over that of a straight line "
            f"{least:.3g}, as it is stated {share:.3g}). Here time runs from noise at t = 0 to data at t = 1, on the "
            f"path (1 - t) z + t m: {fix}")
    wanted = (data - noise if prior.has_velocity else data - data.mean(0)).double().square().flatten(1).mean()
    part = float(own.mean() / wanted)
    expect(part < 0.9,
           f"{name}: its network explains nothing of {target}: squared error {part:.3g} of that of "
           f"{'zero' if prior.has_velocity else 'their mean'}. Look at decode and encode (states in the range that the "
           "network was trained in), and at the units of its time")


def linear_errors(states: Tensor, t: Tensor, velocity: bool) -> Tensor:
    """Mean squared error of the best predictor that is a straight line in each value, ``(n,)``.

    Of m given x = (1 - t) z + t m the error is s^2 (1 - t)^2 / g with g = (1 - t)^2 + t^2 s^2, s the spread of m; m - z
    = (m - x) / (1 - t) has that over (1 - t)^2.
    """
    spread = states.double().std(0).square().flatten()[None]
    time = t.double()[:, None]
    error = spread / ((1 - time) ** 2 + time**2 * spread)
    return (error if velocity else error * (1 - time) ** 2).mean(1).clamp(min=1e-12)
