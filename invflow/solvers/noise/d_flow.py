"""D-Flow: the noise whose image fits the measurement best. Optimisation, not posterior sampling."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from invflow._core.chunks import ChunkSize, check_chunk_size
from invflow._core.random import draw_noise
from invflow._core.watch import check_gradients
from invflow.flowmap import FlowMap, check_prior, integrate, rows_at_a_time
from invflow.likelihood import GaussianLikelihood
from invflow.posterior import Posterior
from invflow.reward import Reward, score_rows
from invflow.smc import precise
from invflow.solver import Solver
from invflow.solvers.finite import check_finite
from invflow.solvers.noise.lbfgs import BatchedLBFGS

__all__ = ["DFlow"]


class DFlow(Solver):
    r"""D-Flow (Ben-Hamu, Puny, Gat, Karrer, Singer and Lipman 2024, arXiv 2402.14017): optimisation, not sampling.

    It minimises :math:`-r(f(z))` over the noise z by L-BFGS, where f is the flow's ODE. For a measurement the objective
    is :math:`|y - A f(z)|^2 / (2 \sigma^2)`. Only the start and the number of iterations keep z likely. The start is

    .. math:: z_0 = \sqrt{\alpha} \, X_{1,0}(A^+ y) + \sqrt{1 - \alpha} \, \epsilon,

    the pseudo-inverse mapped back to noise, blended with fresh noise. The samples differ only by this noise, so their
    spread is not that of the posterior. For the posterior in noise space use :class:`~invflow.NoiseSMC` or
    :class:`~invflow.NoiseLangevin`.

    Args:
        prior: Flow map.
        iterations: Number of L-BFGS iterations. Each takes a forward and a backward call per ODE velocity, and more if
            a step is shortened.
        ode_steps: Number of midpoint steps from noise to data, with two velocities each. The paper uses 6. None uses
            the map's jump.
        blend: alpha, in [0, 1]. The paper uses 0.1 for linear operators. Without a Gaussian likelihood and a linear
            operator it is 0.
        memory: Number of curvature pairs of L-BFGS.
        chunk_size: Number of rows through the network at a time; None for 256 on a CPU, and as many as fit on a GPU.

    The authors use a line search with Wolfe conditions; here steps are halved until the objective falls.

    Raises:
        TypeError: For a prior that is not a flow map.
        ValueError: For a setting out of range; in ``sample``, for a reward without a gradient.

    Example:
        >>> import torch, invflow
        >>> from invflow.operators import Denoising
        >>> prior = invflow.GaussianMixtureFlow(torch.full((1, 1, 4, 4), 0.5), std=0.1)
        >>> likelihood = invflow.GaussianLikelihood(Denoising((1, 4, 4)), torch.full((2, 1, 4, 4), 0.7), sigma=0.1)
        >>> images = invflow.DFlow(prior).sample(likelihood, 3, generator=0).samples
        >>> round(float(images.mean()), 2)  # the measurement itself: nothing keeps to the prior
        0.7
    """

    prior: FlowMap

    def __init__(self, prior: FlowMap, *, iterations: int = 20, ode_steps: int | None = 6, blend: float = 0.1,
                 memory: int = 10, chunk_size: int | None = None) -> None:
        check_prior("DFlow", prior)
        if iterations < 1 or memory < 1 or (ode_steps is not None and ode_steps < 1) or not 0 <= blend <= 1:
            raise ValueError(f"iterations={iterations}, memory={memory} and ode_steps={ode_steps} must be at least 1, "
                             f"blend={blend} in [0, 1]")
        reason = None if ode_steps is None else prior.refusal("velocity", "DFlow(ode_steps=6)")
        if reason is not None:
            raise ValueError(f"{reason}. Or pass ode_steps=None to use the map's jump")
        self.prior, self.iterations, self.ode_steps, self.blend = prior, iterations, ode_steps, blend
        self.memory, self.chunk_size = memory, check_chunk_size(chunk_size)

    def _sample(self, reward: Reward, n: int, generator: torch.Generator, progress: bool) -> Posterior:
        """Search; see :meth:`Solver.sample`.

        Returns:
            Images without weights or evidence; ``diagnostics`` holds ``kind``, "search", and ``reward`` ``(B, n)``.
        """
        from tqdm import tqdm

        if not reward.differentiable:
            raise ValueError(f"DFlow needs the reward's gradient, but this {type(reward).__name__} has none: use "
                             "invflow.BestOfN(prior)")
        check_gradients("DFlow")
        prior, reward = self.prior, reward.to(self.prior.device)
        count = reward.num_observations or 1
        start = self._start(reward, count, n, generator)
        owner = torch.arange(count).repeat_interleave(n)
        size = ChunkSize(rows_at_a_time(self.chunk_size, prior), "DFlow")
        images = torch.empty(len(owner), *prior.image_shape, device=prior.device, dtype=prior.dtype)
        rewards = precise(images.new_empty(len(owner)))

        def run(part: slice) -> None:
            mine, shape = owner[part], prior.state_shape

            def objective(points: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
                with torch.enable_grad():
                    z = points.detach().reshape(-1, *shape).requires_grad_()
                    value = -score_rows(reward, self._image(z), mine[rows.cpu()])
                    gradient = torch.autograd.grad(value.sum(), z)[0]
                return precise(value.detach()), gradient.flatten(1)

            search = BatchedLBFGS(objective, start[part].flatten(1), memory=self.memory, tolerance=1e-6)
            for _ in range(self.iterations):
                search.step()
            with torch.no_grad():
                images[part] = self._image(search.point.reshape(-1, *shape))
            rewards[part] = -search.value

        chunks = size.over(len(owner), run)
        for _ in tqdm(chunks, total=-(-len(owner) // size.rows), disable=not progress, desc="DFlow", delay=2):
            pass
        check_finite("DFlow", "its end", n, images)
        found = rewards.reshape(count, n).to(prior.dtype)
        return Posterior(images.reshape(count, n, *prior.image_shape), diagnostics={"kind": "search", "reward": found},
                         settings={"kind": "search"})

    @torch.no_grad()
    def prior_samples(self, n: int, *, generator: torch.Generator | int | None = None) -> Tensor:
        """Images of random noise without optimisation, ``(n, *image_shape)``."""
        return self._image(self.prior.noise(n, generator=generator))

    def _start(self, reward: Reward, count: int, n: int, generator: torch.Generator) -> Tensor:
        """Start of the optimisation, ``(count n, *state_shape)``."""
        prior = self.prior
        noise = draw_noise((count * n, *prior.state_shape), generator, prior.device).to(prior.dtype)
        if self.blend == 0 or not isinstance(reward, GaussianLikelihood) or not reward.operator.linear:
            return noise
        with torch.no_grad():
            state = prior.encode(reward.operator.pseudo_inverse(reward.y).to(prior.dtype))
            back = prior.jump(state, 1.0, 0.0) if self.ode_steps is None else integrate(
                prior.velocity, state, 1.0, 0.0, self.ode_steps)
        return math.sqrt(self.blend) * back.repeat_interleave(n, 0) + math.sqrt(1 - self.blend) * noise

    def _image(self, z: Tensor) -> Tensor:
        if self.ode_steps is None:
            return self.prior.one_step(z)
        return self.prior.decode(integrate(self.prior.velocity, z, 0.0, 1.0, self.ode_steps))
