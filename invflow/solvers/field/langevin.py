"""Langevin sampling with the denoiser of a flow map."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from invflow._core.shapes import column
from invflow.flowmap import FlowMap
from invflow.likelihood import GaussianLikelihood
from invflow.linear.structure import observed_forward
from invflow.solvers.field.diffusion import RangedSampler, require_positive
from invflow.solvers.field.rows import Rows

__all__ = ["ULA", "operator_norm"]


class ULA(RangedSampler):
    r"""Plug-and-play unadjusted Langevin algorithm (Laumont et al. 2022, algorithm 2, projected), through deepinv.

    Each step of a chain takes x to the projection onto ``clip`` of :math:`x + \delta \nabla \log p(y | x) + \delta
    \alpha (D_\epsilon(x) - x) / \epsilon + \sqrt{2 \delta} z`. It uses the score of the images blurred by noise of
    variance :math:`\epsilon`, and has no accept-reject correction, so the discretisation biases the samples. Each
    observation has several chains, and each chain gives several samples. Samples of one chain are correlated, and a
    chain may never leave the mode that it first reached. The paper runs chains of millions of steps; in the thousand
    steps of ``burn_in`` they hardly move.

    Args:
        prior: Same as in :class:`DiffusionSampler`.
        burn_in: Number of steps before the first sample.
        thinning: Number of steps between the samples of a chain.
        chains: Number of chains for each observation; None for one chain for each sample, so that each sample costs
            ``burn_in`` calls.
        step: :math:`\delta`, in units of 1 / (alpha / epsilon + |A|^2 / sigma^2); one third in the paper. The chain
            diverges above 2.
        denoiser_sigma: :math:`\sqrt{\epsilon}`, for images in [0, 1]; 5 / 255 in the paper.
        alpha: Weight of the prior.
        clip: C, the range that the chain is projected onto, in units of [0, 1]; None for no projection.
        value_range: Same as in :class:`DiffusionSampler`; the range of images that maps to [0, 1] here.
        chunk_size: Same as in :class:`DiffusionSampler`.

    Raises:
        TypeError, ValueError: If the prior or a setting does not fit; in ``sample``, if the operator is not linear.

    Example:
        >>> import torch, invflow
        >>> from invflow.operators import Denoising
        >>> prior = invflow.GaussianMixtureFlow(torch.full((1, 1, 4, 4), 0.5), std=0.1)
        >>> likelihood = invflow.GaussianLikelihood(Denoising((1, 4, 4)), torch.full((2, 1, 4, 4), 0.7), sigma=0.1)
        >>> invflow.ULA(prior, burn_in=10, thinning=5).sample(likelihood, 3).samples.shape
        torch.Size([2, 3, 1, 4, 4])
    """

    uses_system = True

    def __init__(self, prior: FlowMap, *, burn_in: int = 1000, thinning: int = 50, chains: int | None = None,
                 step: float = 1 / 3, denoiser_sigma: float = 5 / 255, alpha: float = 1.0,
                 clip: tuple[float, float] | None = (-1.0, 2.0), value_range: tuple[float, float] = (0.0, 1.0),
                 chunk_size: int | None = None) -> None:
        super().__init__(prior, value_range=value_range, chunk_size=chunk_size)
        require_positive(step=step, denoiser_sigma=denoiser_sigma, alpha=alpha)
        if burn_in < 0 or thinning < 1 or (chains is not None and chains < 1):
            raise ValueError(f"burn_in={burn_in} must be at least 0, thinning={thinning}, chains={chains} at least 1")
        self.burn_in, self.thinning, self.chains, self.step = burn_in, thinning, chains, step
        self.denoiser_sigma, self.alpha, self.clip = denoiser_sigma, alpha, clip

    def _layout(self, num_samples: int) -> tuple[int, int]:
        chains = num_samples if self.chains is None else min(self.chains, num_samples)
        return chains, -(-num_samples // chains)

    def _run(self, rows: Rows) -> Tensor:
        steps = self._step_sizes(rows)
        out = torch.empty(len(steps), rows.kept, *self.prior.image_shape, dtype=torch.float64, device=steps.device)
        for step in steps.unique():  # deepinv takes one step size for all rows; mixed noise levels need several
            index = (steps == step).nonzero().flatten()
            out[index] = self._chains(rows.take(index), float(step))
        return out

    def _step_sizes(self, rows: Rows) -> Tensor:
        """Step size of each row, ``(n,)``, rounded down to eighths of an octave so that few values differ."""
        span = self.value_range[1] - self.value_range[0]
        norm = operator_norm(rows.likelihood) if rows.system is None else rows.system.values.amax(1)
        curvature = self.alpha / self.denoiser_sigma**2 + (span * norm / rows.likelihood.sigma.to(norm)).square()
        return torch.exp2((8 * (self.step / curvature).double().log2()).floor() / 8)

    def _chains(self, rows: Rows, step: float) -> Tensor:
        """Samples ``(n, kept, *image_shape)`` of n chains with the same step size."""
        from deepinv.optim.data_fidelity import L2
        from deepinv.optim.prior import ScorePrior
        from deepinv.sampling import sampling_builder

        from invflow.solvers.field.bridge import FlowDenoiser, NoiseFrom, direct_physics, measured

        y, level = measured(rows, self.value_range, whiten=True)
        kept: list[Tensor] = []
        iterations = self.burn_in + self.thinning * rows.kept
        count = 0

        def collect(state: dict[str, Tensor], **_: Any) -> None:
            nonlocal count
            count += 1
            if count > self.burn_in and (count - self.burn_in) % self.thinning == 0:
                kept.append(state["x"])

        chain = sampling_builder(
            "ULA", L2(), ScorePrior(FlowDenoiser(self.prior, self.value_range)), max_iter=iterations, thinning=1,
            params_algo={"step_size": step, "alpha": self.alpha, "sigma": self.denoiser_sigma}, clip=self.clip,
            burnin_ratio=0.0, history_size=False, callback=collect)
        like = torch.full((len(y), *self.prior.image_shape), 0.5, device=y.device)
        start = like + 0.25 * rows.noise(like)
        with NoiseFrom(rows.noise):
            chain.sample(y, direct_physics(rows, self.value_range, level, 1.0), x_init=start)
        return torch.cat([self._from_unit(x) for x in kept], dim=1)


def operator_norm(likelihood: GaussianLikelihood, iterations: int = 30) -> Tensor:
    """Largest singular value of each row's operator by power iteration, ``(n,)``; slightly underestimated."""
    operator = likelihood.operator
    x = torch.randn(1, *operator.image_shape, generator=torch.Generator().manual_seed(0)).to(likelihood.y)
    x = x.expand(len(likelihood.y), *x.shape[1:])
    norm = torch.ones(len(x)).to(x)
    for _ in range(iterations):
        norm = x.flatten(1).norm(dim=1).clamp(min=torch.finfo(x.dtype).tiny)
        x = operator.adjoint(observed_forward(likelihood, x / column(norm, x)))
    result: Tensor = x.flatten(1).norm(dim=1).sqrt()
    return result
