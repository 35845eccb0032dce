"""Linear minimum-mean-square-error estimate: the posterior under a Gaussian prior fitted to training images."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from invflow._core.chunks import ChunkSize
from invflow._core.folders import SHIPPED, load_built, read_config, resolve_folder, save_module
from invflow._core.random import draw_noise
from invflow.likelihood import GaussianLikelihood
from invflow.linear.structure import dense_matrix
from invflow.posterior import Posterior
from invflow.reward import Reward
from invflow.solver import Solver

__all__ = ["LinearMMSE"]

KIND = "linear-mmse"
#: largest number of values in an image for which a dense covariance is fitted; its square is stored in float64
LARGEST = 8192
_VALUES_AT_A_TIME = 2**19  # noise values in double precision


class LinearMMSE(Solver):
    r"""Exact posterior under a Gaussian prior N(m, C) with the mean and covariance of training images.

    For y = A x + sigma e with a linear A the posterior is Gaussian with

    .. math:: m + K (y - A m), \quad C - K A C, \quad K = C A^T (A C A^T + \sigma^2 I)^{-1}.

    Its mean has the least mean squared error of all affine estimates (Kay 1993, "Fundamentals of Statistical
    Signal Processing", chapter 12), so it is the baseline that a learned prior has to beat. Samples follow Matheron's
    rule: a prior draw plus the gain times its residual on a perturbed measurement. The computation is in float64, with
    one dense solve per observation, or a single one if all share operator and noise level.

    Args:
        mean: Mean image, ``(*image_shape,)``.
        covariance: Covariance, ``(d, d)``, symmetric and positive semidefinite, where d is the number of values in an
            image.
        chunk_size: Number of observations with their own operators that are solved at a time.

    Raises:
        ValueError: For shapes that do not fit, or a covariance that is not symmetric positive semidefinite.

    Example:
        >>> import torch, invflow
        >>> from invflow.operators import SuperResolution
        >>> g = torch.Generator().manual_seed(0)
        >>> solver = invflow.LinearMMSE.fit(torch.rand(500, 1, 8, 8, generator=g))
        >>> operator = SuperResolution((1, 8, 8), factor=4)
        >>> y = operator.measure(solver.prior_samples(2, generator=g), sigma=0.1, generator=g)
        >>> solver.sample(invflow.GaussianLikelihood(operator, y, sigma=0.1), 16, generator=g).samples.shape
        torch.Size([2, 16, 1, 8, 8])
    """

    image_shape: tuple[int, ...]

    def __init__(self, mean: Tensor, covariance: Tensor, *, chunk_size: int = 8) -> None:
        size = mean.numel()
        if covariance.shape != (size, size):
            raise ValueError(
                f"covariance has shape {tuple(covariance.shape)}, but images {tuple(mean.shape)} have {size} "
                f"values: pass ({size}, {size})"
            )
        covariance = covariance.double()
        asymmetry = float((covariance - covariance.mT).abs().max())
        if not asymmetry <= 1e-4 * float(covariance.abs().max()):  # also true for NaN
            raise ValueError("covariance is not symmetric: pass (covariance + covariance.T) / 2")
        values, vectors = torch.linalg.eigh(covariance)
        if float(values[0]) < -1e-4 * float(values[-1]):
            raise ValueError(f"covariance is not positive semidefinite: its least eigenvalue is {values[0]:.4g}")
        # triangular, with factor^T factor = C; it also exists if some pixels never vary
        self._set(mean, torch.linalg.qr((vectors * values.clamp(min=0).sqrt()).mT, mode="r").R, chunk_size)

    def _set(self, mean: Tensor, factor: Tensor, chunk_size: int) -> None:
        if chunk_size < 1:
            raise ValueError(f"chunk_size={chunk_size}: pass at least 1")
        self.image_shape = tuple(mean.shape)
        self.mean, self.factor, self.chunk_size = mean.double(), factor.double(), chunk_size
        self.covariance = self.factor.mT @ self.factor

    @classmethod
    def fit(cls, images: Tensor, *, chunk_size: int = 8) -> LinearMMSE:
        """Fit mean and covariance to training images.

        Args:
            images: Training images, ``(n, *image_shape)``, n >= 2; floating point in [0, 1], or bytes, which are
                divided by 255.
            chunk_size: As in the class.

        Raises:
            ValueError: For fewer than two images, values that are not finite, or images that are too large
                for a dense covariance.
        """
        if images.ndim < 2 or len(images) < 2:
            raise ValueError(f"fit takes at least two images (n, *image_shape), not {tuple(images.shape)}")
        flat = images.flatten(1)
        if flat.shape[1] > LARGEST:
            raise ValueError(
                f"images {tuple(images.shape[1:])} have {flat.shape[1]} values, more than {LARGEST}: their "
                "dense covariance would not fit; fit patches or smaller images"
            )
        scale = 1.0 if images.is_floating_point() else 1 / 255
        total = torch.zeros(flat.shape[1], dtype=torch.float64)
        for part in flat.split(8192):
            total += part.double().sum(0)
        mean = scale * total / len(flat)
        covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64)
        for part in flat.split(8192):
            centred = scale * part.double() - mean
            covariance.addmm_(centred.mT, centred)
        if not bool(torch.isfinite(covariance).all()):
            raise ValueError("the training images hold values that are not finite")
        return cls(mean.reshape(images.shape[1:]), covariance / (len(flat) - 1), chunk_size=chunk_size)

    # -- posteriors -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def _sample(self, reward: Reward, n: int, generator: torch.Generator, progress: bool) -> Posterior:
        """Draw posterior samples; see :meth:`Solver.sample`.

        Returns:
            A posterior without weights, with its exact log evidence; ``diagnostics`` holds the exact
            ``mean`` and ``std``, each ``(B, *image_shape)``.

        Raises:
            TypeError: For anything but a Gaussian likelihood with a linear operator.
            ValueError: If the images have another shape.
        """
        from tqdm import tqdm

        likelihood = self._supported(reward)
        batch, size, rows = len(likelihood.y), self.mean.numel(), likelihood.y[0].numel()
        noise = draw_noise((batch, n, size + rows), generator).to(likelihood.y.device)
        chunks = ChunkSize(self._together(likelihood), "LinearMMSE").over(
            batch, lambda part: self._solve(likelihood.select(part), noise[part]))
        pieces = [piece for _, piece in tqdm(chunks, disable=not progress, desc="LinearMMSE", delay=2)]
        samples, mean, std, log_evidence = (torch.cat(piece) if len(piece) > 1 else piece[0]
                                            for piece in zip(*pieces, strict=True))
        shape = (batch, *self.image_shape)
        return Posterior(samples.reshape(batch, n, *self.image_shape), log_evidence=log_evidence.to(likelihood.y),
                         diagnostics={"mean": mean.to(likelihood.y).reshape(shape),
                                      "std": std.to(likelihood.y).reshape(shape)})

    def _together(self, likelihood: GaussianLikelihood) -> int:
        """Number of observations solved together: all if they share operator and noise level."""
        shared = likelihood.operator.num_sets == 1 and bool((likelihood.sigma == likelihood.sigma[0]).all())
        return len(likelihood.y) if shared else self.chunk_size

    def _solve(self, likelihood: GaussianLikelihood, noise: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Samples ``(B, N, d)``, means and standard deviations ``(B, d)`` and log evidences ``(B,)``."""
        y, sigma = likelihood.y.flatten(1).double(), likelihood.sigma.double()
        centre, factor = self.mean.flatten().to(y.device), self.factor.to(y.device)
        covariance = self.covariance.to(y.device)
        level = sigma[:1] if bool((sigma == sigma[0]).all()) else sigma  # with equal levels, one solve serves all
        # rows of unobserved entries are zero, so that they have no effect
        matrix = dense_matrix(likelihood)
        cross = covariance @ matrix.mT
        innovation = matrix @ cross
        # with one operator there may still be as many noise levels as observations
        innovation = innovation + torch.diag_embed(level[:, None].square().expand(-1, innovation.shape[-1]))
        chol = torch.linalg.cholesky(innovation)
        gain = torch.cholesky_solve(cross.mT, chol).mT
        residual = y - (matrix @ centre)
        mean = centre + (gain @ residual[..., None]).squeeze(-1)
        variance = covariance.diagonal() - (gain * cross).sum(2)
        std = variance.clamp(min=0).sqrt().expand(len(y), -1)

        samples = noise.new_empty((*noise.shape[:2], len(centre)), dtype=likelihood.y.dtype)
        for part in torch.arange(noise.shape[1]).split(max(1, _VALUES_AT_A_TIME // noise[:, 0].numel())):
            rows = slice(int(part[0]), int(part[-1]) + 1)  # double precision for all at once would take many copies
            white_noise = noise[:, rows].double()
            draw = white_noise[..., : len(centre)] @ factor
            error = sigma[:, None, None] * white_noise[..., len(centre) :]
            unexplained = residual[:, None] + error - draw @ matrix.mT
            samples[:, rows] = (centre + draw + unexplained @ gain.mT).to(samples)
        white = torch.linalg.solve_triangular(chol, residual[..., None], upper=False).squeeze(-1)
        log_det = chol.diagonal(dim1=1, dim2=2).log().sum(1)
        entries = y.shape[1]
        log_evidence = -0.5 * white.square().sum(1) - log_det - 0.5 * entries * math.log(2 * math.pi)
        # each unobserved entry has added the log density of sigma e at 0
        missing = entries - likelihood.count_observed().double()
        return samples, mean, std, log_evidence + missing * (sigma * math.sqrt(2 * math.pi)).log()

    def prior_samples(self, n: int, *, generator: torch.Generator | int | None = None) -> Tensor:
        """Draw from the fitted Gaussian, ``(n, *image_shape)``, float32."""
        noise = draw_noise((n, self.mean.numel()), generator).double().to(self.factor.device)
        return (self.mean.flatten() + noise @ self.factor).float().reshape(n, *self.image_shape)

    def _supported(self, reward: Reward) -> GaussianLikelihood:
        if not isinstance(reward, GaussianLikelihood) or not reward.operator.linear:
            what = type(reward).__name__
            if isinstance(reward, GaussianLikelihood):
                what = f"the operator {type(reward.operator).__name__}, which is not linear"
            raise TypeError(
                f"LinearMMSE needs a GaussianLikelihood with a linear operator, not {what}: use a solver that "
                "takes any differentiable reward, such as invflow.VFM trained for it"
            )
        if tuple(reward.operator.image_shape) != self.image_shape:
            raise ValueError(
                f"LinearMMSE was fitted to images {self.image_shape}, but the operator measures images "
                f"{tuple(reward.operator.image_shape)}: fit one with LinearMMSE.fit(images)"
            )
        return reward

    # -- files ----------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | os.PathLike[str], dtype: torch.dtype = torch.float16,
                        **notes: Any) -> None:
        """Write the mean and the packed triangular factor of the covariance into a folder.

        Rounding the factor instead of the covariance keeps the matrix positive semidefinite and its small
        eigenvalues accurate relative to their size.

        Args:
            folder: Folder, created if it does not exist.
            dtype: Type in which the numbers are stored.
            **notes: Further entries of ``config.json``, such as the number of training images.
        """
        config = {"kind": KIND, "image_shape": list(self.image_shape), **notes}
        stored = _Stored(self.mean.flatten(), self.factor[_upper(self.mean.numel())])
        save_module(stored, folder, config, dtype)

    @classmethod
    def load(cls, name: str | os.PathLike[str], *, chunk_size: int = 8) -> LinearMMSE:
        """Load a fitted estimate.

        Args:
            name: Name of a shipped estimate, ``"mnist"`` or ``"fashion-mnist"``; a folder that :meth:`save_pretrained`
                wrote; or a Hub repository id ``owner/name``.
            chunk_size: As in the class.

        Raises:
            ValueError: If it does not exist, is not a linear estimate, or its files are damaged.
        """
        shipped = SHIPPED / f"{name}-lmmse"
        folder = shipped if shipped.is_dir() else resolve_folder(name, "linear-mmse")
        config = read_config(folder, KIND)
        shape = config.get("image_shape")
        if not isinstance(shape, list) or not all(isinstance(side, int) and side > 0 for side in shape):
            raise ValueError(f"{Path(folder)} has no valid image_shape in its config.json, but {shape!r}")
        size = math.prod(shape)
        stored = load_built(lambda: _Stored(torch.zeros(size), torch.zeros(size * (size + 1) // 2)), Path(folder),
                            config, "linear estimate")
        solver = cls.__new__(cls)
        factor = torch.zeros(size, size)
        factor[_upper(size)] = stored.factor
        solver._set(stored.mean.reshape(shape), factor, chunk_size)
        return solver


class _Stored(nn.Module):
    """The tensors of a file."""

    mean: Tensor
    factor: Tensor

    def __init__(self, mean: Tensor, factor: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("factor", factor)


def _upper(size: int) -> tuple[Tensor, Tensor]:
    """Rows and columns of the upper triangle, packed."""
    rows, columns = torch.triu_indices(size, size)
    return rows, columns
