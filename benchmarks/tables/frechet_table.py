"""Distance of a prior's samples from real images: ``python -m benchmarks.tables.frechet_table cifar10 FOLDER``.

The table has the Frechet distance, precision and recall of samples, relative to the images of the test file, in
Inception's features. For reference, it has the distance of as many training images, which no prior can be expected to
beat. Inception's weights do not ship with the library: ``help(invflow.metrics.inception_features)`` explains how to
make the file. ``--classifier cifar10`` uses the features of a shipped classifier instead. The distances are only for
comparing methods with each other: published FID values use another port of the network and 50,000 images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.tables.image_table import along_velocity
from benchmarks.tables.shared import head, line, parser
from invflow.datasets.sets import load_images
from invflow.evaluation.summary import write_json
from invflow.flowmap import FlowMap
from invflow.metrics import classifier_features, frechet_distance, inception_features, precision_recall
from invflow.models.neural import load_prior
from invflow.plugins import kind_of
from invflow.solvers.vfm import VFM

__all__ = ["frechet_rows", "main"]

CHUNK = 256


Features = Callable[[Tensor], Tensor]


def frechet_rows(maker: FlowMap, real: Tensor, training: Tensor, features: Features, *,
                 steps: Sequence[int] = (1, 2, 4), flow: int = 0,
                 seed: int = 0) -> Iterator[tuple[str, dict[str, float]]]:
    """Compare generated images with real ones.

    Args:
        maker: The prior.
        real: ``(n, C, H, W)``, reference images; as many are generated.
        training: ``(m, C, H, W)``, for the row of real images.
        features: Features of images in [0, 1], ``(n, C, H, W)`` to ``(n, k)``.
        steps: Numbers of jumps; each is one row.
        flow: Number of Heun steps along the velocity, for one more row; 0 for no such row.
        seed: Random seed of the noise, the same for each row.

    Yields:
        Name and numbers of each row: ``frechet``, ``precision`` and ``recall``.
    """
    known = _features(real.split(CHUNK), features)
    yield "training images", _row(_features(training.split(CHUNK), features), known)
    makers = [(f"{k} step{'s' * (k > 1)}", maker, k) for k in steps]
    if flow:
        makers.append((f"velocity, {flow} Heun steps", along_velocity(maker, flow), 1))
    for name, each, k in makers:
        g = torch.Generator().manual_seed(seed)
        made = (each.generate(len(part), k, generator=g) for part in real.split(CHUNK))
        yield name, _row(_features(made, features), known)


def _features(parts: Iterable[Tensor], features: Features) -> Tensor:
    return torch.cat([features(part if part.is_floating_point() else part.float() / 255) for part in parts])


def _row(features: Tensor, known: Tensor) -> dict[str, float]:
    precision, recall = precision_recall(features, known)
    return {"frechet": float(frechet_distance(features, known)), "precision": precision, "recall": recall}


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    command = parser("frechet_table", __doc__, seed=0)
    command.add_argument("name", help="name or folder of a prior; for a VFM, its map is used")
    command.add_argument("data", help="folder of the official files, or the name of a data set to download")
    command.add_argument("--weights", help="Inception's weights, a safetensors file or its folder; default: where "
                                           "torch.hub keeps its checkpoints")
    command.add_argument("--classifier", help="name or folder of a classifier whose features replace Inception's")
    command.add_argument("--images", type=int, default=10000,
                         help="number of images of each kind; default: 10000, the whole file")
    command.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4])
    command.add_argument("--flow", type=int, default=0, metavar="STEPS",
                         help="number of Heun steps for one more row, along the velocity")
    command.add_argument("--output", type=Path, help="JSON file to write")
    options = command.parse_args(arguments)
    maker: FlowMap = VFM.load(options.name).prior if kind_of(options.name) == "vfm" else load_prior(options.name)
    real, training = (load_images(options.data, split, dtype=torch.uint8)[: options.images]
                      for split in ("test", "train"))

    def features(images: Tensor) -> Tensor:
        if options.classifier:
            return classifier_features(images, options.classifier)
        return inception_features(images, options.weights)

    table: dict[str, dict[str, float]] = {}
    try:
        rows = frechet_rows(maker, real, training, features, steps=options.steps, flow=options.flow, seed=options.seed)
        for name, row in rows:
            if not table:
                print(head("images", "Frechet distance", "precision", "recall"))
            table[name] = row
            print(line(name, f"{row['frechet']:.2f}", f"{row['precision']:.3f}", f"{row['recall']:.3f}"), flush=True)
    except FileNotFoundError as error:
        command.error(str(error))
    if options.output:
        write_json(table, options.output)


if __name__ == "__main__":
    main()
