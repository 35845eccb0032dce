"""The solver interface: a reward goes in, a posterior comes out."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import math
import time
import types
import warnings
from abc import ABC
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from invflow._core.counting import Countable
from invflow._core.explained import explained
from invflow._core.identity import identity
from invflow._core.misfit import complaints
from invflow._core.random import as_generator
from invflow._core.remembered import quick_identity, trusting
from invflow.flowmap import FlowMap
from invflow.likelihood import GaussianLikelihood
from invflow.posterior import NFE, Posterior
from invflow.reward import Reward

__all__ = ["Solver", "plain"]

S = TypeVar("S", bound="Solver")


class Solver(ABC):  # noqa: B024 - a solver may write sample in the place of _sample
    """Turns a reward into samples of p(x) e^{r(x)}, p being the law of the solver's own base sampler.

    A solver is built with its prior and its settings; :meth:`sample` takes only what changes from call to call. A
    subclass writes :meth:`_sample` and keeps what it is built with under the names of its parameters, so that
    :meth:`settings` finds it; :meth:`sample` checks what it is given, takes the time, counts the calls, and says in the
    posterior what made it.

    Example:
        >>> import torch, invflow
        >>> class Importance(invflow.Solver):  # draws of the prior, weighted by e^r
        ...     def __init__(self, prior, *, steps=1):
        ...         self.prior, self.steps = prior, steps
        ...     def _sample(self, reward, n, generator, progress):
        ...         count = reward.num_observations or 1
        ...         x = self.prior.generate(count * n, self.steps, generator=generator).unflatten(0, (count, n))
        ...         return invflow.Posterior(x, reward(x))
        >>> prior = invflow.GaussianMixtureFlow(torch.zeros(1, 2), std=1.0, steps=2)
        >>> right = invflow.FunctionReward(lambda x: x[:, 0])
        >>> posterior = Importance(prior).sample(right, 8, generator=0)
        >>> posterior.nfe.forward, posterior.settings["steps"]
        (1.0, 1)
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in cls.__dict__:
            type.__setattr__(cls, "__init__", explained(cls.__dict__["__init__"]))

    #: names of attributes that follow from the others, such as caches: :meth:`fingerprint` leaves them out
    _derived: frozenset[str] = frozenset()
    #: whether measurements without noise (sigma 0), which have no density, are taken
    takes_no_noise = False

    @explained(like="posterior = solver.sample(likelihood, 64, generator=generator)")
    def sample(self, reward: Reward, num_samples: int, *, generator: torch.Generator | int | None = None,
               progress: bool = False) -> Posterior:
        """Draw posterior samples.

        Args:
            reward: over B observations, such as a :class:`~invflow.GaussianLikelihood`.
            num_samples: N, samples for each observation.
            generator: source of all random numbers of this call; an int is a seed.
            progress: show a progress bar.

        Returns:
            A :class:`~invflow.Posterior` with samples ``(B, N, *image_shape)``, with the network calls that they cost,
            the seconds, and in ``settings`` those of the solver, with the identity of prior, adapter and operator.

        Raises:
            TypeError: for what is no reward, such as a measurement, an image or a problem; for a number of samples that
                is no whole number.
            ValueError: for under one sample.

        Warns:
            UserWarning: where the mean of the samples misses a measurement with Gaussian noise by over 3 times that
                noise, or comes within 0.3 times it, as right samples of a right model hardly ever do.
        """
        name = type(self).__name__
        if not isinstance(reward, Reward):
            raise TypeError(_no_reward(name, reward))
        level: Any = getattr(reward, "sigma", None) if getattr(reward, "noiseless", False) else None
        if not self.takes_no_noise and level is not None and not bool((level > 0).all()):
            raise ValueError(f"{name} needs the density of the measurement, and without noise (sigma 0) there is none: "
                             "pass the level of what noise there is, such as sigma=0.0011 for values rounded to 8 "
                             "bits, or use the VFM")
        count, generator = checked_count(num_samples), as_generator(generator)
        start = time.perf_counter()
        with self.counting() as cost:
            posterior = self._sample(reward, count, generator, progress)
        if not isinstance(posterior, Posterior):
            raise TypeError(f"{name}._sample returned a {type(posterior).__name__}: return a Posterior")
        posterior.nfe = cost(posterior.nfe, posterior.samples.shape[0] * count)
        posterior.seconds = time.perf_counter() - start
        with trusting(once=True):  # to read all weights at each call would cost half of a small sample
            posterior.settings = {**self.settings(), **posterior.settings, "identity": self._identity(reward)}
        if isinstance(reward, GaussianLikelihood):
            _warn_of_misfit(name, posterior, reward)
        return posterior

    def _sample(self, reward: Reward, n: int, generator: torch.Generator, progress: bool) -> Posterior:
        """Draw; what a subclass writes.

        Args:
            reward: over B observations.
            n: N, at least 1.
            generator: source of all random numbers.
            progress: show a progress bar.

        Returns:
            Samples ``(B, N, *image_shape)``, with weights, evidence and diagnostics where there are any.
        """
        raise TypeError(f"{type(self).__name__} cannot draw: a solver writes _sample(reward, n, generator, progress), "
                        "which returns a Posterior")

    def prior_samples(self, n: int, *, generator: torch.Generator | int | None = None) -> Tensor:
        """Draw from the law that the solver tilts, its own base sampler.

        Args:
            n: number of samples.
            generator: source of randomness.

        Returns:
            ``(n, *image_shape)``.
        """
        raise TypeError(f"{type(self).__name__} has no base sampler of its own to draw from")

    # -- what a solver is --------------------------------------------------------------------------------------------

    def settings(self) -> dict[str, Any]:
        """Settings as JSON holds them, kept with each posterior: the parameters of ``__init__`` that are kept as
        attributes of the same name, but for flow maps, which ``settings["identity"]`` of a posterior tells apart."""
        found = {"solver": type(self).__name__}
        for name in _parameters(type(self)):
            value = getattr(self, name, _ABSENT)
            if value is not _ABSENT and not isinstance(value, FlowMap):
                found[name] = plain(value)
        return found

    def fingerprint(self) -> str:
        """Digest of what decides the samples beside the reward: class, settings, prior, adapter, every tensor held.

        The same in every process; 32 hexadecimal digits. A solver whose content cannot be read, since it holds an open
        file, say, writes its own.

        Raises:
            TypeError: where something that the solver holds cannot be identified, with its name.

        Example:
            >>> import torch, invflow
            >>> prior = invflow.GaussianMixtureFlow(torch.zeros(1, 2), std=1.0)
            >>> one, two = invflow.FMTT(prior), invflow.FMTT(prior, steps=10)
            >>> one.fingerprint() == invflow.FMTT(prior).fingerprint(), one.fingerprint() == two.fingerprint()
            (True, False)
        """
        return identity(self)

    @contextmanager
    def counting(self) -> Iterator[Callable[[NFE, int], NFE]]:
        """Count the calls of the networks that the solver holds, as long as the block lasts.

        Yields:
            A function of the cost that is stated and of the number of samples, which gives what was counted for each
            of them, or what is stated where that is more: of networks that count nothing.
        """
        with ExitStack() as scopes:
            calls = [scopes.enter_context(network.count()) for network in self._networks()]
            yield lambda stated, rows: NFE(max(stated.forward, sum(c.forward for c in calls) / rows),
                                           max(stated.backward, sum(c.backward for c in calls) / rows))

    def to(self: S, device: torch.device | str) -> S:
        """Move networks and tensors to a device, in place; returns the solver."""
        place = torch.device(device)
        for name, value in vars(self).items():
            if isinstance(value, (nn.Module, Tensor, Solver, Reward)):
                setattr(self, name, value.to(place))
            elif dataclasses.is_dataclass(value) and callable(getattr(value, "to", None)):
                setattr(self, name, value.to(place))  # type: ignore[union-attr]
        return self

    def resized(self: S, image_shape: Sequence[int]) -> S:
        """The same solver for images of another size, where its networks take any: a copy that shares their weights.

        Args:
            image_shape: ``(C, H, W)``.

        Returns:
            A copy; the solver itself for the size that it has.

        Raises:
            ValueError: for a shape that its networks do not take.
        """
        shape = tuple(image_shape)
        swaps: dict[int, object] = {}
        for network in self._networks():
            own: tuple[int, ...] = tuple(getattr(network, "image_shape", shape))  # type: ignore[arg-type]
            if own == shape:
                continue
            resize: Any = getattr(network, "resized", None)
            if resize is None:
                raise ValueError(f"{type(self).__name__} holds a {type(network).__name__} for images of shape "
                                 f"{own}, which cannot take {shape}: build it with a prior for "
                                 "images of that shape")
            swaps[id(network)] = resize(shape).counted_with(network)
        return _swapped(self, swaps) if swaps else self

    def _networks(self) -> list[Countable]:
        """The networks whose calls are the cost of a sample: those that the solver holds, or a solver that it holds."""
        found: dict[int, Countable] = {}
        for value in vars(self).values():
            if isinstance(value, Countable):
                found[id(value)] = value
            elif isinstance(value, Solver):
                found.update((id(network), network) for network in value._networks())
        return list(found.values())

    def _identity(self, reward: Reward) -> dict[str, str | None]:
        """Digests of prior, adapter and operator, where there are any; null for one that cannot be identified."""
        parts = {"prior": getattr(self, "prior", None),
                 "adapter": next((part for name in ("adapter", "proposal")
                                  if isinstance(part := getattr(self, name, None), nn.Module)), None),
                 "operator": getattr(reward, "operator", None)}
        held = {name: part for name, part in parts.items() if part is not None and not isinstance(part, str)}
        return {name: quick_identity(part) for name, part in held.items()}

    def __repr__(self) -> str:
        """The class with its prior, and the settings that are not the defaults."""
        prior = getattr(self, "prior", None)
        with trusting():
            settings = self.settings()
        parts = [] if "prior" in _parameters(type(self)) or prior is None else [f"prior={type(prior).__name__}"]
        for name, parameter in _parameters(type(self)).items():
            value = getattr(self, name, _ABSENT)
            if isinstance(value, (nn.Module, Tensor)):
                shape: Any = getattr(value, "shape" if isinstance(value, Tensor) else "image_shape", None)
                parts.append(f"{name}={type(value).__name__}{'' if shape is None else (*shape,)}")
            elif isinstance(value, Solver):
                parts.append(f"{name}={value!r}")
            elif name in settings and settings[name] != plain(parameter.default):
                parts.append(f"{name}={settings[name]!r}")
        return f"{type(self).__name__}({', '.join(parts)})"


_ABSENT = object()


@functools.cache
def _parameters(kind: type[Solver]) -> Mapping[str, inspect.Parameter]:
    """What ``__init__`` takes beside ``self``, by name."""
    named = inspect.signature(kind.__init__).parameters.values()
    return {p.name: p for p in list(named)[1:] if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


@torch.no_grad()
def _warn_of_misfit(solver: str, posterior: Posterior, likelihood: GaussianLikelihood) -> None:
    """Warn where the posterior mean misses its measurement, or meets the measurement's noise as well."""
    found = posterior.diagnostics
    if found.get("point_estimate", False):  # which is no mean of a posterior
        return
    place = posterior.samples.device
    likelihood = likelihood if likelihood.y.device == place else likelihood.to(place)

    def averaged(function: Callable[[Tensor], Tensor]) -> Tensor:
        at_a_time = max(1, 2**24 // posterior.samples[:, 0].numel())
        parts = zip(posterior.samples.split(at_a_time, 1), posterior.weights.split(at_a_time, 1))
        return sum(torch.einsum("bn,bn...->b...", weights, function(x)) for x, weights in parts)  # type: ignore[return-value]

    of_mean = found.get("residual_of_mean")
    if of_mean is None:  # of an operator that is not linear the mean of what samples measure, not what their mean does
        of_mean = (likelihood.residual(posterior.mean()[:, None]) if likelihood.operator.linear else
                   likelihood.misfit(averaged(likelihood.predict)[:, None]))[:, 0].sqrt()
    for words in complaints(of_mean, lambda: averaged(likelihood.residual), likelihood.count_observed(),
                            likelihood.sigma):
        warnings.warn(f"{solver}: the mean of the samples {words}", stacklevel=5)


def checked_count(num_samples: int) -> int:
    """A number of samples, once it is one."""
    if isinstance(num_samples, bool) or not hasattr(num_samples, "__index__"):
        raise TypeError(f"num_samples is {num_samples!r}: ask for a whole number of samples, at least 1")
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}: ask for at least one sample")
    return int(num_samples)


def _no_reward(solver: str, given: object) -> str:
    """What is said of something that is no reward."""
    if isinstance(given, Tensor):
        given_as, instead = f"a tensor of shape {tuple(given.shape)}", ("a measurement y goes in with its operator, "
                            "invflow.GaussianLikelihood(operator, y, sigma)")
    elif hasattr(given, "simulate"):  # a problem, which stands to the right of this module
        given_as, instead = f"{given!r}", "it gives one with truth, likelihood = problem.simulate(4)"
    elif isinstance(given, tuple) and any(isinstance(part, Reward) for part in given):
        given_as, instead = "a tuple", "take the reward out of it, as in truth, likelihood = problem.simulate(4)"
    elif callable(given):
        given_as, instead = f"a {type(given).__name__}", "a function of images goes in as invflow.FunctionReward(fn)"
    else:
        given_as, instead = f"a {type(given).__name__}", ("an image or a measurement goes in as a tensor with its "
                            "operator, invflow.GaussianLikelihood(operator, y, sigma)")
    return f"{solver}.sample takes a Reward, such as a likelihood, not {given_as}: {instead}"


def _has_plain_repr(value: object) -> bool:
    """Whether an object's text is its address, which no two runs share."""
    own: Any = type(value).__repr__
    return own is object.__repr__


def plain(value: Any) -> Any:
    """A setting as JSON holds it: functions by their names, networks and tensors by what they are and a digest."""
    if value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, Solver):
        return value.settings()
    if isinstance(value, functools.partial):  # whose repr holds an address, which no two runs share
        fixed = [*map(str, value.args), *(f"{key}={setting}" for key, setting in value.keywords.items())]
        return f"{plain(value.func)}({', '.join(fixed)})"
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, nn.Module | Tensor) or (_has_plain_repr(value) and not isinstance(value, type)
                                                 and not hasattr(value, "__name__")):
        digest = quick_identity(value)
        return type(value).__name__ if digest is None else f"{type(value).__name__} {digest}"
    return getattr(value, "__name__", repr(value))


def _swapped(value: Any, swaps: Mapping[int, object]) -> Any:
    """A copy of a solver, or of what it holds, with some objects in the place of others; itself where none occurs."""
    if id(value) in swaps:
        return swaps[id(value)]
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        items = [_swapped(item, swaps) for item in value]
        return value if all(a is b for a, b in zip(items, value)) else type(value)(items)
    if isinstance(value, (nn.Module, Tensor, type, types.FunctionType)) or not hasattr(value, "__dict__"):
        return value
    parts = {name: _swapped(item, swaps) for name, item in vars(value).items()}
    changed = {name: part for name, part in parts.items() if part is not vars(value)[name]}
    if not changed:
        return value
    other = copy.copy(value)
    vars(other).update(changed)  # also of frozen dataclasses
    return other
