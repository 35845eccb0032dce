"""The checkerboard: a distribution on half of a square's sixteen cells, with the first coordinate observed.

This is the toy example of the Variational Flow Maps paper (arXiv 2603.07276). In the first coordinate, the posterior is
a Gaussian truncated at the edges of the board; in the second, it is uniform over two separate cells. A Gaussian
approximation cannot represent it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from invflow.likelihood import GaussianLikelihood
from invflow.metrics import energy_score, mmd_root, nlpd
from invflow.operator import Operator
from invflow.plugins import as_generator
from invflow.posterior import Posterior
from invflow.problem import Problem, load_problem
from invflow.reward import Reward
from invflow.solver import Solver

__all__ = ["BoardPosterior", "board_sample", "checkerboard", "exact_posterior_samples", "on_board"]

#: standard deviation of the noise on the first coordinate
NOISE = 0.1


def board_sample(n: int, generator: torch.Generator | int | None = None) -> Tensor:
    """Draw points uniformly from the board's eight dark cells.

    The board [-2, 2]^2 has 4 x 4 unit cells; (x, y) is on a dark one where floor(x) + floor(y) is even.

    Args:
        n: Number of points.
        generator: Source of randomness.

    Returns:
        ``(n, 2)``, float32.
    """
    generator = as_generator(generator)
    uniform = torch.rand(n, 2, generator=generator, device=generator.device)
    cell = torch.randint(8, (n,), generator=generator, device=generator.device)
    column = cell // 2
    row = 2 * (cell % 2) + column % 2
    return torch.stack([column, row], 1) - 2 + _below(uniform, 1.0)


def on_board(x: Tensor) -> Tensor:
    """Whether points lie on a dark cell of the board: ``(..., 2)`` to ``(...)``, bool."""
    inside = ((x >= -2) & (x < 2)).all(-1)
    return inside & (x.floor().sum(-1) % 2 == 0)


def exact_posterior_samples(y: Tensor, n: int, generator: torch.Generator | int | None = None, *,
                            sigma: float | Tensor = NOISE) -> Tensor:
    """Draw from the exact posterior given noisy first coordinates, by inversion of the distribution function.

    Each first coordinate is equally likely a priori, so its posterior is N(y, sigma^2) restricted to [-2,
    2]; the second is uniform over the two dark cells of that column.

    Args:
        y: ``(B,)`` or ``(B, 1)``, measured first coordinates.
        n: Number of draws for each measurement.
        generator: Source of randomness.
        sigma: Standard deviation of the noise, a float or ``(B,)``.

    Returns:
        ``(B, n, 2)``, in the type of ``y``.

    Raises:
        ValueError: If a measurement lies more than 35 standard deviations off the board.
    """
    generator = as_generator(generator)
    centre = y.reshape(len(y), 1).double()
    scale = torch.as_tensor(sigma, dtype=torch.float64, device=y.device).reshape(-1, 1)
    uniform = torch.rand(len(y), n, 2, generator=generator, device=generator.device, dtype=torch.float64)
    uniform = uniform.to(y.device)
    # mirror: for y beyond an edge, the board is then in the lower tail, where probabilities keep their digits
    flip = torch.where(centre < 0, -1.0, 1.0).double()
    low, high = ((edge - flip * centre) / scale for edge in (-2.0, 2.0))
    if bool((high < -35).any()):
        raise ValueError(f"a measurement of {float(y.abs().max()):.4g} lies too far off the board [-2, 2]")
    lower, upper = (torch.special.log_ndtr(edge).exp() for edge in (low, high))  # ndtr itself is 0 below -9
    quantile = torch.special.ndtri(lower + uniform[..., 0] * (upper - lower))
    first = _below((flip * (flip * centre + scale * quantile)).clamp(min=-2.0).to(y.dtype), 2.0)
    # one draw selects the column's cell, and its remainder the position in it
    cell, place = (2 * uniform[..., 1]).floor(), (2 * uniform[..., 1]) % 1
    second = 2 * cell.to(y.dtype) + first.floor() % 2 - 2
    return torch.stack([first, second + _below(place.to(y.dtype), 1.0)], -1)


def _below(x: Tensor, edge: float) -> Tensor:
    """Clamp below an edge, so that no rounding, here or in a sum, moves a point into the next cell."""
    return x.clamp(max=edge - 4 * torch.finfo(x.dtype).eps)


class BoardPosterior(Solver):
    """The exact posterior of the checkerboard, as a solver: independent draws without weights.

    Example:
        >>> import torch, invflow
        >>> g = torch.Generator().manual_seed(0)
        >>> problem = invflow.load_problem("checkerboard")
        >>> truth, likelihood = problem.simulate(5, generator=g)
        >>> problem.exact_posterior().sample(likelihood, 100, generator=g).samples.shape
        torch.Size([5, 100, 2])
    """

    def _sample(self, reward: Reward, n: int, generator: torch.Generator, progress: bool) -> Posterior:
        """Draw posterior samples; see :meth:`Solver.sample`.

        Raises:
            TypeError: If the reward is not a Gaussian likelihood of the first coordinate.
        """
        points = torch.eye(2)
        if not isinstance(reward, GaussianLikelihood) or reward.operator.measurement_shape != (1,):
            raise TypeError("BoardPosterior only supports the Gaussian likelihood of the first coordinate")
        row = reward.operator.select(0)(points.to(reward.y)).flatten()
        if reward.operator.num_sets > 1 or not torch.equal(row, points[0].to(row)):
            raise TypeError("BoardPosterior only supports operators that observe the first coordinate")
        samples = exact_posterior_samples(reward.y, n, generator, sigma=reward.sigma)
        return Posterior(samples)

    def prior_samples(self, n: int, *, generator: torch.Generator | int | None = None) -> Tensor:
        """Draw from the board itself, ``(n, 2)``."""
        return board_sample(n, generator)


def _first_coordinate() -> Operator:
    from invflow_operators.linear import MatrixOperator

    return MatrixOperator(torch.tensor([[1.0, 0.0]]), image_shape=(2,), problem_class="checkerboard")


checkerboard = Problem("checkerboard", "checkerboard", _first_coordinate, NOISE, sampler=board_sample,
                       exact=BoardPosterior,
                       description="a 4 x 4 board on [-2, 2]^2, first coordinate observed with noise 0.1")


def evaluate(solver: Solver, *, num_observations: int = 1000, num_samples: int = 100,
             seed: int = 1) -> dict[str, float]:
    """Evaluate a solver on the checkerboard.

    Args:
        solver: Solver with ``sample`` and ``prior_samples``.
        num_observations: Number of measurements, each of a new truth.
        num_samples: Posterior draws for each measurement.
        seed: Random seed of truths, measurements and draws; the same seed gives every solver the same observations.

    Returns:
        Negative log predictive density (NLPD) of a second measurement, energy score with diagonal, share of posterior
        draws on the board, root MMD to the exact posterior, standard deviation of the unobserved coordinate, and for
        prior draws the share on the board and the root MMD.
    """
    g = torch.Generator().manual_seed(seed)
    truth, likelihood = load_problem("checkerboard").simulate(num_observations, generator=g)
    second = likelihood.simulate(truth, g)
    exact = exact_posterior_samples(likelihood.y, num_samples, g)
    samples = solver.sample(likelihood, num_samples, generator=g).samples
    prior = solver.prior_samples(num_observations * num_samples // 10, generator=g)
    board = board_sample(len(prior), g)
    return {
        "nlpd": float(nlpd(_second_density(second, samples, likelihood.sigma)).mean()),
        "crps": float(energy_score(samples, truth, fair=False).mean()),
        "share": float(on_board(samples).float().mean()),
        "mmd": float(mmd_root(samples, exact).mean()),
        "spread": float(samples[..., 1].std(dim=1).mean()),
        "prior_share": float(on_board(prior).float().mean()),
        "prior_mmd": float(mmd_root(prior.view(-1, 100, 2), board.view(-1, 100, 2)).mean()),
    }


def _second_density(second: Tensor, samples: Tensor, sigma: Tensor) -> Tensor:
    """Log density of a second measurement given each sample: ``(B, N)``."""
    normal = torch.distributions.Normal(samples[..., 0], sigma[:, None])
    result: Tensor = normal.log_prob(second)
    return result
