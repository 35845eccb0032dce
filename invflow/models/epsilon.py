"""Flow maps from networks that predict the noise of a diffusion, without a scheduler library."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from invflow._core.networks import Network
from invflow.models.decoded import Decode, PathFlow
from invflow.models.paths import VariancePreservingPath

__all__ = ["EpsilonFlow", "alphas_cumprod", "from_epsilon"]

BETAS = ("linear", "scaled-linear", "cosine")
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "sample": "sample"}


class EpsilonFlow(PathFlow):
    """A flow map whose jump solves the ODE of a diffusion's network; built by :func:`from_epsilon`."""

    def predict(self, x: Tensor, time: Tensor) -> Tensor:
        """The prediction, without a learned variance: ``(n, *state_shape), (n,)`` to ``(n, *state_shape)``."""
        out: Any = self.network(x, time)
        out = out[0] if isinstance(out, (tuple, list)) else getattr(out, "sample", out)
        if out.shape[1] == 2 * x.shape[1] and out.shape[2:] == x.shape[2:]:
            out = out[:, :x.shape[1]]  # the other half is a learned variance
        if out.shape != x.shape:
            raise ValueError(f"the network returned {tuple(out.shape)} for states {tuple(x.shape)}: it must keep the "
                             f"shape, or return twice the channels, {2 * x.shape[1]}, with a learned variance in the "
                             "second half")
        made: Tensor = out
        return made.to(x.dtype)


def alphas_cumprod(betas: str | Tensor, num_steps: int = 1000) -> Tensor:
    """Squared share of the data after each step of a diffusion.

    Args:
        betas: ``"linear"`` (Ho et al. 2020; guided-diffusion), ``"cosine"`` (Nichol and Dhariwal 2021),
            ``"scaled-linear"`` (latent diffusion, 0.00085 to 0.012), or the betas themselves, ``(K,)``.
        num_steps: K, for a schedule by name.

    Returns:
        ``(K,)``, float64.

    Raises:
        ValueError: For an unknown schedule, or betas that are not shares.
    """
    if isinstance(betas, str):
        if betas not in BETAS:
            raise ValueError(f"no schedule of betas is called {betas!r}: choose one of {', '.join(BETAS)}, or pass the "
                             "betas themselves, a tensor (K,)")
        if betas == "linear":
            table = torch.linspace(0.1 / num_steps, 20 / num_steps, num_steps, dtype=torch.float64)
        elif betas == "scaled-linear":
            table = torch.linspace(0.00085**0.5, 0.012**0.5, num_steps, dtype=torch.float64).square()
        else:
            ends = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
            bar = ((ends + 0.008) / 1.008 * math.pi / 2).cos().square()
            table = (1 - bar[1:] / bar[:-1]).clamp(max=0.999)
    else:
        table = torch.as_tensor(betas, dtype=torch.float64)
    if table.ndim != 1 or len(table) < 2 or not bool(((table > 0) & (table < 1)).all()):
        raise ValueError(f"betas have shape {tuple(table.shape)}: pass (K,), at least two numbers between 0 and 1")
    return (1 - table).cumprod(0)


def from_epsilon(network: Callable[..., Any], state_shape: tuple[int, ...], *, steps: int,
                 betas: str | Tensor = "linear", num_steps: int = 1000, prediction: str = "epsilon",
                 image_shape: tuple[int, ...] | None = None, decode: Decode = (0.5, 0.5), method: str = "midpoint",
                 order: str | None = None, **condition: Any) -> EpsilonFlow:
    r"""Build a flow map from a network that predicts the noise of a diffusion, as in guided-diffusion.

    For ``UNetModel(x, timesteps)`` of Dhariwal and Nichol (2021), the FFHQ and ImageNet priors of most papers on
    posterior sampling: states in [-1, 1], 1,000 steps, 3 output channels, or 6 with a learned variance, which is
    ignored. Step k of the diffusion, alpha_k m + sigma_k z, is exactly (alpha_k + sigma_k) x_t at
    t = alpha_k / (alpha_k + sigma_k); an Euler step is deterministic DDIM. The network is put into
    evaluation mode and stays there.

    Args:
        network: ``(n, *state_shape), (n,) -> (n, *state_shape)``, from states and steps k in [0, K - 1] to the noise;
            k need not be an integer.
        state_shape: (C, H, W) of a state.
        steps: Number of steps of one jump, equal on the diffusion's grid; each costs 1 (Euler), 2 (midpoint, Heun),
            4 (rk4) or 6 (dopri5) calls.
        betas: ``"linear"``, ``"cosine"``, ``"scaled-linear"``, or the betas, ``(K,)``.
        num_steps: K, for a schedule by name.
        prediction: ``"epsilon"``; ``"v"`` or ``"sample"`` for networks that predict those.
        image_shape: Shape of one image. Default: the state's.
        decode: ``(scale, shift)``, image = scale state + shift, or two functions; the default is for states in [-1, 1].
        method: ``"euler"``, ``"midpoint"``, ``"heun"``, ``"rk4"`` or ``"dopri5"``.
        order: ``"x, t"`` or ``"t, x"``, if the argument names do not make it clear.
        **condition: The network's other arguments, held fixed: ``y=207``, tensors of one row or numbers.

    Returns:
        A :class:`~invflow.FlowMap`.

    Raises:
        ValueError: For an unknown schedule, prediction or method.
        TypeError: For a network whose signature is not recognised.

    Example:
        >>> import torch, invflow
        >>> network = lambda x, timesteps: torch.cat([x, x], dim=1)  # stands for UNetModel(learn_sigma=True)
        >>> prior = invflow.from_epsilon(network, (3, 8, 8), steps=5)
        >>> prior.generate(2, generator=torch.Generator().manual_seed(0)).shape
        torch.Size([2, 3, 8, 8])
    """
    if not callable(network):
        raise TypeError(f"network is a {type(network).__name__}: pass a function (x, t) from states and steps to noise")
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction={prediction!r}: choose one of {', '.join(PREDICTIONS)}")
    path = VariancePreservingPath(alphas_cumprod(betas, num_steps), PREDICTIONS[prediction])
    return EpsilonFlow(Network(network, condition, order, call="from_epsilon(..."), path, state_shape, steps=steps,
                       method=method, image_shape=image_shape, decode=decode)
