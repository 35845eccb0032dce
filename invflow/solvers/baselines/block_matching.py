"""BM3D, through the package of its authors, for denoising and for circular blurs."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from invflow._core.shapes import as_pictures
from invflow.likelihood import GaussianLikelihood
from invflow.linear.spectral import opponent_matrix
from invflow.linear.structure import transfer_function
from invflow.solvers.baselines.point import PointEstimator

if TYPE_CHECKING:
    import numpy as np

__all__ = ["BM3D"]

#: profiles of the package by the names that it has for them, and their classes
_PROFILES = {"np": "BM3DProfile", "refilter": "BM3DProfileRefilter", "high": "BM3DProfileHigh", "vn": "BM3DProfileVN",
             "deb": "BM3DProfileDeb"}


class BM3D(PointEstimator):
    """Block matching and 3-D filtering, the strongest of the classical denoisers.

    Similar blocks of the image are stacked and filtered together (Dabov, Foi, Katkovnik and Egiazarian 2007, "Image
    denoising by sparse 3-D transform-domain collaborative filtering", with the exact variances of Mäkinen, Azzari and
    Foi 2020, "Collaborative filtering of correlated noise"). A circular blur is undone by a regularised inverse first,
    and the noise that this colours is filtered (Dabov et al. 2008). Blocks of a noisy colour photograph are matched by
    its brightness; of a blurred one each opponent colour is restored by itself.

    The work is done by the authors' package ``bm3d``, which comes with ``pip install 'invflow[baselines]'``. **Its
    licence allows non-commercial use only**, and asks that the authors are named where results are published. It is no
    part of invflow, and is never imported but when this solver runs.

    Args:
        profile: of the package: ``"np"``, the normal one; ``"refilter"``, ``"high"``, ``"vn"``, ``"deb"``.
        chunk_size: observations at a time, one after the other; the estimates do not depend on it.

    Raises:
        ImportError: where the package is not installed.
        ValueError: for an unknown profile.

    Example:
        >>> import torch, invflow
        >>> from invflow.operators import Denoising
        >>> likelihood = invflow.GaussianLikelihood(Denoising((1, 32, 32)), torch.rand(1, 1, 32, 32), sigma=0.1)
        >>> invflow.BM3D().sample(likelihood, 1).mean().shape  # doctest: +SKIP
        torch.Size([1, 1, 32, 32])
    """

    def __init__(self, *, profile: str = "np", chunk_size: int = 8) -> None:
        super().__init__(chunk_size=chunk_size)
        if profile not in _PROFILES:
            raise ValueError(f"there is no profile {profile!r}: choose one of {', '.join(map(repr, _PROFILES))}")
        if importlib.util.find_spec("bm3d") is None:
            raise ImportError("BM3D needs the package bm3d, whose licence allows non-commercial use only: "
                              "pip install 'invflow[baselines]', or pip install bm3d")
        self.profile = profile

    def _estimate(self, likelihood: GaussianLikelihood) -> tuple[Tensor, dict[str, Tensor]]:
        operator, y = likelihood.operator, likelihood.y
        shape = tuple(operator.image_shape)
        picture = as_pictures(shape)
        transfer = transfer_function(likelihood) if min(picture[1:]) >= 8 else None
        if transfer is None:
            raise ValueError(
                f"BM3D takes pictures of 8 x 8 or more with white noise, or blurred circularly, and "
                f"{type(operator).__name__} of {shape} is neither: use invflow.TotalVariation() or invflow.Wiener(), "
                "which take any linear operator, or for a blur padding='circular' (--operator-set padding=circular)"
            )
        transfer = transfer.expand(len(y), *picture)
        rows = [self._restore(y[b].reshape(picture), float(likelihood.sigma[b]), transfer[b]) for b in range(len(y))]
        return torch.stack(rows).to(y).reshape(-1, *shape), {}

    def _restore(self, y: Tensor, sigma: float, transfer: Tensor) -> Tensor:
        """One picture ``(C, H, W)``."""
        bm3d = _package()
        profile = getattr(bm3d, _PROFILES[self.profile])()
        profile.num_threads = torch.get_num_threads()
        channels, deblur = len(y), bool((transfer - 1).abs().max() > 1e-5)
        if channels not in (1, 3) or bool((transfer != transfer[:1]).any()):
            # no colours to mix: each channel by itself
            return torch.cat([self._restore(y[c : c + 1], sigma, transfer[c : c + 1]) for c in range(channels)])
        picture = y.double().cpu().permute(1, 2, 0).numpy()
        if not deblur:
            clean = bm3d.bm3d if channels == 1 else bm3d.bm3d_rgb
            out = clean(picture.squeeze(), sigma, profile)
        else:  # opponent colours one by one, scaled so that brightness lies in [0, 1]: all the package has for blurs
            colours, scale = opponent_matrix(channels, torch.float64).numpy(), channels**-0.5
            mixed, kernel = scale * picture @ colours.T, _kernel(transfer[0])
            parts = [bm3d.bm3d_deblurring(mixed[..., c : c + 1], scale * sigma, kernel, profile).squeeze()
                     for c in range(channels)]
            out = torch.stack([torch.tensor(part) for part in parts], dim=-1).numpy() @ colours / scale
        return torch.tensor(out, dtype=torch.float64).reshape(*y.shape[1:], channels).permute(2, 0, 1)


class _Numpy:
    """Numpy with the old name of the trapezoidal rule."""

    def __getattr__(self, name: str) -> Any:
        import numpy

        return getattr(numpy, "trapezoid" if name == "trapz" else name)


def _package() -> Any:
    """The package, able to run with numpy from 2.4."""
    import bm3d
    import bm4d
    import numpy

    if not hasattr(numpy, "trapz"):  # which the package calls where noise is coloured: given to it alone
        bm4d.np = _Numpy()
    return bm3d


def _kernel(transfer: Tensor) -> np.ndarray[Any, Any]:
    """The kernel of a transfer function ``(H, W)``, with its origin in the middle of odd sides."""
    kernel = torch.fft.fftshift(torch.fft.ifft2(transfer).real).double().cpu()
    for axis, side in enumerate(kernel.shape):
        if side % 2 == 0:  # what is farthest from the origin, which no kernel smaller than the image reaches
            kernel = kernel.narrow(axis, 1, side - 1)
    result: np.ndarray[Any, Any] = kernel.numpy()
    return result
