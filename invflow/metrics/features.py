"""Distances between sets of images in the features of a network: Frechet distance, precision and recall."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from invflow._core.weighted import variance_weights
from invflow.metrics.quality import exact_distances

__all__ = ["PrecisionRecall", "classifier_features", "frechet_distance", "inception_features", "precision_recall"]

_INCEPTION = "inception_v3_google-0cc3c7bd"


@torch.no_grad()
def classifier_features(images: Tensor, name: str = "mnist", chunk_size: int = 1024) -> Tensor:
    """Features of a shipped classifier: the input of its last layer.

    The classifier was trained on its own kind of images only, and may map others close to them. For example, precision
    in its features can be high for pure noise, although recall is 0 and the Frechet distance large. Read all three
    together.

    Args:
        images: ``(n, *image_shape)``, nominally in [0, 1]; clipped.
        name: ``"mnist"``, ``"fashion-mnist"``, ``"cifar10"``, or a folder that ``Classifier.save_pretrained`` wrote.
        chunk_size: Number of images at a time.

    Returns:
        ``(n, 128)`` for the shipped ones, float32, on the CPU.

    Raises:
        ValueError: If the images do not fit, or there is no such classifier.
    """
    model = _classifier(str(name))
    if tuple(images.shape[1:]) != model.image_shape:
        raise ValueError(f"images have shape {tuple(images.shape)}, but the classifier {name!r} takes (n, "
                         f"*image_shape), image_shape {model.image_shape}: for samples (B, N, ...) pass "
                         "samples.flatten(0, 1)")
    parts = images.to("cpu", torch.float32).clamp(0, 1).split(chunk_size)
    layers: Any = model.layers
    return torch.cat([layers[:-1](2 * part - 1) for part in parts])


@torch.no_grad()
def inception_features(images: Tensor, weights: str | os.PathLike[str] | None = None,
                       chunk_size: int = 32) -> Tensor:
    """Pooled features of torchvision's Inception v3, if its weights are present; nothing is downloaded.

    Distances in these features compare methods with each other. Published FID values use another port of the
    network, and are not comparable. The weights are only read as safetensors; torchvision's are a pickle, which may run
    code when it is read. To convert them once::

        from safetensors.torch import save_file
        from torchvision.models import inception_v3
        model = inception_v3(weights="IMAGENET1K_V1")
        save_file(model.state_dict(), "inception_v3_google-0cc3c7bd.safetensors")

    Args:
        images: ``(n, 1 or 3, H, W)``, nominally in [0, 1]; clipped, and scaled to 299 x 299.
        weights: A safetensors file, or a folder that contains ``inception_v3_google-0cc3c7bd.safetensors``; None for
            the checkpoint folder of ``torch.hub``.
        chunk_size: Number of images at a time.

    Returns:
        ``(n, 2048)``, on the CPU.

    Raises:
        FileNotFoundError: If the weights are missing; the message names the file.
        ValueError: If the images have another shape, or if the file is not safetensors or is of another network.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"inception_features takes images (n, 1 or 3, H, W), not {tuple(images.shape)}")
    path = Path(torch.hub.get_dir()) / "checkpoints" if weights is None else Path(weights)
    if weights is None or path.is_dir():
        path = path / f"{_INCEPTION}.safetensors"
    if not path.is_file():
        raise FileNotFoundError(
            f"no Inception weights at {str(path)!r}: help(inception_features) shows how to make the file of "
            "torchvision's weights; or use classifier_features, which are shipped"
        )
    model = _inception(str(path))
    mean, std = (images.new_tensor(v, device="cpu", dtype=torch.float32)[:, None, None]
                 for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    found = []
    for part in images.split(chunk_size):
        part = part.to("cpu", torch.float32).clamp(0, 1).expand(-1, 3, -1, -1)
        part = F.interpolate(part, (299, 299), mode="bilinear", align_corners=False, antialias=True)
        found.append(model((part - mean) / std))
    return torch.cat(found)


def frechet_distance(x: Tensor, y: Tensor, log_weights: Tensor | None = None,
                     y_log_weights: Tensor | None = None) -> Tensor:
    r"""Squared Frechet distance of the Gaussians with the moments of two sets of features (Heusel et al. 2017).

    :math:`\|\mu_x - \mu_y\|^2 + \mathrm{tr}(S_x + S_y - 2 (S_x S_y)^{1/2})`, with unbiased covariances. With few
    samples it is biased upwards, so compare only values of the same n and m, both well above d.

    Args:
        x: ``(n, d)``, n >= 2.
        y: ``(m, d)``, m >= 2.
        log_weights: Log weights of x, ``(n,)`` or None.
        y_log_weights: Log weights of y, ``(m,)`` or None.

    Returns:
        A number, float64, at least 0.

    Raises:
        ValueError: If the shapes do not fit.
    """
    _check_features(x, y, "frechet_distance", 2)
    (mean_x, factor_x), (mean_y, factor_y) = (_moments(z, w) for z, w in ((x, log_weights), (y, y_log_weights)))
    # tr (S_x S_y)^{1/2} is the sum of singular values of F_x F_y^T, S = F^T F; avoids a near-singular matrix root
    cross = torch.linalg.svdvals(factor_x @ factor_y.mT).sum()
    distance = (mean_x - mean_y).square().sum() + factor_x.square().sum() + factor_y.square().sum() - 2 * cross
    result: Tensor = distance.clamp(min=0)
    return result


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1]; see :func:`precision_recall`."""

    precision: float
    recall: float


def precision_recall(x: Tensor, truth: Tensor, k: int = 3, *, log_weights: Tensor | None = None,
                     chunk_size: int = 4096) -> PrecisionRecall:
    """Improved precision and recall (Kynkaanniemi, Karras, Laine, Lehtinen, Aila 2019).

    A set's manifold is the union of balls around its points, each with the distance to its k-th nearest
    neighbour in the set as radius. Precision is the share of x inside the manifold of the truths, recall the share of
    truths inside that of x. Compare only values of the same n and m.

    Args:
        x: Features of generated images, ``(n, d)``, n > k.
        truth: Features of real images, ``(m, d)``, m > k.
        k: Index of the neighbour.
        log_weights: Log weights of x, ``(n,)`` or None. They weight precision. Only points with a weight of at least
            1 / 2n, expected at least half a time among n resampled ones, belong to the manifold.
        chunk_size: Number of rows of distances at a time.

    Returns:
        ``precision``: share of x that looks real; ``recall``: share of the real images that x covers.

    Raises:
        ValueError: If the shapes do not fit or a set has too few points.
    """
    _check_features(x, truth, "precision_recall", k + 1)
    x, truth = x.double(), truth.double()
    weights = torch.full_like(x[:, 0], 1 / len(x)) if log_weights is None else log_weights.double().softmax(0)
    support = x[weights >= 0.5 / len(x)]
    if len(support) <= k:
        raise ValueError(f"only {len(support)} of x have a weight of at least 1 / 2n: precision_recall takes more "
                         f"than k={k}")
    precise = _inside(x, truth, k, chunk_size)
    recalled = _inside(truth, support, k, chunk_size)
    return PrecisionRecall(float((weights * precise).sum()), float(recalled.double().mean()))


def _inside(points: Tensor, manifold: Tensor, k: int, chunk_size: int) -> Tensor:
    """Whether points ``(n, d)`` lie in the manifold of others ``(m, d)``."""
    radii = torch.cat([exact_distances(part[None], manifold[None])[0].kthvalue(k + 1, 1).values
                       for part in manifold.split(chunk_size)])  # the nearest is the point itself
    return torch.cat([(exact_distances(part[None], manifold[None])[0] <= radii).any(1)
                      for part in points.split(chunk_size)])


def _moments(x: Tensor, log_weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean ``(d,)`` and a factor F ``(r, d)`` with F^T F the unbiased covariance."""
    x = x.double()
    if log_weights is not None and tuple(log_weights.shape) != (len(x),):
        raise ValueError(f"log weights {tuple(log_weights.shape)} do not fit features {tuple(x.shape)}: pass one for "
                         "each row")
    weights = torch.full_like(x[:, 0], 1 / len(x)) if log_weights is None else log_weights.double().softmax(0)
    mean = weights @ x
    factor = variance_weights(weights[None])[0][0].sqrt()[:, None] * (x - mean)
    if len(factor) > x.shape[1]:
        factor = torch.linalg.qr(factor, mode="r").R
    return mean, factor


def _check_features(x: Tensor, y: Tensor, name: str, least: int) -> None:
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < least:
        raise ValueError(f"{name} takes features (n, d) and (m, d) of at least {least} images each, not "
                         f"{tuple(x.shape)} and {tuple(y.shape)}: pass classifier_features(images)")


@functools.lru_cache(maxsize=4)
def _classifier(name: str) -> nn.Module:
    from invflow.nets.classifier import Classifier

    return Classifier.load(name)


@functools.lru_cache(maxsize=1)
def _inception(path: str) -> nn.Module:
    from torchvision.models import inception_v3

    model = inception_v3(weights=None, init_weights=False, aux_logits=True, transform_input=False)
    try:
        model.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{path!r} does not hold torchvision's Inception v3 as safetensors (pickles are not read): "
                         f"help(inception_features) shows how to make one. {str(error)[:200]}") from error
    model.fc = nn.Identity()
    result: nn.Module = model.eval().requires_grad_(False)
    return result
