"""Maps that jump to data only: consistency models, with one call per sample, or several steps with renoising."""

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

#: start times of the steps for a given number of steps; the first is 0
Times: TypeAlias = Callable[[int], Sequence[float]]


def equal_times(steps: int) -> Sequence[float]:
    """0, 1 / steps, ..., 1 - 1 / steps."""
    return [i / steps for i in range(steps)]


class ConsistencyFlow(DecodedFlow):
    """A map X_{s,1} from any time to the data; built by :func:`from_consistency`.

    Args:
        network: Function of states and its own times.
        path: Meaning of its prediction; its data estimate is the end of a jump.
        state_shape: Shape of one state; same as in :class:`DecodedFlow`, like the arguments below.
        image_shape: Shape of one image.
        decode: How states become images.
        times: Times at which a sample in several steps is renoised.

    Attributes:
        has_velocity: False. A jump gives the end of a path, not its direction.
    """

    has_velocity = False

    def __init__(self, network: nn.Module, path: Jumps, state_shape: tuple[int, ...], *,
                 image_shape: tuple[int, ...] | None = None, decode: Decode = (1.0, 0.0),
                 times: Times = equal_times) -> None:
        super().__init__(state_shape, image_shape, decode)
        self.network, self.path, self.times = network, path, times

    def velocity(self, x: Tensor, t: Time) -> Tensor:
        """Raise an error: this map has no velocity.

        Raises:
            ValueError: Always; the message names the alternatives.
        """
        raise ValueError(self.refusal("velocity", "velocity(x, t)"))

    def predict(self, x: Tensor, time: Tensor) -> Tensor:
        """Output of the network for states and its own times: ``(n, *state_shape), (n,)`` to ``(n, *state_shape)``."""
        out: Tensor = self.network(x, time)
        if out.shape != x.shape:
            raise ValueError(f"the function f returned {tuple(out.shape)} for states {tuple(x.shape)}: it must "
                             "return data in the shape of the states")
        return out

    def jump(self, x: Tensor, s: Time, t: Time) -> Tensor:
        """X_{s,1}(x), one call: ``(n, *state_shape)`` to the same.

        Raises:
            ValueError: For a t that is neither 1 nor s.
        """
        start, end = expand_time(s, x), expand_time(t, x)
        if not bool(((end == 1) | (end == start)).all()):
            raise ValueError(f"this {type(self).__name__} only jumps to the data, jump(x, s, 1.0). "
                             "For samples in several steps use prior.generate(n, steps=4, generator=g), "
                             "which renoises")
        out = self.path.estimate(self.predict, x, start)[0]
        return torch.where(end == start, x, out)

    def noises(self, steps: int) -> int:
        """Number of noise tensors: one for each step."""
        return steps

    def flow(self, z: Tensor, steps: int = 1, *fresh: Tensor) -> Tensor:
        """Jump to the data; then, for each later time, add noise back to that time and jump again.

        Args:
            z: ``(n, *state_shape)``, noise.
            steps: Number of jumps.
            fresh: ``steps - 1`` further noise tensors of that shape.

        Raises:
            ValueError: For any other number of noise tensors.
        """
        if len(fresh) != steps - 1:
            raise ValueError(f"{steps} steps of a map to the data need {steps - 1} further noise tensors, but "
                             f"{len(fresh)} were passed: call flow(z, steps, *fresh), or "
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
    r"""Build a map from a consistency function f(x, t), which jumps from any time to the data in one call.

    It takes consistency models (Song et al. 2023), latent consistency models, sCM / TrigFlow (Lu and Song 2025), and
    consistency trajectory models restricted to jumps to the data. ``generate(n)`` costs one call per sample;
    ``generate(n, steps=4)`` jumps, adds noise back to a later time, and jumps again. The map has no velocity, hence no
    denoiser and no score. NoiseSMC, NoiseRTO and BestOfN accept it; solvers that follow a path (FMTT, DPS, ...) raise
    an error. The network is put into evaluation mode and stays there.

    Args:
        f: ``(n, *state_shape), (n,) -> (n, *state_shape)``, from a noisy state and its own time to data.
        state_shape: Shape of one state, without the batch.
        path: Path on which f was trained: ``"edm"``, m + sigma z with sigma as its time (consistency models);
            ``"trigflow"``, cos(t) m + sin(t) z with t from pi / 2; or a path of :func:`~invflow.from_velocity`:
            ``"linear"``, ``"cosine"``, ``"vp"``, (alpha, sigma). Noise has unit variance: if f takes states of
            another scale c, pass ``lambda x, t: f(c * x, t) / c``.
        convention: For paths whose time runs in [0, 1]: which end is the data.
        sigma_max: For ``"edm"``: the noise level at which f starts.
        sigma_min: For ``"edm"``: the noise level at which f is the identity.
        image_shape: Shape of one image. Default: the state's.
        decode: ``(scale, shift)``, (0.5, 0.5) for states in [-1, 1]; or two functions.
        times: Times of this library, 0 for noise to 1 for data, at which a sample in ``len(times) + 1`` steps is
            renoised; (0.55,) is the sigma of 0.8 that consistency models use for two steps. Default: equal steps.
        order: ``"x, t"`` or ``"t, x"``, if the argument names do not make it clear.
        **condition: The network's other arguments, held fixed: tensors of one row or numbers.

    Returns:
        A :class:`~invflow.FlowMap` without a velocity.

    Raises:
        ValueError: For an unknown path, or times out of order.
        TypeError: For a network whose signature is not recognised.

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
    """The caller's times; for other numbers of steps, equal steps."""

    def __init__(self, times: Sequence[float]) -> None:
        self.stated = list(times)

    def __call__(self, steps: int) -> Sequence[float]:
        return self.stated if steps == len(self.stated) else equal_times(steps)
