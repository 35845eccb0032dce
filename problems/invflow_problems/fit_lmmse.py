"""Fit the linear estimate that learned priors have to beat; a command, see ``--help``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from invflow.datasets import load_images
from invflow.pretrained import SHIPPED, write_atomically
from invflow.solvers.lmmse import LinearMMSE

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: fit on the training file, store in half precision, write the card."""
    parser = argparse.ArgumentParser(prog="python -m invflow_problems.fit_lmmse", description=__doc__)
    parser.add_argument("name", choices=("mnist", "fashion-mnist"))
    parser.add_argument("data", nargs="?", help="folder of the official files; default: download them")
    parser.add_argument("--output", type=Path, help="folder; default: where the library looks for it")
    options = parser.parse_args(arguments)
    images = load_images(options.data or options.name, "train", dtype=torch.uint8)
    output = options.output or SHIPPED / f"{options.name}-lmmse"
    solver = LinearMMSE.fit(images)
    solver.save_pretrained(output, torch.float16, images=len(images))
    stored = LinearMMSE.load(output)
    change = (stored.covariance - solver.covariance).norm() / solver.covariance.norm()
    card = f"""# Linear estimate for {options.name}

Mean and covariance of the {len(images):,} images of the official training file, for
`invflow.LinearMMSE.load`. Stored is a triangular factor of the covariance in half precision, which changes
the covariance by {float(change):.1e} of its norm. Made by

    python -m invflow_problems.fit_lmmse {options.name} FOLDER
"""
    write_atomically(output / "README.md", lambda path: Path(path).write_text(card, encoding="utf-8"))
    print(card)


if __name__ == "__main__":
    main()
