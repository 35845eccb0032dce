"""A slider where a notebook can show one, and a row of pictures where it cannot."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["explore"]


def explore(draw: Callable[[Any, Any], Any], values: Sequence[Any], *, name: str, shown: Sequence[Any] | None = None,
            size: tuple[float, float] = (3.0, 3.0), title: str = "", static: bool | None = None) -> Any:
    """Let a reader move through a picture: with a slider, or as a row of pictures where there is none.

    The slider is ipywidgets'. The row is drawn where ipywidgets is missing, where Python is not run by a notebook, and
    where the environment says ``INVFLOW_STATIC=1``, as the runner of the lessons does so that pictures are saved.

    Args:
        draw: called with axes of matplotlib and a value; draws the picture of that value.
        values: of the slider, in order.
        name: of what is moved; shown beside the slider and above each picture of the row.
        shown: values of the row. Default: the first, the middle and the last.
        size: of one picture, width and height in inches.
        title: above the row.
        static: True for the row whatever there is, False for the slider.

    Returns:
        The slider with its picture, for the notebook to show; None where the row was drawn.

    Raises:
        ValueError: without values.
    """
    import matplotlib.pyplot as plt

    values = list(values)
    if not values:
        raise ValueError("explore takes at least one value: explore(draw, [1, 2, 3], name='steps')")
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
    """Whether a notebook runs this, and has ipywidgets."""
    try:
        import ipywidgets  # noqa: F401
        from IPython import get_ipython
    except ImportError:
        return False
    shell = get_ipython()  # type: ignore[no-untyped-call]
    return shell is not None and hasattr(shell, "kernel")
