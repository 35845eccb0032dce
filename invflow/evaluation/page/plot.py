"""Quality against calls as drawings inside a page: sharp in print, and in the page's own colours."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from invflow.evaluation.page.elements import Markup, element
from invflow.evaluation.results.figure import plotted_metrics, points_of
from invflow.evaluation.results.text import with_error
from invflow.evaluation.summary import METRICS

if TYPE_CHECKING:
    from invflow.evaluation.results.results import Results

__all__ = ["pareto_drawings"]

_WIDTH, _HEIGHT = 360.0, 270.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 50.0, 350.0, 14.0, 226.0
#: width of a letter of a label, with some to spare, and height of its line
_LETTER, _LINE = 6.2, 10.0


def pareto_drawings(comparison: Results, problem: str) -> list[Markup]:
    """A drawing for each metric of :func:`plotted_metrics`."""
    return [_drawing(comparison, problem, metric) for metric in plotted_metrics(comparison, problem)]


class _Axis:
    """Numbers to places: linear, or logarithmic."""

    def __init__(self, low: float, high: float, start: float, end: float, log: bool) -> None:
        self.low, self.high, self.start, self.end, self.log = low, high, start, end, log

    def __call__(self, value: float) -> float:
        low, high, x = self.low, self.high, value
        if self.log:
            low, high, x = math.log(low), math.log(high), math.log(max(value, self.low))
        return self.start + (x - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        if not self.log:
            step = 10 ** math.floor(math.log10((self.high - self.low) / 2))
            step = next(k * step for k in (0.5, 1, 2, 5, 10) if (self.high - self.low) / (k * step) < 7.01)
            first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
            return [k * step for k in range(first, last + 1)]
        low, high = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        whole = [10.0**k for k in range(low, high + 1) if self.low <= 10.0**k <= self.high]
        if len(whole) >= 3:
            return whole
        return [k * 10.0**e for e in range(low, high + 1) for k in (1, 2, 5) if self.low <= k * 10.0**e <= self.high]


def _drawing(comparison: Results, problem: str, metric: str) -> Markup:
    points, front = points_of(comparison, problem, metric), comparison.pareto(problem, metric)
    shown = METRICS.get(metric)
    title = shown.title if shown else metric
    called = [calls for calls, _, _ in points.values() if calls > 0]
    edge = min([1.0, *called]) / 3  # where no call is drawn
    across = _Axis(edge / 1.5, max([1.0, *called]) * 2.5, _LEFT, _RIGHT, True)
    lows, highs = [m - e for _, m, e in points.values()], [m + e for _, m, e in points.values()]
    target = shown.better if shown is not None and isinstance(shown.better, float) else None
    low, high = min(lows + ([] if target is None else [target])), max(highs + ([] if target is None else [target]))
    log = target is None and low > 0 and high > 12 * low  # one bad solver must not squash all others
    if log:
        up = _Axis(low / 1.2, high * 1.2, _BOTTOM, _TOP, True)
    else:
        margin = 0.07 * (high - low) or 0.05 * abs(high) or 1.0
        up = _Axis(low - margin, high + margin, _BOTTOM, _TOP, False)
    parts = [*_grid(across, up, bool(len(called) < len(points)), edge)]
    if target is not None:
        parts.append(_line(_LEFT, up(target), _RIGHT, up(target), "target"))
    place = {s: (across(max(calls, edge)), up(mean)) for s, (calls, mean, _) in points.items()}
    if front:
        way = f"M{place[front[0]][0]:.1f} {place[front[0]][1]:.1f}"
        way += "".join(f"H{place[s][0]:.1f}V{place[s][1]:.1f}" for s in front[1:]) + f"H{_RIGHT:g}"
        parts.append(element("path", d=way, class_="front"))
    for solver, (calls, mean, error) in points.items():
        x, y = place[solver]
        if error > 0:
            parts.append(_line(x, up(max(mean - error, up.low)), x, up(mean + error), "error"))
        hint = element("title", f"{solver}: {title} {with_error(mean, error)}, {calls:.4g} calls")
        parts.append(element("circle", hint, cx=f"{x:.1f}", cy=f"{y:.1f}", r=4 if solver in front else 3,
                             class_="best" if solver in front else "other", data_solver=solver))
    parts += _labels(place, front)
    direction = {"low": "lower is better", "high": "higher is better"}.get(str(shown.better) if shown else "")
    direction = f"{target:g} is best" if target is not None else direction
    caption = f"{title}{f', {direction}' if direction else ''}"
    words = "; ".join(f"{s}: {with_error(mean, error)} at {calls:.4g}" for s, (calls, mean, error) in points.items())
    drawing = element("svg", *parts, viewBox=f"0 0 {_WIDTH:g} {_HEIGHT:g}", role="img",
                      aria_label=f"{title} on {problem} against network calls for each sample. {words}")
    return element("figure", element("figcaption", caption), drawing, class_="plot", data_metric=metric)


def _grid(across: _Axis, up: _Axis, without_calls: bool, edge: float) -> list[Markup]:
    parts = []
    for tick in up.ticks():
        parts += [_line(_LEFT, up(tick), _RIGHT, up(tick), "grid"),
                  _text(_LEFT - 5, up(tick) + 3, f"{tick:.6g}", "end")]
    for tick in across.ticks():
        if tick > edge * 1.2:
            parts += [_line(across(tick), _TOP, across(tick), _BOTTOM, "grid"),
                      _text(across(tick), _BOTTOM + 14, f"{tick:g}", "middle")]
    if without_calls:
        parts.append(_text(across(edge), _BOTTOM + 14, "0", "middle"))
    return [*parts, _text((_LEFT + _RIGHT) / 2, _BOTTOM + 32, "network calls for each sample", "middle")]


def _labels(place: dict[str, tuple[float, float]], front: list[str]) -> list[Markup]:
    """Names beside their points, those on the front first, where they cover no point, no line and no other name."""
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in place.values()]
    for here, there in zip(front, [*front[1:], None]):  # the steps of the front
        (x, y), (right, low) = place[here], (_RIGHT, place[here][1]) if there is None else place[there]
        taken += [(x, y - 1, right, y + 1), (right - 1, min(y, low), right + 1, max(y, low))]
    parts = []
    for solver in [*front, *(s for s in place if s not in front)]:
        x, y = place[solver]
        name = solver if len(solver) <= 24 else solver[:23] + "…"
        width = _LETTER * len(name) * (1.08 if solver in front else 1.0)
        best: tuple[float, float, float] | None = None
        for distance in (6, 10, 16, 24, 36, 50, 66):
            for turn in range(16):
                angle = math.pi * (turn - 2) / 8  # above to the right first
                cx, cy = x + distance * math.cos(angle), y + (distance + _LINE / 2) * math.sin(angle)
                shift = 0.0 if math.cos(angle) > 0.3 else width if math.cos(angle) < -0.3 else width / 2
                left = min(max(cx - shift, _LEFT + 1), _WIDTH - width - 1)
                box = (left, cy - _LINE / 2, left + width, cy + _LINE / 2)
                free = all(box[2] < b[0] or b[2] < box[0] or box[3] < b[1] or b[3] < box[1] for b in taken)
                if free and box[1] > 0 and box[3] < _BOTTOM:
                    best = (left, cy, distance)
                    break
            if best is not None:
                break
        if best is None:
            continue  # its point still says its name when touched
        left, cy, away = best
        taken.append((left, cy - _LINE / 2, left + width, cy + _LINE / 2))
        if away > 14:
            parts.append(_line(x, y, min(max(x, left), left + width), cy, "leader"))
        parts.append(_text(left, cy + 3, name, "start", "best" if solver in front else None))
    return parts


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    return element("line", x1=f"{x1:.1f}", y1=f"{y1:.1f}", x2=f"{x2:.1f}", y2=f"{y2:.1f}", class_=kind)


def _text(x: float, y: float, text: str, anchor: str, kind: str | None = None) -> Markup:
    return element("text", text, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor, class_=kind)
