"""A spectrum like that of photographs, and an untrained map with it, for the tests of spectral maps."""

import torch

import invflow
from invflow.linear.spectral import Spectrum

OPTIONS = {"channels": [8, 16, 16], "blocks": 1, "attention": False}
AFFINE = (0.5, 0.5)


def natural(channels: int = 3) -> Spectrum:
    """A power law of slope -1 in amplitude, weaker in the colour differences."""
    log_std = -Spectrum.frequencies().log()[None] - 3.0 - torch.arange(channels, dtype=torch.float64)[:, None]
    return Spectrum(channels, log_std).double()


def spectral_map(shape=(3, 32, 32), **kwargs) -> invflow.NeuralFlowMap:
    return invflow.NeuralFlowMap(shape, options=OPTIONS, skip="spectral", spectrum=natural(shape[0]).float(),
                                 mean=torch.full((shape[0], 1, 1), -0.1), std=torch.full((shape[0], 1, 1), 0.5),
                                 generator=torch.Generator().manual_seed(0), **kwargs)
