"""Rejection sampling of truths from tilted distributions."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["rejection_sample"]


@torch.no_grad()
def rejection_sample(propose: Callable[[int, torch.Generator], Tensor], reward: Callable[[Tensor], Tensor], n: int,
                     generator: torch.Generator, *, bound: float = 0.0, batch: int = 4096,
                     max_proposals: int = 10_000_000) -> Tensor:
    """Draw from p(x) e^{r(x)}: keep a draw of p with probability e^{r(x) - bound} (von Neumann 1951).

    Args:
        propose: Function ``(n, generator)`` that returns independent draws of p, ``(n, *image_shape)``.
        reward: r, ``(n, *image_shape)`` to ``(n,)``.
        n: Number of draws.
        generator: Source of all random numbers.
        bound: Upper bound of r.
        batch: Number of draws of p at a time.
        max_proposals: Largest number of draws of p.

    Returns:
        ``(n, *image_shape)``, in the order of the draws.

    Raises:
        ValueError: If a reward exceeds the bound.
        RuntimeError: If too few draws are accepted.
    """
    kept: list[Tensor] = []
    found = drawn = 0
    while found < n:
        if drawn >= max_proposals:
            raise RuntimeError(f"only {found} of {drawn} prior draws were accepted, but {n} are needed: the reward "
                               "is too sharp for rejection")
        x = propose(batch, generator)
        values = reward(x).double()
        if float(values.max()) > bound + 1e-4:
            raise ValueError(f"a reward of {float(values.max()):.4g} exceeds the bound {bound}: pass a larger bound=")
        uniform = torch.rand(batch, generator=generator, device=generator.device, dtype=torch.float64)
        accepted = x[(uniform.to(values.device).log() < values - bound)]
        kept.append(accepted)
        found, drawn = found + len(accepted), drawn + batch
        if found:  # estimated number of draws still needed, within limits
            batch = max(batch, min(16 * batch, math.ceil(1.1 * (n - found) * drawn / found)))
    return torch.cat(kept)[:n]
