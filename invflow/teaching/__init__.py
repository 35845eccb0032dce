"""What the lessons draw with: one style, images, points of the plane, animations, and sliders or a row of pictures."""

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
