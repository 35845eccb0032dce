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


class Solver(ABC):  # noqa: B024 - a solver may define sample instead of _sample
    """Base class of solvers: turns a reward into samples of p(x) e^{r(x)}, where p is the law of its base sampler.

    A solver is built with its prior and its settings; :meth:`sample` takes only what changes from call to call. A
    subclass writes :meth:`_sample` and stores each parameter of ``__init__`` as an attribute of the same name, so that
    :meth:`settings` finds it. :meth:`sample` checks its arguments, measures the time, counts the network calls, and
    records all of this in the posterior.

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
    #: whether the solver accepts measurements without noise (sigma 0), which have no density
    takes_no_noise = False
    #: the flow map, in a solver that has one; such a class declares ``prior: FlowMap``
    prior: FlowMap | None = None
    #: shape of the images, in a solver without a prior that knows it
    image_shape: tuple[int, ...] | None = None

    @explained(like="posterior = solver.sample(likelihood, 64, generator=generator)")
    def sample(self, reward: Reward, num_samples: int, *, generator: torch.Generator | int | None = None,
               progress: bool = False) -> Posterior:
        """Draw posterior samples.

        Args:
            reward: A reward over B observations, such as a :class:`~invflow.GaussianLikelihood`.
            num_samples: N, the number of samples for each observation.
            generator: Generator for all random numbers of this call; an int is a seed.
            progress: Whether to show a progress bar.

        Returns:
            A :class:`~invflow.Posterior` with samples ``(B, N, *image_shape)``, their cost in network calls, the time
            in seconds, and ``settings``: the solver's settings and the identity of prior, adapter and operator.

        Raises:
            TypeError: If ``reward`` is not a reward (but a measurement, an image or a problem), or if the number of
                samples is not an integer.
            ValueError: If the number of samples is below one.

        Warns:
            UserWarning: If the noise is Gaussian and the residual of the mean of the samples is over 3 times the noise
                or below 0.3 times the noise. This is very rare for correct samples of a correct model.
        """
        name = type(self).__name__
        if not isinstance(reward, Reward):
            raise TypeError(_no_reward(name, reward))
        noiseless = isinstance(reward, GaussianLikelihood) and reward.noiseless and not bool((reward.sigma > 0).all())
        if noiseless and not self.takes_no_noise:
            raise ValueError(f"{name} needs the density of the measurement, which does not exist without noise "
                             "(sigma 0): pass the noise level, such as sigma=0.0011 for values rounded to 8 "
                             "bits, or use the VFM")
        count, generator = checked_count(num_samples), as_generator(generator)
        start = time.perf_counter()
        with self.counting() as cost:
            posterior = self._sample(reward, count, generator, progress)
        if not isinstance(posterior, Posterior):
            raise TypeError(f"{name}._sample returned a {type(posterior).__name__}: return a Posterior")
        posterior.nfe = cost(posterior.nfe, posterior.samples.shape[0] * count)
        posterior.seconds = time.perf_counter() - start
        with trusting(once=True):  # reading all weights at each call would take half the time of a small sample
            posterior.settings = {**self.settings(), **posterior.settings, "identity": self._identity(reward)}
        if isinstance(reward, GaussianLikelihood):
            _warn_of_misfit(name, posterior, reward)
        return posterior

    def _sample(self, reward: Reward, n: int, generator: torch.Generator, progress: bool) -> Posterior:
        """Draw samples; a subclass implements this method.

        Args:
            reward: A reward over B observations.
            n: N, at least 1.
            generator: Generator for all random numbers.
            progress: Whether to show a progress bar.

        Returns:
            Samples ``(B, N, *image_shape)``, with weights, evidence and diagnostics if the solver computes them.
        """
        raise TypeError(f"{type(self).__name__} cannot draw: a solver must define _sample(reward, n, generator, "
                        "progress), which returns a Posterior")

    def prior_samples(self, n: int, *, generator: torch.Generator | int | None = None) -> Tensor:
        """Draw from the solver's base sampler, the law that it tilts.

        Args:
            n: Number of samples.
            generator: Random generator, or a seed.

        Returns:
            ``(n, *image_shape)``.
        """
        raise TypeError(f"{type(self).__name__} has no base sampler of its own to draw from")

    # -- description -------------------------------------------------------------------------------------------------

    def settings(self) -> dict[str, Any]:
        """Settings as JSON values, stored with each posterior: the parameters of ``__init__`` that are attributes of
        the same name. Flow maps are left out; ``settings["identity"]`` of a posterior identifies them."""
        found = {"solver": type(self).__name__}
        for name in _parameters(type(self)):
            value = getattr(self, name, _ABSENT)
            if value is not _ABSENT and not isinstance(value, FlowMap):
                found[name] = plain(value)
        return found

    def fingerprint(self) -> str:
        """Digest of all that determines the samples except the reward: class, settings, prior, adapter, tensors.

        It has 32 hexadecimal digits and is the same in every process. A solver with content that cannot be read, such
        as an open file, must define its own.

        Raises:
            TypeError: If an attribute of the solver cannot be identified; the message names it.

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
        """Count the calls of the solver's networks inside the ``with`` block.

        Yields:
            A function of the stated cost and the number of samples. It returns the counted cost per sample, or the
            stated cost if that is higher, as for networks that do not count their calls.
        """
        with ExitStack() as scopes:
            calls = [scopes.enter_context(network.count()) for network in self._networks()]
            yield lambda stated, rows: NFE(max(stated.forward, sum(c.forward for c in calls) / rows),
                                           max(stated.backward, sum(c.backward for c in calls) / rows))

    def to(self: S, device: torch.device | str) -> S:
        """Move networks and tensors to a device, in place, and return the solver."""
        place = torch.device(device)
        for name, value in vars(self).items():
            if isinstance(value, (nn.Module, Tensor, Solver, Reward)):
                setattr(self, name, value.to(place))
            elif dataclasses.is_dataclass(value) and callable(getattr(value, "to", None)):
                setattr(self, name, value.to(place))  # type: ignore[union-attr]
        return self

    def resized(self: S, image_shape: Sequence[int]) -> S:
        """Return the same solver for images of another size: a copy that shares the weights of the networks.

        Args:
            image_shape: Shape of the images, ``(C, H, W)``.

        Returns:
            A copy, or the solver itself if it already has this size.

        Raises:
            ValueError: If its networks do not accept this shape.
        """
        shape = tuple(image_shape)
        swaps = {id(network): network.resized(shape) for network in self._networks() if network.image_shape != shape}
        return _swapped(self, swaps) if swaps else self

    def _networks(self) -> list[Countable]:
        """The networks whose calls are the cost of a sample: those of this solver and of any solver inside it."""
        found: dict[int, Countable] = {}
        for value in vars(self).values():
            if isinstance(value, Countable):
                found[id(value)] = value
            elif isinstance(value, Solver):
                found.update((id(network), network) for network in value._networks())
        return list(found.values())

    def _identity(self, reward: Reward) -> dict[str, str | None]:
        """Digests of prior, adapter and operator, where present; null for one that cannot be identified."""
        parts = {"prior": self.prior,
                 "adapter": next((part for name in ("adapter", "proposal")
                                  if isinstance(part := getattr(self, name, None), nn.Module)), None),
                 "operator": reward.operator}
        held = {name: part for name, part in parts.items() if part is not None and not isinstance(part, str)}
        return {name: quick_identity(part) for name, part in held.items()}

    def __repr__(self) -> str:
        """The class with its prior and all settings that differ from the defaults."""
        with trusting():
            settings = self.settings()
        unnamed = self.prior is not None and "prior" not in _parameters(type(self))
        parts = [f"prior={type(self.prior).__name__}"] if unnamed else []
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
    """The parameters of ``__init__`` except ``self``, by name."""
    named = inspect.signature(kind.__init__).parameters.values()
    return {p.name: p for p in list(named)[1:] if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


@torch.no_grad()
def _warn_of_misfit(solver: str, posterior: Posterior, likelihood: GaussianLikelihood) -> None:
    """Warn if the posterior mean does not fit its measurement, or if it fits the noise too."""
    found = posterior.diagnostics
    if found.get("point_estimate", False):  # a point estimate is not a posterior mean
        return
    place = posterior.samples.device
    likelihood = likelihood if likelihood.y.device == place else likelihood.to(place)

    def averaged(function: Callable[[Tensor], Tensor]) -> Tensor:
        at_a_time = max(1, 2**24 // posterior.samples[:, 0].numel())
        parts = zip(posterior.samples.split(at_a_time, 1), posterior.weights.split(at_a_time, 1))
        return sum(torch.einsum("bn,bn...->b...", weights, function(x)) for x, weights in parts)  # type: ignore[return-value]

    of_mean = found.get("residual_of_mean")
    if of_mean is None:  # a nonlinear operator: average the samples' measurements rather than measure their mean
        of_mean = (likelihood.residual(posterior.mean()[:, None]) if likelihood.operator.linear else
                   likelihood.misfit(averaged(likelihood.predict)[:, None]))[:, 0].sqrt()
    for words in complaints(of_mean, lambda: averaged(likelihood.residual), likelihood.count_observed(),
                            likelihood.sigma):
        warnings.warn(f"{solver}: the mean of the samples {words}", stacklevel=5)


def checked_count(num_samples: int) -> int:
    """Check a number of samples and return it."""
    if isinstance(num_samples, bool) or not hasattr(num_samples, "__index__"):
        raise TypeError(f"num_samples is {num_samples!r}: ask for a whole number of samples, at least 1")
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}: ask for at least one sample")
    return int(num_samples)


def _no_reward(solver: str, given: object) -> str:
    """The error message for something that is not a reward."""
    if isinstance(given, Tensor):
        given_as, instead = f"a tensor of shape {tuple(given.shape)}", ("pass a measurement y with its operator, "
                            "invflow.GaussianLikelihood(operator, y, sigma)")
    elif hasattr(given, "simulate"):  # a problem, whose class this module may not import
        given_as, instead = f"{given!r}", "get a likelihood by truth, likelihood = problem.simulate(4)"
    elif isinstance(given, tuple) and any(isinstance(part, Reward) for part in given):
        given_as, instead = "a tuple", "unpack it and pass the reward, as in truth, likelihood = problem.simulate(4)"
    elif callable(given):
        given_as, instead = f"a {type(given).__name__}", "pass a function of images as invflow.FunctionReward(fn)"
    else:
        given_as, instead = f"a {type(given).__name__}", ("pass an image or a measurement as a tensor with its "
                            "operator, invflow.GaussianLikelihood(operator, y, sigma)")
    return f"{solver}.sample takes a Reward, such as a likelihood, not {given_as}: {instead}"


def _has_plain_repr(value: object) -> bool:
    """Whether an object's repr is the default one, with an address that differs from run to run."""
    own: Any = type(value).__repr__
    return own is object.__repr__


def plain(value: Any) -> Any:
    """A setting as a JSON value: functions by name, networks and tensors by class and digest."""
    if value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, Solver):
        return value.settings()
    if isinstance(value, functools.partial):  # its repr contains an address, which differs from run to run
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
    """A copy of a solver, or of one of its parts, with some objects replaced; the original if none of them occurs."""
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
