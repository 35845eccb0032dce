"""Flow maps in a latent space: a flow of codes, and a decoder from codes to images."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from invflow._core.networks import settle
from invflow._core.ode import Time
from invflow.flowmap import FlowMap

__all__ = ["LatentFlowMap"]

Transform = Callable[[Tensor], Tensor]


class LatentFlowMap(FlowMap):
    r"""A flow map whose states are latent codes: decode(m) is a decoder's image, and gradients pass through it.

    Velocity, jump, noise and score are those of ``latent``; only :meth:`decode`, :meth:`encode` and
    ``image_shape`` differ. Decoding is not affine (:attr:`decode_affine` is None). Solvers that need an affine
    decoding raise an error; all others (NoiseSMC, NoiseRTO, FMTT, search) work with the map.

    Only calls of the latent flow are counted. Rows that pass through the decoder, one for each reward, are not.
    Decoder and encoder are put into evaluation mode and stay there, even after ``train()``.

    Args:
        latent: The flow of the codes. Its own ``decode`` is not used.
        decoder: Map from codes ``(n, *latent.state_shape)`` to images ``(n, *image_shape)`` in [0, 1]: a module, which
            moves with the map, a function, or a method of a module. Differentiable wherever the reward is.
        encoder: Map from images to codes, an approximate inverse of the decoder; None: the map cannot encode.
        image_shape: Shape of one image; None determines it by decoding one code of zeros.

    Raises:
        TypeError: If the latent flow is not a FlowMap, or the decoder or encoder is not callable.
        ValueError: If the decoder's images do not have ``image_shape``; raised on first use.

    Example:
        >>> import torch, invflow
        >>> codes = invflow.GaussianMixtureFlow(torch.tensor([[-2.0, 0.0], [2.0, 0.0]]), std=0.5)
        >>> decoder = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.Unflatten(1, (1, 4, 4)))
        >>> prior = invflow.LatentFlowMap(codes, decoder)
        >>> prior.state_shape, prior.image_shape
        ((2,), (1, 4, 4))
    """

    def __init__(self, latent: FlowMap, decoder: Transform, encoder: Transform | None = None, *,
                 image_shape: tuple[int, ...] | None = None) -> None:
        super().__init__()
        if not isinstance(latent, FlowMap):
            raise TypeError(f"latent is a {type(latent).__name__}: pass a FlowMap, such as one from from_velocity(...)")
        for name, function in (("decoder", decoder), ("encoder", encoder)):
            if not callable(function) and not (name == "encoder" and function is None):
                raise TypeError(f"{name} is a {type(function).__name__}: pass a module or a function")
        self.latent = latent
        self.state_shape = tuple(latent.state_shape)
        self.independent_noise, self.ode_steps = latent.independent_noise, latent.ode_steps
        self.has_velocity = latent.has_velocity
        self.decoder, self.encoder = decoder, encoder
        self._settle()
        # a method is not a module, but it may belong to one, which has to move with the map
        owners = {id(owner): owner for owner in (getattr(f, "__self__", None) for f in (decoder, encoder))
                  if isinstance(owner, nn.Module)}
        self.owners = nn.ModuleList(owners.values())
        if image_shape is None:
            with torch.no_grad():
                code = torch.zeros((1, *self.state_shape), device=self.device, dtype=self.dtype)
                image_shape = tuple(decoder(code).shape[1:])
        self.image_shape = tuple(image_shape)

    def train(self, mode: bool = True) -> LatentFlowMap:
        """Training mode for the latent flow alone."""
        super().train(mode)
        self._settle()
        return self

    def _settle(self) -> None:
        for function in (self.decoder, self.encoder):
            if function is not None:
                settle(function)

    @property
    def decode_affine(self) -> None:
        """None: a decoder is not affine."""
        return None

    @property
    def device(self) -> torch.device:
        """Device of the latent flow."""
        return self.latent.device

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the codes: that of the latent flow, not of the decoder."""
        return self.latent.dtype

    def velocity(self, x: Tensor, t: Time) -> Tensor:
        """Velocity of the codes: ``(n, *state_shape)`` to the same."""
        return self._counting(lambda: self.latent.velocity(x, t))

    def jump(self, x: Tensor, s: Time, t: Time) -> Tensor:
        """Flow map of the codes, in one call or along an ODE, as in the latent flow."""
        return self._counting(lambda: self.latent.jump(x, s, t))

    def noises(self, steps: int) -> int:
        """Same as in the latent flow."""
        return self.latent.noises(steps)

    def flow(self, z: Tensor, steps: int = 1, *fresh: Tensor) -> Tensor:
        """Transport noise to codes with the latent flow."""
        return self._counting(lambda: self.latent.flow(z, steps, *fresh))

    def decode(self, state: Tensor) -> Tensor:
        """Image of a code: ``(n, *state_shape)`` to ``(n, *image_shape)``.

        Raises:
            ValueError: If the decoder returns another shape.
        """
        _hold(self.decoder)
        image = self.decoder(state).to(state.dtype)
        if tuple(image.shape) != (state.shape[0], *self.image_shape):
            raise ValueError(
                f"the decoder returned {tuple(image.shape)} for codes {tuple(state.shape)}, but image_shape is "
                f"{self.image_shape}: pass image_shape={tuple(image.shape[1:])}, or leave it out"
            )
        return image

    def encode(self, image: Tensor) -> Tensor:
        """Code of an image: ``(n, *image_shape)`` to ``(n, *state_shape)``.

        Raises:
            TypeError: For a map without an encoder.
            ValueError: If the encoder returns another shape.
        """
        if self.encoder is None:
            raise TypeError("this LatentFlowMap has no encoder: build it as LatentFlowMap(latent, decoder, encoder)")
        _hold(self.encoder)
        code = self.encoder(image).to(image.dtype)
        if tuple(code.shape) != (image.shape[0], *self.state_shape):
            raise ValueError(
                f"the encoder returned {tuple(code.shape)} for images {tuple(image.shape)}, but codes have shape "
                f"{self.state_shape}: the decoder, the encoder and the latent flow must belong together"
            )
        return code

    def with_latent(self, latent: FlowMap) -> LatentFlowMap:
        """Map with the same decoder and encoder and another flow of the same codes, such as a distilled one.

        Raises:
            ValueError: If its states have another shape.
        """
        if tuple(latent.state_shape) != self.state_shape:
            raise ValueError(f"states of the new flow have shape {tuple(latent.state_shape)}, but this decoder takes "
                             f"{self.state_shape}: pass a flow with states of that shape")
        return LatentFlowMap(latent, self.decoder, self.encoder, image_shape=self.image_shape)

    def _counting(self, evaluate: Callable[[], Tensor]) -> Tensor:
        """Count the latent flow's calls in this map's scopes, including every velocity of an ODE."""
        if not self.call_scopes():
            return evaluate()
        with self.latent.count() as calls:
            out = evaluate()
        return self.record_output(out, calls.forward)


def _hold(function: Transform) -> None:
    """Restore evaluation mode in case a decoder was put into training mode."""
    owner = function if isinstance(function, nn.Module) else getattr(function, "__self__", None)
    if isinstance(owner, nn.Module) and owner.training:
        owner.eval()
