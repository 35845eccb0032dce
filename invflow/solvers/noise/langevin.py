"""Langevin chains in noise space, preconditioned by the prior or by past gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from invflow._core.chunks import check_chunk_size
from invflow._core.random import draw_noise
from invflow.flowmap import FlowMap, check_prior
from invflow.posterior import Posterior
from invflow.reward import Reward
from invflow.solver import Solver
from invflow.solvers.noise.moves import CrankNicolsonLangevin, MoveRandom, gradient_of
from invflow.solvers.noise.target import NoiseTarget, Particles

__all__ = ["NoiseLangevin"]

PRECONDITIONERS = ("prior", "rmsprop")


class NoiseLangevin(Solver):
    r"""Langevin chains for the posterior in noise space, :math:`\pi(z) \propto N(z; 0, I) e^{r(f(z))}`, f one jump.

    ``preconditioner="prior"`` takes semi-implicit steps (Cotter, Roberts, Stuart and White 2013), which leave the prior
    exactly invariant without a reward:

    .. math:: z' = \rho z + (1 - \rho) \nabla r(f(z)) + \sqrt{1 - \rho^2} \xi, \qquad \rho = \sqrt{1 - h^2},

    with a Metropolis test if ``adjusted``. ``preconditioner="rmsprop"`` uses the dynamics of D-Flow SGLD
    (arXiv 2602.21469) with the preconditioner of Li, Chen, Carlson and Carin 2016 (pSGLD):

    .. math:: V \leftarrow \alpha V + (1 - \alpha) g^2, \quad G = (\lambda + \sqrt{V})^{-1}, \quad
        z' = z + \tfrac{\epsilon}{2} G g + \sqrt{\epsilon G} \xi, \quad g = \nabla r(f(z)) - z,

    without a test and, as usual, without the term for the changing preconditioner, so its distribution is biased. Each
    sample is the end of its own chain, which starts from the prior. Nothing reports a chain that has not forgotten its
    start or stays in one of several modes. For a solver that reports this, use :class:`~invflow.NoiseSMC`.

    Args:
        prior: Any flow map; its jump is used.
        steps: Number of steps of each chain. Each takes one forward and one backward network call.
        step_size: h in (0, 1), or epsilon > 0 for ``"rmsprop"``.
        preconditioner: ``"prior"`` or ``"rmsprop"``.
        adjusted: Whether to test each step (Metropolis-Hastings), for ``"prior"``; exact in the limit of long chains.
        decay: alpha, in [0, 1].
        damping: lambda, over 0.
        chunk_size: Number of rows through the map at a time; None for 256 on a CPU, and as many as fit on a GPU.

    Raises:
        TypeError: For a prior that is not a flow map.
        ValueError: For a setting out of range; in ``sample``, for a reward without a gradient.

    Example:
        >>> import torch, invflow
        >>> from invflow.operators import Denoising
        >>> prior = invflow.GaussianMixtureFlow(torch.full((1, 1, 4, 4), 0.5), std=0.1)
        >>> likelihood = invflow.GaussianLikelihood(Denoising((1, 4, 4)), torch.full((2, 1, 4, 4), 0.7), sigma=0.1)
        >>> posterior = invflow.NoiseLangevin(prior, steps=50).sample(likelihood, 3, generator=0)
        >>> posterior.nfe.backward
        51.0
    """

    prior: FlowMap

    def __init__(self, prior: FlowMap, *, steps: int = 500, step_size: float = 0.2, preconditioner: str = "prior",
                 adjusted: bool = True, decay: float = 0.99, damping: float = 1e-5,
                 chunk_size: int | None = None) -> None:
        check_prior("NoiseLangevin", prior)
        if preconditioner not in PRECONDITIONERS:
            raise ValueError(f"preconditioner={preconditioner!r}: choose one of {', '.join(PRECONDITIONERS)}")
        if steps < 1 or not step_size > 0 or (preconditioner == "prior" and not step_size < 1):
            raise ValueError(f"steps={steps} must be at least 1, step_size={step_size} over 0, and under 1 for "
                             "preconditioner='prior'")
        if not 0 <= decay <= 1 or not damping > 0:
            raise ValueError(f"decay={decay} must be in [0, 1], damping={damping} over 0")
        self.prior, self.steps, self.step_size, self.preconditioner = prior, steps, step_size, preconditioner
        self.adjusted, self.decay, self.damping = adjusted, decay, damping
        self.chunk_size = check_chunk_size(chunk_size)

    def _sample(self, reward: Reward, n: int, generator: torch.Generator, progress: bool) -> Posterior:
        """Draw; see :meth:`Solver.sample`.

        Returns:
            A posterior without weights or evidence. Its diagnostics hold ``acceptance`` ``(B,)`` if there is a test.
        """
        from tqdm import tqdm

        if not reward.differentiable:
            raise ValueError(f"NoiseLangevin needs the reward's gradient, but this {type(reward).__name__} has none: "
                             'use invflow.NoiseSMC(prior, moves="crank-nicolson")')
        reward = reward.to(self.prior.device)
        target = NoiseTarget(self.prior, reward, gradient=True, chunk_size=self.chunk_size)
        shape = (target.num_observations, n, *self.prior.state_shape)
        rows = torch.arange(shape[0], device=self.prior.device)

        def normal() -> Tensor:
            return draw_noise(shape, generator, self.prior.device).to(self.prior.dtype)

        particles = target.evaluate(normal(), rows)
        accepted, square = [], torch.zeros_like(particles.noise)
        for step in tqdm(range(self.steps), disable=not progress, desc="NoiseLangevin", unit="step", delay=2):
            target.where = f"step {step + 1}"
            if self.preconditioner == "rmsprop":
                particles, square = self._adaptive(target, particles, rows, square, normal())
            elif self.adjusted:
                uniform = torch.rand((*shape[:2], 1), generator=generator, device=generator.device)
                one = torch.ones(len(rows), device=rows.device, dtype=self.prior.dtype)
                particles, share = CrankNicolsonLangevin()(target, particles, rows, one, self.step_size * one,
                                                           MoveRandom(normal(), uniform).to(particles.noise))
                accepted.append(share)
            else:
                rho = (1 - self.step_size**2) ** 0.5
                drift = rho * particles.noise + (1 - rho) * gradient_of(particles)
                particles = target.evaluate(drift + self.step_size * normal(), rows)
        diagnostics = {"acceptance": torch.stack(accepted).mean(0)} if accepted else {}
        return Posterior(particles.images, diagnostics=diagnostics)

    def _adaptive(self, target: NoiseTarget, particles: Particles, rows: Tensor, square: Tensor,
                  xi: Tensor) -> tuple[Particles, Tensor]:
        gradient = gradient_of(particles) - particles.noise
        square = self.decay * square + (1 - self.decay) * gradient.square()
        scale = 1 / (self.damping + square.sqrt())
        moved = particles.noise + 0.5 * self.step_size * scale * gradient + (self.step_size * scale).sqrt() * xi
        return target.evaluate(moved, rows), square

    def prior_samples(self, n: int, *, generator: torch.Generator | int | None = None) -> Tensor:
        """Draw from the one-step prior that the chains tilt, ``(n, *image_shape)``."""
        return self.prior.generate(n, generator=generator, chunk_size=self.chunk_size)
