"""Total variation: the image of least variation that explains the measurement, from a convex problem."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from invflow._core.conjugate_gradients import solve
from invflow._core.shapes import as_pictures, column
from invflow.likelihood import GaussianLikelihood
from invflow.linear.spectral import dct2
from invflow.linear.structure import normal_operator, observed_residual, passed_share, transfer_function
from invflow.solvers.baselines.point import PointEstimator

__all__ = ["TotalVariation", "gradient", "gradient_adjoint", "total_variation"]


class TotalVariation(PointEstimator):
    r"""Total variation (Rudin, Osher and Fatemi 1992), for any linear operator.

    The estimate minimises the convex function

    .. math:: |y - A x|^2 / 2 + \lambda \sum_i |(D x)_i|, \qquad \lambda = \mathrm{weight} \cdot q^{1/4} \sigma^{3/2},

    where D takes the differences of a pixel to its neighbours below and to the right (zero at the last pixel), and q is
    the mean eigenvalue of A' A (1 for denoising, 1 / 256 for averages of 4 x 4 pixels). The rule and its weight were
    chosen on the validation photographs, over noise levels from 0.005 to 0.2. With ``joint``, all channels of a pixel
    share one norm, so that edges of different colours coincide (Bresson and Chan 2008). Otherwise each channel is
    restored separately, as in scikit-image and deepinv. The solver is the alternating direction method of multipliers
    (Boyd et al. 2011) with over-relaxation. Its linear systems are solved by conjugate gradients with a preconditioner
    that is diagonal in cosines, or in the Fourier domain for a circular blur.

    Args:
        weight: Weight of the variation, as above.
        strength: lambda itself, instead of the rule.
        joint: Whether the channels of a pixel share one norm.
        iterations: Maximum number of iterations.
        tolerance: Root mean square change of the image and of its differences below which the iteration stops.
        chunk_size: Number of observations at a time. The estimates do not depend on it.

    Raises:
        ValueError: For a setting that is not positive.

    Example:
        >>> import torch, invflow
        >>> from invflow.operators import Denoising
        >>> edge = (torch.arange(32) >= 16).float().expand(1, 1, 32, 32)
        >>> y = edge + 0.1 * torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))
        >>> likelihood = invflow.GaussianLikelihood(Denoising((1, 32, 32)), y, sigma=0.1)
        >>> restored = invflow.TotalVariation().sample(likelihood, 1).mean()
        >>> bool((restored - edge).abs().mean() < 0.3 * (y - edge).abs().mean())
        True
    """

    def __init__(self, *, weight: float = 5.0, strength: float | None = None, joint: bool = True,
                 iterations: int = 300, tolerance: float = 2e-4, chunk_size: int = 8) -> None:
        super().__init__(chunk_size=chunk_size)
        if not (weight > 0 and iterations >= 1 and tolerance > 0 and (strength is None or strength > 0)):
            raise ValueError(f"weight={weight}, strength={strength} and tolerance={tolerance} must be over 0, "
                             f"iterations={iterations} at least 1")
        self.weight, self.strength, self.joint = weight, strength, joint
        self.iterations, self.tolerance = iterations, tolerance

    def _strength(self, likelihood: GaussianLikelihood) -> Tensor:
        """lambda for each observation, ``(B,)``."""
        if self.strength is not None:
            return torch.full_like(likelihood.sigma, self.strength)
        share = passed_share(likelihood).to(likelihood.sigma)
        return self.weight * share**0.25 * likelihood.sigma**1.5

    def _estimate(self, likelihood: GaussianLikelihood) -> tuple[Tensor, dict[str, Tensor]]:
        operator, y = likelihood.operator, likelihood.y
        shape = tuple(operator.image_shape)
        picture = as_pictures(shape)
        x = operator.embed(y).reshape(-1, *picture)
        chosen = self._strength(likelihood).to(x)
        strength = column(chosen, x)
        # shrinking differences in [-1, 1] by a tenth converged fastest on photographs
        penalty = 10 * strength
        normal, right = normal_operator(likelihood), operator.adjoint(observed_residual(likelihood, torch.zeros_like(
            x.reshape(-1, *shape)))).reshape(-1, *picture)
        precondition = self._preconditioner(likelihood, penalty, picture)

        def system(z: Tensor) -> Tensor:
            return normal(z.reshape(-1, *shape)).reshape(z.shape) + penalty * gradient_adjoint(gradient(z))

        wide = penalty[:, :, None]
        split, dual = gradient(x), torch.zeros_like(gradient(x))  # dual in units of the penalty
        moving, taken = torch.ones(len(x), dtype=torch.bool, device=x.device), torch.zeros(len(x), device=x.device)
        for _ in range(self.iterations):
            new, _ = solve(system, right + penalty * gradient_adjoint(split - dual), precondition, 6, 1e-6, start=x)
            slope = 1.7 * gradient(new) - 0.7 * split  # over-relaxation
            shrunk = self._shrink(slope + dual, strength[:, :, None] / wide)
            change = torch.stack([_size(new - x), _size(shrunk - split), _size(gradient(new) - shrunk)]).amax(0)
            keep = column(moving, x).bool()
            x, dual = torch.where(keep, new, x), torch.where(keep[:, :, None], dual + slope - shrunk, dual)
            split = torch.where(keep[:, :, None], shrunk, split)
            taken = taken + moving
            moving = moving & (change > self.tolerance)
            if not bool(moving.any()):
                break
        image = x.reshape(-1, *shape)
        misfit = 0.5 * observed_residual(likelihood, image).square().flatten(1).sum(1)
        variation = total_variation(x, self.joint)
        return image, {"iterations": taken, "objective": misfit + chosen * variation, "strength": chosen}

    def _shrink(self, slope: Tensor, threshold: Tensor) -> Tensor:
        """Shorten each vector of differences by the threshold, down to zero at most."""
        length = _length(slope, self.joint)
        return slope * (1 - threshold / length.clamp(min=1e-30)).clamp(min=0)

    def _preconditioner(self, likelihood: GaussianLikelihood, penalty: Tensor, picture: tuple[int, int, int]):  # type: ignore[no-untyped-def]
        """Approximate inverse of A' A + penalty D' D."""
        transfer = transfer_function(likelihood)
        if transfer is not None and not bool((transfer == 1).all()):
            rows, columns = (2 - 2 * torch.cos(2 * math.pi * torch.fft.fftfreq(n)) for n in picture[1:])
            inverse = 1 / (transfer.abs().square() + penalty * (rows[:, None] + columns).to(penalty))
            return lambda x: torch.fft.ifft2(torch.fft.fft2(x) * inverse).real
        rows, columns = (2 - 2 * torch.cos(math.pi * torch.arange(n) / n) for n in picture[1:])
        share = column(passed_share(likelihood), penalty)
        weight = 1 / (share + penalty * (rows[:, None] + columns).to(penalty))
        return lambda x: dct2(weight * dct2(x), inverse=True)


def gradient(x: Tensor) -> Tensor:
    """Differences to the pixels below and to the right, zero at the last: ``(n, C, H, W)`` to ``(n, C, 2, H, W)``."""
    slope = x.new_zeros(*x.shape[:2], 2, *x.shape[2:])
    slope[:, :, 0, :-1] = x[:, :, 1:] - x[:, :, :-1]
    slope[:, :, 1, :, :-1] = x[..., 1:] - x[..., :-1]
    return slope


def gradient_adjoint(slope: Tensor) -> Tensor:
    """Transpose of :func:`gradient`: ``(n, C, 2, H, W)`` to ``(n, C, H, W)``."""
    down, right = slope[:, :, 0, :-1], slope[:, :, 1, :, :-1]
    x = torch.zeros_like(slope[:, :, 0])
    x[:, :, 1:] += down
    x[:, :, :-1] -= down
    x[..., 1:] += right
    x[..., :-1] -= right
    return x


def total_variation(x: Tensor, joint: bool = True) -> Tensor:
    """Isotropic total variation of images, ``(n, C, H, W)`` to ``(n,)``.

    Args:
        x: Images.
        joint: Whether all channels of a pixel share one norm. False adds up the channels.

    Example:
        >>> import torch
        >>> from invflow.solvers.baselines.total_variation import total_variation
        >>> total_variation(torch.eye(2).reshape(1, 1, 2, 2))  # sqrt(2) + 1 + 1 + 0
        tensor([3.4142])
    """
    return _length(gradient(x), joint).flatten(1).sum(1)


def _length(slope: Tensor, joint: bool) -> Tensor:
    """Lengths of the vectors of differences, ``(n, 1 or C, 1, H, W)``."""
    result: Tensor = torch.linalg.vector_norm(slope, dim=(1, 2) if joint else 2, keepdim=True)
    return result


def _size(x: Tensor) -> Tensor:
    """Root mean square of each row."""
    return x.flatten(1).square().mean(1).sqrt()
