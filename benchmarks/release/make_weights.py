"""Make shipped weights and their card from a training run: ``python -m benchmarks.release.make_weights NAME RUN``.

RUN is the folder that ``invflow train NAME --output RUN`` writes. The weights are stored in half precision. With
``--evaluation``, the card also has the numbers of ``python -m benchmarks.tables.image_table``.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from invflow.models.neural import NeuralFlowMap
from invflow.plugins import SHIPPED, write_text
from invflow.solvers.vfm import VFM
from invflow.training.recipe import load_recipe

__all__ = ["card", "main"]

_UNUSED = "; the test file was not used in training"
LICENCES = {
    "mnist": f"MNIST, training file, 60,000 images (Yann LeCun, Corinna Cortes; CC BY-SA 3.0){_UNUSED}",
    "mnist-14": "MNIST, training file, 60,000 images averaged over 2 x 2 pixels (Yann LeCun, Corinna Cortes; "
                f"CC BY-SA 3.0){_UNUSED}",
    "photos": "28 photographs from Debian's collections of wallpapers, listed in "
              "problems/invflow_problems/photo_split.py: Plasma's (LGPL-3 and GPL-2+), MATE's (GPL-2+) and Lomiri's "
              "(CC BY, CC BY-SA, CC0). Whole photographs are held out, and none is from scikit-image",
    "fashion-mnist": f"Fashion-MNIST, training file, 60,000 images (Zalando SE; MIT){_UNUSED}",
    "cifar10": "CIFAR-10, training files, 50,000 images (Alex Krizhevsky 2009, collected with Vinod Nair and Geoffrey "
               f"Hinton from the 80 Million Tiny Images; the authors state no licence){_UNUSED}",
}


def read_settings(run: Path) -> dict[str, Any]:
    """Training settings of a finished run."""
    with safe_open(run / "checkpoint.safetensors", framework="pt") as file:
        result: dict[str, Any] = json.loads(file.metadata()["settings"])
        return result


def precision(run: Path) -> str:
    """Description of a run's precision."""
    return {"bf16": "in bfloat16 autocast", "fp16": "in float16 autocast"}.get(
        str(read_settings(run)["precision"]), "in single precision")


def commands(stages: list[tuple[str, Path]]) -> list[str]:
    """The command of each stage, with changes to the recipe's settings; RUN2 starts from RUN1, and so on."""
    lines, kind = [], "prior" if (stages[-1][1] / "prior").is_dir() else "vfm"
    for k, (name, run) in enumerate(stages):
        own = asdict(load_recipe(name).settings)
        changed = [f"--set {key}={value}" for key, value in read_settings(run).items()
                   if key in own and json.loads(json.dumps(own[key])) != value]
        parts = [f"invflow train {name} --data FOLDER", *([f"--prior RUN{k}/{kind}"] if k else []), *changed,
                 f"--output RUN{k + 1}"]
        lines.append("    " + " ".join(parts))
    return lines


def card(name: str, stages: list[tuple[str, Path]], evaluation: dict[str, Any] | None, notes: str = "") -> str:
    """The card of the weights: data, commands, settings, last training metrics, results on test images.

    Args:
        name: Name of the weights.
        stages: Recipe and folder of each run, in order; each run after the first started from the previous one.
        evaluation: Results of ``image_table``; None for a card without them.
        notes: Notes from an inspection of the images, placed at the end.
    """
    data = name.removesuffix("-vfm")
    description = load_recipe(name).description
    lines = [f"# {name}", "", f"{description[0].upper()}{description[1:]}. The weights are stored in half precision.",
             "", f"Data: {LICENCES[data]}.", "",
             f"Trained on one CPU core, {precision(stages[-1][1])}, with", "", *commands(stages),
             f"    python -m benchmarks.release.make_weights {name} RUN{len(stages)}"
             + "".join(f" --after {recipe}=RUN{k + 1}" for k, (recipe, _) in enumerate(stages[:-1]))
             + (f" --recipe {stages[-1][0]}" if stages[-1][0] != name else "")]
    for k, (_, run) in enumerate(stages):
        rows = list(csv.DictReader((run / "metrics.csv").open()))[-20:]
        last = {key: sum(float(row[key]) for row in rows) / len(rows) for key in rows[0]}
        # a column without rows in this stage is NaN: flow matching has no MeanFlow loss
        shown = {key: v for key, v in last.items()
                 if math.isfinite(v) and not key.startswith(("step", "loss", "learning", "grad"))}
        lines += ["", f"RUN{k + 1}: " + ", ".join(f"{key} {v}" for key, v in read_settings(run).items())
                  + ". Averages over the last twenty logged steps: "
                  + ", ".join(f"{key} {v:.3g}" for key, v in shown.items()) + "."]
    told = _evaluation(evaluation, vfm=name.endswith("-vfm")) if evaluation else []
    if evaluation and told:
        count, samples = evaluation.get("observations", 100), evaluation.get("samples", 64)
        changed = f" --samples {samples}" if samples != 64 else ""
        lines += ["", f"Results of `python -m benchmarks.tables.image_table {data} --steps 1{changed}` ({count} test "
                  f"images, {samples} samples, seed 0):", "", *told]
    if notes:
        lines += ["", notes.strip()]
    return "\n".join(lines) + "\n"


def _evaluation(results: dict[str, Any], vfm: bool) -> list[str]:
    label = "map of the VFM" if vfm else "prior"
    found = {key.split(", ")[1]: value for key, value in results.items() if key.startswith(label)}
    shares = [f"{steps} step{'s' * (steps != '1')} {value:.3f}" for steps, value in found.items()]
    lines = []
    if shares:
        lines = ["Share of 1,000 unconditional samples that the shipped classifier recognises with over 0.9 "
                 "confidence: "
                 + ", ".join(shares) + "; its card gives the share for real test images."]
    if vfm:
        tables = {task: table for task, table in results.items() if isinstance(table, dict)}
        columns = [("VFM, 1 step", key, digits, heading) for key, digits, heading in (
            ("psnr", 2, "PSNR of the mean"), ("crps", 4, "CRPS"), ("coverage", 3, "90% coverage"),
            ("residual", 2, "residual"))]
        if all("stationary linear" in table for table in tables.values()):  # the estimate that the adapter starts from
            columns.insert(0, ("stationary linear", "psnr", 2, "PSNR of the linear estimate"))
        lines += [*([""] if lines else []), "| problem | " + " | ".join(heading for *_, heading in columns) + " |",
                  "|---" * (len(columns) + 1) + "|"]
        for task, table in tables.items():
            lines.append(f"| {task} | " + " | ".join(f"{table[row][key][0]:.{d}f} ± {table[row][key][1]:.{d}f}"
                                                     for row, key, d, _ in columns) + " |")
    return lines


def main() -> None:
    """Store the weights and write their card."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", help="name of the weights, such as mnist or mnist-vfm")
    parser.add_argument("run", type=Path, help="folder written by invflow train")
    parser.add_argument("--recipe", help="recipe of RUN, if its name differs from that of the weights")
    parser.add_argument("--after", action="append", default=[], metavar="RECIPE=RUN",
                        help="an earlier run that RUN continues; repeat the option for several, in order")
    parser.add_argument("--evaluation", type=Path, help="JSON file written by image_table")
    parser.add_argument("--notes", type=Path, help="file with notes on the images, placed at the end")
    parser.add_argument("--output", type=Path, help="output folder; default: the folder of the library's weights")
    arguments = parser.parse_args()
    folder = arguments.output or SHIPPED / arguments.name
    if arguments.name.endswith("-vfm"):
        VFM.load(arguments.run / "vfm").save_pretrained(folder, torch.float16)
    else:
        NeuralFlowMap.from_pretrained(arguments.run / "prior").save_pretrained(folder, torch.float16)
    evaluation = json.loads(arguments.evaluation.read_text()) if arguments.evaluation else None
    before = [(recipe, Path(run)) for recipe, _, run in (text.partition("=") for text in arguments.after)]
    text = card(arguments.name, [*before, (arguments.recipe or arguments.name, arguments.run)], evaluation,
                arguments.notes.read_text(encoding="utf-8") if arguments.notes else "")
    write_text(folder / "README.md", text)
    print(f"wrote {folder}")


if __name__ == "__main__":
    main()
