"""Flow maps from an existing average velocity: MeanFlow and related methods, one call per jump."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from invflow._core.networks import Network
from invflow._core.ode import Time, expand_time
from invflow.models.decoded import Decode, DecodedFlow, is_independent
from invflow.models.paths import check_convention

__all__ = ["AverageVelocityFlow", "check_second", "from_average_velocity"]

SECONDS = ("r", "t-r")


class AverageVelocityFlow(DecodedFlow):
    """A flow map X_{s,t}(x) = x + (t - s) u with a given u; built by :func:`from_average_velocity`.

    Args:
        network: Average velocity, as a function of a state, its time and the second argument.
        state_shape: Same as in :func:`from_average_velocity`.
        second: Meaning of the second argument.
        convention: Which end of the network's time is the data.
        image_shape: Shape of an image.
        decode: (scale, shift), or a pair of functions.
        independent_noise: Whether the map was trained with noise independent of the data.
    """

    def __init__(self, network: nn.Module, state_shape: tuple[int, ...], *, second: str, convention: str,
                 image_shape: tuple[int, ...] | None = None, decode: Decode = (1.0, 0.0),
                 independent_noise: bool = True) -> None:
        super().__init__(state_shape, image_shape, decode, independent_noise)
        self.second, self.convention = check_second(second), check_convention(convention)
        self.network = network

    def average_velocity(self, x: Tensor, s: Time, t: Time) -> Tensor:
        """Average velocity from s to t, in this library's time: ``(n, *state_shape)`` to the same."""
        start, end = expand_time(s, x).flatten(), expand_time(t, x).flatten()
        reverse = self.convention == "data-at-0"
        now, then = (1 - start, 1 - end) if reverse else (start, end)
        out = self.network(x, now, then if self.second == "r" else end - start)
        if not isinstance(out, Tensor) or out.shape != x.shape:
            made = tuple(out.shape) if isinstance(out, Tensor) else f"a {type(out).__name__}"
            raise ValueError(f"the average velocity returned {made} for states {tuple(x.shape)}: return a tensor in "
                             "the shape of the states")
        return -out if reverse else out

    def velocity(self, x: Tensor, t: Time) -> Tensor:
        """Velocity b_t(x), the average velocity at s = t."""
        return self.average_velocity(x, t, t)

    def jump(self, x: Tensor, s: Time, t: Time) -> Tensor:
        """Flow map X_{s,t}(x), one call: ``(n, *state_shape)`` to the same."""
        return x + (expand_time(t, x) - expand_time(s, x)) * self.average_velocity(x, s, t)


def check_second(second: str) -> str:
    """Return the meaning of the second argument if it is valid.

    Raises:
        ValueError: For any other value.
    """
    if second not in SECONDS:
        raise ValueError(f"second={second!r}: pass 'r' if the network's second time is the end of the jump, "
                         "'t-r' if it is the length of the jump")
    return second


def from_average_velocity(u: Callable[..., Tensor], state_shape: tuple[int, ...], *, second: str = "r",
                          convention: str = "data-at-1", image_shape: tuple[int, ...] | None = None,
                          decode: Decode = (1.0, 0.0), independent_noise: bool = True, coupling: str | None = None,
                          order: str | None = None, **condition: Any) -> AverageVelocityFlow:
    """Build a flow map from an average velocity u(x, t, r); it jumps from time t to time r in one call.

    MeanFlow (Geng et al. 2025), Decoupled MeanFlow, the map of a VFM and AnyFlow are networks of this kind: they are
    trained to predict the mean of the velocity between two times. On the diagonal, r = t, it is the velocity, so the
    map has a denoiser and, with independent noise, a score. The network is put into evaluation mode and stays there.

    Args:
        u: ``(n, *state_shape), (n,), (n,) -> (n, *state_shape)``: the state, its time t, and the second argument.
        state_shape: Shape of one state, without the batch.
        second: ``"r"`` for the end time of the jump, ``"t-r"`` for its length, which is positive towards the data
            in either convention.
        convention: ``"data-at-1"``: noise at 0, x_r = x_t + (r - t) u with r > t (VFM's code for images);
            ``"data-at-0"``: noise at 1, x_r = x_t - (t - r) u with r < t (MeanFlow, DMF, VFM's checkerboard).
        image_shape: Shape of one image. Default: the state's.
        decode: ``(scale, shift)``, image = scale state + shift, or two functions (decode, encode); see
            :func:`~invflow.from_velocity`.
        independent_noise: Whether it was trained with noise independent of the data; False for a map trained jointly
            with an adapter.
        coupling: The same setting by name, see :func:`~invflow.from_velocity`.
        order: Order of x, t and r, such as ``"x, r, t"``, if the argument names do not make it clear.
        **condition: The network's other arguments, held fixed: ``y=207``, tensors of one row or numbers.

    Returns:
        A :class:`~invflow.FlowMap`.

    Raises:
        ValueError: For an unknown convention or second argument.
        TypeError: For a network whose signature is not recognised.

    Example:
        >>> import torch, invflow
        >>> def u(x, t, r):  # of N(0, 1) data, the reverse time of MeanFlow: x_r = x_t g(r) / g(t)
        ...     g = lambda time: (time**2 + (1 - time) ** 2).sqrt()[:, None]
        ...     gap = (t - r)[:, None]
        ...     return torch.where(gap > 0, x * (1 - g(r) / g(t)) / gap.clamp(min=1e-12),
        ...                        x * (2 * t - 1)[:, None] / g(t) ** 2)
        >>> prior = invflow.from_average_velocity(u, (2,), convention="data-at-0")
        >>> z = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
        >>> bool(torch.allclose(prior.one_step(z), z))
        True
    """
    if not callable(u):
        raise TypeError(f"u is a {type(u).__name__}: pass a function (x, t, r) of states and two times")
    fixed: Mapping[str, Any] = condition
    network = Network(u, fixed, order, ("x", "t", "r"), call="from_average_velocity(...")
    return AverageVelocityFlow(network, state_shape, second=second, convention=convention, image_shape=image_shape,
                               decode=decode, independent_noise=is_independent(coupling, independent_noise))
