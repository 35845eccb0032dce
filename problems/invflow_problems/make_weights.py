"""Turn a finished training into shipped weights with their card: ``python -m invflow_problems.make_weights NAME RUN``.

``invflow train NAME --output RUN`` comes first. The weights are stored in half precision. With ``--evaluation`` the
card also holds the numbers of ``python -m invflow_problems.image_table``.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from invflow.neural import NeuralFlowMap
from invflow.pretrained import SHIPPED, write_atomically
from invflow.solvers.vfm import VFM
from invflow.training.recipe import load_recipe

__all__ = ["card", "main"]

LICENCES = {
    "mnist": "MNIST, training file, 60,000 images (Yann LeCun, Corinna Cortes; CC BY-SA 3.0)",
    "fashion-mnist": "Fashion-MNIST, training file, 60,000 images (Zalando SE; MIT)",
}


def card(name: str, run: Path, evaluation: dict[str, Any] | None) -> str:
    """The text that stands beside the weights: data, settings, seed, last training numbers, metrics on test images."""
    data = name.removesuffix("-vfm")
    with safe_open(run / "checkpoint.safetensors", framework="pt") as file:
        settings = json.loads(file.metadata()["settings"])
    rows = list(csv.DictReader((run / "metrics.csv").open()))[-20:]
    last = {key: sum(float(row[key]) for row in rows) / len(rows) for key in rows[0]}
    shown = {k: v for k, v in last.items() if not k.startswith(("step", "loss", "learning", "grad"))}
    lines = [f"# {name}", "", f"{load_recipe(name).description}. Weights stored in half precision.", "",
             f"Data: {LICENCES[data]}; the test file was not touched.", "",
             "Made on one CPU core, in bfloat16 autocast, by", "",
             f"    invflow train {name} --data FOLDER --output RUN",
             f"    python -m invflow_problems.make_weights {name} RUN", "",
             "Settings: " + ", ".join(f"{k} {v}" for k, v in settings.items()) + ". Averages over the last twenty "
             "logged steps: " + ", ".join(f"{k} {v:.3g}" for k, v in shown.items()) + "."]
    if evaluation:
        lines += ["", f"Measured by `python -m invflow_problems.image_table {data} --steps 1` (100 test images, "
                  "64 samples, seed 0):", ""]
        lines += _evaluation(evaluation, vfm=name.endswith("-vfm"))
    return "\n".join(lines) + "\n"


def _evaluation(results: dict[str, Any], vfm: bool) -> list[str]:
    label = "map of the VFM" if vfm else "prior"
    shares = [f"{key.split(', ')[1]} step(s) {value:.3f}" for key, value in results.items() if key.startswith(label)]
    lines = ["Share of 1,000 unconditional samples that the shipped classifier recognises with over 0.9 confidence: "
             + ", ".join(shares) + "; its card gives the share of real test images."]
    if vfm:
        lines += ["", "| problem | PSNR of the mean | CRPS | 90% coverage | residual |", "|---|---|---|---|---|"]
        for task, table in results.items():
            if isinstance(table, dict):
                row = table["VFM, 1 step"]
                lines.append(f"| {task} | " + " | ".join(
                    f"{row[k][0]:.{d}f} ± {row[k][1]:.{d}f}"
                    for k, d in (("psnr", 2), ("crps", 4), ("coverage", 3), ("residual", 2))) + " |")
    return lines


def main() -> None:
    """Store weights and card."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", help="such as mnist or mnist-vfm")
    parser.add_argument("run", type=Path, help="the folder that invflow train wrote")
    parser.add_argument("--evaluation", type=Path, help="JSON that image_table wrote")
    parser.add_argument("--output", type=Path, help="folder to write; default the library's own")
    arguments = parser.parse_args()
    folder = arguments.output or SHIPPED / arguments.name
    if arguments.name.endswith("-vfm"):
        VFM.load(arguments.run / "vfm").save_pretrained(folder, torch.float16)
    else:
        NeuralFlowMap.from_pretrained(arguments.run / "prior").save_pretrained(folder, torch.float16)
    evaluation = json.loads(arguments.evaluation.read_text()) if arguments.evaluation else None
    text = card(arguments.name, arguments.run, evaluation)
    write_atomically(folder / "README.md", lambda p: Path(p).write_text(text, encoding="utf-8"))
    print(f"wrote {folder}")


if __name__ == "__main__":
    main()
