"""BM3D, through its authors' package, for denoising and circular blurs."""

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

#: profiles of the package: their names there, and their classes
_PROFILES = {"np": "BM3DProfile", "refilter": "BM3DProfileRefilter", "high": "BM3DProfileHigh", "vn": "BM3DProfileVN",
             "deb": "BM3DProfileDeb"}


class BM3D(PointEstimator):
    """Block matching and 3-D filtering, the strongest of the classical denoisers.

    Similar blocks of the image are stacked and filtered together (Dabov, Foi, Katkovnik and Egiazarian 2007, "Image
    denoising by sparse 3-D transform-domain collaborative filtering", with the exact variances of Mäkinen, Azzari and
    Foi 2020, "Collaborative filtering of correlated noise"). For a circular blur, a regularised inverse is applied
    first, and the coloured noise that it leaves is filtered (Dabov et al. 2008). In a noisy colour photograph, blocks
    are matched by brightness. In a blurred one, each opponent colour is restored separately.

    The computation is done by the authors' package ``bm3d``, installed by ``pip install 'invflow[baselines]'``. **Its
    licence allows non-commercial use only**, and requires that publications of results name the authors. The package is
    not part of invflow, and is imported only when this solver runs.

    Args:
        profile: Profile of the package: ``"np"``, the normal one; ``"refilter"``, ``"high"``, ``"vn"``, ``"deb"``.
        chunk_size: Number of observations at a time, restored one after the other. The estimates do not depend on it.

    Raises:
        ImportError: If the package is not installed.
        ValueError: For an unknown profile.

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
                f"BM3D takes images of 8 x 8 or more with white noise or a circular blur, but "
                f"{type(operator).__name__} of {shape} is neither: use invflow.TotalVariation() or invflow.Wiener(), "
                "which take any linear operator, or, for a blur, padding='circular' (--operator-set padding=circular)"
            )
        transfer = transfer.expand(len(y), *picture)
        rows = [self._restore(y[b].reshape(picture), float(likelihood.sigma[b]), transfer[b]) for b in range(len(y))]
        return torch.stack(rows).to(y).reshape(-1, *shape), {}

    def _restore(self, y: Tensor, sigma: float, transfer: Tensor) -> Tensor:
        """Restore one image ``(C, H, W)``."""
        bm3d = _package()
        profile = getattr(bm3d, _PROFILES[self.profile])()
        profile.num_threads = torch.get_num_threads()
        channels, deblur = len(y), bool((transfer - 1).abs().max() > 1e-5)
        if channels not in (1, 3) or bool((transfer != transfer[:1]).any()):
            # no colours to mix: each channel separately
            return torch.cat([self._restore(y[c : c + 1], sigma, transfer[c : c + 1]) for c in range(channels)])
        picture = y.double().cpu().permute(1, 2, 0).numpy()
        if not deblur:
            clean = bm3d.bm3d if channels == 1 else bm3d.bm3d_rgb
            out = clean(picture.squeeze(), sigma, profile)
        else:  # the package deblurs single channels only: opponent colours, scaled so that brightness lies in [0, 1]
            colours, scale = opponent_matrix(channels, torch.float64).numpy(), channels**-0.5
            mixed, kernel = scale * picture @ colours.T, _kernel(transfer[0])
            parts = [bm3d.bm3d_deblurring(mixed[..., c : c + 1], scale * sigma, kernel, profile).squeeze()
                     for c in range(channels)]
            out = torch.stack([torch.tensor(part) for part in parts], dim=-1).numpy() @ colours / scale
        return torch.tensor(out, dtype=torch.float64).reshape(*y.shape[1:], channels).permute(2, 0, 1)


class _Numpy:
    """NumPy with the old name of the trapezoidal rule."""

    def __getattr__(self, name: str) -> Any:
        import numpy

        return getattr(numpy, "trapezoid" if name == "trapz" else name)


def _package() -> Any:
    """The package, patched to run with NumPy 2.4 or later."""
    import bm3d
    import bm4d
    import numpy

    if not hasattr(numpy, "trapz"):  # the package calls it for coloured noise; only the package gets it
        bm4d.np = _Numpy()
    return bm3d


def _kernel(transfer: Tensor) -> np.ndarray[Any, Any]:
    """Kernel of a transfer function ``(H, W)``, with odd sides and its origin in the centre."""
    kernel = torch.fft.fftshift(torch.fft.ifft2(transfer).real).double().cpu()
    for axis, side in enumerate(kernel.shape):
        if side % 2 == 0:  # drop the entries farthest from the origin, which no kernel smaller than the image reaches
            kernel = kernel.narrow(axis, 1, side - 1)
    result: np.ndarray[Any, Any] = kernel.numpy()
    return result
