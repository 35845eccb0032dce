"""Flow maps in a latent space: a flow, and the decoder through which rewards see its states."""

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

    Velocity, jump, noise and score are those of ``latent``; only :meth:`decode` and :meth:`encode` differ, and with
    them ``image_shape``. Decoding is not affine (:attr:`decode_affine` is None), so that solvers that need an affine
    decoding refuse the map with a message, and all others (NoiseSMC, NoiseRTO, FMTT, search) use it as it is.

    Calls are counted for the latent flow alone: the rows that go through the decoder, one for each reward, are not.
    Decoder and encoder are put into evaluation mode and stay there, whatever ``train()`` says to the map.

    Args:
        latent: the flow of the codes. Its own ``decode`` is not used.
        decoder: from codes ``(n, *latent.state_shape)`` to images ``(n, *image_shape)`` in [0, 1]: a module, which
            moves with the map, or a function, or a method of a module. Differentiable where the reward is.
        encoder: from images to codes, the decoder's inverse as far as it has one; None: the map cannot encode.
        image_shape: shape of one image; None decodes one code of zeros to see.

    Raises:
        TypeError: for a latent flow that is no FlowMap, or a decoder or encoder that cannot be called.
        ValueError: if ``image_shape`` is not what the decoder makes, once it is used.

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
            raise TypeError(f"latent is a {type(latent).__name__}: pass a FlowMap, such as from_velocity(...) makes")
        for name, function in (("decoder", decoder), ("encoder", encoder)):
            if not callable(function) and not (name == "encoder" and function is None):
                raise TypeError(f"{name} is a {type(function).__name__}: pass a module or a function")
        self.latent = latent
        self.state_shape = tuple(latent.state_shape)
        self.independent_noise, self.ode_steps = latent.independent_noise, latent.ode_steps
        self.has_velocity = latent.has_velocity
        self.decoder, self.encoder = decoder, encoder
        self._settle()
        # a method is no module, but what it belongs to is one, and has to move with the map
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
        """Where the latent flow is."""
        return self.latent.device

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the codes: the latent flow's, whatever the decoder's."""
        return self.latent.dtype

    def velocity(self, x: Tensor, t: Time) -> Tensor:
        """Velocity of the codes: ``(n, *state_shape)`` to the same."""
        return self._counting(lambda: self.latent.velocity(x, t))

    def jump(self, x: Tensor, s: Time, t: Time) -> Tensor:
        """Flow map of the codes, in one call or along the ODE as the latent flow has it."""
        return self._counting(lambda: self.latent.jump(x, s, t))

    def noises(self, steps: int) -> int:
        """As many as the latent flow takes."""
        return self.latent.noises(steps)

    def flow(self, z: Tensor, steps: int = 1, *fresh: Tensor) -> Tensor:
        """Noise carried to codes as the latent flow does it."""
        return self._counting(lambda: self.latent.flow(z, steps, *fresh))

    def decode(self, state: Tensor) -> Tensor:
        """Image of a code: ``(n, *state_shape)`` to ``(n, *image_shape)``.

        Raises:
            ValueError: if the decoder makes another shape.
        """
        _hold(self.decoder)
        image = self.decoder(state).to(state.dtype)
        if tuple(image.shape) != (state.shape[0], *self.image_shape):
            raise ValueError(
                f"the decoder made {tuple(image.shape)} of codes {tuple(state.shape)}, but image_shape is "
                f"{self.image_shape}: pass image_shape={tuple(image.shape[1:])}, or leave it out"
            )
        return image

    def encode(self, image: Tensor) -> Tensor:
        """Code of an image: ``(n, *image_shape)`` to ``(n, *state_shape)``.

        Raises:
            TypeError: for a map without an encoder.
            ValueError: if the encoder makes another shape.
        """
        if self.encoder is None:
            raise TypeError("this LatentFlowMap was made without an encoder: LatentFlowMap(latent, decoder, encoder)")
        _hold(self.encoder)
        code = self.encoder(image).to(image.dtype)
        if tuple(code.shape) != (image.shape[0], *self.state_shape):
            raise ValueError(
                f"the encoder made {tuple(code.shape)} of images {tuple(image.shape)}, but codes have shape "
                f"{self.state_shape}: the decoder, the encoder and the latent flow must belong together"
            )
        return code

    def with_latent(self, latent: FlowMap) -> LatentFlowMap:
        """The same decoder and encoder for another flow of the same codes, such as a distilled one.

        Raises:
            ValueError: if its states have another shape.
        """
        if tuple(latent.state_shape) != self.state_shape:
            raise ValueError(f"states of the new flow have shape {tuple(latent.state_shape)}, those of this one "
                             f"{self.state_shape}: the decoder reads the latter")
        return LatentFlowMap(latent, self.decoder, self.encoder, image_shape=self.image_shape)

    def _counting(self, evaluate: Callable[[], Tensor]) -> Tensor:
        """Let this map's scopes see what the latent flow's own counting saw: every velocity of an ODE."""
        if not self.call_scopes():
            return evaluate()
        with self.latent.count() as calls:
            out = evaluate()
        return self.record_output(out, calls.forward)


def _hold(function: Transform) -> None:
    """Back into evaluation mode, where somebody has put a decoder into training mode since."""
    owner = function if isinstance(function, nn.Module) else getattr(function, "__self__", None)
    if isinstance(owner, nn.Module) and owner.training:
        owner.eval()
