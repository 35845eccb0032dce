"""``invflow restore``: files as people have them, written back restored."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from invflow.cli.options import say

if TYPE_CHECKING:
    from invflow.restore import Restored

__all__ = ["restore"]


def restore(
    source: Annotated[Path, typer.Argument(help="A picture, or a folder of them.")],
    mask: Annotated[Path | None, typer.Option(
        help="What is to be filled in: an image with it painted in black, or on a transparent layer.")] = None,
    mask_hides: Annotated[str | None, typer.Option(help="Which paint of the mask hides: white or black.")] = None,
    kernel: Annotated[Path | None, typer.Option(help="The blur to take out: an image of it, .npy or .txt.")] = None,
    factor: Annotated[int | None, typer.Option(min=2, help="Enlarge by 2, 3 or 4.")] = None,
    filter_name: Annotated[str | None, typer.Option(
        "--filter", metavar="NAME", help="How it was made small: average, bilinear, bicubic, lanczos or gaussian "
                                         "[default: bicubic, which the others are nearest to].")] = None,
    sigma: Annotated[float | None, typer.Option(
        help="Noise standard deviation, on a scale of 0 to 1 [default: estimated].")] = None,
    value_range: Annotated[tuple[float, float] | None, typer.Option(
        "--range", help="Black and white of .npy, FITS or floating-point TIFF files.")] = None,
    samples: Annotated[int, typer.Option(min=0, help="Samples to write beside each picture.")] = 0,
    keep_observed: Annotated[bool, typer.Option(
        help="Leave pixels that the mask does not hide as they are.")] = True,
    prior: Annotated[str, typer.Option(help="A shipped name, a folder, or a Hub repository id.")] = "photos",
    seed: Annotated[int, typer.Option(help="Of all random numbers.")] = 0,
    device: Annotated[str, typer.Option(help="Where to run: cpu, cuda, cuda:1, mps.")] = "cpu",
    output: Annotated[Path | None, typer.Option(
        help="File, or folder for a folder [default: beside the source, with -restored after its name].")] = None,
) -> None:
    """Restore a picture or a folder of them: noise, or what --mask, --kernel or --factor says.

    What is written has the format, bits, colour profile, EXIF and transparency of the file that it was made of, or a
    note says what was lost. One file that fails does not stop the others; the exit code is then 2.
    """
    from invflow.cli.options import check_device
    from invflow.restore import Restoration, each, files_in, restore_file

    what = Restoration(mask, mask_hides, kernel, factor, filter_name, sigma, value_range, keep_observed, samples, seed)
    if not source.exists():
        raise FileNotFoundError(f"there is no file {str(source)!r}")
    sources = files_in(source) if source.is_dir() else [source]
    if not sources:
        raise ValueError(f"{source} holds no picture: none of its files has a suffix such as .png, .jpg, .tif")
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
    """Where each file is written: never over itself."""
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
            raise ValueError(f"{target} would be written over the file itself: pass another --output")
    return targets


def _line(number: int, total: int, path: Path, result: Restored, passed: float) -> str:
    count = f"[{number}/{total}] " if total > 1 else ""
    left = f", {passed / number * (total - number):.0f} s left" if number < total else ""
    return f"{count}{path.name} -> {result.files[0]}, sigma {result.sigma:.2g}, {result.seconds:.1f} s{left}"
