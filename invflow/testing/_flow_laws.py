"""Whether a velocity belongs to the law that its map makes of noise, or to given images: time, sign and range."""

from __future__ import annotations

import torch
from torch import Tensor

from invflow.flowmap import FlowMap, expand_time
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
    """Expect the velocity to predict m - z for the given images, better than reversed in time or in sign.

    Args:
        prior: learned or not.
        images: ``(n, *image_shape)``, n at least 16.
        seed: of the noise.

    Raises:
        AssertionError: if another reading of the velocity predicts better, or if it predicts nothing.
        ValueError: for images that do not fit.
    """
    name = type(prior).__name__
    if tuple(images.shape[1:]) != tuple(prior.image_shape) or len(images) < 16:
        raise ValueError(f"images have shape {tuple(images.shape)}, expected (n, *image_shape) = "
                         f"(n, {', '.join(map(str, prior.image_shape))}) with n at least 16")
    data = prior.encode(images.to(device=prior.device, dtype=prior.dtype))
    rows = max(len(data), min(512, 8 * len(data)))
    data = data[torch.arange(rows, device=data.device) % len(data)]
    noise = prior.noise(rows, generator=torch.Generator().manual_seed(seed))
    # away from both ends, where all readings agree on what is left of noise or data
    t = torch.linspace(0.15, 0.85, rows, dtype=data.dtype, device=data.device).flip(0)
    time = expand_time(t, data)
    x, target = (1 - time) * noise + time * data, data - noise
    readings = {
        "as it is": lambda a, b: prior.velocity(a, b),
        "with time reversed, -v(x, 1 - t)": lambda a, b: -prior.velocity(a, 1 - b),
        "with the sign reversed, -v(x, t)": lambda a, b: -prior.velocity(a, b),
    }
    parts = list(zip(x.split(256), t.split(256)))
    errors = {}
    for what, reading in readings.items():
        velocity = torch.cat([reading(a, b) for a, b in parts])
        errors[what] = float((velocity - target).double().square().mean() / target.double().square().mean())
    own, best = errors["as it is"], min(errors, key=lambda key: errors[key])
    stated = ", ".join(f"{what} {value:.3g}" for what, value in errors.items())
    expect(best == "as it is",
           f"{name}: its velocity predicts m - z of the images best {best} (squared error over that of zero: "
           f"{stated}). Here time runs from noise at t = 0 to data at t = 1: reverse it where the network is called")
    expect(own < 0.9,
           f"{name}: its velocity explains nothing of m - z of the images: squared error {own:.3g} of that of zero. "
           "Look at decode and encode (states in the range that the network was trained in), and at the units of its "
           "time")
