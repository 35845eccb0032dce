"""Restores files one by one (scratches, noise, blur, low resolution) and writes them in their own format."""

from __future__ import annotations

import glob
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from invflow.datasets.files import FORMATS, read_kernel, read_mask
from invflow.datasets.pictures import NUMBERS, Picture, read_picture, write_picture
from invflow.likelihood import noise_levels
from invflow.linear.structure import zero_unobserved
from invflow.restore.blocks import Tell, posterior_in_blocks
from invflow.restore.posterior import told

if TYPE_CHECKING:
    from invflow.operator import Operator
    from invflow.solvers.vfm import VFM

__all__ = ["Restoration", "Restored", "each", "files_in", "restore_file"]

Say = Callable[[str], None]

@dataclass
class Restoration:
    """Degradation of pictures and options for restoring them.

    Attributes:
        mask: File of the mask of the area to fill in.
        mask_hides: Colour of the mask's hidden pixels, ``"white"`` or ``"black"``; None for the rule of
            :func:`~invflow.datasets.files.read_mask`.
        kernel: File of the blur kernel.
        factor: Factor by which to enlarge.
        filter: Downsampling filter, as named by :class:`~invflow.operators.SuperResolution`; None means
            ``"bicubic"``, which works best if the true filter is unknown.
        sigma: Standard deviation of the noise, on a scale of 0 to 1; None to estimate it for each picture.
        value_range: Values of black and white in files of numbers.
        keep_observed: Whether observed pixels stay unchanged under a mask.
        samples: Number of posterior samples to write for each picture.
        seed: Random seed for each file.
    """

    mask: Path | None = None
    mask_hides: str | None = None
    kernel: Path | None = None
    factor: int | None = None
    filter: str | None = None
    sigma: float | None = None
    value_range: tuple[float, float] | None = None
    keep_observed: bool = True
    samples: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        asked = [f"--{name}" for name in ("mask", "kernel", "factor") if getattr(self, name) is not None]
        if len(asked) > 1:
            raise ValueError(f"{' and '.join(asked)}: pass one at a time; restore the result again with the other")
        if self.mask_hides is not None and self.mask is None:
            raise ValueError("--mask-hides needs a mask: pass --mask FILE too")
        if self.filter is not None and self.factor is None:
            raise ValueError("--filter belongs to enlarging: pass --factor 2, 3 or 4 too")
        if self.sigma is not None and not 0 <= self.sigma <= 1:
            raise ValueError(f"sigma={self.sigma:g}: noise on pixels in [0, 1] has a standard deviation from 0 to 1; "
                             f"if you mean a scale of 0 to 255, pass {self.sigma / 255:.3g}")


@dataclass(frozen=True)
class Restored:
    """Result of restoring a file.

    Attributes:
        files: Files written, the restored picture first.
        sigma: The noise level used.
        seconds: Wall time.
    """

    files: list[Path]
    sigma: float
    seconds: float


def files_in(folder: Path) -> list[Path]:
    """The pictures in a folder by their suffixes, in order, without subfolders."""
    from PIL import Image

    Image.init()
    known = {suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS}
    known |= {*NUMBERS, ".heic", ".heif"}
    return sorted(path for path in folder.iterdir() if path.is_file() and path.suffix.lower() in known)


def restore_file(vfm: VFM, source: Path, target: Path, what: Restoration, say: Say = print,
                 tell: Tell | None = None) -> Restored:
    """Restore a file, and write it with its format, bit depth, colour profile, EXIF data and transparency.

    Args:
        vfm: Solver for colour images of any size, such as ``VFM.load("photos")``.
        source: The file.
        target: Output path; its suffix is changed if the format cannot be written. Samples go into a folder next to it.
        what: The degradation.
        say: Called with a sentence for each assumption, change or loss.
        tell: Called after each block of a large picture, see :func:`~invflow.restore.blocks.posterior_in_blocks`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file cannot be read or restored; the message says what helps.
    """
    start = time.perf_counter()
    picture = read_picture(source, value_range=what.value_range, say=say)
    operator = _operator(vfm, picture, what, say)
    y = zero_unobserved(operator, picture.values[None])
    sigma = _sigma(picture, operator, y, what, say)
    generator = torch.Generator().manual_seed(what.seed)
    scale = math.sqrt(3) if len(picture.values) == 1 else 1.0  # for the noise of each of three channels
    least = told(vfm, operator, scale * sigma) / scale
    if not math.isclose(least, sigma, rel_tol=1e-3):
        say(f"noise of {sigma:.2g} is outside the range that the prior was trained for: using {least:.2g}")
    mean, away = posterior_in_blocks(vfm, operator, y, sigma, what.samples, generator, tell)
    observed = operator.observed()

    def finished(image: Tensor) -> Picture:
        keep = what.keep_observed and observed is not None
        return replace(picture, values=torch.where(observed[0], y[0], image) if keep else image)  # type: ignore[index]

    if picture.suffix is not None and target.suffix.lower() != picture.suffix:
        say(f"{source.name} is written as PNG: {picture.kind} can only be read")
        target = target.with_suffix(picture.suffix)
    write_picture(finished(mean), target, say=say)
    files = [target]
    for old in target.parent.glob(f"{glob.escape(target.stem)}-samples/[0-9]*{glob.escape(target.suffix)}"):
        old.unlink()  # of an earlier run: some might otherwise remain among the new ones
    for i, sample in enumerate(away):
        files.append(target.parent / f"{target.stem}-samples" / f"{i}{target.suffix}")
        write_picture(finished(mean + sample), files[-1], say=lambda _: None)
    return Restored(files, sigma, time.perf_counter() - start)


def _operator(vfm: VFM, picture: Picture, what: Restoration, say: Say) -> Operator:
    from invflow import operators

    shape = tuple(picture.values.shape)
    if max(what.factor or 1, 1) > 1:
        shape = (shape[0], *(side * (what.factor or 1) for side in shape[1:]))
    known = None if picture.known is None else picture.known.float()
    if known is not None and (what.kernel or what.factor):
        raise ValueError("it contains NaN, where nothing was observed: first fill in these pixels, with a run without "
                         "--kernel and --factor")
    if what.kernel is not None:
        kernel = read_kernel(what.kernel, say=say)
        kind: Any = operators.find("Blur")
        blur: Operator = kind(kernel, shape, padding="reflect")
        return blur
    if what.factor is not None:
        kind = operators.find("SuperResolution")
        operator: Operator = kind(shape, factor=what.factor, filter=what.filter or "bicubic")
        if operator.problem_class not in vfm.adapter.classes:
            raise ValueError(f"--factor {what.factor}: this prior only enlarges by "
                             + ", ".join(name[-1] for name in vfm.adapter.classes if name.startswith("super-")))
        return operator
    if what.mask is None and known is None:
        kind = operators.find("Denoising")
        return kind(shape)  # type: ignore[no-any-return]
    mask = torch.ones(1, *shape[1:])
    if what.mask is not None:
        mask = read_mask(what.mask, shape, hides=what.mask_hides, say=say)
    if known is not None:
        say(f"{1 - float(known.mean()):.2%} of the picture is NaN: these pixels are filled in")
        mask = mask * known
    kind = operators.find("MaskInpainting")
    return kind(mask, shape)  # type: ignore[no-any-return]


def _sigma(picture: Picture, operator: Operator, y: Tensor, what: Restoration, say: Say) -> float:
    """The noise level, given or estimated, and at least that of rounding."""
    rounding = (1 / 255 if picture.bits == 8 else 1 / 65535) / math.sqrt(12)
    if what.sigma is not None:
        return max(what.sigma, rounding)
    observed = operator.observed()
    try:
        level = noise_levels(y, observed)[0]
    except ValueError as error:
        if observed is None or min(y.shape[2:]) < 15:
            raise ValueError("the picture is too small or too uniform to estimate the noise: pass --sigma, such as "
                             "0.02 for a little grain") from error
        return rounding  # probably a drawing or a screenshot
    lossy = picture.kind in ("JPEG", "WEBP", "AVIF", "HEIC", "JPEG2000")  # likely to have correlated noise
    enlarged = what.factor is not None  # it matters little here: assuming twice the noise costs a tenth of a decibel
    if level.known or observed is not None or lossy or enlarged:
        sigma = level.sigma if level.known else level.high if lossy else level.low
        if enlarged and not level.known:
            sigma = (level.low + level.high) / 2
        say(f"noise estimated as {sigma:.2g}, between {level.low:.2g} and {level.high:.2g}"
            + (f", for {level.doubt}" if level.doubt else "") + "; --sigma sets another value")
        return max(sigma, rounding)
    raise ValueError(f"its noise is between {level.low:.2g} and {level.high:.2g}: {level.doubt}; pass --sigma")


def each(sources: list[Path], work: Callable[[Path], Restored]) -> Iterator[tuple[Path, Restored | Exception]]:
    """Process files one by one; if one fails, its error is yielded instead of a result."""
    for source in sources:
        try:
            yield source, work(source)
        except Exception as error:  # an error in one file must not prevent the others
            yield source, error
