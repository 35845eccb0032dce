"""Common base of maps built from existing networks: shapes, decoding of states, and coupling of the noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn

from invflow._core.ode import TABLEAUS, Time, expand_time
from invflow.flowmap import FlowMap
from invflow.models.paths import Path, integrate_on_path

__all__ = ["Decode", "DecodedFlow", "PathFlow", "check_solver_settings", "is_independent"]

Decode: TypeAlias = "tuple[float, float] | tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]"

COUPLINGS = ("independent", "optimal-transport", "joint")


def is_independent(coupling: str | None, independent_noise: bool) -> bool:
    """Whether the named coupling leaves the noise independent of the data.

    Raises:
        ValueError: For an unknown coupling.
    """
    if coupling is None:
        return independent_noise
    if coupling not in COUPLINGS:
        raise ValueError(f"no coupling is called {coupling!r}: 'independent' draws noise separately for each image, "
                         "'optimal-transport' pairs noises with images in each batch, and 'joint' noise comes from an "
                         "adapter")
    return coupling == "independent"


class DecodedFlow(FlowMap):
    """A flow map with shapes and a decoding given by the caller.

    Args:
        state_shape: Shape of one state, without the batch.
        image_shape: Shape of one image; None: the state's.
        decode: ``(scale, shift)`` of an affine decoding, or two functions (decode, encode).
        independent_noise: Whether the map was trained with noise independent of the data.

    Raises:
        TypeError: For any other decode.
        ValueError: If the shapes differ and the decoding is affine.
    """

    def __init__(self, state_shape: tuple[int, ...], image_shape: tuple[int, ...] | None = None,
                 decode: Decode = (1.0, 0.0), independent_noise: bool = True) -> None:
        super().__init__()
        self.state_shape = tuple(state_shape)
        self.image_shape = self.state_shape if image_shape is None else tuple(image_shape)
        self.independent_noise = independent_noise
        self._affine: tuple[float, float] | None = None
        self._decoder: Callable[[Tensor], Tensor] | None = None
        self._encoder: Callable[[Tensor], Tensor] | None = None
        first, second = decode
        if callable(first) and callable(second):
            self._decoder, self._encoder = first, second
        elif not callable(first) and not callable(second):
            self._affine = (float(first), float(second))
            _check_affine(self._affine, self.state_shape, self.image_shape)
        else:
            raise TypeError("decode must be two numbers (scale, shift) or two functions (decode, encode)")
        # a plain function has no tensors: this buffer gives the map a device and a dtype that .to() changes
        self.register_buffer("_anchor", torch.empty(0), persistent=False)

    @property
    def decode_affine(self) -> tuple[float, float] | None:
        """(scale, shift), or None if decoding uses functions."""
        return self._affine

    def decode(self, state: Tensor) -> Tensor:
        """Image of a data state: ``(n, *state_shape)`` to ``(n, *image_shape)``."""
        return super().decode(state) if self._decoder is None else self._decoder(state)

    def encode(self, image: Tensor) -> Tensor:
        """Data state of an image: ``(n, *image_shape)`` to ``(n, *state_shape)``."""
        return super().encode(image) if self._encoder is None else self._encoder(image)


class PathFlow(DecodedFlow):
    """A flow map whose jump solves the ODE of a network's prediction, on the path that the network was trained on.

    Args:
        network: Function of states and its own times.
        path: Meaning of its prediction, and the grid on which its steps are equal.
        state_shape: Shape of one state; same as in :class:`DecodedFlow`, like the shapes below.
        steps: Number of steps of one jump.
        method: Runge-Kutta method.
        image_shape: Shape of one image.
        decode: How states become images.
        independent_noise: Whether the network was trained with noise independent of the data.
    """

    def __init__(self, network: nn.Module, path: Path, state_shape: tuple[int, ...], *, steps: int,
                 method: str = "midpoint", image_shape: tuple[int, ...] | None = None, decode: Decode = (1.0, 0.0),
                 independent_noise: bool = True) -> None:
        super().__init__(state_shape, image_shape, decode, independent_noise)
        check_solver_settings(steps, method)
        self.network, self.path, self.ode_steps, self.method = network, path, steps, method

    def predict(self, x: Tensor, time: Tensor) -> Tensor:
        """Output of the network for states and its own times: ``(n, *shape), (n,)`` to ``(n, *shape)``."""
        out: Tensor = self.network(x, time)
        return out

    def velocity(self, x: Tensor, t: Time) -> Tensor:
        """The network's velocity, in this library's time and on its path: ``(n, *state_shape)`` to the same."""
        return self.path.velocity(self.predict, x, expand_time(t, x))

    def jump(self, x: Tensor, s: Time, t: Time) -> Tensor:
        """The ODE from s to t, in ``ode_steps`` steps that are equal on the path's grid."""
        return integrate_on_path(self.path, self.velocity, x, s, t, self.ode_steps, self.method)


def check_solver_settings(steps: int, method: str) -> None:
    """Raise an error for an unknown Runge-Kutta method or fewer than one step."""
    if method not in TABLEAUS:
        raise ValueError(f"no integration method is called {method!r}: choose one of {', '.join(TABLEAUS)}")
    if steps < 1:
        raise ValueError(f"steps={steps} is too few: a jump takes at least 1 step")


def _check_affine(affine: tuple[float, float], state_shape: tuple[int, ...],
                  image_shape: tuple[int, ...]) -> None:
    if affine[0] == 0:
        raise ValueError("decode=(0, shift) makes every image the same: the scale must not be 0")
    if state_shape != image_shape:
        raise ValueError(
            f"state_shape {state_shape} and image_shape {image_shape} differ, and an affine decode cannot "
            "convert between them: pass decode=(decode_function, encode_function)"
        )
