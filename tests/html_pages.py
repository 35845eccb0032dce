"""A comparison with random numbers and a reader of pages, for the tests of the report."""

from __future__ import annotations

import base64
import io
import math
from html.parser import HTMLParser

import torch
from PIL import Image
from torch import Tensor

from invflow.evaluation.comparison import Comparison
from invflow.evaluation.results.parts import Part, Task

EVIL = '<img src=x onerror="alert(1)">&amp;\u2028'
PROBLEM, PLANE = "</script><b>images", "plane"
SOLVERS = ["plain", EVIL, "third", "fails"]
VOID = {"img", "input", "meta", "br"}


class Page(HTMLParser):
    """Elements as (tag, attributes, text), and whether tags are balanced."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.open: list[int] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({key for key, _ in attrs}) == len(attrs)
        self.elements.append((tag, dict(attrs), []))
        if tag not in VOID:
            self.open.append(len(self.elements) - 1)

    def handle_endtag(self, tag: str) -> None:
        assert self.elements[self.open.pop()][0] == tag

    def handle_data(self, data: str) -> None:
        for i in self.open:
            self.elements[i][2].append(data.replace("\u00a0", " "))  # that keeps an error with its sign

    def find(self, tag: str, **attributes: str) -> list[tuple[dict[str, str | None], str]]:
        return [(own, "".join(text)) for name, own, text in self.elements
                if name == tag and all(own.get(k.rstrip("_").replace("_", "-")) == v for k, v in attributes.items())]


def comparison(observations: int = 6, shown: int = 5, samples: int = 9, image: tuple[int, ...] = (1, 12, 8),
               seed: int = 0) -> Comparison:
    """Made of random numbers: nothing is solved."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=g)

    values: dict = {PROBLEM: {}, PLANE: {}}
    costs: dict = {PROBLEM: {}, PLANE: {}}
    parts = {}
    for problem, shape, metrics in ((PROBLEM, image, ("crps", "psnr", "coverage", "spread")), (PLANE, (2,), ("crps",))):
        level, truth, measured = draw(observations), draw(shown, *shape), draw(shown, *shape)
        for i, solver in enumerate(SOLVERS[:3]):
            values[problem][solver] = {m: (level + 0.3 * i + 0.1 * draw(observations)).tolist() for m in metrics}
            costs[problem][solver] = {"forward": float(10**i - 1), "backward": 0.0, "seconds": 0.5 + i,
                                      "memory": 3e6 if i else None}
            tensors = {"truth": truth, "observation": measured, "samples": draw(shown, samples, *shape),
                       "mean": draw(shown, *shape), "std": draw(shown, *shape), "covered": draw(shown, *shape) > 0.2}
            if problem == PROBLEM:
                tensors["observed"] = measured > 0.5
            parts[Task(problem, solver, 0, observations)] = Part(tensors=tensors)
    values[PROBLEM]["third"]["extra"] = [1.0, math.nan, *[2.0] * (observations - 2)]
    sets: dict = {p: {solver: {} for solver in SOLVERS[:3]} for p in values}
    sets[PROBLEM]["plain"] = {"frechet": (12.5, 0.7)}
    return Comparison(values, sets, costs, {p: {"fails": f"no {EVIL}"} for p in values},
                      {"num_observations": observations, "num_samples": 64, "seed": 3, "split": "test",
                       "source": "data"}, {s: {"solver": s, "steps": 3} for s in SOLVERS},
                      {p: [7] * observations for p in values}, {"invflow": "1", "torch": "2"}, None, parts)


def cells(page: Page, found: Comparison) -> dict[tuple[str, str, str], tuple[dict[str, str | None], str]]:
    """The cells of the tables by problem, solver and metric."""
    cells, place = {}, ["", ""]
    solvers = list(found.solvers)
    for tag, own, text in page.elements:
        if tag == "table":
            place[0] = own.get("data-problem") or ""
        elif "data-solver" in own and tag == "th":
            place[1] = solvers[int(own["data-solver"] or 0)]
        elif tag == "td" and place[0] and "data-metric" in own:
            cells[place[0], place[1], str(own["data-metric"])] = own, "".join(text)
    return cells


def pixels(uri: str) -> Tensor:
    """``(H, W)`` grey levels or ``(H, W, 3)`` colours of an embedded picture."""
    assert uri.startswith("data:image/png;base64,")
    image = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    image = image if image.mode == "L" else image.convert("RGB")
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.view(image.height, image.width, -1).squeeze(-1)
