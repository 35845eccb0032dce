"""Maps that jump to data only: consistency models, one call a sample, or several steps by renoising."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from invflow._core.networks import Network
from invflow._core.ode import Time, expand_time
from invflow.models.decoded import Decode, DecodedFlow
from invflow.models.named_paths import Schedule
from invflow.models.paths import Jumps, edm_path, make_path, trigonometric_path

__all__ = ["ConsistencyFlow", "Times", "from_consistency"]

#: times at which a draw in so many steps is renoised, the first of them 0
Times: TypeAlias = Callable[[int], Sequence[float]]


def equal_times(steps: int) -> Sequence[float]:
    """0, 1 / steps, ..., 1 - 1 / steps."""
    return [i / steps for i in range(steps)]


class ConsistencyFlow(DecodedFlow):
    """A map X_{s,1} from any time to the data; made by :func:`from_consistency`.

    Args:
        network: of states and its own times.
        path: what its prediction says; the data it estimates are where the map jumps.
        state_shape: shape of one state; and so on, as :class:`DecodedFlow` takes it.
        image_shape: shape of one image.
        decode: how states become images.
        times: when a draw in several steps is renoised.

    Attributes:
        has_velocity: False. A jump says where a state ends, not where it is going.
    """

    has_velocity = False

    def __init__(self, network: nn.Module, path: Jumps, state_shape: tuple[int, ...], *,
                 image_shape: tuple[int, ...] | None = None, decode: Decode = (1.0, 0.0),
                 times: Times = equal_times) -> None:
        super().__init__(state_shape, image_shape, decode)
        self.network, self.path, self.times = network, path, times

    def velocity(self, x: Tensor, t: Time) -> Tensor:
        """There is none.

        Raises:
            ValueError: always; says what to use.
        """
        raise ValueError(self.refusal("velocity", "velocity(x, t)"))

    def predict(self, x: Tensor, time: Tensor) -> Tensor:
        """What the network makes of states and its own times: ``(n, *state_shape), (n,)`` to ``(n, *state_shape)``."""
        out: Tensor = self.network(x, time)
        if out.shape != x.shape:
            raise ValueError(f"the consistency function made {tuple(out.shape)} of states {tuple(x.shape)}: it must "
                             "return data in the shape of the states")
        return out

    def jump(self, x: Tensor, s: Time, t: Time) -> Tensor:
        """X_{s,1}(x), one call: ``(n, *state_shape)`` to the same.

        Raises:
            ValueError: for a t that is neither 1 nor s.
        """
        start, end = expand_time(s, x), expand_time(t, x)
        if not bool(((end == 1) | (end == start)).all()):
            raise ValueError(f"this {type(self).__name__} jumps to the data only, jump(x, s, 1.0): no other end is "
                             "known to it. For samples in several steps use prior.generate(n, steps=4, generator=g), "
                             "which renoises")
        out = self.path.estimate(self.predict, x, start)[0]
        return torch.where(end == start, x, out)

    def noises(self, steps: int) -> int:
        """One for each step."""
        return steps

    def flow(self, z: Tensor, steps: int = 1, *fresh: Tensor) -> Tensor:
        """Jump to the data, and from each of the later times again, after noise has been added back to that time.

        Args:
            z: ``(n, *state_shape)``, noise.
            steps: jumps.
            fresh: steps - 1 further noises of that shape.

        Raises:
            ValueError: without as many noises.
        """
        if len(fresh) != steps - 1:
            raise ValueError(f"{steps} steps of a map that jumps to the data renoise {steps - 1} times, and "
                             f"{len(fresh)} noises were passed: flow(z, steps, *fresh), or "
                             "prior.generate(n, steps, generator=g)")
        x = self.jump(z, 0.0, 1.0)
        for time, noise in zip(list(self.times(steps))[1:], fresh):
            x = self.jump((1 - time) * noise + time * x, time, 1.0)
        return x


def from_consistency(f: Callable[..., Tensor], state_shape: tuple[int, ...], *,
                     path: str | tuple[Schedule, Schedule] = "edm", convention: str = "data-at-0",
                     sigma_max: float = 80.0, sigma_min: float = 0.002, image_shape: tuple[int, ...] | None = None,
                     decode: Decode = (1.0, 0.0), times: Sequence[float] | None = None, order: str | None = None,
                     **condition: Any) -> ConsistencyFlow:
    r"""Make a map of a consistency function f(x, t), which jumps from any time to the data in one call.

    Consistency models (Song et al. 2023), latent consistency models, sCM / TrigFlow (Lu and Song 2025), and a
    consistency trajectory model asked for its data end alone. ``generate(n)`` costs one call a sample; ``generate(n,
    steps=4)`` jumps, adds noise back to a later time, and jumps again. There is no velocity, hence no denoiser and no
    score: NoiseSMC, NoiseRTO and BestOfN take the map, and solvers that follow a path (FMTT, DPS, ...) say so.
    The network is put into evaluation mode and stays there.

    Args:
        f: ``(n, *state_shape), (n,) -> (n, *state_shape)``, from a noisy state and its own time to data.
        state_shape: shape of one state, without the batch.
        path: on which f was trained: ``"edm"``, m + sigma z with sigma as its time (consistency models);
            ``"trigflow"``, cos(t) m + sin(t) z with t from pi / 2; or as :func:`~invflow.from_velocity` has it:
            ``"linear"``, ``"cosine"``, ``"vp"``, (alpha, sigma). Noise has unit variance: where f takes states of
            another scale c, pass ``lambda x, t: f(c * x, t) / c``.
        convention: for paths whose time runs in [0, 1], where the data are.
        sigma_max: of ``"edm"``, where f begins.
        sigma_min: of ``"edm"``, where f is the identity.
        image_shape: shape of one image. Default: the state's.
        decode: ``(scale, shift)``, (0.5, 0.5) for states in [-1, 1]; or two functions.
        times: of this library, 0 for noise to 1 for data, at which a draw in ``len(times) + 1`` steps renoises;
            (0.55,) is the sigma of 0.8 that consistency models take for two. Default: equal steps.
        order: ``"x, t"`` or ``"t, x"``, where the names of the arguments do not tell.
        **condition: the network's other arguments, held fixed: tensors of one row or numbers.

    Returns:
        A :class:`~invflow.FlowMap` without a velocity.

    Raises:
        ValueError: for an unknown path, or times out of order.
        TypeError: for a network whose arguments are not understood.

    Example:
        >>> import torch, invflow
        >>> def f(x, sigma):  # of data from N(0, 0.5^2)
        ...     return x * 0.5 / (0.25 + sigma[:, None] ** 2).sqrt()
        >>> prior = invflow.from_consistency(f, (2,))
        >>> prior.generate(3, steps=2, generator=torch.Generator().manual_seed(0)).shape
        torch.Size([3, 2])
    """
    if not callable(f):
        raise TypeError(f"f is a {type(f).__name__}: pass a function (x, t) from noisy states to data")
    if path == "edm":
        if not 0 < sigma_min < sigma_max:
            raise ValueError(f"noise levels must satisfy 0 < sigma_min < sigma_max; these are {sigma_min}, {sigma_max}")
        way: Jumps = edm_path(sigma_min, sigma_max)
    elif path == "trigflow":
        way = trigonometric_path()
    else:
        way = make_path(path, convention, "sample")
    moments: Times = equal_times
    if times is not None:
        stated = [0.0, *map(float, times)]
        if stated != sorted(set(stated)) or stated[-1] >= 1:
            raise ValueError(f"times={tuple(times)}: pass increasing numbers between 0 (noise) and 1 (data)")
        moments = _Stated(stated)
    network = Network(f, condition, order, call="from_consistency(...")
    return ConsistencyFlow(network, way, state_shape, image_shape=image_shape, decode=decode, times=moments)


class _Stated:
    """Times that the caller chose; other numbers of steps are equal."""

    def __init__(self, times: Sequence[float]) -> None:
        self.stated = list(times)

    def __call__(self, steps: int) -> Sequence[float]:
        return self.stated if steps == len(self.stated) else equal_times(steps)
