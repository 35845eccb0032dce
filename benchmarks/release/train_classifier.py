"""Train a classifier of generated images: ``python -m benchmarks.release.train_classifier NAME``."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from invflow.datasets.sets import load_images
from invflow.nets.classifier import Classifier
from invflow.plugins import SHIPPED, write_text

__all__ = ["CLASSES", "main", "shift_images", "train_classifier"]

CLASSES = {
    "mnist": tuple("0123456789"),
    "fashion-mnist": ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag",
                      "ankle boot"),
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
}
LICENCES = {
    "mnist": "MNIST (Yann LeCun, Corinna Cortes), CC BY-SA 3.0",
    "fashion-mnist": "Fashion-MNIST (Zalando SE), MIT",
    "cifar10": "CIFAR-10 (Alex Krizhevsky 2009; the authors state no licence)",
}


def shift_images(images: Tensor, pixels: int, generator: torch.Generator) -> Tensor:
    """Shift each image at random by a few pixels, padded with zeros: ``(n, C, H, W)`` to the same."""
    n, _, height, width = images.shape
    padded = F.pad(images, (pixels,) * 4)
    down, right = torch.randint(2 * pixels + 1, (2, n, 1), generator=generator)
    rows, columns = down + torch.arange(height), right + torch.arange(width)
    index = torch.arange(n)[:, None, None]
    return padded[index, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def train_classifier(images: Tensor, labels: Tensor, classes: Sequence[str], *, epochs: int = 4,
                     batch_size: int = 128, learning_rate: float = 2e-3, shift: int = 1, mirror: bool = False,
                     seed: int = 0, progress: bool = True) -> Classifier:
    """Train on shifted images with AdamW; the learning rate rises over a tenth of the steps, then falls.

    Args:
        images: ``(n, C, H, W)`` in uint8.
        labels: ``(n,)`` int64.
        classes: Names, in the order of the labels.
        epochs: Number of passes over the images.
        batch_size: Number of images per step.
        learning_rate: Largest learning rate.
        shift: Largest shift of images in pixels.
        mirror: Whether to flip every other image horizontally.
        seed: Random seed of initial weights, order and shifts.
        progress: Whether to show a progress bar.
    """
    generator = torch.Generator().manual_seed(seed)
    model = Classifier(tuple(images.shape[1:]), classes, generator=generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.05)
    per_epoch = len(images) // batch_size
    total = epochs * per_epoch
    bar = tqdm(range(total), disable=not progress, desc="classifier", unit="step", mininterval=2)
    order = torch.empty(0, dtype=torch.long)
    for step in bar:
        if step % per_epoch == 0:
            order = torch.randperm(len(images), generator=generator)
        rise, fall = (step + 1) / (0.1 * total), 0.5 * (1 + math.cos(math.pi * step / total))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(rise, fall)
        rows = order[step % per_epoch * batch_size :][:batch_size]
        batch = shift_images(images[rows].float() / 255, shift, generator)
        if mirror:
            batch = torch.where(torch.rand(len(batch), 1, 1, 1, generator=generator) < 0.5, batch.flip(3), batch)
        loss = F.cross_entropy(model(batch), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval().requires_grad_(False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, store in half precision, evaluate the stored weights, and write the card."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.release.train_classifier", description=__doc__)
    parser.add_argument("name", choices=CLASSES)
    parser.add_argument("data", nargs="?", help="folder of the official files; default: download them")
    parser.add_argument("--output", type=Path, help="output folder; default: the folder of the library's weights")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--shift", type=int, default=1, help="largest shift of images in pixels")
    parser.add_argument("--mirror", action="store_true", help="flip every other image horizontally")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    data, output = options.data or options.name, options.output or SHIPPED / f"{options.name}-classifier"
    images, labels = load_images(data, "train", labels=True, dtype=torch.uint8)
    start = time.perf_counter()
    model = train_classifier(images, labels, CLASSES[options.name], epochs=options.epochs,
                             shift=options.shift, mirror=options.mirror, seed=options.seed)
    seconds = time.perf_counter() - start
    model.save_pretrained(output, torch.float16)
    settings = f"--epochs {options.epochs} --shift {options.shift} --seed {options.seed}"
    settings += " --mirror" * options.mirror
    card = describe(options.name, output, data, seconds, settings)
    write_text(output / "README.md", card)
    print(card)


def describe(name: str, folder: Path, data: str, seconds: float, settings: str) -> str:
    """The card of a stored classifier, with its accuracy and confident share on the official test file."""
    model = Classifier.load(folder)
    images, labels = load_images(data, "test", labels=True)
    probabilities = model.probabilities(images)
    largest, guess = probabilities.max(1)
    right = guess == labels
    sure = largest > 0.9
    return f"""# Classifier for {name}

{sum(p.numel() for p in model.parameters()):,} parameters, stored in half precision. It evaluates generated
images: see `invflow.nets.classifier.confident_share`.

| on the {len(images):,} images of the official test file | |
|---|---|
| accuracy | {100 * float(right.double().mean()):.2f}% |
| share recognised with over 0.9 confidence | {100 * float(sure.double().mean()):.2f}% |
| accuracy among those | {100 * float(right[sure].double().mean()):.2f}% |

Trained on the official training file alone, in {seconds:.0f} s on one CPU core, with

    python -m benchmarks.release.train_classifier {name} FOLDER {settings}

Training data: {LICENCES[name]}.
"""


if __name__ == "__main__":
    main()
