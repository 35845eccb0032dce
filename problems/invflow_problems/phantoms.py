"""Multi-coil MRI and fan-beam CT of phantoms: random ellipses of 32 x 32 pixels, generated on demand.

The operators are deepinv's. The prior of the problems is the Gaussian with the mean and the spectrum of phantoms, whose
flow is known in closed form. Under this prior the posteriors are Gaussian, so samplers can be compared with them.
``invflow train ellipses`` and ``invflow train ellipses-complex`` train other priors in minutes, for ``--prior``.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from invflow.flowmap import FlowMap
from invflow.operator import Operator
from invflow.problem import Problem

__all__ = ["DECODE", "draw_complex_phantoms", "draw_phantoms", "phantoms_ct", "phantoms_mri"]

SIDE = 32
#: (scale, shift) of the decoding for real phantoms, in [0, 1], and for complex ones, in [-1, 1] for each part
DECODE = {1: (0.5, 0.5), 2: (1.0, 0.0)}
COILS = 4
VIEWS, DETECTORS = 30, 48


def draw_phantoms(n: int, generator: torch.Generator) -> Tensor:
    """Draw slices of a body: one large ellipse, with six ellipses of higher or lower density inside.

    Args:
        n: Number of phantoms.
        generator: Source of randomness.

    Returns:
        ``(n, 1, 32, 32)`` in [0, 1], with edges smoothed over a pixel.

    Example:
        >>> import torch
        >>> from invflow_problems.phantoms import draw_phantoms
        >>> draw_phantoms(2, torch.Generator().manual_seed(0)).shape
        torch.Size([2, 1, 32, 32])
    """
    def uniform(low: float, high: float, count: int) -> Tensor:
        drawn = torch.rand(n, count, 1, 1, generator=generator, device=generator.device)
        return low + (high - low) * drawn

    body = _ellipses(uniform(-0.08, 0.08, 1), uniform(-0.08, 0.08, 1), uniform(0.6, 0.8, 1), uniform(0.6, 0.8, 1),
                     uniform(0, math.pi, 1))
    radius, angle = 0.45 * uniform(0, 1, 6).sqrt(), uniform(0, 2 * math.pi, 6)
    inner = _ellipses(radius * angle.cos(), radius * angle.sin(), uniform(0.08, 0.35, 6), uniform(0.08, 0.35, 6),
                      uniform(0, math.pi, 6))
    density = uniform(0.4, 0.6, 1) + (uniform(-0.3, 0.4, 6) * inner).sum(1, keepdim=True)
    return (body * density).clamp(0, 1)


def _ellipses(x: Tensor, y: Tensor, a: Tensor, b: Tensor, turn: Tensor) -> Tensor:
    """``(n, k, 32, 32)``, 1 inside and 0 outside; centres and half axes are in units of half the image's side."""
    axis = (torch.arange(SIDE, device=x.device) + 0.5) * (2 / SIDE) - 1
    dx, dy = axis - x, axis[:, None] - y
    u, v = dx * turn.cos() + dy * turn.sin(), dy * turn.cos() - dx * turn.sin()
    # approximate distance from the border, in pixels
    inside = (1 - ((u / a) ** 2 + (v / b) ** 2).sqrt()) * torch.minimum(a, b) * (SIDE / 2)
    return (inside + 0.5).clamp(0, 1)


def draw_complex_phantoms(n: int, generator: torch.Generator) -> Tensor:
    """Draw phantoms with a slowly varying phase, as in magnetic resonance imaging.

    Args:
        n: Number of phantoms.
        generator: Source of randomness.

    Returns:
        ``(n, 2, 32, 32)``, real and imaginary parts, each in [-1, 1].
    """
    magnitude = draw_phantoms(n, generator)
    axis = torch.linspace(-1, 1, SIDE, device=magnitude.device)
    x, y = axis.expand(SIDE, SIDE), axis[:, None].expand(SIDE, SIDE)
    basis = torch.stack([torch.ones_like(x), x, y, x * y, x**2 - y**2])  # smooth, and at most one turn
    weights = torch.randn(n, len(basis), generator=generator, device=generator.device) * 0.5
    phase = torch.einsum("nk,khw->nhw", weights, basis)[:, None]
    return torch.cat([magnitude * phase.cos(), magnitude * phase.sin()], dim=1)


def _fan_beam() -> Operator:
    """30 views around a full circle, 48 detectors each; values are line integrals of the density, in pixels."""
    from deepinv.physics import Tomography

    from invflow_operators.deepinv_physics import DeepinvOperator

    fan = {"pixel_spacing": 1 / SIDE, "n_detector_pixels": DETECTORS, "detector_spacing": 2.5 / DETECTORS}
    angles = torch.arange(VIEWS) * (360 / VIEWS)
    physics = Tomography(angles=angles, img_width=SIDE, fan_beam=True, fan_parameters=fan, normalize=False)
    return DeepinvOperator(physics, (1, SIDE, SIDE), "fan-beam-ct")


def _coils() -> Tensor:
    """Sensitivities of four coils around the body, ``(1, 4, 32, 32)``, whose squares sum to one."""
    axis = torch.linspace(-1, 1, SIDE)
    maps = []
    for k in range(COILS):
        angle = 2 * math.pi * k / COILS + 0.4
        square = (axis - 1.2 * math.cos(angle)) ** 2 + (axis[:, None] - 1.2 * math.sin(angle)) ** 2
        maps.append(torch.polar((-square / 1.5).exp(), angle + 0.8 * (axis * math.sin(angle)).expand(SIDE, SIDE)))
    stacked = torch.stack(maps)
    return (stacked / stacked.abs().square().sum(0).sqrt())[None]


def _mask() -> Tensor:
    """Measured lines of k-space, ``(1, 1, 32, 32)``: the central eight, and every third of the others."""
    columns = torch.zeros(SIDE)
    columns[::3] = 1
    columns[SIDE // 2 - 4 : SIDE // 2 + 4] = 1
    return columns.expand(1, 1, SIDE, SIDE)


def _multi_coil() -> Operator:
    """Four coils, half of the lines of k-space; real and imaginary parts."""
    from deepinv.physics import MultiCoilMRI

    from invflow_operators.deepinv_physics import DeepinvOperator

    physics = MultiCoilMRI(mask=_mask(), coil_maps=_coils(), img_size=(2, SIDE, SIDE))
    return DeepinvOperator(physics, (2, SIDE, SIDE), "multi-coil-mri")


@functools.cache
def _gaussian(channels: int) -> FlowMap:
    from invflow.training.prior import gaussian_map

    draw = draw_phantoms if channels == 1 else draw_complex_phantoms
    images = draw(4096, torch.Generator().manual_seed(0))
    return gaussian_map(images, DECODE[channels], torch.Generator().manual_seed(0)).eval().requires_grad_(False)


phantoms_ct = Problem("phantoms/ct", None, _fan_beam, 0.3, sampler=draw_phantoms,
                      prior=functools.partial(_gaussian, 1),
                      description="fan-beam CT, 30 views of 48 detectors, noise 0.3 (in pixels of full density)")
phantoms_mri = Problem("phantoms/mri", None, _multi_coil, 0.05, sampler=draw_complex_phantoms,
                       prior=functools.partial(_gaussian, 2),
                       description="MRI with 4 coils, half of the lines of k-space, noise 0.05 per real part")
