"""A slider in notebooks that support it, otherwise a row of figures."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["explore"]


def explore(draw: Callable[[Any, Any], Any], values: Sequence[Any], *, name: str, shown: Sequence[Any] | None = None,
            size: tuple[float, float] = (3.0, 3.0), title: str = "", static: bool | None = None) -> Any:
    """Show a figure for several values: with a slider, or as a row of figures if sliders are not available.

    The slider is from ipywidgets. The row is drawn if ipywidgets is missing, if Python does not run in a notebook, or
    if ``INVFLOW_STATIC=1`` is set in the environment, as in the lesson runner, which saves the figures.

    Args:
        draw: Function of axes of matplotlib and a value; draws the figure for that value.
        values: Values of the slider, in order.
        name: Name of the value; shown next to the slider and above each figure of the row.
        shown: Values of the row. Default: the first, the middle and the last.
        size: Size of one figure, width and height in inches.
        title: Title above the row.
        static: True forces the row, False the slider.

    Returns:
        The slider with its figure, for display in the notebook; None if the row was drawn.

    Raises:
        ValueError: Without values.
    """
    import matplotlib.pyplot as plt

    values = list(values)
    if not values:
        raise ValueError("explore needs at least one value: explore(draw, [1, 2, 3], name='steps')")
    if static is None:
        static = os.environ.get("INVFLOW_STATIC", "") == "1" or not _has_widgets()
    if not static:
        import ipywidgets

        def picture(**chosen: Any) -> None:
            _, axes = plt.subplots(figsize=size)
            draw(axes, chosen[name])
            plt.show()

        slider = ipywidgets.SelectionSlider(options=[(f"{v:g}" if isinstance(v, float) else str(v), v) for v in values],
                                            description=name, continuous_update=False)
        return ipywidgets.interactive(picture, **{name: slider})
    row = list(shown) if shown is not None else [values[k] for k in sorted({0, len(values) // 2, len(values) - 1})]
    figure, panels = plt.subplots(1, len(row), figsize=(size[0] * len(row), size[1]), squeeze=False)
    for axes, value in zip(panels[0], row):
        draw(axes, value)
        axes.set_title(f"{name} = {value:g}" if isinstance(value, float) else f"{name} = {value}")
    figure.suptitle(title)
    plt.show()
    return None


def _has_widgets() -> bool:
    """Whether this runs in a notebook with ipywidgets."""
    try:
        import ipywidgets  # noqa: F401
        from IPython import get_ipython
    except ImportError:
        return False
    shell = get_ipython()  # type: ignore[no-untyped-call]
    return shell is not None and hasattr(shell, "kernel")
