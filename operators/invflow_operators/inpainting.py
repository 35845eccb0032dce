"""Inpainting: some pixels are observed, the others are not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from invflow.operator import SUMMARY_SIZE, Operator
from invflow.plugins import as_generator, as_shape
from invflow_operators._free_form import draw_free_form

__all__ = ["BoxInpainting", "FreeFormInpainting", "Inpainting", "MaskInpainting", "RandomInpainting"]

FREE_FORM = "free-form-inpainting"


class MaskInpainting(Operator):
    """Inpainting with a given mask: A(x) = mask * x, with 1 for observed pixels and 0 for others.

    A measurement has the shape of an image, with zeros where nothing was observed. A likelihood
    ignores those entries, also in its normalisation (see :meth:`observed`).

    Args:
        mask: 1 where a pixel is observed, 0 where it is not; bool or numbers. ``(H, W)`` or ``(C, H, W)`` for
            all images, or ``(n, 1 or C, H, W)``, one for each.
        image_shape: (C, H, W); default: the mask's, with one channel for ``(H, W)``.
        problem_class: Class of the mask for adapters. Default: "free-form-inpainting", the class of all kinds of masks;
            "box-inpainting" or "random-inpainting" if the mask is known to be of that kind.

    Raises:
        ValueError: For a mask of the wrong shape, with other values, or without observed pixels.

    Example:
        >>> import torch
        >>> from invflow.operators import MaskInpainting
        >>> upper = torch.arange(28)[:, None].expand(28, 28) < 14
        >>> MaskInpainting(upper, image_shape=(3, 28, 28)).num_sets
        1
    """

    mask: Tensor

    def __init__(self, mask: Tensor, image_shape: Sequence[int] | None = None,
                 problem_class: str | None = FREE_FORM) -> None:
        super().__init__()
        mask = torch.as_tensor(mask)
        if image_shape is None and mask.ndim >= 2:
            image_shape = (1, *mask.shape) if mask.ndim == 2 else mask.shape[-3:]
        shape = tuple(image_shape or ())
        sets = mask[(None,) * (4 - mask.ndim)] if mask.ndim in (2, 3) else mask
        fits = len(shape) == 3 and sets.ndim == 4 and sets.shape[1] in (1, shape[0])
        if not fits or tuple(sets.shape[2:]) != shape[1:]:
            raise ValueError(
                f"the mask has shape {tuple(mask.shape)}, the images {shape}: pass a mask (H, W), "
                "(C, H, W) or (n, C, H, W) with the images' H and W and their C or 1; image_shape=(C, H, W)"
            )
        if mask.dtype != torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
            span = f"{float(mask.min()):.4g} to {float(mask.max()):.4g}"
            raise ValueError(f"the mask has values from {span}, expected 0 and 1: pass mask > 0.5")
        if not bool(sets.bool().flatten(1).any(1).all()):
            raise ValueError("a mask observes nothing: 1 means observed, 0 hidden; if yours is reversed, pass ~mask")
        self.image_shape = self.measurement_shape = shape
        self.problem_class = problem_class
        self.register_sets(mask=sets.bool())
        if problem_class == FREE_FORM:
            self.stand_ins = ("box-inpainting",) * self._hides_areas() + ("random-inpainting",)

    structure = "diagonal"
    #: problem class of a mask from a file; a subclass without this attribute takes the file as its own ``mask``
    _file_class: str | None = FREE_FORM

    @classmethod
    def file_parameters(cls) -> tuple[str, ...]:
        """Accept a mask file, also in classes that draw or compute their mask."""
        return ("mask",) if "_file_class" in vars(cls) else super().file_parameters()

    @classmethod
    def from_files(cls, image_shape: tuple[int, ...], files: Mapping[str, Tensor], settings: Mapping[str, Any],
                   say: Callable[[str], None]) -> MaskInpainting:
        """Build the operator from a mask file, treated as a mask of this class, so that an adapter accepts it."""
        if "_file_class" not in vars(cls):
            return super().from_files(image_shape, files, settings, say)
        if settings:
            raise ValueError(f"--operator-set {next(iter(settings))}=... conflicts with --mask, which "
                             "sets the whole mask: pass only one of the two")
        return MaskInpainting(files["mask"], image_shape, cls._file_class)

    def forward(self, x: Tensor) -> Tensor:
        """Images with zeros where nothing is observed: ``(n, C, H, W)`` to the same."""
        return x * self.mask

    def adjoint(self, y: Tensor) -> Tensor:
        """The operator itself, a projection."""
        return y * self.mask

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        """The operator itself, a projection."""
        return y * self.mask

    def embed(self, y: Tensor) -> Tensor:
        """The measurement, with mid grey at unobserved pixels."""
        return torch.where(self.mask, y, 0.5)

    def observed(self) -> Tensor:
        """The mask, ``(num_sets, C, H, W)`` bool."""
        return self.mask.expand(-1, *self.image_shape)

    def _hides_areas(self) -> bool:
        """Whether each mask hides boxes or broad strokes, where most hidden pixels have only hidden neighbours."""
        hidden = (~self.mask.all(1, keepdim=True)).float()
        inside = torch.nn.functional.avg_pool2d(hidden, 3, stride=1, padding=1, count_include_pad=False) > 0.99
        share = (inside * hidden).flatten(1).sum(1) / hidden.flatten(1).sum(1).clamp(min=1)
        return self._hides_boxes() or bool((share > 0.5).all())

    def _hides_boxes(self) -> bool:
        """Whether each mask hides one full rectangle, the same in all channels."""
        hidden = ~self.mask.all(1)
        rows, columns = hidden.any(2), hidden.any(1)
        full = (hidden == (rows[:, :, None] & columns[:, None, :])).all()
        # one run of hidden rows and one of hidden columns; the row or column before the image counts as observed
        whole = [(torch.nn.functional.pad(along.int(), (1, 0)).diff(dim=1).clamp(min=0).sum(1) == 1).all()
                 for along in (rows, columns)]
        return bool(full & whole[0] & whole[1] & (self.mask == self.mask[:, :1]).all())

    def context(self) -> tuple[Tensor, Tensor]:
        """The mask averaged over channels, and no kernel."""
        maps = self.mask.to(self.dtype)
        return maps if maps.shape[1] == 1 else maps.mean(1, keepdim=True), maps.new_zeros(self.num_sets, SUMMARY_SIZE)


#: name for users who give a mask
Inpainting = MaskInpainting


class RandomInpainting(MaskInpainting):
    """Inpainting with pixels observed independently at random, all channels of a pixel together.

    Args:
        image_shape: (C, H, W).
        keep: Share of observed pixels, in (0, 1]; a range (low, high) draws it for each mask.
        generator: Source of randomness for the mask. At least one pixel is observed.

    Example:
        >>> import torch
        >>> from invflow.operators import RandomInpainting
        >>> g = torch.Generator().manual_seed(0)
        >>> RandomInpainting((1, 28, 28), keep=0.5, generator=g).randomize(8, g).num_sets
        8
    """

    _file_class = "random-inpainting"

    def __init__(self, image_shape: Sequence[int], keep: float | tuple[float, float] = (0.3, 0.7),
                 generator: torch.Generator | None = None) -> None:
        low, high = keep if isinstance(keep, Sequence) else (keep, keep)
        if not 0 < low <= high <= 1:
            raise ValueError(f"keep={keep}: pass the share of observed pixels, in (0, 1], or a range (low, high)")
        shape = as_shape(image_shape, "RandomInpainting((1, 28, 28), keep=0.5)")
        super().__init__(_draw_pixels(1, shape, (low, high), generator), shape, "random-inpainting")
        self.keep = (low, high)

    def randomize(self, n: int, generator: torch.Generator | None = None) -> Operator:
        """Fresh masks for n images."""
        mask = _draw_pixels(n, self.image_shape, self.keep, generator)
        return self._with_sets({"mask": mask.to(self.mask.device)})


def _draw_pixels(n: int, image_shape: tuple[int, ...], keep: tuple[float, float],
                 generator: torch.Generator | None) -> Tensor:
    """Masks ``(n, 1, H, W)`` that observe a share of pixels drawn from a range."""
    generator = as_generator(generator)
    share = torch.rand(n, 1, 1, 1, generator=generator, device=generator.device)
    number = torch.rand(n, 1, *image_shape[1:], generator=generator, device=generator.device)
    # the pixel with the smallest random number is observed at any share, so no mask is empty
    return (number < keep[0] + (keep[1] - keep[0]) * share) | (number == number.amin((2, 3), keepdim=True))


class BoxInpainting(MaskInpainting):
    """Inpainting of a box: all pixels outside a rectangle are observed.

    Args:
        image_shape: (C, H, W).
        box: (height, width) of the unobserved box in pixels, centred; one number for a square; default: half the
            image's sides.
        sides: Range, in shares of the image's height and width, from which :meth:`randomize` draws the two
            sides of a box independently; None keeps the sides of ``box``. The position is uniform in both cases.

    Raises:
        ValueError: If the box is empty or covers the image, or the sides are out of range.

    Example:
        >>> from invflow.operators import BoxInpainting
        >>> int((~BoxInpainting((1, 28, 28)).mask).sum())
        196
    """

    _file_class = "box-inpainting"

    def __init__(self, image_shape: Sequence[int], box: tuple[int, int] | int | None = None,
                 sides: tuple[float, float] | None = (0.25, 0.5)) -> None:
        shape = as_shape(image_shape, "BoxInpainting((1, 28, 28), box=(14, 14))")
        height, width = shape[-2:]
        box = (height // 2, width // 2) if box is None else (box, box) if isinstance(box, int) else box
        if not isinstance(box, tuple | list) or len(box) != 2:
            raise ValueError(f"box={box!r}: pass (height, width) in pixels, or one whole number for a square")
        if not (0 < box[0] <= height and 0 < box[1] <= width and tuple(box) != (height, width)):
            raise ValueError(f"a box of {box} pixels does not fit images {shape}: pass (height, width)")
        if sides is not None and not 0 < sides[0] <= sides[1] < 1:
            raise ValueError(f"sides={sides}: pass shares of the image's sides, 0 < low <= high < 1, or None")
        top, left = torch.tensor([(height - box[0]) // 2]), torch.tensor([(width - box[1]) // 2])
        mask = _outside_boxes((height, width), top, left, torch.tensor([box[0]]), torch.tensor([box[1]]))
        super().__init__(mask, shape, "box-inpainting")
        self.box, self.sides = (int(box[0]), int(box[1])), sides

    def randomize(self, n: int, generator: torch.Generator | None = None) -> Operator:
        """Draw boxes of random sides at random positions, for n images."""
        generator = as_generator(generator)
        uniform = torch.rand(4, n, generator=generator, device=generator.device, dtype=torch.float64)
        length, start = [], []
        for axis, side in enumerate(self.image_shape[1:]):
            low, high = self.box[axis], self.box[axis]
            if self.sides is not None:
                low, high = (max(1, round(share * side)) for share in self.sides)
            length.append(low + (uniform[axis] * (high - low + 1)).long())
            start.append((uniform[2 + axis] * (side - length[axis] + 1)).long())
        mask = _outside_boxes(self.image_shape[1:], *start, *length)
        return self._with_sets({"mask": mask.to(self.mask.device)})


def _outside_boxes(size: tuple[int, ...], top: Tensor, left: Tensor, height: Tensor, width: Tensor) -> Tensor:
    """Masks ``(n, 1, H, W)`` that are False inside one box each, given by four ``(n,)`` tensors of integers."""
    row = torch.arange(size[0], device=top.device)
    column = torch.arange(size[1], device=top.device)
    in_rows = (row >= top[:, None]) & (row < (top + height)[:, None])
    in_columns = (column >= left[:, None]) & (column < (left + width)[:, None])
    return ~(in_rows[:, :, None] & in_columns[:, None, :])[:, None]


class FreeFormInpainting(MaskInpainting):
    """Free-form inpainting: a mix of brush strokes, scratches, captions, boxes and lost pixels.

    An adapter trained on this class supports any mask: :class:`MaskInpainting` belongs to this problem class by
    default. All channels of a pixel are hidden together.

    Args:
        image_shape: (C, H, W).
        generator: Source of randomness for the mask. Each mask hides at least one pixel and observes at least one.

    Example:
        >>> import torch
        >>> from invflow.operators import FreeFormInpainting
        >>> g = torch.Generator().manual_seed(0)
        >>> FreeFormInpainting((1, 28, 28), generator=g).randomize(8, g).num_sets
        8
    """

    _file_class = FREE_FORM

    def __init__(self, image_shape: Sequence[int], generator: torch.Generator | None = None) -> None:
        shape = as_shape(image_shape, "FreeFormInpainting((1, 28, 28))")
        height, width = shape[-2:]
        super().__init__(draw_free_form(1, (height, width), as_generator(generator)), shape, FREE_FORM)

    def randomize(self, n: int, generator: torch.Generator | None = None) -> Operator:
        """Fresh masks for n images."""
        height, width = self.image_shape[1:]
        mask = draw_free_form(n, (height, width), as_generator(generator))
        return self._with_sets({"mask": mask.to(self.mask.device)})
