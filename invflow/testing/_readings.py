"""Alternative conventions of a network: time, sign, path, time scale, prediction, range."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from invflow.flowmap import FlowMap
from invflow.models.average_velocity import AverageVelocityFlow
from invflow.models.consistency import ConsistencyFlow
from invflow.models.paths import PATHS, LinearPath, edm_path, make_path, trigonometric_path
from invflow.models.wrappers import VelocityFlow

__all__ = ["Reading", "data_readings", "network_readings"]

Evaluate = Callable[[Tensor, Tensor], Tensor]
OTHER = {"data-at-1": "data-at-0", "data-at-0": "data-at-1"}


@dataclass
class Reading:
    """One set of conventions for a network.

    Attributes:
        what: The conventions, to complete "predicts best ...".
        fix: What to pass, or to do.
        evaluate: Map from states ``(n, *shape)`` and times ``(n, 1, ..., 1)`` to b_t(x) or, for jumps to data, to m.
    """

    what: str
    fix: str
    evaluate: Evaluate


def inner(prior: FlowMap) -> FlowMap:
    """The map whose network is tested: for a latent map, the flow of its codes."""
    latent = getattr(prior, "latent", None)
    return inner(latent) if isinstance(latent, FlowMap) else prior


def network_readings(prior: FlowMap) -> Iterator[Reading]:
    """Alternatives with the same states and the same target."""
    own = inner(prior)
    raw, path, convention = _raw(own)
    kind = "velocity" if prior.has_velocity else "sample"

    def read(predict: Evaluate, name: Any, where: str) -> Evaluate:
        way = make_path(name, where, kind)
        return lambda x, t: way.velocity(predict, x, t) if prior.has_velocity else way.estimate(predict, x, t)[0]

    def stated(predict: Evaluate) -> Evaluate:
        way = getattr(own, "path", None) or LinearPath(convention)
        return lambda x, t: way.velocity(predict, x, t) if prior.has_velocity else way.estimate(predict, x, t)[0]

    other = OTHER[convention]
    where = (f"convention={other!r}" if isinstance(own, (VelocityFlow, AverageVelocityFlow)) else
             "reverse it where the network is called")
    if path != "custom":
        yield Reading("with time reversed, -v(x, 1 - t)" if prior.has_velocity else "with time reversed, f(x, 1 - t)",
                      where, read(raw, path, other))
    if prior.has_velocity:
        yield Reading("with the sign reversed, -v(x, t)", "pass lambda x, t: -network(x, t)",
                      lambda x, t: -stated(raw)(x, t))
        yield Reading("with only the time argument reversed, v(x, 1 - t)", "pass lambda x, t: network(x, 1 - t)",
                      stated(lambda x, t: raw(x, 1 - t)))
    yield Reading("with times that run to 1,000", "pass lambda x, t: network(x, 1000 * t)",
                  stated(lambda x, t: raw(x, 1000 * t)))
    yield Reading("with times that run to 1, not to 1,000", "pass lambda x, t: network(x, t / 1000)",
                  stated(lambda x, t: raw(x, t / 1000)))
    for name in PATHS:
        for there in (convention, other):
            if name != path:
                yield Reading(f"on the {name} path, data at {there[-1]}", f"path={name!r}, convention={there!r}",
                              read(raw, name, there))
    if not prior.has_velocity:
        for what, name, way in (("on the path of EDM, m + sigma z", "edm", edm_path(0.002, 80.0)),
                                ("on TrigFlow's path", "trigflow", trigonometric_path())):
            yield Reading(what, f"path={name!r}", lambda x, t, way=way: way.estimate(raw, x, t)[0])  # type: ignore[misc]
        return
    for there in ("data-at-1", "data-at-0"):
        clock: Callable[[Tensor], Tensor] = (lambda t: t) if there == "data-at-1" else (lambda t: 1 - t)
        yield Reading("as a prediction of the noise", "for a diffusion network use invflow.from_epsilon; for the "
                      "linear path pass lambda x, t: (x - network(x, t)) / t, with t in (0, 1] and axes to broadcast",
                      lambda x, t, clock=clock: (x - raw(x, clock(t).flatten())) / t)  # type: ignore[misc]
        yield Reading("as a prediction of the data, a denoiser", "pass lambda x, t: (network(x, t) - x) / (1 - t), "
                      "with axes to broadcast, or use invflow.from_deepinv",
                      lambda x, t, clock=clock: (raw(x, clock(t).flatten()) - x) / (1 - t))  # type: ignore[misc]
    if isinstance(own, AverageVelocityFlow):
        second = "t-r" if own.second == "r" else "r"
        swapped = LinearPath(own.convention)
        yield Reading(f"with the second argument {second!r}", f"second={second!r}", lambda x, t: swapped.velocity(
            lambda y, time: own.network(y, time, time if second == "r" else torch.zeros_like(time)), x, t))


def data_readings(prior: FlowMap, images: Tensor) -> Iterator[tuple[str, str, Tensor]]:
    """Alternative data states that the network may have been trained on: (what, fix, states)."""
    if tuple(prior.image_shape) != tuple(prior.state_shape):
        return
    stated = prior.encode(images)
    for what, fix, states in (
        ("on states in [0, 1]", "decode=(1.0, 0.0)", images),
        ("on states in [-1, 1]", "decode=(0.5, 0.5)", 2 * images - 1),
        ("on states in [0, 255]", "decode=(1 / 255, 0.0)", 255 * images),
    ):
        if not torch.allclose(states, stated, rtol=1e-3, atol=1e-3):
            yield what, fix, states
    if len(prior.state_shape) == 3 and prior.state_shape[0] == 3:
        yield ("with its colours in reverse order", "pass lambda x, t: network(x.flip(1), t).flip(1)",
               stated.flip(1))


def _raw(own: FlowMap) -> tuple[Evaluate, str, str]:
    """The bare network, as a function of states and its own times ``(n,)``, with the stated path and convention."""
    if isinstance(own, VelocityFlow):
        return own.predict, own.path_name, own.convention
    if isinstance(own, AverageVelocityFlow):
        return (lambda x, t: own.network(x, t, t if own.second == "r" else torch.zeros_like(t)), "linear",
                own.convention)
    if isinstance(own, ConsistencyFlow):
        return own.predict, "custom", "data-at-0"
    return (lambda x, t: own.velocity(x, t)), "linear", "data-at-1"

