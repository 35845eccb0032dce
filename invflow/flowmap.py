"""Flow maps: priors that carry noise to data, in one jump or along a path."""

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

__all__ = ["bytes_per_row", "check_prior", "expand_time", "FlowMap", "integrate", "rows_at_a_time", "Time"]


def _counted(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Count one call of ``velocity`` or ``jump``, unless the method that it calls was counted already."""

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
    r"""A prior over images, given by the flow that carries noise at t = 0 to data at t = 1.

    The path is linear, :math:`x_t = (1 - t) z + t m`, with z ~ N(0, I) and a data point m in *state* space. The
    flow has velocity :math:`b_t(x) = E[m - z \mid x_t = x]`; its map :math:`X_{s,t}` carries a state from
    time s to time t along dx/dt = b_t(x) (Boffi, Albergo, Vanden-Eijnden 2024, "Flow map matching").

    A subclass sets ``state_shape`` and defines :meth:`velocity`, and :meth:`jump` if it has a map. Everything else
    follows. ``image_shape`` equals ``state_shape`` unless :meth:`decode` changes it.

    Attributes:
        state_shape: Shape of one state, without the batch.
        image_shape: Shape of one image, without the batch.
        independent_noise: Whether the map was trained with noise independent of the data. Only then is
            :meth:`score` the score of the path. The velocity gives the denoiser either way.
        has_velocity: Whether there is a velocity. A map that only jumps to data, like a consistency model, has none.
        ode_steps: Number of midpoint steps (two velocities each) of the default :meth:`jump`.

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
            t: Time, a float or ``(n,)``, in [0, 1].

        Returns:
            ``(n, *state_shape)``.
        """
        raise TypeError(f"{type(self).__name__} does not define velocity(x, t), which every flow map needs")

    def jump(self, x: Tensor, s: Time, t: Time) -> Tensor:
        """Flow map X_{s,t}(x). The default solves the ODE in ``ode_steps`` midpoint steps.

        Args:
            x: ``(n, *state_shape)``, states at time s.
            s: Time, a float or ``(n,)``, in [0, 1].
            t: Time, a float or ``(n,)``, in [0, 1].

        Returns:
            ``(n, *state_shape)``, states at time t.
        """
        return integrate(self.velocity, x, s, t, self.ode_steps)

    def decode(self, state: Tensor) -> Tensor:
        """Map data states to images: ``(n, *state_shape)`` to ``(n, *image_shape)``, nominally in [0, 1].

        The default is the affine map of :attr:`decode_affine`.
        """
        if self.decode_affine is None:
            raise TypeError(f"{type(self).__name__} has no affine decoding: it must define decode(state)")
        scale, shift = self.decode_affine
        return state if (scale, shift) == (1.0, 0.0) else state * scale + shift

    def encode(self, image: Tensor) -> Tensor:
        """Map images to data states, the inverse of decode: ``(n, *image_shape)`` to ``(n, *state_shape)``."""
        if self.decode_affine is None:
            raise TypeError(f"{type(self).__name__} has no affine decoding: it must define encode(image)")
        scale, shift = self.decode_affine
        return image if (scale, shift) == (1.0, 0.0) else (image - shift) / scale

    @property
    def decode_affine(self) -> tuple[float, float] | None:
        """``(scale, shift)`` if decode(m) = scale m + shift, else None. The default is the identity."""
        return (1.0, 0.0)

    # -- what follows ---------------------------------------------------------------------------------------

    def denoise(self, x: Tensor, t: Time) -> Tensor:
        """Posterior mean of the data state, D_t(x) = E[m | x_t = x] = x + (1 - t) b_t(x).

        Args:
            x: ``(n, *state_shape)``.
            t: Time, a float or ``(n,)``.

        Returns:
            ``(n, *state_shape)``.

        The identity holds for every coupling of noise and data, such as optimal transport or the coupling of an
        adapter. The mean is over the paths that the map was trained on.
        """
        return x + (1 - expand_time(t, x)) * self.velocity(x, t)

    def score(self, x: Tensor, t: Time) -> Tensor:
        """Score of the path's marginal at t < 1, s_t(x) = (t b_t(x) - x) / (1 - t).

        Args:
            x: ``(n, *state_shape)``.
            t: Time, a float or ``(n,)``, in [0, 1).

        Returns:
            ``(n, *state_shape)``.

        Raises:
            ValueError: If the map was trained with noise that depends on the data, since its velocity gives no score,
                or at t = 1, where the identity divides by zero.
        """
        reason = self.refusal("score", "score(x, t)")
        if reason is not None:
            raise ValueError(reason)
        time = expand_time(t, x)
        # a float below 1 by more than 16-bit rounding needs no check of the tensor, which would wait for the GPU
        if (isinstance(t, Tensor) or t > 0.99) and bool((time >= 1).any()):
            raise ValueError("the score is undefined at t = 1, where no noise is left: use t < 1")
        return (time * self.velocity(x, t) - x) / (1 - time)

    def refusal(self, needs: str, what: str) -> str | None:
        """Explain why ``what`` does not work with this map and which solvers do; None if it works.

        Args:
            needs: ``"velocity"`` or ``"score"``.
            what: Name for the message, such as ``"FMTT"``.
        """
        name = type(self).__name__
        if not self.has_velocity:
            return (f"{what} needs a {'score' if needs == 'score' else 'denoiser'}, and this {name} has none: it jumps "
                    "from noise to data and has no velocity. Use invflow.NoiseSMC(prior) or invflow.NoiseRTO(prior), "
                    "which only need its jump")
        if needs == "score" and not self.independent_noise:
            return (f"{what} needs a score, and the velocity of this {name} gives no score: the map was trained with "
                    "noise that depends on its data, jointly with an adapter or in pairs matched by optimal transport. "
                    "Pass a map trained with independent noise, such as invflow.load_prior('mnist'); for this map use "
                    "invflow.NoiseSMC(prior), which only needs its jump, or invflow.PnPFlow(prior) or "
                    "invflow.Flower(prior), which need its denoiser")
        return None

    def noise(self, n: int, *, generator: torch.Generator | int | None = None) -> Tensor:
        """Draw standard normal noise ``(n, *state_shape)`` on the generator's device, then move it to the map's."""
        return draw_noise((n, *self.state_shape), generator, self.device).to(self.dtype)

    def __getattr__(self, name: str) -> Any:
        """Point to ``generate`` if another name for it is tried."""
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
            n: Number of images, at least 1.
            steps: Number of jumps from noise to data; 1 means one network call for each image.
            generator: Random generator, or a seed.
            chunk_size: Number of images processed at a time; None for 256 on a CPU, and as many as fit on a GPU. The
                draws do not depend on it.

        Returns:
            ``(n, *image_shape)``, nominally in [0, 1], not clipped.

        Raises:
            ValueError: If ``n`` or ``steps`` is under 1.
        """
        if n < 1 or steps < 1:
            raise ValueError(f"generate takes n >= 1 and steps >= 1, not n={n}, steps={steps}")
        noise = [self.noise(n, generator=generator) for _ in range(self.noises(steps))]
        size = ChunkSize(rows_at_a_time(check_chunk_size(chunk_size), self), type(self).__name__)
        parts = size.over(n, lambda part: self.decode(self.flow(noise[0][part], steps, *(z[part] for z in noise[1:]))))
        return torch.cat([images for _, images in parts])

    def noises(self, steps: int) -> int:
        """Number of noise tensors that a draw in ``steps`` steps needs: 1, unless the map renoises between steps."""
        return 1

    def flow(self, z: Tensor, steps: int = 1, *fresh: Tensor) -> Tensor:
        """Carry noise to data in ``steps`` equal jumps: ``(n, *state_shape)`` to the same shape; differentiable.

        Args:
            z: ``(n, *state_shape)``.
            steps: Number of jumps.
            fresh: Further noise of the same shape, for a map that renoises between steps; see :meth:`noises`.
        """
        for i in range(steps):
            z = self.jump(z, i / steps, (i + 1) / steps)
        return z

    def one_step(self, z: Tensor) -> Tensor:
        """The one-step prior f(z) = decode(X_{0,1}(z)): ``(n, *state_shape)`` to ``(n, *image_shape)``."""
        return self.decode(self.jump(z, 0.0, 1.0))

    def fingerprint(self) -> str:
        """Digest of all that determines the map's output, 32 hexadecimal digits: class, attributes, weights, buffers.

        A map with content that cannot be read, such as a connection to another process, must define its own: a string
        that changes whenever its output changes.

        Raises:
            TypeError: If an attribute of the map cannot be identified; the message names it.
        """
        return identity(self)

    @property
    def device(self) -> torch.device:
        """Device of the map's tensors; the CPU for a map without any."""
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
        """Shapes and the number of values in the map, for ``print``."""
        states, images = (tuple(getattr(self, name, ())) for name in ("state_shape", "image_shape"))
        count = sum(x.numel() for x in chain(self.parameters(), self.buffers()))
        return f"{states}{'' if states == images else f' -> {images}'}, {count:,} numbers"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"


def check_prior(solver: str, prior: object, needs: str | None = None, *, affine: bool = False) -> None:
    """Check what was passed to the named solver as its prior.

    Args:
        solver: Name of the solver, for the message.
        prior: The prior.
        needs: ``"velocity"`` or ``"score"``, as in :meth:`FlowMap.refusal`; None if the jump is enough.
        affine: Whether images must be an affine function of states.

    Raises:
        TypeError: If the prior is not a flow map.
        ValueError: If the map lacks what the solver needs.
    """
    if not isinstance(prior, FlowMap):
        raise TypeError(f"{solver} takes a FlowMap, not a {type(prior).__name__}: pass one, such as "
                        "invflow.load_prior('mnist')")
    reason = None if needs is None else prior.refusal(needs, solver)
    if reason is None and affine and prior.decode_affine is None:
        reason = (f"{solver} needs images that are an affine function of the states, and the decoding of this "
                  f"{type(prior).__name__} is not affine: use invflow.FMTT(prior) or invflow.NoiseSMC(prior)")
    if reason is not None:
        raise ValueError(reason)


def rows_at_a_time(chunk_size: int | None, prior: FlowMap, *, velocity: bool = False) -> int:
    """Number of rows to pass through a map together: the requested number, or what fits into the device's memory.

    On a CPU the default is 256. On a GPU it is the number of rows, from 1 to 4,096, whose tensors for a backward pass
    fit into half of the free memory. The memory per row is measured once per map, by one evaluation of a few rows,
    which is not counted as calls.

    Args:
        chunk_size: The requested number; None to choose it.
        prior: The map, on its device.
        velocity: Whether only velocities are needed, which may take less memory than jumps.

    Example:
        >>> import invflow
        >>> from invflow.flowmap import rows_at_a_time
        >>> prior = invflow.GaussianMixtureFlow([[0.0, 1.0]], std=0.5)
        >>> rows_at_a_time(None, prior), rows_at_a_time(7, prior)
        (256, 7)
    """
    if chunk_size is not None:
        return chunk_size
    # before CUDA is initialised no map can be on it; reading a map's device takes 1% of the time of a single sample
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
            return 1  # if even that does not fit, the solver's message says what to do
    return max(1, min(MOST_ROWS, int(SHARE * _free_bytes(prior.device)) // known[key]))

#: upper limit on a GPU: so many rows use it fully, and the progress bar still moves
MOST_ROWS = 4096
#: share of the free memory for the tensors that a backward pass needs. The other half is for everything else:
#: gradients, results, workspaces of the convolutions, and what the solver stores for each row
SHARE = 0.5
#: number of rows used to measure the memory of one, so that shared memory matters little; one row for large states
PROBE, LARGE = 8, 1 << 16

_KNOWN: WeakKeyDictionary[torch.nn.Module, dict[object, int]] = WeakKeyDictionary()


def _free_bytes(device: torch.device) -> int:
    """Free memory on a GPU, including what torch has reserved there but does not use."""
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + idle


def bytes_per_row(prior: FlowMap, *, velocity: bool = False) -> int:
    """Bytes that a map stores for each state for a backward pass through one jump or velocity, on any device.

    Args:
        prior: The map.
        velocity: Whether to measure a velocity instead of a jump.

    Returns:
        The number of bytes, at least twice the size of the state.
    """
    storages: dict[int, int] = {}
    own = {x.untyped_storage().data_ptr() for x in (*prior.parameters(), *prior.buffers())}

    def weigh(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in own:  # the weights exist once for any number of rows
            storages[storage.data_ptr()] = storage.nbytes()
        return saved

    # otherwise a compiled network would first be compiled for this small batch
    compiled = any(module._compiled_call_impl is not None for module in prior.modules())
    plainly = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
    velocity = velocity and prior.has_velocity
    with plainly, prior.uncounted(), torch.enable_grad(), saved_tensors_hooks(weigh, lambda saved: saved):
        count = PROBE if math.prod(prior.state_shape) <= LARGE else 1
        x = torch.zeros(count, *prior.state_shape, device=prior.device, dtype=prior.dtype, requires_grad=True)
        # kept until its tensors are measured, since a freed tensor's address may be used again
        out = prior.velocity(x, 0.5) if velocity else prior.jump(x, 0.0, 1.0)
    return max(sum(storages.values()) // count, 2 * out[0].numel() * out.element_size())
