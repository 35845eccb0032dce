"""All registered problems by their Python names, including those of installed plug-ins.

    from invflow.problems import mnist_box_inpainting

Plug-ins register a module under the entry-point group ``invflow.problems``; its ``__all__`` is the list.
Names are looked up when first used. :func:`invflow.load_problem` finds a problem by its own name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from invflow._core import plugins
from invflow.problem import GROUP

if TYPE_CHECKING:
    from invflow_problems.checkerboard import checkerboard as checkerboard
    from invflow_problems.gaussian import gaussian_linear as gaussian_linear
    from invflow_problems.half_plane import half_plane as half_plane
    from invflow_problems.images import cifar10_box_inpainting as cifar10_box_inpainting
    from invflow_problems.images import cifar10_denoising as cifar10_denoising
    from invflow_problems.images import cifar10_gaussian_blur as cifar10_gaussian_blur
    from invflow_problems.images import cifar10_motion_blur as cifar10_motion_blur
    from invflow_problems.images import cifar10_random_inpainting as cifar10_random_inpainting
    from invflow_problems.images import cifar10_super_resolution as cifar10_super_resolution
    from invflow_problems.images import fashion_mnist_box_inpainting as fashion_mnist_box_inpainting
    from invflow_problems.images import fashion_mnist_denoising as fashion_mnist_denoising
    from invflow_problems.images import fashion_mnist_gaussian_blur as fashion_mnist_gaussian_blur
    from invflow_problems.images import fashion_mnist_motion_blur as fashion_mnist_motion_blur
    from invflow_problems.images import fashion_mnist_random_inpainting as fashion_mnist_random_inpainting
    from invflow_problems.images import fashion_mnist_super_resolution as fashion_mnist_super_resolution
    from invflow_problems.images import mnist_box_inpainting as mnist_box_inpainting
    from invflow_problems.images import mnist_denoising as mnist_denoising
    from invflow_problems.images import mnist_gaussian_blur as mnist_gaussian_blur
    from invflow_problems.images import mnist_motion_blur as mnist_motion_blur
    from invflow_problems.images import mnist_random_inpainting as mnist_random_inpainting
    from invflow_problems.images import mnist_super_resolution as mnist_super_resolution
    from invflow_problems.mixture25 import mixture25 as mixture25
    from invflow_problems.ring import ring_wavy as ring_wavy
    from invflow_problems.tilt import mnist_mirror as mnist_mirror
    from invflow_problems.tilt import mnist_open_centre as mnist_open_centre
    from invflow_problems.tilt import mnist_rotation as mnist_rotation
    from invflow_problems.tilt import mnist_tilt_3 as mnist_tilt_3


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return plugins.names(GROUP)
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = plugins.find(GROUP, name)
    except KeyError:
        hint = plugins.nearest(name, plugins.names(GROUP))
        raise AttributeError(f"there is no problem {name!r} in invflow.problems: {hint}") from None
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *plugins.names(GROUP)})
