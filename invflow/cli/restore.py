"""``invflow restore``: restore image files and write them in their own format."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from invflow.cli.options import Device, say

if TYPE_CHECKING:
    from invflow.restore import Restored

__all__ = ["restore"]


def restore(
    source: Annotated[Path, typer.Argument(help="A picture or a folder of pictures.")],
    mask: Annotated[Path | None, typer.Option(
        help="Mask of the area to fill in: an image in which this area is painted black, or a transparent layer on "
             "which it is painted.")] = None,
    mask_hides: Annotated[str | None, typer.Option(help="Colour of the mask's hidden area: white or black.")] = None,
    kernel: Annotated[Path | None, typer.Option(help="Blur kernel to remove: an image, .npy or .txt.")] = None,
    factor: Annotated[int | None, typer.Option(min=2, help="Enlarge by 2, 3 or 4.")] = None,
    filter_name: Annotated[str | None, typer.Option(
        "--filter", metavar="NAME", help="With --factor: filter with which the picture was reduced: average, bilinear, "
                                         "bicubic, lanczos or gaussian [default: bicubic, which is closest to the "
                                         "others].")] = None,
    sigma: Annotated[float | None, typer.Option(
        help="Standard deviation of the noise, on a scale of 0 to 1 [default: estimated].")] = None,
    value_range: Annotated[tuple[float, float] | None, typer.Option(
        "--range", help="Values of black and white in .npy, FITS or floating-point TIFF files.")] = None,
    samples: Annotated[int, typer.Option(min=0, help="Number of samples to write for each picture.")] = 0,
    keep_observed: Annotated[bool, typer.Option(
        help="Keep the pixels outside the mask unchanged.")] = True,
    prior: Annotated[str, typer.Option(help="Name of a shipped prior, a folder, or a Hub repository id.")] = "photos",
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    device: Device = "cpu",
    output: Annotated[Path | None, typer.Option(
        help="Output file, or output folder if the source is a folder [default: next to the source, named "
             "...-restored].")] = None,
) -> None:
    """Restore a picture or a folder of pictures: remove noise, or undo what --mask, --kernel or --factor describes.

    The output keeps the format, bit depth, colour profile, EXIF data and transparency of the input. A
    note lists what cannot be kept. If a file fails, the others are still restored, and the exit code is 2.
    """
    from invflow.cli.options import check_device
    from invflow.restore import Restoration, each, files_in, restore_file

    what = Restoration(mask, mask_hides, kernel, factor, filter_name, sigma, value_range, keep_observed, samples, seed)
    if not source.exists():
        raise FileNotFoundError(f"there is no file {str(source)!r}")
    sources = files_in(source) if source.is_dir() else [source]
    if not sources:
        raise ValueError(f"{source} contains no picture: none of its files has a suffix such as .png, .jpg, .tif")
    targets = _targets(source, sources, output)
    place = check_device(device)

    from invflow.solvers.vfm import VFM

    vfm = VFM.load(prior)
    vfm.to(place)
    start, failed = time.perf_counter(), 0

    def work(path: Path) -> Restored:
        def tell(done: int, total: int, left: float) -> None:
            typer.echo(f"{path.name}: block {done} of {total}, {left:.0f} s left", err=True)

        def note(text: str) -> None:
            say(text if text.startswith(path.name) else f"{path.name}: {text}")

        return restore_file(vfm, path, targets[path], what, note, tell)

    for i, (path, result) in enumerate(each(sources, work)):
        if isinstance(result, Exception):
            failed += 1
            reason = " ".join(str(result).split()) or type(result).__name__
            typer.echo(f"error: {path.name}: {reason}", err=True)
        else:
            typer.echo(_line(i + 1, len(sources), path, result, time.perf_counter() - start))
    if failed and len(sources) > 1:
        typer.echo(f"{failed} of {len(sources)} files were not restored", err=True)
    if failed:
        raise typer.Exit(2)


def _targets(source: Path, sources: list[Path], output: Path | None) -> dict[Path, Path]:
    """Output path of each file, which is never the file itself."""
    if source.is_dir():
        folder = output or source.parent / f"{source.resolve().name}-restored"
        if source.name in ("", ".", ".."):
            folder = output or source.resolve().parent / f"{source.resolve().name}-restored"
        targets = {path: folder / path.name for path in sources}
    else:
        target = output or source.with_name(f"{source.stem}-restored{source.suffix}")
        target = target / source.name if target.is_dir() or not target.suffix else target
        targets = {source: target}
    for path, target in targets.items():
        if path.resolve() == target.resolve():
            raise ValueError(f"{target} would overwrite the source file: pass another --output")
    return targets


def _line(number: int, total: int, path: Path, result: Restored, passed: float) -> str:
    count = f"[{number}/{total}] " if total > 1 else ""
    left = f", {passed / number * (total - number):.0f} s left" if number < total else ""
    return f"{count}{path.name} -> {result.files[0]}, sigma {result.sigma:.2g}, {result.seconds:.1f} s{left}"
