"""Drawing tools of the lessons: one style, images, points in the plane, animations, and sliders or rows of figures."""

from invflow.teaching.pictures import (
    BLUE,
    COLORS,
    GREEN,
    GREY,
    ORANGE,
    RED,
    animate,
    show_image,
    show_plane,
    show_points,
    use_style,
)
from invflow.teaching.sliders import explore

__all__ = ["BLUE", "COLORS", "GREEN", "GREY", "ORANGE", "RED", "animate", "explore", "show_image", "show_plane",
           "show_points", "use_style"]
