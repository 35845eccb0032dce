"""The adapter for photographs: starts from the best linear estimate; diagonal in block cosines."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, pad, pixel_shuffle, pixel_unshuffle

from invflow.likelihood import GaussianLikelihood
from invflow.linear.bands import NUM_BANDS, bands_of, checked_bands
from invflow.linear.lapped import TRANSFORMS
from invflow.linear.slow import draw_slow_cosines, hides_blocks
from invflow.linear.spectral import BLOCK, Spectrum, gaussian_estimate, mix_channels, opponent_matrix
from invflow.models.adapter import LEAST_LEVEL, LOG_VARIANCE, Adapter
from invflow.models.neural import NeuralFlowMap, initialise
from invflow.nets.unet import UNet
from invflow.operator import SUMMARY_LATTICE
from invflow.reward import Reward

if TYPE_CHECKING:
    from invflow.operator import Operator

__all__ = ["SpectralAdapter"]

#: scale of the correction in units of the state; at full scale the first training steps only add errors
CORRECTION = 0.1
FEATURES = 4  # values per pixel from the network to the layer for the standard deviations
#: symmetries of the square, as (quarter turns, whether mirrored afterwards); the correction averages 1, 2, 4 or 8
SYMMETRIES = ((0, False), (2, False), (0, True), (2, True), (1, False), (3, False), (1, True), (3, True))


def turned_summary(summary: Tensor, turns: int, mirrored: bool) -> Tensor:
    """Summary of a kernel's transfer function, ``(n, 32)``, after rotating and then mirroring the kernel.

    Args:
        summary: Summary from :meth:`invflow.Operator.context`.
        turns: Number of quarter turns, as in :func:`torch.rot90` of rows and columns.
        mirrored: Whether the columns are then reversed.
    """
    places, signs = [], []
    for u, v in SUMMARY_LATTICE:
        if mirrored:
            v = -v
        for _ in range(turns % 4):
            u, v = v, -u
        own = (u, v) in SUMMARY_LATTICE  # or its negative, where a real kernel has the complex conjugate
        places.append(SUMMARY_LATTICE.index((u, v) if own else (-u, -v)))
        signs.append(1.0 if own else -1.0)
    real, imaginary = summary.chunk(2, dim=1)
    return torch.cat([real[:, places], imaginary[:, places] * summary.new_tensor(signs)], dim=1)


class SpectralAdapter(Adapter):
    r"""Noise adapter for maps with ``skip="spectral"``: q(z | y, c), diagonal in the cosines of 8 x 8 blocks.

    The map's Gaussian part turns noise z into the state mean + S^{1/2} z, so knowledge of the image translates to
    knowledge of the noise. The adapter first computes the best linear estimate under that Gaussian
    (:func:`~invflow.linear.spectral.gaussian_estimate`). Its network, which sees that estimate and the measurement,
    *restores* it, x = estimate + correction, like a residual denoiser (Zhang et al. 2017). The mean of the noise
    is S^{-1/2} (x - mean). The standard deviations are those of cosine coefficients in blocks, of brightness and of
    two colour differences. After noise or blur, the uncertainty differs strongly between low and high frequencies,
    which a Gaussian that is diagonal in pixels cannot represent. They are initialised to the values that follow from
    observing each coefficient directly.

    It is fully convolutional and takes measurements of images of any size (:meth:`resized`).

    Training on randomly rotated and mirrored crops makes the correction nearly equivariant under these symmetries, but
    not exactly. With ``symmetries``, the correction is averaged over that many rotated and mirrored inputs (the
    self-ensemble of Lim et al. 2017). This multiplies the calls of the adapter by that number and adds none per sample.
    Training uses one.

    Args:
        state_shape: ``(C, H, W)`` of the training images.
        classes: Problem classes.
        image_shape: Shape of the images; default ``state_shape``.
        options: Options of the U-Net, which has no attention.
        decode_affine: (scale, shift) with image = scale * state + shift.
        spectrum: Spectrum of the map.
        mean: Mean of the map, ``(C, 1, 1)``.
        trained_for: Fingerprint of the map; None before training.
        generator: Source of the initial weights.
        symmetries: 1, 2, 4 or 8.
        spread: Factors of the standard deviations, by problem class, for example fitted to validation images; 1 for
            classes without an entry.
        bands: Further factors, by problem class: a row for each opponent colour, with a factor for each of the six
            bands of frequency of :mod:`invflow.linear.bands`; 1 for classes without an entry.
        transform: ``"block"`` for the cosines of 8 x 8 blocks, or ``"lapped"`` for cosines of the same frequencies
            that overlap (:func:`invflow.linear.lapped.lapped_dct`), with which samples have no grid of blocks.
        levels: Lowest and highest noise level in training, by problem class; see :class:`Adapter`.
        traits: Traits of the training operators; see :class:`Adapter`.

    Raises:
        ValueError: For an invalid number of symmetries, a factor that is not positive, or an unknown class.

    Example:
        >>> import torch
        >>> from invflow import GaussianLikelihood
        >>> from invflow.operators import Denoising
        >>> from invflow.models.spectral_adapter import SpectralAdapter
        >>> options = {"channels": [8, 16, 16], "blocks": 1}
        >>> adapter = SpectralAdapter((3, 64, 64), classes=["denoising"], options=options)
        >>> y = torch.rand(1, 3, 30, 50)
        >>> adapter.resized((3, 30, 50)).propose(GaussianLikelihood(Denoising((3, 30, 50)), y, sigma=0.1))[0].shape
        torch.Size([1, 3, 30, 50])
    """

    turned = True
    mean: Tensor

    form = "spectral"

    def __init__(self, state_shape: tuple[int, ...], *, classes: Sequence[str],
                 image_shape: tuple[int, ...] | None = None, options: dict[str, Any] | None = None,
                 decode_affine: tuple[float, float] = (0.5, 0.5), spectrum: Spectrum | None = None,
                 mean: Tensor | None = None, trained_for: str | None = None,
                 generator: torch.Generator | None = None, symmetries: int = 1,
                 spread: Mapping[str, float] | None = None,
                 bands: Mapping[str, Sequence[Sequence[float]]] | None = None, transform: str = "block",
                 levels: Mapping[str, Sequence[float]] | None = None,
                 traits: Mapping[str, Sequence[Sequence[float]]] | None = None) -> None:
        options = {**(options or {}), "attention": False}
        super().__init__(state_shape, classes=classes, image_shape=image_shape, network="unet", options=options,
                         trained_for=trained_for, generator=generator, levels=levels, traits=traits)
        self.symmetries, self.spread, self.transform = symmetries, dict(spread or {}), transform
        channels = self.state_shape[0]
        self.bands = dict(bands or {})
        self.decode_affine = (float(decode_affine[0]), float(decode_affine[1]))
        self.spectrum = Spectrum(channels, None if spectrum is None else spectrum.log_std)
        self.register_buffer("mean", torch.zeros(channels, 1, 1) if mean is None
                             else mean.detach().expand(channels, 1, 1).clone())
        width = int(self.options.get("embedding", 128))
        with torch.random.fork_rng(devices=[]):
            self.network = UNet(2 * channels + 1, channels + FEATURES, **{**self.options, "embedding": width})
            self.widths = nn.Conv2d(FEATURES * BLOCK**2, channels * BLOCK**2, 1)
        initialise(self, generator)
        nn.init.zeros_(self.problem.weight)
        # widths keeps its random weights: its input starts at zero, and two zero layers in sequence would never train

    @property
    def symmetries(self) -> int:
        """Number of symmetries of the square over which the correction is averaged: 1, 2, 4 or 8."""
        return self._symmetries

    @symmetries.setter
    def symmetries(self, number: int) -> None:
        if number not in (1, 2, 4, 8) or isinstance(number, bool):
            raise ValueError(f"symmetries={number!r}: pass 1, 2, 4 or 8")
        self._symmetries = number

    @property
    def spread(self) -> dict[str, float]:
        """Factors of the standard deviations, by problem class; 1 for classes without an entry."""
        return dict(self._spread)

    @spread.setter
    def spread(self, factors: Mapping[str, float]) -> None:
        for name, factor in factors.items():
            if name not in self.classes:
                raise ValueError(f"spread names the class {name!r}, but the adapter knows {', '.join(self.classes)}")
            if not isinstance(factor, int | float) or not 0 < factor < math.inf:
                raise ValueError(f"spread[{name!r}]={factor!r} must be a positive number, such as 1.1 for samples with "
                                 "10% more spread")
        self._spread = {name: float(factor) for name, factor in factors.items()}

    @property
    def bands(self) -> dict[str, list[list[float]]]:
        """Factors of the standard deviations by problem class, opponent colour and band of frequency."""
        return {name: [list(row) for row in rows] for name, rows in self._bands.items()}

    @bands.setter
    def bands(self, factors: Mapping[str, Sequence[Sequence[float]]]) -> None:
        for name in factors:
            if name not in self.classes:
                raise ValueError(f"bands names the class {name!r}, but the adapter knows {', '.join(self.classes)}")
        self._bands = {name: checked_bands(name, rows, self.state_shape[0]) for name, rows in factors.items()}

    @property
    def transform(self) -> str:
        """Name of the transform in whose coefficients the Gaussian is diagonal: ``"block"`` or ``"lapped"``."""
        return self._transform

    @transform.setter
    def transform(self, name: str) -> None:
        if name not in TRANSFORMS:
            raise ValueError(f"transform={name!r}: pass one of {', '.join(map(repr, TRANSFORMS))}")
        self._transform = name

    def settings(self) -> dict[str, Any]:
        """Settings that are not weights, stored with each posterior."""
        return {"symmetries": self.symmetries, "spread": self.spread, "transform": self.transform,
                **({"bands": self.bands} if self._bands else {})}

    @classmethod
    def for_map(cls, prior: NeuralFlowMap, classes: Sequence[str], options: dict[str, Any] | None = None,
                generator: torch.Generator | None = None) -> SpectralAdapter:
        """Build an untrained adapter for a map with ``skip="spectral"``.

        Raises:
            ValueError: For any other map.
        """
        if prior.spectrum is None:
            raise ValueError(f"the map has skip={prior.skip!r}: a SpectralAdapter needs a map with skip='spectral'")
        return cls(prior.state_shape, classes=classes, options=prior.options if options is None else options,
                   decode_affine=prior.decode_affine, spectrum=prior.spectrum, mean=prior.mean, generator=generator)

    def observe(self, operator: Operator, y: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Same as in every adapter; the best linear estimate precedes the embedded measurement, ``(n, 2C, H, W)``."""
        embedded, observed, summary, sigma = super().observe(operator, y, sigma)
        scale, shift = self.decode_affine
        estimate = gaussian_estimate(self.spectrum, self.mean, self.decode_affine, operator, y,
                                     sigma.clamp(min=LEAST_LEVEL))
        return torch.cat([scale * estimate + shift, embedded], dim=1), observed, summary, sigma

    def outputs(self, embedded: Tensor, observed: Tensor, summary: Tensor, classes: Tensor,
                sigma: Tensor) -> tuple[Tensor, Tensor, None]:
        """Mean and log standard deviation of the noise in the coordinates of :meth:`to_state`.

        Args:
            embedded: ``(n, 2C, H, W)``, best linear estimates and measurements as images, in [0, 1].
            observed: ``(n, 1, H, W)``, 1 where the operator observes directly.
            summary: ``(n, 32)``, the operator's summary of its kernel.
            classes: ``(n,)``, indices into :attr:`classes`.
            sigma: ``(n,)``, noise levels in the measurement's units.

        Returns:
            Mean and log standard deviation, each ``(n, C, H, W)``; deviations are None.
        """
        scale, shift = self.decode_affine
        told = self.noise_level(self.told(sigma)) + self.problem(classes)
        x = torch.cat([2 * embedded - 1, observed], dim=1)
        out = self.network(x, told + self.summary(summary)).to(embedded.dtype)
        self.record_output(out, len(out))
        channels, (height, width) = self.mean.shape[0], embedded.shape[-2:]
        if self.symmetries > 1 and not self.training:
            out = torch.cat([self._average(x, told, summary, out[:, :channels]), out[:, channels:]], dim=1)
        with torch.autocast(embedded.device.type, enabled=False):
            state = (embedded[:, :channels] - shift) / scale + CORRECTION * out[:, :channels]
            mean = self.from_state(self.spectrum.whiten(state - self.mean))
            below = (-height % BLOCK, -width % BLOCK)
            features = pad(out[:, channels:], (0, below[1], 0, below[0]), mode="replicate")
            widths = pixel_shuffle(self.widths(pixel_unshuffle(features, BLOCK)), BLOCK)[..., :height, :width]
            log_variance = 2 * widths - torch.log1p(self._information(observed, sigma, below))[..., :height, :width]
        log_std = 0.5 * log_variance.clamp(*LOG_VARIANCE) + self._log_spread(classes).to(mean)
        if self._bands:
            log_std = log_std + self._log_bands(classes.device)[classes][..., bands_of(height, width)].to(mean)
        return mean, log_std, None

    def _average(self, x: Tensor, told: Tensor, summary: Tensor, first: Tensor) -> Tensor:
        """The correction averaged over symmetries, computed one by one to save memory on large images."""
        total = first.clone()
        for turns, mirrored in SYMMETRIES[1 : self.symmetries]:
            turned, kernel = x.rot90(turns, (2, 3)), turned_summary(summary, turns, mirrored)
            out = self.network(turned.flip(3) if mirrored else turned, told + self.summary(kernel)).to(x.dtype)
            self.record_output(out, len(out))
            out = out[:, : first.shape[1]]
            total += (out.flip(3) if mirrored else out).rot90(-turns, (2, 3))
        return total / self.symmetries

    def _log_spread(self, classes: Tensor) -> Tensor:
        """Log factors of rows with these classes, ``(n, 1, 1, 1)``."""
        factors = torch.tensor([math.log(self.spread.get(name, 1.0)) for name in self.classes], device=classes.device)
        return factors[classes].view(-1, 1, 1, 1)

    def _log_bands(self, device: torch.device) -> Tensor:
        """Log factors of all classes, ``(number, C, 6)``."""
        ones = [[1.0] * NUM_BANDS] * self.state_shape[0]
        return torch.tensor([self._bands.get(name, ones) for name in self.classes], device=device).log()

    def _information(self, observed: Tensor, sigma: Tensor, below: tuple[int, int]) -> Tensor:
        """Prior variance over noise variance of each block coefficient, as if observed directly: ``(n, C, H', W')``."""
        share = avg_pool2d(pad(observed, (0, below[1], 0, below[0])), BLOCK)[:, :, :, None, :, None]
        power = (self.spectrum.scales(BLOCK, BLOCK) * self.decode_affine[0]).square()[:, None, :, None, :]
        return (share * power / sigma.clamp(min=LEAST_LEVEL).view(-1, 1, 1, 1, 1, 1).square()).flatten(4).flatten(2, 3)

    def slow_cosines(self, reward: Reward, n: int, generator: torch.Generator) -> Tensor | None:
        """Deviation of the slow cosines of n samples of each observation from their mean, ``(B * n, C, h, w)``.

        A Gaussian that is diagonal in blocks cannot represent the uncertainty of sums over many blocks; see
        :mod:`invflow.linear.slow`. In large holes the network has more information than the spectrum of all
        photographs, under which a smooth surface would vary like any other: for such masks nothing is replaced.
        """
        if not isinstance(reward, GaussianLikelihood) or not reward.operator.linear:
            return None
        if hides_blocks(reward.operator):
            return None
        name, drawn = self.classes[self.class_index(reward, quiet=True)], []
        sigma = self.nearest_level(name, reward.sigma).clamp(min=LEAST_LEVEL).tolist()
        for i, level in enumerate(sigma):
            operator = reward.operator if len(sigma) == 1 else reward.operator.select(torch.tensor([i]))
            drawn.append(draw_slow_cosines(self.spectrum, self.decode_affine[0], operator, level, n, generator))
        return None if drawn[0] is None else torch.cat([part for part in drawn if part is not None])

    def to_state(self, z: Tensor) -> Tensor:
        """Convert cosine coefficients in opponent colours to noise of the map."""
        colours = opponent_matrix(z.shape[1], z.dtype, z.device)
        return mix_channels(colours.mT, TRANSFORMS[self.transform](z, inverse=True))

    def from_state(self, z: Tensor) -> Tensor:
        """Coefficients of the map's noise, the inverse of :meth:`to_state`."""
        colours = opponent_matrix(z.shape[1], z.dtype, z.device)
        return TRANSFORMS[self.transform](mix_channels(colours, z))

    @property
    def resizable(self) -> bool:
        """True: no part depends on the position or number of pixels."""
        return True

    @classmethod
    def build(cls, config: Mapping[str, Any], shared: Mapping[str, Any]) -> SpectralAdapter:
        """Build a spectral adapter from a configuration; ``shared`` holds the arguments common to all forms."""
        return cls(tuple(config["state_shape"]), decode_affine=config["decode_affine"],
                   symmetries=config.get("symmetries", 1), spread=config.get("spread"), bands=config.get("bands"),
                   transform=config.get("transform", "block"), **shared)

    def config(self) -> dict[str, Any]:
        """Everything that :meth:`from_pretrained` needs in addition to the weights."""
        return {**super().config(), "form": self.form, "decode_affine": list(self.decode_affine), **self.settings()}
