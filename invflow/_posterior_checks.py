"""Checks of what a posterior is made of."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["checked_evidence", "checked_samples", "normalised", "precise"]


def checked_samples(samples: Tensor) -> Tensor:
    """The samples, detached and in single precision at least, if they are a batch of finite images."""
    if not isinstance(samples, Tensor) or not samples.is_floating_point():
        kind = samples.dtype if isinstance(samples, Tensor) else type(samples).__name__
        raise TypeError(f"samples are a floating-point tensor (B, N, *image_shape), not {kind}")
    if samples.ndim < 3 or samples.shape[0] == 0 or samples.shape[1] == 0:
        raise ValueError("samples have shape (B, N, *image_shape) with B and N at least 1, not "
                         f"{tuple(samples.shape)}; for a single observation write samples.unsqueeze(0)")
    samples = samples.detach()
    if samples.dtype not in (torch.float32, torch.float64):  # half precision spoils sums over thousands
        samples = samples.float()
    broken = ~torch.isfinite(samples).flatten(2).all(2)
    if bool(broken.any()):
        b, n = (int(i) for i in broken.nonzero()[0])
        raise ValueError(
            f"{int(broken.sum())} of {broken.numel()} samples hold values that are not finite, the first in "
            f"particle {n} of observation {b}: check the solver's step sizes and its reward there"
        )
    return samples


def precise(values: Tensor) -> Tensor:
    """In double precision, where the device has it."""
    return values.float() if values.device.type == "mps" else values.double()


def normalised(log_weights: Tensor | None, samples: Tensor) -> Tensor:
    """Log weights ``(B, N)`` whose exponentials sum to one over N; equal ones for None."""
    b, n = samples.shape[:2]
    if log_weights is None:
        return torch.full((b, n), -math.log(n), dtype=samples.dtype, device=samples.device)
    if tuple(log_weights.shape) != (b, n):
        raise ValueError(f"log_weights of shape {tuple(log_weights.shape)} do not fit samples of shape "
                         f"{tuple(samples.shape)}: one for each particle, ({b}, {n})")
    log_weights = precise(log_weights.detach().to(samples.device))
    bad = log_weights.isnan() | (log_weights == torch.inf)
    if bool(bad.any()):
        i, j = (int(k) for k in bad.nonzero()[0])
        raise ValueError(f"the log weight of particle {j} of observation {i} is {log_weights[i, j].item()}")
    total = log_weights.logsumexp(1, keepdim=True)
    if bool(total.isinf().any()):
        empty = int(total.squeeze(1).isinf().nonzero()[0])
        raise ValueError(f"all {n} log weights of observation {empty} are -inf: no particle is compatible")
    return (log_weights - total).to(samples.dtype)


def checked_evidence(log_evidence: Tensor | None, samples: Tensor) -> Tensor | None:
    """The log evidence, if there is one for each observation."""
    if log_evidence is None:
        return None
    if tuple(log_evidence.shape) != (samples.shape[0],):
        raise ValueError(f"log_evidence has shape ({samples.shape[0]},), one for each observation, "
                         f"not {tuple(log_evidence.shape)}")
    return log_evidence.detach().to(samples.device)
