"""LPIPS, where the weights of its network are present."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from invflow.metrics.quality import _pair

__all__ = ["lpips"]

_FILES = {"alex": "alexnet-owt-7be5be79.pth", "vgg": "vgg16-397923af.pth", "squeeze": "squeezenet1_1-b8a52dc0.pth"}
_LEAST_SIDE = 64  # AlexNet's strides leave nothing of smaller images


@torch.no_grad()
def lpips(x: Tensor, truth: Tensor, net: str = "alex", chunk_size: int = 64) -> Tensor:
    """Learned perceptual image patch similarity (Zhang, Isola, Efros, Shechtman, Wang 2018), as torchmetrics has it.

    Grey images are taken as colour, and images with a side under 64 pixels enlarged to it (bilinear). The
    network's weights must be present in the cache of ``torch.hub``: nothing is downloaded.

    Args:
        x: images ``(n, 1 or 3, H, W)``, or several for each truth, ``(n, N, 1 or 3, H, W)``; clipped to [0, 1].
        truth: ``(n, 1 or 3, H, W)``.
        net: ``"alex"``, ``"vgg"`` or ``"squeeze"``.
        chunk_size: images at a time.

    Returns:
        ``(n,)`` or ``(n, N)``; 0 for equal images, smaller is nearer.

    Raises:
        FileNotFoundError: if the weights are not there, naming the file.
        ImportError: without torchmetrics.
        ValueError: if the shapes do not fit or the network is unknown.
    """
    x, truth, lead = _pair(x, truth, "lpips")
    if net not in _FILES:
        raise ValueError(f"net={net!r} must be one of {', '.join(map(repr, _FILES))}")
    if truth.ndim != lead + 3 or truth.shape[-3] not in (1, 3):
        raise ValueError(f"lpips takes images (n, 1 or 3, H, W), not {tuple(truth.shape)}")
    model = _network(net, str(Path(torch.hub.get_dir()) / "checkpoints" / _FILES[net]))
    a, b = torch.broadcast_tensors(x, truth)
    pairs = zip(a.reshape(-1, *a.shape[-3:]).split(chunk_size), b.reshape(-1, *b.shape[-3:]).split(chunk_size))
    found = torch.cat([model(_ready(u), _ready(v), normalize=True).flatten() for u, v in pairs])
    return found.reshape(a.shape[:-3]).to(x)


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
        raise FileNotFoundError(f"no weights for LPIPS at {path!r}: put torchvision's {Path(path).name} there; they "
                                "are not downloaded by themselves")
    try:
        from torchmetrics.functional.image.lpips import _LPIPS
    except ImportError as error:
        raise ImportError("lpips needs torchmetrics: pip install torchmetrics") from error
    return _LPIPS(pretrained=True, net=net, eval_mode=True).eval().requires_grad_(False)
