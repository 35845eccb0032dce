"""Computation of the app, without display: from a view to a posterior."""

from __future__ import annotations

import functools
import math
import threading
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from invflow.app.damage import DAMAGES, operator_of
from invflow.likelihood import GaussianLikelihood
from invflow.registry import solver_by_name

if TYPE_CHECKING:
    from invflow.posterior import Posterior
    from invflow.solver import Solver

__all__ = ["MOST_SAMPLES", "SOLVERS", "Restored", "View", "ask", "restore", "solvers_of"]

MOST_SAMPLES = 256
#: solvers offered for each prior, with settings that keep them to seconds
SOLVERS: dict[str, dict[str, dict[str, Any]]] = {
    "mnist": {"vfm": {}, "lmmse": {}, "ddrm": {}, "pigdm": {"steps": 25}, "flower": {"steps": 25},
              "noise-rto": {"max_iterations": 50}},
    "photos": {"vfm": {}, "wiener": {}, "tv": {}, "bicubic": {}},
}
#: solvers use all cores: two at once would only slow each other down
_ONE_AT_A_TIME = threading.Lock()


@dataclass(frozen=True)
class View:
    """The user's choices.

    Attributes:
        image: ``(C, H, W)`` in [0, 1], in steps of 1/255.
        prior: ``"mnist"`` or ``"photos"``.
        damage: Key of :data:`invflow.app.damage.DAMAGES`.
        parameter: Value of its setting.
        hole: ``(H, W)`` bool, True where hidden; None if none is painted.
        sigma: Standard deviation of the noise, in [0.001, 0.5].
        seed: Random seed.
        samples: Number of samples, up to :data:`MOST_SAMPLES`.
        solver: Key of :data:`SOLVERS` of the prior.
    """

    image: Tensor
    prior: str = "mnist"
    damage: str = "painted hole"
    parameter: float = 0.0
    hole: Tensor | None = None
    sigma: float = 0.02
    seed: int = 0
    samples: int = 64
    solver: str = "vfm"

    def __post_init__(self) -> None:
        if self.prior not in SOLVERS or self.damage not in DAMAGES:
            raise ValueError(f"the app offers the priors {', '.join(SOLVERS)} and the damages {', '.join(DAMAGES)}, "
                             f"not {self.prior!r} and {self.damage!r}")
        if self.solver not in SOLVERS[self.prior]:
            raise ValueError(f"the app offers {', '.join(SOLVERS[self.prior])} for the prior {self.prior!r}, not "
                             f"{self.solver!r}")
        if not (1 <= self.samples <= MOST_SAMPLES and 0.001 <= self.sigma <= 0.5 and 0 <= self.seed < 2**31):
            raise ValueError(f"samples={self.samples}, sigma={self.sigma}, seed={self.seed}: the app takes 1 to "
                             f"{MOST_SAMPLES} samples, sigma from 0.001 to 0.5 and a seed from 0 to {2**31 - 1}")


@dataclass(frozen=True)
class Restored:
    """A view with its posterior.

    Attributes:
        view: The view.
        likelihood: Likelihood of the one observation.
        posterior: Posterior from the solver.
        draws: ``(N, C, H, W)``, equally weighted; resampled from a weighted posterior.
        said: Warnings of the library, one sentence each.
    """

    view: View
    likelihood: GaussianLikelihood
    posterior: Posterior
    draws: Tensor
    said: tuple[str, ...]


def solvers_of(prior: str) -> list[str]:
    """Names of the solvers offered for a prior."""
    return list(SOLVERS[prior])


def restore(view: View) -> Restored:
    """Simulate the measurement of a view, and draw from the posterior.

    The code of :func:`invflow.app.words.python_code` and ``invflow solve`` give the same numbers.

    Raises:
        ValueError: For invalid choices, explained in one sentence.
    """
    with _ONE_AT_A_TIME, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        solver, generator = _solver(view.solver, view.prior), torch.Generator().manual_seed(view.seed)
        shape = tuple(view.image.shape)
        operator = operator_of(view.damage, view.parameter, shape, view.hole, generator)
        y = operator.measure(view.image[None], view.sigma, generator=generator)
        likelihood = GaussianLikelihood(operator, y, view.sigma)
        posterior = solver.resized(shape).sample(likelihood, view.samples, generator=generator)
        draws = posterior.samples[0]
        if posterior.weighted:
            draws = posterior.resample(view.samples, generator=torch.Generator().manual_seed(0)).samples[0]
    said = dict.fromkeys(str(warning.message) for warning in caught if issubclass(warning.category, UserWarning))
    return Restored(view, likelihood, posterior, draws, tuple(said))


@functools.lru_cache
def _solver(name: str, prior: str) -> Solver:
    return solver_by_name(name, prior, **SOLVERS[prior][name])


def ask(restored: Restored) -> tuple[dict[str, float], str]:
    """Posterior probability of each class, as estimated from samples and a classifier.

    p(class | y) is the mean of p(class | x) over posterior samples x, with their weights.

    Returns:
        Probabilities by class, which sum to 1, and a sentence with the standard error of the largest.

    Raises:
        ValueError: For images other than digits.
    """
    if restored.view.prior != "mnist":
        raise ValueError("only digits have a classifier: restore a digit first")
    posterior, classifier = restored.posterior, _classifier()
    each = classifier.probabilities(posterior.samples[0]).double()
    weights = posterior.weights[0].double()
    chances = weights @ each
    best = int(chances.argmax())
    error = math.sqrt(float((weights.square() * (each[:, best] - chances[best]).square()).sum()))
    found = {name: float(p) for name, p in zip(classifier.classes, chances, strict=True)}
    name = classifier.classes[best]
    text = (f"Given the measurement, the digit is {name} with probability {found[name]:.0%} (standard error "
            f"{error:.1%}, from {len(each)} samples), if the samples follow the posterior and the classifier is "
            "correct for each.")
    return found, text


@functools.lru_cache
def _classifier() -> Any:
    from invflow.nets.classifier import Classifier

    return Classifier.load("mnist").eval()
