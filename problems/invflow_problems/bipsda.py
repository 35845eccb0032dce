r"""Three problems of a mixture of three Gaussians in ten dimensions: inpainting, X-ray counts, phase retrieval.

After the experiments of "Benchmarking diffusion annealing-based Bayesian inverse problem solvers" (BIPSDA, 2025,
doi 10.1109/OJSP.2025.3597867): means -5, 0 and 5 in every coordinate, weights 0.4, 0.3 and 0.3, covariances the
identity, diag(1, ..., 2), and the same spectrum in a random basis.

- ``bipsda/inpainting``: eight of ten coordinates with noise 5;
- ``bipsda/x-ray``: Poisson counts of rate 1000 exp(-a_i (x + 10)), for 15 rays a_i uniform in [0.01, 0.05];
- ``bipsda/phase-retrieval``: five squares (a_i x)^2 with noise 25, a_i standard normal.

The random matrices are drawn here, so numbers cannot be compared with those of the article digit by digit. The
article uses long chains as its reference; here, all three posteriors have independent exact draws. The first posterior
is a mixture in closed form. The other two use rejection from the prior (von Neumann 1951), bounded by the largest
likelihood. For counts, Newton's method finds it, because their log likelihood is concave; for squares it is known.
"""

from __future__ import annotations

import functools
import math
import warnings

import torch
from torch import Tensor

from invflow.likelihood import GaussianLikelihood, Likelihood, PoissonLikelihood
from invflow.operator import Operator
from invflow.plugins import as_generator
from invflow.posterior import Posterior
from invflow.problem import Problem
from invflow.reward import Reward
from invflow.solver import Solver
from invflow_problems.covariance_mixture import CovarianceMixtureFlow

__all__ = ["Attenuation", "BipsdaPosterior", "Squares", "bipsda_inpainting", "bipsda_phase_retrieval", "bipsda_prior",
           "bipsda_x_ray"]

D, PHOTONS = 10, 1000.0


class _Rays(Operator):
    """Base of both operators: a matrix ``(m, d)``."""

    linear = False
    matrix: Tensor

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.measurement_shape, self.image_shape = (matrix.shape[0],), (matrix.shape[1],)
        self.register_sets(matrix=matrix[None])

    def _project(self, x: Tensor) -> Tensor:
        return torch.einsum("smd,nd->nm", self.matrix[:1].to(x), x)


class Attenuation(_Rays):
    """A(x) = exp(-M (x + 10)), the share of photons that pass along each ray: ``(n, d)`` to ``(n, m)``.

    Args:
        matrix: M, ``(m, d)``.
    """

    def forward(self, x: Tensor) -> Tensor:
        """``(n, d)`` to ``(n, m)``."""
        return (-self._project(x + 10)).exp()


class Squares(_Rays):
    """A(x) = (M x)^2, entry by entry: ``(n, d)`` to ``(n, m)``.

    Args:
        matrix: M, ``(m, d)``.
    """

    def forward(self, x: Tensor) -> Tensor:
        """``(n, d)`` to ``(n, m)``."""
        return self._project(x).square()


class BipsdaPosterior(Solver):
    """Exact posterior of a mixture: independent draws, in closed form or by rejection from the prior.

    A linear operator with Gaussian noise has the closed form. For likelihoods with a known maximum (Gaussian
    noise on :class:`Squares`, counts through :class:`Attenuation`), draws use rejection.

    Args:
        prior: The mixture.
        max_proposals: Largest number of prior draws for each observation.

    Example:
        >>> import torch, invflow
        >>> problem = invflow.load_problem("bipsda/x-ray")
        >>> truth, likelihood = problem.simulate(2, generator=torch.Generator().manual_seed(0))
        >>> problem.exact_posterior().sample(likelihood, 20).samples.shape
        torch.Size([2, 20, 10])
    """

    prior: CovarianceMixtureFlow

    def __init__(self, prior: CovarianceMixtureFlow, *, max_proposals: int = 200_000_000) -> None:
        self.prior, self.max_proposals = prior, max_proposals

    @torch.no_grad()
    def _sample(self, reward: Reward, n: int, generator: torch.Generator, progress: bool) -> Posterior:
        """Draw posterior samples; see :meth:`Solver.sample`.

        Raises:
            TypeError: For any other likelihood.
            RuntimeError: If too few prior draws are accepted.
        """
        if isinstance(reward, GaussianLikelihood) and reward.operator.linear:
            return self._closed_form(reward, n, generator)
        if not isinstance(reward, Likelihood) or not isinstance(reward.operator, Squares | Attenuation):
            raise TypeError("BipsdaPosterior takes a GaussianLikelihood of a linear operator or of Squares, or a "
                            "PoissonLikelihood of Attenuation: pass the likelihood from problem.simulate")
        rows = [self._reject(reward.select(slice(b, b + 1)), n, generator) for b in range(len(reward.y))]
        evidence = torch.stack([log_evidence for _, log_evidence in rows])
        return Posterior(torch.stack([samples for samples, _ in rows]), log_evidence=evidence.to(self.prior.dtype))

    def prior_samples(self, n: int, *, generator: torch.Generator | int | None = None) -> Tensor:
        """Draw from the mixture itself, ``(n, d)``."""
        return self.prior.sample(n, generator=as_generator(generator))

    # -- closed form ---------------------------------------------------------------------------------------------------

    def _closed_form(self, likelihood: GaussianLikelihood, n: int, generator: torch.Generator) -> Posterior:
        prior, y, sigma = self.prior, likelihood.y.double(), likelihood.sigma.double()
        matrix = likelihood.operator(torch.eye(D, device=y.device)).double().T  # (m, d)
        covariance, means = prior.covariances.double(), prior.means.double()
        cross = covariance @ matrix.T  # (K, d, m)
        residual = y[:, None] - means @ matrix.T  # (B, K, m)
        total = (matrix @ cross)[None] + sigma.square()[:, None, None, None] * torch.eye(len(matrix)).to(y)
        gain = torch.linalg.solve(total, cross.mT.expand(len(y), *cross.mT.shape)).mT  # (B, K, d, m)
        factor = torch.linalg.cholesky(total)
        white = torch.linalg.solve_triangular(factor, residual[..., None], upper=False)[..., 0]
        log_density = -0.5 * white.square().sum(2) - factor.diagonal(dim1=2, dim2=3).log().sum(2)
        log_joint = prior.log_weights.double() + log_density - 0.5 * y.shape[1] * math.log(2 * math.pi)
        k = torch.multinomial(log_joint.softmax(1).to(generator.device), n, replacement=True, generator=generator)
        k = k.to(y.device)
        rows = torch.arange(len(y), device=y.device)[:, None]
        left = torch.linalg.cholesky(covariance - gain @ cross.mT)  # (B, K, d, d)
        noise = torch.randn(len(y), n, D, generator=generator, device=generator.device, dtype=torch.float64).to(y)
        mean = means + torch.einsum("bkdm,bkm->bkd", gain, residual)
        samples = mean[rows, k] + torch.einsum("bnde,bne->bnd", left[rows, k], noise)
        return Posterior(samples.to(prior.dtype), log_evidence=log_joint.logsumexp(1).to(prior.dtype))

    # -- rejection -----------------------------------------------------------------------------------------------------

    def _reject(self, likelihood: Likelihood, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """n draws ``(n, d)`` of one observation's posterior, and its log evidence from the share of acceptances."""
        bound, found, kept, drawn = _greatest(likelihood), 0, [], 0
        batch = 2**12
        while found < n:
            if drawn >= self.max_proposals:
                raise RuntimeError(f"only {found} of {drawn} prior draws were accepted, but {n} are needed: the "
                                   "measurement is too unlikely under this prior")
            x = self.prior.sample(batch, generator=generator)
            log_ratio = likelihood(x[None])[0].double() - bound
            uniform = torch.rand(batch, generator=generator, device=generator.device, dtype=torch.float64)
            kept.append(x[uniform.log().to(x.device) < log_ratio])
            found, drawn = found + len(kept[-1]), drawn + batch
            batch = min(2**18, 2 * batch)
        return torch.cat(kept)[:n], torch.as_tensor(math.log(found / drawn) + bound)


def _greatest(likelihood: Likelihood) -> float:
    """The largest log likelihood of one observation over all images, or a slightly larger bound."""
    operator, y = likelihood.operator, likelihood.y[0].double()
    if isinstance(likelihood, GaussianLikelihood) and isinstance(operator, Squares):
        # a square can equal every y above 0, and differs from a negative y by at least |y|
        best = y.clamp(min=0)[None, None]
        return float(likelihood.log_density(y[None, None], best).sum())
    if not isinstance(likelihood, PoissonLikelihood) or not isinstance(operator, Attenuation):
        raise TypeError(f"the maximum of {likelihood!r} is not known: pass a GaussianLikelihood of Squares, or a "
                        "PoissonLikelihood of Attenuation")
    matrix, gain = operator.matrix[0].double(), float(likelihood.gain[0])
    x = torch.full((matrix.shape[1],), -10.0, dtype=torch.float64, device=y.device)
    damping = 1e-9 * torch.eye(len(x), dtype=torch.float64, device=y.device)

    def value(x: Tensor) -> float:
        log_rate = math.log(gain) - matrix @ (x + 10)
        return float((y * log_rate - log_rate.exp() - torch.lgamma(y + 1)).sum())

    for _ in range(200):  # damped Newton steps on a concave function, whose gradient vanishes only at its maximum
        rate = (math.log(gain) - matrix @ (x + 10)).exp()
        slope = matrix.T @ (rate - y)
        step = torch.linalg.solve(matrix.T @ (rate[:, None] * matrix) + damping, slope)
        rise, size = float(slope @ step), 1.0
        while value(x + size * step) < value(x) and size > 1e-8:
            size /= 2
        x = x + size * step
        if rise < 1e-10:
            break
    # for small steps, at most half of the last gain remains; rates near 0 never converge
    return value(x) + rise + 1e-6


# -- the three problems ------------------------------------------------------------------------------------------------


@functools.cache
def bipsda_prior() -> CovarianceMixtureFlow:
    """The mixture of three Gaussians in ten dimensions."""
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.linspace(1, 2, D, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(D, D, generator=generator, dtype=torch.float64)).Q
    turned = basis.T @ (spectrum[:, None] * basis)
    covariances = torch.stack([torch.eye(D, dtype=torch.float64), spectrum.diag(), turned])
    means = torch.tensor([-5.0, 0.0, 5.0])[:, None].expand(3, D)
    return CovarianceMixtureFlow(means.contiguous(), covariances.float(), torch.tensor([0.4, 0.3, 0.3]))


def _sample(n: int, generator: torch.Generator) -> Tensor:
    return bipsda_prior().sample(n, generator=generator)


def _exact() -> Solver:
    return BipsdaPosterior(bipsda_prior())


def _mask() -> Operator:
    from invflow_operators.linear import MatrixOperator

    return MatrixOperator(torch.eye(D)[[0, 1, 2, 4, 5, 6, 7, 9]])


def _rays() -> Operator:
    return Attenuation(0.01 + 0.04 * torch.rand(15, D, generator=torch.Generator().manual_seed(0)))


def _squares() -> Operator:
    return Squares(torch.randn(5, D, generator=torch.Generator().manual_seed(0)))


def _counts(operator: Operator, y: Tensor) -> Likelihood:
    with warnings.catch_warnings():  # an image of ones is not bright here
        warnings.simplefilter("ignore")
        return PoissonLikelihood(operator, y, gain=PHOTONS)


bipsda_inpainting = Problem("bipsda/inpainting", None, _mask, 5.0, sampler=_sample, prior=bipsda_prior, exact=_exact,
                            description="three Gaussians in 10 dimensions, 8 coordinates observed with noise 5")
bipsda_x_ray = Problem("bipsda/x-ray", None, _rays, likelihood=_counts, sampler=_sample, prior=bipsda_prior,
                       exact=_exact,
                       description="three Gaussians in 10 dimensions, counts along 15 rays of 1,000 photons")
bipsda_phase_retrieval = Problem("bipsda/phase-retrieval", None, _squares, 25.0, sampler=_sample, prior=bipsda_prior,
                                 exact=_exact,
                                 description="three Gaussians in 10 dimensions, 5 squared projections with noise 25")
