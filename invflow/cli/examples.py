"""``invflow examples``: write the files that the commands in the documentation use."""

from __future__ import annotations

import functools
import io
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

__all__ = ["examples", "write_examples"]

#: height and width of the photographs, and the downsampling factor of the small one
SIZE, FACTOR = (192, 240), 3
#: where scratches begin on the left edge, in pixels from the top, and their slopes
_SCRATCHES = ((30, 0.3), (170, -0.45), (-60, 1.1))


def examples(
    folder: Annotated[Path, typer.Argument(help="Folder for the files.")] = Path("."),
) -> None:
    """Write sample files: a digit and scratched, blurred, small and noisy photographs."""
    written = write_examples(folder)
    typer.echo("wrote " + ", ".join(map(str, written)))
    typer.echo("\ntry:\n"
               f"  invflow restore {folder / 'scratched.jpg'} --mask {folder / 'scratches.png'}\n"
               f"  invflow restore {folder / 'shaken.jpg'} --kernel {folder / 'psf.png'}\n"
               f"  invflow solve --image {folder / 'digit.png'} --operator gaussian-blur --output out\n"
               f"  invflow solve --image {folder / 'damaged.png'} --observed --operator box-inpainting "
               f"--mask {folder / 'mask.png'} --output out")


def write_examples(folder: Path) -> list[Path]:
    """Write the sample files, which are the same in every call.

    Args:
        folder: Folder for the files, created if needed.

    Returns:
        The files: ``digit.png``, light on dark, and ``paper.png``, dark on light and larger; ``photo.jpg`` and
        ``photo.png``, the same photograph; ``scratched.jpg``, the same with white scratches, and ``scratches.png``,
        the scratches in black; from other photographs ``damaged.png``, without the pixels that ``mask.png`` hides,
        ``blurred.png`` and ``shaken.jpg``, blurred by the motion in ``kernel.npy``, also written as ``psf.png``,
        ``small.jpg``, a third as large, and ``scan.tif``, noisy; ``counts.npy``, photon counts of at most 4095;
        ``photographs/``, four noisy ones; and ``kernel.npy``.

    Raises:
        FileExistsError: If one of the files exists already.
    """
    import numpy as np
    import torch
    import torch.nn.functional as F

    from invflow._core.records import write_atomically
    from invflow.datasets.files import write_image
    from invflow.operators import Blur, BoxInpainting, Denoising, MotionBlur, SuperResolution
    from invflow.problem import load_problem

    generator = torch.Generator().manual_seed(0)
    digit = load_problem("mnist/denoising").images()[3]
    photos = load_problem("photos/denoising").images()[:, :, : SIZE[0], : SIZE[1]]
    shape = tuple(photos.shape[1:])
    box = BoxInpainting(shape, box=(40, 60))
    path = MotionBlur(shape, kernel_size=21, generator=generator).kernel[0, 0]
    blur = Blur(path, shape, padding="reflect")

    rows, columns = torch.arange(SIZE[0])[:, None], torch.arange(SIZE[1])
    scratches = torch.stack([(rows - top - slope * columns).abs() < 1.5 for top, slope in _SCRATCHES]).any(0)[None]

    def seen(operator: Callable[[Tensor], Tensor], photo: int, sigma: float) -> Tensor:
        clean = operator(photos[photo : photo + 1])
        return (clean + sigma * torch.randn(clean.shape, generator=generator))[0]

    paper = 1 - 0.9 * F.interpolate(F.pad(digit[None], (6, 6, 10, 10)), scale_factor=5, mode="bicubic")[0]
    pictures = {
        "digit.png": digit, "paper.png": paper, "photo.jpg": photos[0], "photo.png": photos[0],
        "damaged.png": box.mask[0] * seen(box, 1, 0.02), "mask.png": box.mask[0].float(),
        "scratched.jpg": torch.where(scratches, 1.0, photos[0]), "scratches.png": (~scratches).float(),
        "psf.png": (path / path.max())[None], "blurred.png": seen(blur, 2, 0.02), "shaken.jpg": seen(blur, 3, 0.01),
        "small.jpg": seen(SuperResolution(shape, factor=FACTOR), 4, 0.01), "scan.tif": seen(Denoising(shape), 1, 0.1),
    }
    counts = torch.poisson(4095 * photos[5].mean(0, keepdim=True).clamp(0, 1), generator=generator).clamp(max=4095)
    arrays = {"counts.npy": counts[0].numpy(), "kernel.npy": path.numpy()}
    pictures |= {f"photographs/{k}.png": seen(Denoising(shape), k, 0.05) for k in range(4)}
    files = [folder / name for name in (*pictures, *arrays)]
    taken = [str(file) for file in files if file.exists()]
    if taken:
        raise FileExistsError(f"{', '.join(taken)} would be overwritten: pass another folder")
    (folder / "photographs").mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        write_image(picture, folder / name)
    for name, array in arrays.items():
        buffer = io.BytesIO()
        np.save(buffer, array)
        write_atomically(folder / name, functools.partial(_write, buffer.getvalue()))
    return files


def _write(data: bytes, path: str) -> None:
    Path(path).write_bytes(data)
