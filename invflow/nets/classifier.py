"""A small convolutional classifier, for an independent check of generated images."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from invflow._core.folders import SHIPPED, load_built, read_config, resolve_folder, save_module
from invflow.nets.mlp import init_linear

__all__ = ["Classifier", "confident_share"]

KIND = "classifier"


class Classifier(nn.Module):
    """Two convolutions of stride 2 and two linear layers, on small images in [0, 1].

    Args:
        image_shape: (C, H, W), H and W at least 12.
        classes: Names of the classes, in the order of the labels.
        width: Number of channels after the first convolution; twice as many after the second.
        generator: Source of the initial weights.

    Raises:
        ValueError: For images that are too small, or fewer than two classes.
    """

    def __init__(self, image_shape: Sequence[int], classes: Sequence[str], *, width: int = 32,
                 generator: torch.Generator | None = None) -> None:
        super().__init__()
        if len(image_shape) != 3 or min(image_shape[1:]) < 12 or len(classes) < 2:
            raise ValueError(
                f"a classifier needs images (C, H, W) of at least 12 x 12 pixels and two classes, not "
                f"{image_shape} and {len(classes)}"
            )
        self.image_shape, self.classes, self.width = tuple(image_shape), tuple(classes), width
        sides = [((side + 1) // 2 + 1) // 2 // 2 for side in image_shape[1:]]
        with torch.random.fork_rng(devices=[]):  # layers draw initial weights from the global generator
            self.layers = nn.Sequential(
                nn.Conv2d(image_shape[0], width, 5, stride=2, padding=2), nn.ReLU(),
                nn.Conv2d(width, 2 * width, 5, stride=2, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
                nn.Linear(2 * width * sides[0] * sides[1], 4 * width), nn.ReLU(),
                nn.Linear(4 * width, len(classes)),
            )
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                init_linear(layer, 2**0.5, generator)

    def forward(self, x: Tensor) -> Tensor:
        """Logits: images ``(n, *image_shape)`` in [0, 1] to ``(n, number of classes)``."""
        if tuple(x.shape[1:]) != self.image_shape:
            raise ValueError(f"images have shape {tuple(x.shape)}, but this classifier takes (n, *{self.image_shape})")
        result: Tensor = self.layers(2 * x - 1)
        return result

    @torch.no_grad()
    def probabilities(self, x: Tensor, chunk_size: int = 1024) -> Tensor:
        """Probabilities: images ``(n, *image_shape)``, clipped to [0, 1], to ``(n, number of classes)``."""
        parts = x.clamp(0, 1).split(chunk_size)
        return torch.cat([self(part.to(self.layers[0].weight)).softmax(1) for part in parts])

    def save_pretrained(self, folder: str | os.PathLike[str], dtype: torch.dtype | None = None,
                        **notes: Any) -> None:
        """Write weights and configuration into a folder; ``notes`` become entries of ``config.json``."""
        config = {"kind": KIND, "image_shape": list(self.image_shape), "classes": list(self.classes),
                  "width": self.width, **notes}
        save_module(self, folder, config, dtype)

    @classmethod
    def load(cls, name: str | os.PathLike[str]) -> Classifier:
        """Load a trained classifier.

        Args:
            name: Name of a shipped classifier, ``"mnist"``, ``"fashion-mnist"`` or ``"cifar10"``; a folder written by
                :meth:`save_pretrained`; or a Hub repository id ``owner/name``.

        Raises:
            ValueError: If it is missing or not a classifier, or its files are damaged.
        """
        shipped = SHIPPED / f"{name}-classifier"
        folder = shipped if shipped.is_dir() else resolve_folder(name, "classifier")
        config = read_config(Path(folder), KIND)
        model = load_built(lambda: cls(config["image_shape"], config["classes"], width=int(config["width"])),
                           Path(folder), config, "classifier")
        return model.eval().requires_grad_(False)


@functools.cache
def _load_once(name: str) -> Classifier:
    return Classifier.load(name)


def confident_share(images: Tensor, name: str = "mnist", threshold: float = 0.9) -> float:
    """Share of images that a shipped classifier assigns with confidence: largest probability over a threshold.

    Compare it with the share for real test images, given in the classifier's card. It detects images that
    show no object, but not a lack of variety.

    Args:
        images: ``(n, *image_shape)``, nominally in [0, 1]; clipped.
        name: Name or folder, as in :meth:`Classifier.load`.
        threshold: Threshold in (0, 1).

    Returns:
        A number in [0, 1].

    Raises:
        ValueError: If the images have the wrong shape, or there are none.
    """
    if images.ndim < 1 or len(images) == 0 or not 0 < threshold < 1:
        shape = tuple(images.shape)
        raise ValueError(f"pass at least one image and a threshold in (0, 1), not {shape} and {threshold}")
    classifier = _load_once(str(name))
    largest = classifier.probabilities(images.to("cpu", torch.float32)).amax(1)
    return float((largest > threshold).double().mean())
