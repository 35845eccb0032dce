"""Flow maps: the prior, as a map that carries noise to data in one jump or along a path."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from contextlib import nullcontext
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from invflow._core.checks import to_tensor_hint
from invflow._core.chunks import ROWS, ChunkSize, check_chunk_size, is_out_of_memory
from invflow._core.counting import Countable
from invflow._core.explained import TellingModule, explained
from invflow._core.identity import identity
from invflow._core.ode import Time, expand_time, integrate
from invflow._core.random import draw_noise

__all__ = ["bytes_per_row", "expand_time", "FlowMap", "integrate", "rows_at_a_time", "Time"]


def _counted(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Count one call of ``velocity`` or ``jump``, unless what it calls has been counted already."""

    @functools.wraps(method)
    def wrapper(self: FlowMap, x: Tensor, *times: Time, **kwargs: Any) -> Tensor:
        if not isinstance(x, Tensor) or x.ndim != len(self.state_shape) + 1:
            raise TypeError(to_tensor_hint(x, "x")) if not isinstance(x, Tensor) else ValueError(
                f"x has shape {tuple(x.shape)}, but {type(self).__name__}.{method.__name__} takes (n, *state_shape) = "
                f"(n, {', '.join(map(str, self.state_shape))}): pass x[None] for a single state")
        scopes = self.call_scopes()
        if not scopes:
            return method(self, x, *times, **kwargs)
        outer = scopes[-1]
        before = outer.forward
        out = method(self, x, *times, **kwargs)
        if outer.forward == before:
            self.record_output(out, x.shape[0])
        return out

    wrapper.__invflow_counted__ = True  # type: ignore[attr-defined]
    return wrapper


class FlowMap(TellingModule, Countable):
    r"""A prior over images, as the flow that carries noise at t = 0 to data at t = 1.

    With the linear path :math:`x_t = (1 - t) z + t m`, z ~ N(0, I) and m a data point in *state* space, the
    flow has velocity :math:`b_t(x) = E[m - z \mid x_t = x]`; its map :math:`X_{s,t}` carries a state from
    time s to time t along dx/dt = b_t(x) (Boffi, Albergo, Vanden-Eijnden 2024, "Flow map matching").

    A subclass sets ``state_shape`` and writes :meth:`velocity`, and :meth:`jump` where it has a map; all else
    follows. ``image_shape`` is the state's unless :meth:`decode` changes it.

    Attributes:
        state_shape: the shape of one state, without the batch.
        image_shape: the shape of one image, without the batch.
        independent_noise: whether the map was trained with noise independent of the data. Only then is
            :meth:`score` the score of the path. The velocity gives the denoiser either way.
        has_velocity: whether there is a velocity. A map that only jumps to data, as a consistency model does, has none.
        ode_steps: midpoint steps (two velocities each) of the default :meth:`jump`.

    Example:
        >>> import torch, invflow
        >>> class Standard(invflow.FlowMap):  # the flow of N(0, I) to N(0, I)
        ...     state_shape = image_shape = (2,)
        ...     def velocity(self, x, t):
        ...         t = invflow.flowmap.expand_time(t, x)
        ...         return x * (2 * t - 1) / ((1 - t) ** 2 + t**2)
        >>> Standard().generate(3, generator=torch.Generator().manual_seed(0)).shape
        torch.Size([3, 2])
    """

    state_shape: tuple[int, ...]
    image_shape: tuple[int, ...]
    independent_noise: bool = True
    has_velocity: bool = True
    ode_steps: int = 50

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in ("velocity", "jump"):
            method = cls.__dict__.get(name)
            if method is not None and not hasattr(method, "__invflow_counted__"):
                setattr(cls, name, _counted(method))

    # -- what a subclass writes -----------------------------------------------------------------------------

    def velocity(self, x: Tensor, t: Time) -> Tensor:
        """Velocity b_t(x) of the probability-flow ODE.

        Args:
            x: ``(n, *state_shape)``, states at time t.
            t: a float or ``(n,)``, in [0, 1].

        Returns:
            ``(n, *state_shape)``.
        """
        raise TypeError(f"{type(self).__name__} writes no velocity(x, t), which every flow map needs")

    def jump(self, x: Tensor, s: Time, t: Time) -> Tensor:
        """Flow map X_{s,t}(x); the default is the ODE, solved in ``ode_steps`` midpoint steps.

        Args:
            x: ``(n, *state_shape)``, states at time s.
            s: a float or ``(n,)``, in [0, 1].
            t: a float or ``(n,)``, in [0, 1].

        Returns:
            ``(n, *state_shape)``, states at time t.
        """
        return integrate(self.velocity, x, s, t, self.ode_steps)

    def decode(self, state: Tensor) -> Tensor:
        """Image of a data state: ``(n, *state_shape)`` to ``(n, *image_shape)``, nominally in [0, 1].

        The default is the affine map of :attr:`decode_affine`, else the identity.
        """
        if self.decode_affine is None:
            raise TypeError(f"{type(self).__name__} has no affine decoding: it must write decode(state)")
        scale, shift = self.decode_affine
        return state if (scale, shift) == (1.0, 0.0) else state * scale + shift

    def encode(self, image: Tensor) -> Tensor:
        """Data state of an image, the inverse of decode: ``(n, *image_shape)`` to ``(n, *state_shape)``."""
        if self.decode_affine is None:
            raise TypeError(f"{type(self).__name__} has no affine decoding: it must write encode(image)")
        scale, shift = self.decode_affine
        return image if (scale, shift) == (1.0, 0.0) else (image - shift) / scale

    @property
    def decode_affine(self) -> tuple[float, float] | None:
        """``(scale, shift)`` where decode(m) = scale m + shift, else None. The default is the identity."""
        return (1.0, 0.0)

    # -- what follows ---------------------------------------------------------------------------------------

    def denoise(self, x: Tensor, t: Time) -> Tensor:
        """Posterior mean of the data state, D_t(x) = E[m | x_t = x] = x + (1 - t) b_t(x).

        Args:
            x: ``(n, *state_shape)``.
            t: a float or ``(n,)``.

        Returns:
            ``(n, *state_shape)``.

        The identity asks nothing of the noise: it holds for every coupling of noise and data, an optimal-transport one
        or an adapter's, as the mean over the paths that the map was trained on.
        """
        return x + (1 - expand_time(t, x)) * self.velocity(x, t)

    def score(self, x: Tensor, t: Time) -> Tensor:
        """Score of the path's marginal at t < 1, s_t(x) = (t b_t(x) - x) / (1 - t).

        Args:
            x: ``(n, *state_shape)``.
            t: a float or ``(n,)``, in [0, 1).

        Returns:
            ``(n, *state_shape)``.

        Raises:
            ValueError: for a map trained with noise that depends on the data, whose velocity gives no score;
                or at t = 1, where the identity divides by zero.
        """
        reason = self.refusal("score", "score(x, t)")
        if reason is not None:
            raise ValueError(reason)
        time = expand_time(t, x)
        # a number under 1 by more than the rounding of sixteen bits is none, and a GPU need not be waited for
        if (isinstance(t, Tensor) or t > 0.99) and bool((time >= 1).any()):
            raise ValueError("the score is undefined at t = 1, where no noise is left: ask at t < 1")
        return (time * self.velocity(x, t) - x) / (1 - time)

    def refusal(self, needs: str, what: str) -> str | None:
        """Why ``what`` cannot be had of this map, and what can; None where it can.

        Args:
            needs: ``"velocity"`` or ``"score"``.
            what: for the message, such as ``"FMTT"``.
        """
        name = type(self).__name__
        if not self.has_velocity:
            return (f"{what} needs a {'score' if needs == 'score' else 'denoiser'}, and this {name} has none: it jumps "
                    "from noise to data and has no velocity. Use invflow.NoiseSMC(prior) or invflow.NoiseRTO(prior), "
                    "which need its jump only")
        if needs == "score" and not self.independent_noise:
            return (f"{what} needs a score, and the velocity of this {name} gives no score: the map was trained with "
                    "noise that depends on its data, jointly with an adapter or in pairs matched by optimal transport. "
                    "Pass a map trained with independent noise, such as invflow.load_prior('mnist'); for this map use "
                    "invflow.NoiseSMC(prior), which needs its jump only, or invflow.PnPFlow(prior) or "
                    "invflow.Flower(prior), which need its denoiser")
        return None

    def noise(self, n: int, *, generator: torch.Generator | int | None = None) -> Tensor:
        """Standard normal noise ``(n, *state_shape)``, drawn on the generator's device, then moved."""
        return draw_noise((n, *self.state_shape), generator, self.device).to(self.dtype)

    def __getattr__(self, name: str) -> Any:
        """Say what draws images, where another word for it is tried."""
        if name in ("sample", "draw", "rvs"):
            raise AttributeError(f"{type(self).__name__} has no {name!r}: prior.generate(4, generator=generator) draws "
                                 "images, and a solver draws samples of a posterior")
        return super().__getattr__(name)

    @explained(like="prior.generate(4, steps=1, generator=generator)")
    @torch.no_grad()
    def generate(self, n: int, steps: int = 1, *, generator: torch.Generator | int | None = None,
                 chunk_size: int | None = None) -> Tensor:
        """Draw images from the prior, X_{0,1}(z) in ``steps`` equal jumps.

        Args:
            n: how many, at least 1.
            steps: jumps from noise to data; 1 is one network call for each image.
            generator: source of randomness.
            chunk_size: images at a time; None for 256 on a CPU, and as many as fit on a GPU. The draws do not depend on
                it.

        Returns:
            ``(n, *image_shape)``, nominally in [0, 1], not clipped.

        Raises:
            ValueError: if ``n`` or ``steps`` is under 1.
        """
        if n < 1 or steps < 1:
            raise ValueError(f"generate takes n >= 1 and steps >= 1, not n={n}, steps={steps}")
        noise = [self.noise(n, generator=generator) for _ in range(self.noises(steps))]
        size = ChunkSize(rows_at_a_time(check_chunk_size(chunk_size), self), type(self).__name__)
        parts = size.over(n, lambda part: self.decode(self.flow(noise[0][part], steps, *(z[part] for z in noise[1:]))))
        return torch.cat([images for _, images in parts])

    def noises(self, steps: int) -> int:
        """How many noises a draw in so many steps takes: 1, but for a map that goes in steps by renoising."""
        return 1

    def flow(self, z: Tensor, steps: int = 1, *fresh: Tensor) -> Tensor:
        """Carry noise to data in ``steps`` equal jumps: ``(n, *state_shape)`` to the same; differentiable.

        Args:
            z: ``(n, *state_shape)``.
            steps: how many.
            fresh: further noises of the same shape, for a map that renoises between steps; see :meth:`noises`.
        """
        for i in range(steps):
            z = self.jump(z, i / steps, (i + 1) / steps)
        return z

    def one_step(self, z: Tensor) -> Tensor:
        """The one-step prior f(z) = decode(X_{0,1}(z)): ``(n, *state_shape)`` to ``(n, *image_shape)``."""
        return self.decode(self.jump(z, 0.0, 1.0))

    def fingerprint(self) -> str:
        """Digest of what decides the map's numbers, 32 hexadecimal digits: class, attributes, parameters and buffers.

        A map whose content cannot be read, since it talks to another process, say, writes its own: a string that
        changes with whatever decides its numbers.

        Raises:
            TypeError: where something that the map holds cannot be identified, with its name.
        """
        return identity(self)

    @property
    def device(self) -> torch.device:
        """Where the map's tensors live; the CPU for a map without any."""
        return next((p.device for p in chain(self.parameters(), self.buffers())), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the map's tensors; torch's default for a map without any."""
        tensors = chain(self.parameters(), self.buffers())
        return next((p.dtype for p in tensors if p.is_floating_point()), torch.get_default_dtype())

    @property
    def dimension(self) -> int:
        """Number of values in one state."""
        return math.prod(self.state_shape)

    def extra_repr(self) -> str:
        """Shapes, and how many numbers the map is made of, for ``print``."""
        states, images = (tuple(getattr(self, name, ())) for name in ("state_shape", "image_shape"))
        count = sum(x.numel() for x in chain(self.parameters(), self.buffers()))
        return f"{states}{'' if states == images else f' -> {images}'}, {count:,} numbers"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"


def rows_at_a_time(chunk_size: int | None, prior: FlowMap, *, velocity: bool = False) -> int:
    """How many rows go through a map together: as many as were asked for, else what the device has memory for.

    On a CPU that is 256. On a GPU, what half of the free memory holds of the tensors that a backward pass needs, from
    1 to 4,096; a row's are weighed in one evaluation of a few, not counted as calls, the first time that a map runs.

    Args:
        chunk_size: as it was asked for; None to choose.
        prior: the map, on its device.
        velocity: whether it is asked for velocities alone, which may take less than its jump.

    Example:
        >>> import invflow
        >>> from invflow.flowmap import rows_at_a_time
        >>> prior = invflow.GaussianMixtureFlow([[0.0, 1.0]], std=0.5)
        >>> rows_at_a_time(None, prior), rows_at_a_time(7, prior)
        (256, 7)
    """
    if chunk_size is not None:
        return chunk_size
    # where CUDA has not begun no map is on it, and to ask each for its device takes a hundredth of a single sample
    if not torch.cuda.is_initialized() or prior.device.type != "cuda":
        return ROWS
    mixed = torch.is_autocast_enabled(prior.device.type)
    known, key = _KNOWN.setdefault(prior, {}), (velocity, mixed, prior.state_shape, prior.dtype)
    if key not in known:
        try:
            known[key] = bytes_per_row(prior, velocity=velocity)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return 1  # and the solver says what to do where that does not fit
    return max(1, min(MOST_ROWS, int(SHARE * _free_bytes(prior.device)) // known[key]))

#: on a GPU no more than this: it is busy by then, and progress is still to be seen
MOST_ROWS = 4096

#: of the free memory, for what a backward pass reads again. The other half is for what is written besides: gradients,
#: results, the workspaces of the convolutions, and what the solver keeps of each row
SHARE = 0.5

#: rows of which the memory of one is learned, so that what they share counts little; a single one of large states
PROBE, LARGE = 8, 1 << 16

_KNOWN: WeakKeyDictionary[torch.nn.Module, dict[object, int]] = WeakKeyDictionary()


def _free_bytes(device: torch.device) -> int:
    """What is free on a GPU, with what torch holds there and does not use."""
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + idle


def bytes_per_row(prior: FlowMap, *, velocity: bool = False) -> int:
    """Bytes that a map keeps of each state for a backward pass through one jump, or one velocity; on any device.

    Args:
        prior: the map.
        velocity: weigh a velocity in place of a jump.

    Returns:
        At least the state's own, twice.
    """
    storages: dict[int, int] = {}
    own = {x.untyped_storage().data_ptr() for x in (*prior.parameters(), *prior.buffers())}

    def weigh(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in own:  # the weights are there once, for however many rows
            storages[storage.data_ptr()] = storage.nbytes()
        return saved

    # compiled networks would be compiled for so few rows first
    compiled = any(module._compiled_call_impl is not None for module in prior.modules())
    plainly = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
    velocity = velocity and prior.has_velocity
    with plainly, prior.uncounted(), torch.enable_grad(), saved_tensors_hooks(weigh, lambda saved: saved):
        count = PROBE if math.prod(prior.state_shape) <= LARGE else 1
        x = torch.zeros(count, *prior.state_shape, device=prior.device, dtype=prior.dtype, requires_grad=True)
        # kept until its tensors are weighed, since what is freed lends its address to the next
        out = prior.velocity(x, 0.5) if velocity else prior.jump(x, 0.0, 1.0)
    return max(sum(storages.values()) // count, 2 * out[0].numel() * out.element_size())
