"""Problem: a named prior together with a measurement to invert, or a reward to tilt the prior by."""

from __future__ import annotations

import copy
import functools
import os
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from invflow._core import plugins
from invflow._core.explained import explained
from invflow._core.random import as_generator
from invflow.likelihood import GaussianLikelihood, Likelihood
from invflow.operator import Operator
from invflow.reward import RepeatedReward, Reward

if TYPE_CHECKING:
    from invflow.flowmap import FlowMap
    from invflow.solver import Solver

__all__ = ["SPLITS", "Problem", "TiltedProblem", "list_problems", "load_problem"]

GROUP = "invflow.problems"
SPLITS = ("test", "validation")
_EITHER = "pass an operator and sigma (or a likelihood for noise that is not Gaussian), or a reward instead of both"


class Problem:
    """A named problem: a prior, a measurement or a reward, and all that is known about the solution.

    Most problems are inverse problems with an operator and a noise level: truths are measured, and the goal is the
    posterior given the measurement. For noise that is not Gaussian, pass a ``likelihood`` instead of the noise level.
    For existing measurements without truths, pass a likelihood instead of both. A problem with a ``reward`` has no
    measurement: the goal is its prior p tilted by the reward, p(x) e^{r(x)}. It is built as a :class:`TiltedProblem`.

    An argument that takes time to build or load may be passed as a function without arguments. It is called once, when
    first needed, so that listing problems builds none of them.

    Args:
        name: Name, such as ``"mnist/box-inpainting"``.
        prior_name: Name of the problem's prior for :func:`invflow.load_prior`; None if it has no learned prior.
        operator: The forward operator, or a function that builds it.
        sigma: Standard deviation of the noise, in the measurement's units, above 0. From a range (low, high) a level
            is drawn for each observation, uniformly in the logarithm.
        images: A function from a split, ``"test"`` or ``"validation"``, to truths ``(n, *image_shape)`` in
            [0, 1].
        sampler: Instead of images, a function ``(n, generator)`` that draws truths from a known law. With a reward, it
            draws independently from the tilted law itself, if that is possible (in closed form, or by rejection).
        random: Whether each observation gets new operator parameters, by ``operator.randomize``.
        prior: Instead of the prior named by ``prior_name``, a function that builds the prior.
        exact: A function that builds a solver that draws from the exact posterior. Not needed if the prior is a
            :class:`~invflow.GaussianMixtureFlow`, or if there is a reward and a sampler.
        likelihood: Instead of sigma, a function ``(operator, y) -> Likelihood``, such as
            ``lambda operator, y: invflow.PoissonLikelihood(operator, y, gain=20.0)``: truths are measured with its
            noise. Or, instead of operator and sigma, a :class:`~invflow.Likelihood` that holds measured data with
            unknown truths; ``source="prior"`` then simulates similar data.
        reward: Instead of operator and sigma, a reward of any number of observations, or a function that builds it.
        quantities: Scalar functions of images ``(n, *image_shape)`` to ``(n,)`` by name, by which solvers of a problem
            with a reward are evaluated, such as the share of a half-plane. The mean reward is always included.
        expectations: A function that returns the known means of these quantities under the tilted law, by the same
            names (and ``"reward"``).
        description: One line.

    Raises:
        ValueError: If sigma is not positive, if a measurement does not have exactly one source of truths, if there is
            both a measurement and a reward or neither, or if there is both a sigma and a likelihood.

    Example:
        >>> import torch, invflow
        >>> from invflow.operators import Denoising
        >>> def waves(n, generator):
        ...     phase = torch.rand(n, 1, 1, 1, generator=generator) + torch.linspace(0, 2, 16)
        ...     return 0.5 + 0.5 * torch.sin(6.28 * phase).expand(n, 1, 16, 16)
        >>> problem = invflow.Problem("waves", None, Denoising((1, 16, 16)), 0.1, sampler=waves)
        >>> truth, likelihood = problem.simulate(3, generator=torch.Generator().manual_seed(0))
        >>> truth.shape, likelihood.num_observations
        (torch.Size([3, 1, 16, 16]), 3)
    """

    #: whether the problem tilts its prior by a reward; otherwise it inverts a measurement
    tilts = False
    #: name of the solver to use if none is chosen
    usual_solver = "vfm"

    @explained(like="invflow.Problem('faces', 'mnist', operator, sigma=0.05, sampler=draw)")
    def __init__(self, name: str, prior_name: str | None, operator: Operator | Callable[[], Operator] | None = None,
                 sigma: float | tuple[float, float] | None = None, *, images: Callable[[str], Tensor] | None = None,
                 sampler: Callable[[int, torch.Generator], Tensor] | None = None, random: bool = False,
                 prior: Callable[[], FlowMap] | None = None, exact: Callable[[], Solver] | None = None,
                 likelihood: Likelihood | Callable[[Operator, Tensor], Likelihood] | None = None,
                 reward: Reward | Callable[[], Reward] | None = None,
                 quantities: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
                 expectations: Callable[[], Mapping[str, float]] | None = None, description: str = "") -> None:
        if not isinstance(prior_name, str | None):
            raise TypeError(f"problem {name!r}: the second argument is the name of a prior or None, not "
                            f"{prior_name!r:.60}; as in invflow.Problem({name!r}, 'mnist', operator, 0.05, sampler=f)")
        if reward is None and (quantities or expectations):
            raise ValueError(f"problem {name!r}: quantities and expectations belong to a problem with a reward")
        self.name, self.prior_name, self.sigma, self.random = name, prior_name, sigma, random
        self.description = description
        self.quantities = dict(quantities or {})
        self._operator, self._images, self._sampler = operator, images, sampler
        self._likelihood = likelihood
        self._prior, self._exact, self._reward, self._expectations = prior, exact, reward, expectations
        self._check()

    def __new__(cls, *arguments: Any, **settings: Any) -> Problem:
        """Build a problem with a reward as a :class:`TiltedProblem`."""
        return super().__new__(TiltedProblem if cls is Problem and settings.get("reward") is not None else cls)

    functools.update_wrapper(__new__, __init__, assigned=())  # signatures show the arguments of __init__

    def _check(self) -> None:
        """Raise an error for arguments that do not fit together."""
        name, sigma, likelihood = self.name, self.sigma, self._likelihood
        if self._reward is not None:
            raise TypeError(f"problem {name!r} has a reward: derive {type(self).__name__} from "
                            "invflow.problem.TiltedProblem")
        if isinstance(likelihood, Likelihood):
            if any(value is not None for value in (self._operator, sigma, self._images, self._sampler)) or self.random:
                raise ValueError(f"problem {name!r}: a likelihood of measured data has its own operator, noise and "
                                 "data: pass no operator, sigma, truths or reward with it; for truths that are "
                                 "still to be measured pass likelihood=lambda operator, y: ...")
            self._operator = likelihood.operator
            return
        if likelihood is not None and not callable(likelihood):
            raise TypeError(f"problem {name!r}: likelihood is a {type(likelihood).__name__}, expected a Likelihood or "
                            "a function (operator, y) that returns one")
        if sigma is not None and likelihood is not None:
            raise ValueError(f"problem {name!r}: sigma={sigma} and a likelihood both define the noise: pass only one")
        if self._operator is None or (sigma is None and likelihood is None):
            raise ValueError(f"problem {name!r}: {_EITHER}")
        low, high = sigma if isinstance(sigma, tuple) else (sigma, sigma)
        if low is not None and high is not None and not 0 < low <= high < float("inf"):
            raise ValueError(f"sigma={sigma}: pass a noise level above 0, or a range (low, high)")
        if (self._images is None) == (self._sampler is None):
            raise ValueError(f"problem {name!r}: pass either images or sampler, one source of truths")

    @functools.cached_property
    def operator(self) -> Operator:
        """The forward operator. In a random problem, new parameters are drawn for it.

        Raises:
            ValueError: If this is a :class:`TiltedProblem`.
        """
        assert self._operator is not None
        return self._operator if isinstance(self._operator, Operator) else self._operator()

    @functools.cached_property
    def prior(self) -> FlowMap:
        """The flow map of the problem.

        Raises:
            ValueError: If the problem has none.
        """
        if self._prior is not None:
            return self._prior()
        if self.prior_name is None:
            raise ValueError(f"problem {self.name!r} has no prior of its own: pass one to the solver")
        from invflow.models.neural import load_prior

        return load_prior(self.prior_name)

    @functools.cached_property
    def reward(self) -> Reward:
        """The reward that tilts the prior. It is the same for any number of observations.

        Raises:
            ValueError: If this is an inverse problem. Its reward is the likelihood that :meth:`simulate` returns.
        """
        raise ValueError(f"problem {self.name!r} is an inverse problem: its reward is the likelihood of a measurement, "
                         "truth, likelihood = problem.simulate(4)")

    @functools.cached_property
    def expectations(self) -> dict[str, float]:
        """Known means under the tilted law, of the quantities and of ``"reward"``, by name."""
        return dict(self._expectations()) if self._expectations is not None else {}

    @property
    def is_measured(self) -> bool:
        """Whether the problem has measured data without known truths."""
        return isinstance(self._likelihood, Likelihood)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of one truth."""
        return tuple(self.operator.image_shape)

    @property
    def problem_class(self) -> str | None:
        """Name under which an adapter can be trained for the operator; None with a reward."""
        return self.operator.problem_class

    @property
    def has_images(self) -> bool:
        """Whether truths are images of a data set with splits; otherwise they are drawn from a known law."""
        return self._images is not None

    def images(self, split: str = "test") -> Tensor:
        """All truths of a split, in their order.

        Args:
            split: ``"test"``, or ``"validation"`` for choosing settings.

        Returns:
            ``(n, *image_shape)``.

        Raises:
            ValueError: If the split is unknown, or if truths are drawn from a law.
        """
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}: pass split='test', or split='validation' for tuning")
        if self._images is None:
            why = "has measured data without truths" if self.is_measured else "draws its truths from a law"
            raise ValueError(f"problem {self.name!r} {why}: it has no set of images")
        return self._images(split)

    @explained(like="problem.simulate(4, generator=generator)")
    @torch.no_grad()
    def simulate(self, num_observations: int, *, generator: torch.Generator | None = None,
                 source: str = "data", split: str = "test", shuffle: bool = True) -> tuple[Any, Any]:
        """Draw truths and measure them. With a reward, draw from the tilted law.

        Args:
            num_observations: B, at least 1.
            generator: Generator for truths, operator parameters, noise levels and noise, in this order.
            source: ``"data"`` for the problem's own truths; ``"prior"`` for draws from its prior, for which the
                posteriors of a calibrated solver are calibrated.
            split: Split of a problem with images, ``"test"`` or ``"validation"``.
            shuffle: Whether to draw images without replacement; False takes the first B in order, the same in every
                call. Truths with a known law are always drawn.

        Returns:
            truth: Truths ``(B, *image_shape)``; with a reward, independent draws of the tilted law, or None if the
                problem cannot draw from it; None for measured data.
            likelihood: A :class:`~invflow.GaussianLikelihood` of B observations, or the problem's own likelihood;
                with a reward, that reward for B independent repeats, each of which gets its own particles. In all
                cases ``truth[b]`` is a draw from the law that the samples of observation b should follow.

        Raises:
            ValueError: If the source or the split is unknown, if there are fewer images than requested, or if truths
                from the prior are requested for a problem with a reward.
        """
        if num_observations < 1:
            raise ValueError(f"num_observations={num_observations}: simulate takes at least one observation")
        return self._simulate(num_observations, as_generator(generator), source, split, shuffle)

    def _simulate(self, count: int, generator: torch.Generator, source: str, split: str,
                  shuffle: bool) -> tuple[Any, Any]:
        if self.is_measured and source == "data" and self._sampler is None:
            return self._measured(count, generator, shuffle)
        truth = self._truths(count, generator, source, split, shuffle)
        if self._likelihood is not None:
            return truth, self._measure(truth, generator)
        assert self.sigma is not None
        operator = self.operator.randomize(count, generator) if self.random else self.operator
        sigma: float | Tensor
        if isinstance(self.sigma, tuple):
            low, high = self.sigma
            share = torch.rand(count, generator=generator, device=generator.device)
            sigma = (low * (high / low) ** share).to(truth)
        else:
            sigma = self.sigma
        y = operator.measure(truth, sigma, generator=generator)
        return truth, GaussianLikelihood(operator, y, sigma)

    def _measured(self, count: int, generator: torch.Generator, shuffle: bool) -> tuple[None, Likelihood]:
        """Select some of the measured data."""
        data = self._likelihood
        assert isinstance(data, Likelihood)
        if count > data.y.shape[0]:
            raise ValueError(f"problem {self.name!r} has {data.y.shape[0]} measurements, but {count} were asked for: "
                             "ask for fewer, or for any number of simulated ones with source='prior'")
        order = torch.randperm(len(data.y), generator=generator, device=generator.device) if shuffle else None
        return None, data.select(slice(count) if order is None else order[:count].cpu())

    def _measure(self, truth: Tensor, generator: torch.Generator) -> Likelihood:
        """Measure each truth with the noise of the likelihood."""
        count = len(truth)
        if isinstance(self._likelihood, Likelihood):  # use the noise levels of the measured data in turn
            empty = self._likelihood.select(torch.arange(count) % len(self._likelihood.y))
        else:
            assert self._likelihood is not None
            operator = self.operator.randomize(count, generator) if self.random else self.operator
            blank = truth.new_zeros(count, *operator.measurement_shape)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the data do not exist yet
                empty = self._likelihood(operator, blank)
            if not isinstance(empty, Likelihood):
                raise TypeError(f"problem {self.name!r}: likelihood(operator, y) returned a {type(empty).__name__}, "
                                "expected an invflow.Likelihood, such as PoissonLikelihood(operator, y, gain=20.0)")
        y = empty.simulate(truth.to(empty.y), generator)
        if not isinstance(self._likelihood, Likelihood):
            return self._likelihood(empty.operator, y)
        made = copy.copy(empty)
        made.y = y
        return made

    def _truths(self, count: int, generator: torch.Generator, source: str, split: str,
                shuffle: bool) -> Tensor:
        if source not in ("data", "prior"):
            raise ValueError(f"unknown source {source!r}: pass source='data' or source='prior'")
        if source == "prior":
            return self.prior.generate(count, generator=generator)
        if self._sampler is not None:
            return self._sampler(count, generator)
        images = self.images(split)
        if count > len(images):
            raise ValueError(
                f"problem {self.name!r} has {len(images)} {split} images, but {count} were asked for: ask "
                "for fewer, or for any number of prior draws with source='prior'"
            )
        if not shuffle:
            return images[:count].clone()
        order = torch.randperm(len(images), generator=generator, device=generator.device)
        return images[order[:count].to(images.device)]

    def with_prior(self, prior: FlowMap | str | os.PathLike[str]) -> Problem:
        """Return the same problem with another prior; truths and measurements are unchanged.

        Args:
            prior: A flow map, or an argument of :func:`invflow.load_prior`; loaded when first needed.
        """
        from invflow.flowmap import FlowMap
        from invflow.models.neural import load_prior

        def build() -> FlowMap:
            built = prior if isinstance(prior, FlowMap) else load_prior(prior)
            if not self._fits(built):
                raise ValueError(f"the prior {name!r} has images {tuple(built.image_shape)}, but the problem "
                                 f"{self.name!r} has {self.image_shape}: pass a prior for this shape")
            return built

        name = type(prior).__name__ if isinstance(prior, FlowMap) else str(prior)
        other = copy.copy(self)
        other.__dict__.pop("prior", None)
        other.prior_name = None if isinstance(prior, FlowMap) else name
        other._prior, other._exact = build, None
        return other

    def _fits(self, prior: FlowMap) -> bool:
        return tuple(prior.image_shape) == self.image_shape

    @explained(arrays=True)
    def with_images(self, images: Tensor) -> Problem:
        """Return the same problem with other images, used for every split.

        Args:
            images: Truths ``(n, *image_shape)``, in order.

        Raises:
            ValueError: If the images have another shape, or if the problem has no set of images.
        """
        if not self.has_images or tuple(images.shape[1:]) != self.image_shape:
            raise ValueError(f"problem {self.name!r} takes images (n, {', '.join(map(str, self.image_shape))})"
                             f"{'' if self.has_images else ', but draws its own truths'}, not {tuple(images.shape)}")
        other = copy.copy(self)
        other._images = lambda split: images
        return other

    def exact_posterior(self) -> Solver:
        """Return a solver that draws from the exact posterior.

        Raises:
            TypeError: If none is known: the prior is not a mixture and the problem provides no exact solver, or no
                sampler for its reward.
        """
        if self._exact is not None:
            return self._exact()
        from invflow.models.mixture import GaussianMixtureFlow

        if self._prior is None or not isinstance(self.prior, GaussianMixtureFlow):
            raise TypeError(
                f"problem {self.name!r} has no exact posterior: its prior is not a Gaussian mixture. Use a "
                "problem that has one, such as 'gaussian/linear' or 'checkerboard'"
            )
        from invflow.solvers.exact import ExactPosterior

        return ExactPosterior(self.prior)

    def __copy__(self) -> Problem:
        other = type(self).__new__(type(self))
        vars(other).update(vars(self))
        return other

    def __reduce__(self) -> Any:
        # local functions cannot be pickled by name, so a registered problem is pickled by its own name
        registered = _REGISTERED.get(self.name)
        if registered is None:
            return super().__reduce__()
        known = vars(registered)
        changed = {key: value for key, value in vars(self).items() if key not in known or known[key] is not value}
        return load_problem, (self.name,), changed

    def __repr__(self) -> str:
        kind = "random operators" if self.random else "one operator"
        if self._likelihood is not None:
            what = "measured data" if self.is_measured else "a likelihood of its own"
            return f"Problem({self.name!r}, prior={self.prior_name!r}, {what}, {kind})"
        return f"Problem({self.name!r}, prior={self.prior_name!r}, sigma={self.sigma}, {kind})"


class TiltedProblem(Problem):
    """A problem with a reward: the goal is its prior p tilted by the reward, p(x) e^{r(x)}.

    It takes the arguments of :class:`Problem`, which builds one if it is passed a reward.
    """

    tilts = True
    usual_solver = "fmtt"

    def _check(self) -> None:
        if any(value is not None for value in (self._operator, self.sigma, self._likelihood)) or self._reward is None:
            raise ValueError(f"problem {self.name!r}: {_EITHER}")
        if self._images is not None or self.random or (self._prior is None and self.prior_name is None):
            raise ValueError(f"problem {self.name!r} has a reward: it takes a prior or its name, no images and no "
                             "random operators; a sampler draws from the tilted law")

    @functools.cached_property
    def operator(self) -> Operator:
        """Raise an error: a problem with a reward has no operator."""
        raise ValueError(f"problem {self.name!r} tilts its prior by a reward: it has no operator and "
                         "no measurements, see its reward")

    @functools.cached_property
    def reward(self) -> Reward:
        """The reward that tilts the prior. It is the same for any number of observations."""
        assert self._reward is not None
        return self._reward if isinstance(self._reward, Reward) else self._reward()

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of one image of the prior."""
        return tuple(self.prior.image_shape)

    @property
    def problem_class(self) -> None:
        """None: there is no operator that an adapter could be trained for."""
        return None

    def _fits(self, prior: FlowMap) -> bool:
        return True

    def _simulate(self, count: int, generator: torch.Generator, source: str, split: str,
                  shuffle: bool) -> tuple[Tensor | None, RepeatedReward]:
        if source != "data":
            raise ValueError(f"problem {self.name!r} tilts its prior by a reward, so a draw of the prior is not a "
                             "truth: pass source='data' for draws of the tilted law")
        truth = None if self._sampler is None else self._sampler(count, generator)
        return truth, RepeatedReward(self.reward, count)

    def exact_posterior(self) -> Solver:
        """Return a solver that draws from the tilted law itself; see :meth:`Problem.exact_posterior`."""
        if self._exact is not None:
            return self._exact()
        if self._sampler is None:
            raise TypeError(f"problem {self.name!r} has no exact sampler of its tilted law: use a problem that has "
                            "one, such as 'mixture/half-plane'")
        from invflow.solvers.exact import DrawnPosterior

        return DrawnPosterior(self._sampler, self.reward, prior=self.prior)

    def __repr__(self) -> str:
        return f"Problem({self.name!r}, prior={self.prior_name!r}, tilted by a reward)"


#: the problems found so far, by name, for :meth:`Problem.__reduce__`
_REGISTERED: dict[str, Problem] = {}


# -- registered problems -------------------------------------------------------------------------------------


def list_problems() -> dict[str, Problem]:
    """All registered problems by name, sorted.

    A problem that is broken, or whose name is taken, is skipped with a warning.
    """
    found: dict[str, Problem] = plugins.named(GROUP, Problem, lambda _, problem: problem.name)
    _REGISTERED.update(found)
    return dict(sorted(found.items()))


@explained(like="invflow.load_problem('mnist/box-inpainting')")
def load_problem(name: str) -> Problem:
    """Find a registered problem.

    Args:
        name: Name of the problem, such as ``"mnist/box-inpainting"``; see :func:`list_problems`.

    Returns:
        The problem. Its operator, prior and reward are not shared with other calls.

    Raises:
        ValueError: If the name is unknown; the message names the nearest known one.

    Example:
        >>> import invflow
        >>> invflow.load_problem("mnist/box-inpainting")
        Problem('mnist/box-inpainting', prior='mnist', sigma=0.025, one operator)
    """
    known = list_problems()
    if not known:
        raise ValueError(f"no problem is registered under {GROUP!r}: install the package, pip install -e .")
    if name not in known:
        family = [other for other in known if other.startswith(name.rstrip("/") + "/")]
        if family:
            raise ValueError(f"there is no problem {name!r}: there are {', '.join(family)}")
        raise ValueError(f"there is no problem {name!r}: {plugins.nearest(name, list(known))}")
    problem = copy.copy(known[name])
    for cached in ("operator", "prior", "reward"):
        problem.__dict__.pop(cached, None)
    return problem
