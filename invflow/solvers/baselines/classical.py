"""Classical baselines: bicubic interpolation and the Wiener filter."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from invflow._core.conjugate_gradients import solve
from invflow._core.shapes import as_pictures, column
from invflow.likelihood import GaussianLikelihood
from invflow.linear.spectral import mix_channels, opponent_matrix
from invflow.linear.structure import normal_operator, observed_residual, passed_share, transfer_function
from invflow.solvers.baselines.point import PointEstimator

__all__ = ["Bicubic", "Wiener"]


class Bicubic(PointEstimator):
    """Bicubic interpolation, the minimal baseline for any restoration.

    A measurement that is a smaller image, with sides that divide the image's sides, is enlarged with Keys's kernel
    (1981, a = -1/2), as in Pillow and MATLAB. A measurement of the image's shape is returned unchanged, with unobserved
    pixels set to the mean of the channel's observed pixels. Any other measurement goes through the operator's
    pseudo-inverse. Noise is not removed.

    Args:
        chunk_size: Number of observations at a time. The estimates do not depend on it.

    Example:
        >>> import torch, invflow
        >>> from invflow.operators import SuperResolution
        >>> operator = SuperResolution((3, 64, 64), factor=4)
        >>> likelihood = invflow.GaussianLikelihood(operator, torch.full((1, 3, 16, 16), 0.5), sigma=0.02)
        >>> invflow.Bicubic().sample(likelihood, 1).mean().shape
        torch.Size([1, 3, 64, 64])
    """

    def _estimate(self, likelihood: GaussianLikelihood) -> tuple[Tensor, dict[str, Tensor]]:
        operator, y = likelihood.operator, likelihood.y
        shape, measured = tuple(operator.image_shape), tuple(operator.measurement_shape)
        if shape == measured:
            observed = operator.observed()
            if observed is None:
                return y.clone(), {}
            seen = observed.expand_as(y)
            axes = tuple(range(2, y.ndim)) if len(shape) == 3 else tuple(range(1, y.ndim))
            mean = (y * seen).sum(axes, keepdim=True) / seen.sum(axes, keepdim=True).clamp(min=1)
            return torch.where(seen, y, mean), {}
        smaller = len(shape) == len(measured) == 3 and shape[0] == measured[0]
        if smaller and all(a >= b and a % b == 0 for a, b in zip(shape[1:], measured[1:], strict=True)):
            # when an image is enlarged, the only effect of "antialias" is a = -1/2 instead of torch's default -3/4
            return F.interpolate(y, shape[1:], mode="bicubic", antialias=True, align_corners=False), {}
        return operator.pseudo_inverse(y), {}


class Wiener(PointEstimator):
    r"""Wiener filter: the best linear estimate of a stationary image with the power spectrum of photographs.

    The image is modelled as a Gaussian of mean 1/2 with independent Fourier coefficients, in opponent colours for
    three channels, with the variance

    .. math:: S_c(f) = a_c^2 |f|^{-p}, \qquad S_c(0) = H W \ell^2,

    with f in cycles per pixel (Field 1987: p is about 2 in photographs of nature). The estimate is the posterior mean

    .. math:: m + S A^T (A S A^T + \sigma^2 I)^{-1} (y - A m).

    For denoising and circular blurs it is a product in the Fourier domain (Wiener 1949). For any other linear operator
    preconditioned conjugate gradients solve the normal equations. Images are treated as periodic, so a narrow border is
    less accurate if opposite sides differ.

    Args:
        amplitude: a, one number, or one for each opponent colour (brightness, red against blue, green against both).
        exponent: p.
        level: Standard deviation of an image's mean.
        iterations: Maximum number of conjugate gradient iterations.
        tolerance: Relative residual at which they stop.
        chunk_size: Number of observations at a time. The estimates do not depend on it.

    Raises:
        ValueError: For a setting that is not positive.

    Example:
        >>> import torch, invflow
        >>> from invflow.operators import GaussianBlur
        >>> operator = GaussianBlur((3, 32, 32), std=1.5)
        >>> y = operator.measure(torch.full((1, 3, 32, 32), 0.4), 0.02, generator=torch.Generator().manual_seed(0))
        >>> restored = invflow.Wiener().sample(invflow.GaussianLikelihood(operator, y, 0.02), 1).mean()
        >>> bool((restored - 0.4).abs().max() < 0.05)
        True
    """

    def __init__(self, *, amplitude: float | tuple[float, ...] = (0.0127, 0.0031, 0.0021), exponent: float = 2.7,
                 level: float = 0.25, iterations: int = 200, tolerance: float = 1e-5, chunk_size: int = 8) -> None:
        super().__init__(chunk_size=chunk_size)
        amplitudes = amplitude if isinstance(amplitude, tuple | list) else (amplitude,)
        if not (all(a > 0 for a in amplitudes) and exponent >= 0 and level > 0 and iterations >= 1 and tolerance > 0):
            raise ValueError(f"amplitude={amplitude}, level={level} and tolerance={tolerance} must be over 0, "
                             f"exponent={exponent} at least 0, iterations={iterations} at least 1")
        self.amplitude, self.exponent, self.level = tuple(float(a) for a in amplitudes), exponent, level
        self.iterations, self.tolerance = iterations, tolerance

    @classmethod
    def fit(cls, images: Tensor, *, level: float = 0.25, chunk_size: int = 8) -> Wiener:
        """Fit amplitudes and exponent to images, by a straight line through the logarithm of their mean spectrum.

        Args:
            images: Images in [0, 1], ``(n, C, H, W)``, at least 16 x 16.
            level, chunk_size: As in the class.

        Raises:
            ValueError: For images of another kind.

        Example:
            >>> import torch, invflow
            >>> g = torch.Generator().manual_seed(0)
            >>> white = invflow.Wiener.fit(0.5 + 0.1 * torch.randn(50, 1, 32, 32, generator=g))
            >>> round(white.amplitude[0], 2), round(abs(white.exponent), 1)
            (0.1, 0.0)
        """
        if images.ndim != 4 or min(images.shape[2:]) < 16 or not images.is_floating_point():
            raise ValueError(f"fit takes images (n, C, H, W) of 16 x 16 or more in [0, 1], not {tuple(images.shape)} "
                             f"of {images.dtype}")
        colours = mix_channels(opponent_matrix(images.shape[1], torch.float64), images.double())
        # a window, because images are not periodic; the mean is removed first, because the window would smear it
        window = torch.outer(*(torch.hann_window(n, periodic=False, dtype=torch.float64) for n in images.shape[2:]))
        window = window / window.square().mean().sqrt()
        centred = colours - (colours * window).mean((2, 3), keepdim=True) / window.mean()
        power = torch.fft.fft2(centred * window, norm="ortho").abs().square().mean(0)
        radius = _radius(images.shape[2], images.shape[3])
        near = (radius > 3 / min(images.shape[2:])) & (radius <= 0.5)
        # rings are weighted by their logarithmic width, not by their number of coefficients
        log_radius, weight = radius[near].log(), radius[near] ** -2
        log_power = power[:, near].clamp(min=1e-20).log()
        centre = (weight * log_radius).sum() / weight.sum()
        means = (weight * log_power).sum(1) / weight.sum()
        slopes = (weight * (log_radius - centre) * log_power).sum(1) / (weight * (log_radius - centre) ** 2).sum()
        share = means.exp() / means.exp().sum()
        slope = float((share * slopes).sum())  # one slope for all colours, weighted by their power
        amplitudes = tuple((0.5 * (means - slope * centre)).exp().tolist())
        return cls(amplitude=amplitudes, exponent=max(0.0, -slope), level=level, chunk_size=chunk_size)

    def spectrum(self, image_shape: tuple[int, ...]) -> Tensor:
        """Variances S of the orthonormal Fourier coefficients, ``(C, H, W)`` float64, in opponent colours.

        Raises:
            ValueError: If there are neither one amplitude nor one for each channel.
        """
        channels, height, width = as_pictures(image_shape)
        # a grey image has only brightness: the sum of three equal channels divided by the root of three
        grey = channels == 1 and len(self.amplitude) == 3
        amplitudes = (self.amplitude[0] / 3**0.5,) if grey else self.amplitude
        if len(amplitudes) not in (1, channels):
            raise ValueError(f"{len(amplitudes)} amplitudes do not fit images {image_shape} with {channels} channels: "
                             "pass amplitude=a, one number for all")
        a = torch.tensor(amplitudes, dtype=torch.float64).expand(channels)[:, None, None]
        radius = _radius(height, width)
        radius[0, 0] = 1.0
        power = a.square() * radius**-self.exponent
        power[:, 0, 0] = height * width * self.level**2
        return power

    def _estimate(self, likelihood: GaussianLikelihood) -> tuple[Tensor, dict[str, Tensor]]:
        y, shape = likelihood.y, tuple(likelihood.operator.image_shape)
        picture = as_pictures(shape)
        power = self.spectrum(shape).to(y)
        colours = opponent_matrix(picture[0], y.dtype, y.device)
        mean = torch.full((len(y), *shape), 0.5).to(y)
        residual = observed_residual(likelihood, mean)
        transfer = transfer_function(likelihood)
        if transfer is not None and bool((transfer == transfer[:, :1]).all()):
            sigma = column(likelihood.sigma, residual.reshape(len(y), *picture))
            gain = power * transfer.conj() / (transfer.abs().square() * power + sigma**2)
            spectrum = torch.fft.fft2(mix_channels(colours, residual.reshape(len(y), *picture)))
            found = mix_channels(colours.mT, torch.fft.ifft2(gain * spectrum).real).reshape(mean.shape)
            return mean + found, {"iterations": torch.zeros(len(y))}
        found, taken = self._solve(likelihood, residual, power, colours)
        return mean + found, {"iterations": taken}

    def _solve(self, likelihood: GaussianLikelihood, residual: Tensor, power: Tensor,
               colours: Tensor) -> tuple[Tensor, Tensor]:
        r"""Solve (A' A + sigma^2 S^{-1}) x = A' residual; return images and the number of steps of each row.

        The preconditioner replaces A' A by a multiple of the identity.
        """
        picture = tuple(power.shape)
        right = likelihood.operator.adjoint(residual)
        level = column(likelihood.sigma, right.reshape(-1, *picture)) ** 2
        normal = normal_operator(likelihood)

        def filtered(x: Tensor, weight: Tensor) -> Tensor:
            coefficients = torch.fft.fft2(mix_channels(colours, x.reshape(-1, *picture)))
            return mix_channels(colours.mT, torch.fft.ifft2(weight * coefficients).real).reshape(x.shape)

        damping = 1 / (column(passed_share(likelihood), level) + level / power)
        return solve(lambda x: normal(x) + filtered(x, level / power), right, lambda x: filtered(x, damping),
                     self.iterations, self.tolerance)


def _radius(height: int, width: int) -> Tensor:
    """Radial frequency of each Fourier coefficient in cycles per pixel, ``(H, W)`` float64."""
    return torch.hypot(torch.fft.fftfreq(height, dtype=torch.float64)[:, None],
                       torch.fft.fftfreq(width, dtype=torch.float64))
