"""Reads photographs, masks and kernels from files and writes pictures. Every change is reported."""

from __future__ import annotations

import os
import warnings
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from invflow._core.explained import explained
from invflow._core.records import write_atomically
from invflow.datasets.kernels import clean_kernel
from invflow.datasets.masks import mask_of_painting

__all__ = ["fit_to", "read_alpha", "read_image", "read_kernel", "read_mask", "write_image"]

Say = Callable[[str], None]

#: Pillow formats that Pillow decodes itself; EPS, for example, would be passed to Ghostscript, which runs programs
FORMATS = ("PNG", "JPEG", "MPO", "TIFF", "WEBP", "BMP", "DIB", "GIF", "PPM", "JPEG2000", "TGA", "AVIF")

_LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R BT.601, as in Pillow


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=4)


@explained
def read_image(path: str | os.PathLike[str], *, channels: int | None = None,
               image_shape: Sequence[int] | None = None, resize: bool = False, say: Say = _warn) -> Tensor:
    """Read an image file as a tensor in [0, 1].

    Reads PNG, JPEG, TIFF, WebP, BMP, GIF, PPM, JPEG 2000, TGA and AVIF, as far as Pillow does, with up to 89 million
    pixels, and turns them upright by their EXIF tag. Colour with 16 bits is read from PNG, and from TIFF in strips that
    are uncompressed or deflated. Necessary changes are made and reported: colour becomes grey by luminance, grey
    becomes colour by repetition, transparency is blended with white, printing inks (CMYK) become colour, and only the
    first of several frames is used. Values are those of the file, display encoded (usually sRGB), not linear in light.

    Args:
        path: Path of the file.
        channels: 1 for grey, 3 for colour; None keeps the channels of the file.
        image_shape: Required image shape ``(C, H, W)``; replaces ``channels``.
        resize: Whether to crop and scale a file of another size with :func:`fit_to`, if ``image_shape`` is given.
        say: Called with a sentence for each change; default: a warning.

    Returns:
        ``(C, H, W)`` in [0, 1], float32.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not an image, or if its size is wrong.

    Example:
        >>> import invflow.imageio
        >>> image = invflow.datasets.files.read_image("digit.png", image_shape=(1, 28, 28))  # doctest: +SKIP
    """
    if image_shape is not None:
        if len(image_shape) != 3:
            raise ValueError(f"an image file holds (C, H, W), which cannot be of shape {tuple(image_shape)}")
        channels = image_shape[0]
    if channels not in (None, 1, 3):
        raise ValueError(f"an image file is read with 1 channel (grey) or 3 (colour), not {channels}")
    image = _to_channels(_read_pixels(Path(path), say), channels, Path(path).name, say)
    if image_shape is None or tuple(image.shape) == tuple(image_shape):
        return image
    if not resize:
        raise ValueError(
            f"{Path(path).name} is {_size(image)} pixels (height x width), but {image_shape[1]} x "
            f"{image_shape[2]} is needed: scale it yourself, or pass --resize (resize=True) to crop its "
            "centre and scale it"
        )
    return fit_to(image, image_shape[1:], say=say)


def fit_to(image: Tensor, size: Sequence[int], *, say: Say = _warn) -> Tensor:
    """Crop the centre to the proportions of ``size``, then scale to it with an antialiasing triangle filter.

    Args:
        image: Image ``(C, H, W)``.
        size: Target size ``(height, width)``.
        say: Called with a sentence for each change.

    Returns:
        ``(C, height, width)``, within the range of the image.
    """
    height, width = size
    ratio = min(image.shape[1] / height, image.shape[2] / width)
    crop = max(1, round(height * ratio)), max(1, round(width * ratio))
    top, left = (image.shape[1] - crop[0]) // 2, (image.shape[2] - crop[1]) // 2
    if crop != tuple(image.shape[1:]):
        say(f"cropped {_size(image)} to its centre, {crop[0]} x {crop[1]}")
    image = image[:, top : top + crop[0], left : left + crop[1]]
    if crop == (height, width):
        return image
    how = "down to" if ratio > 1 else "UP to"
    say(f"scaled {_size(image)} {how} {height} x {width} (antialiased); the result refers to the scaled image")
    return F.interpolate(image[None], size=(height, width), mode="bilinear", antialias=True)[0]


def read_mask(path: str | os.PathLike[str], shape: Sequence[int] | None = None, *, hides: str | None = None,
              say: Say = _warn) -> Tensor:
    """Read which pixels were observed from a painted image, a ``.npy`` array or a ``.txt`` table.

    In an image, dark pixels are hidden, including every pixel touched by a soft brush, and light ones are not. On a
    transparent layer, painted pixels are hidden. The hidden share is always reported.

    Args:
        path: Path of the file. Arrays hold 0 and 1, ``(H, W)`` or ``(C, H, W)``, 1 for observed.
        shape: Shape ``(C, H, W)`` of the image; a mask of one channel applies to all channels.
        hides: Colour of hidden pixels in an image: ``"white"`` or ``"black"``; None means black if at least half of
            the image then remains visible. For an array, ``"white"`` exchanges 0 and 1.
        say: Called with a sentence for each change.

    Returns:
        ``(1, H, W)`` or ``(C, H, W)``, float32, 1 where the pixel was observed and 0 where not.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read, has another shape, observes nothing, is a photograph, or is an image that
            would hide more than half while ``hides`` is None.
    """
    name, painted = Path(path).name, Path(path).suffix.lower() not in (".npy", ".txt")
    values = _read_array(Path(path), say if not painted else lambda _: None)
    values = values[None] if values.ndim == 2 else values
    if values.ndim != 3:
        raise ValueError(f"{name} has shape {tuple(values.shape)}, but a mask has (H, W) or (C, H, W)")
    if shape is not None and tuple(values.shape) not in ((1, *shape[1:]), tuple(shape)):
        raise ValueError(
            f"the mask {name} has shape {tuple(values.shape)}, but the image has {tuple(shape)}: a mask has "
            f"{(1, *shape[1:])} or {tuple(shape)}"
        )
    if painted:
        mask = mask_of_painting(values, read_alpha(path), name, hides, say)
    else:
        values = values / 255 if float(values.max()) == 255 else values
        values = 1 - values if hides == "white" else values
        mask = (values > 0.5).float()
        between = int(((values - mask).abs() > 1e-3).sum())
        if between:
            say(f"{between} values of the mask {name} are neither 0 nor 1: values above 0.5 count as observed")
    if not bool(mask.any()):
        raise ValueError(f"the mask {name} observes no pixel: observed is light (1), missing is dark (0)")
    say(f"the mask {name} hides {1 - float(mask.mean()):.2%} of the picture")
    return mask


def read_alpha(path: str | os.PathLike[str]) -> Tensor | None:
    """Read the opacity of an image file, ``(1, H, W)`` in [0, 1], upright; None if all of it is opaque."""
    import numpy as np
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            if file.mode not in ("RGBA", "LA", "PA", "RGBa", "La") and "transparency" not in file.info:
                return None
            alpha = np.array(ImageOps.exif_transpose(file).convert("RGBA").getchannel("A"))
    except (OSError, ValueError):  # reading its colours will raise the error
        return None
    return None if alpha.min() == 255 else torch.from_numpy(alpha).float()[None] / 255


def read_kernel(path: str | os.PathLike[str], *, centre: bool = True, say: Say = _warn) -> Tensor:
    """Read a blur kernel from an image, a ``.npy`` array or a ``.txt`` table, and clean it.

    A constant offset is removed, the kernel is normalised to sum to one, and it is centred so that it does not shift
    the picture.

    Args:
        path: Path of the file.
        centre: Whether to move its centre of mass to the middle, to the nearest pixel.
        say: Called with a sentence for each change.

    Returns:
        ``(height, width)``, float32, summing to one.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read, has another number of dimensions, has no positive sum, or is a
            photograph.
    """
    values = _read_array(Path(path), say)
    values = values[0] if values.ndim == 3 and values.shape[0] == 1 else values
    total = float(values.sum())
    if values.ndim != 2 or total <= 0:
        raise ValueError(
            f"the kernel {Path(path).name} has shape {tuple(values.shape)} and the sum {total:.4g}: a kernel "
            "has shape (height, width) and a positive sum"
        )
    kernel = clean_kernel(values, Path(path).name, say, centre)
    if abs(total - 1) > 1e-3:
        say(f"the kernel {Path(path).name} sums to {total:.4g}: divided by that")
    return kernel


@explained(arrays=True)
def write_image(image: Tensor, path: str | os.PathLike[str], *, bits: int = 8) -> None:
    """Write an image file atomically, with values clipped to [0, 1].

    Args:
        image: Image ``(C, H, W)`` or ``(H, W)`` with 1 or 3 channels, nominally in [0, 1].
        path: Path of the file; its suffix is the format, such as ``.png``, ``.jpg`` (written at quality 95) or
            ``.tif``.
        bits: Bits per value: 8, or 16 for PNG and TIFF.

    Raises:
        ValueError: If the shape or the format is not supported, or if the format has no 16 bits.

    Example:
        >>> import tempfile, torch, invflow.imageio
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     invflow.datasets.files.write_image(torch.rand(3, 20, 30), f"{folder}/a.png", bits=16)
        ...     invflow.datasets.files.read_image(f"{folder}/a.png").shape
        torch.Size([3, 20, 30])
    """
    from PIL import Image

    from invflow.datasets.sixteen_bits import encode_png, encode_tiff

    image = image[None] if image.ndim == 2 else image
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        hint = ": pass one image of the batch, image[0]" if image.ndim == 4 else ""
        raise ValueError(f"an image file holds (1, H, W) or (3, H, W), not {tuple(image.shape)}{hint}")
    suffix = Path(path).suffix.lower()
    formats = Image.registered_extensions()
    if suffix not in formats:
        raise ValueError(f"{str(path)!r} does not name an image format: use a name that ends in .png")
    encoders = {"PNG": encode_png, "TIFF": encode_tiff}
    if bits not in (8, 16) or (bits == 16 and formats[suffix] not in encoders):
        raise ValueError(f"{formats[suffix]} with {bits} bits is not supported: pass bits=8, or bits=16 with a file "
                         "that ends in .png or .tif")
    values = (image.detach().double().clamp(0, 1) * (2**bits - 1)).round().cpu()
    values = values[0] if len(values) == 1 else values.permute(1, 2, 0)
    array = values.contiguous().numpy().astype(f"u{bits // 8}")
    if bits == 16:
        data = encoders[formats[suffix]](array)
        write_atomically(Path(path), lambda name: Path(name).write_bytes(data))
        return
    options = {"quality": 95, "subsampling": 0} if formats[suffix] == "JPEG" else {}
    write_atomically(Path(path), lambda name: Image.fromarray(array).save(name, format=formats[suffix], **options))


# -- the pixels of a file ------------------------------------------------------------------------------------


def _read_pixels(path: Path, say: Say) -> Tensor:
    """Upright pixels of a file, ``(C, H, W)`` in [0, 1] with one channel or three."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    from invflow.datasets.sixteen_bits import read_unknown_tiff

    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}")
    Image.init()
    known, said = [name for name in FORMATS if name in Image.OPEN], []
    try:
        with warnings.catch_warnings():
            # a small file that declares a huge image is rejected before memory of that size is allocated
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=known) as file:
                frames = getattr(file, "n_frames", 1)
                if frames > 1:
                    said.append(f"{path.name} holds {frames} images: using the first")
                pixels = _deep_pixels(file, path, said.append)
                if pixels is None:
                    pixels = _levels(file, _pixels(ImageOps.exif_transpose(file), path.name, said.append))
    except UnidentifiedImageError as error:
        try:
            found = read_unknown_tiff(path)
        except Exception as other:  # damaged files can raise any error
            raise ValueError(f"{str(path)!r} is an image that cannot be read: {other}") from other
        if found is not None:
            if found[2]:
                say(f"{path.name} holds several images: using the first")
            return _upright(*found[:2])
        heif = _read_heif(path)
        if heif is not None:
            return _pixels(heif, path.name, say)
        raise ValueError(f"{str(path)!r} is not an image in a supported format, which are "
                         f"{', '.join(known)}") from error
    except Exception as error:  # damaged files can raise any error in Pillow
        reason = str(error) or type(error).__name__
        raise ValueError(f"{str(path)!r} is an image that cannot be read: {reason}") from error
    for sentence in said:
        say(sentence)
    return pixels


def _read_heif(path: Path) -> Any:
    """The image of a HEIC file, as written by phones; None if it is not one."""
    with path.open("rb") as stream:
        head = stream.read(12)
    if head[4:8] != b"ftyp" or head[8:12] not in (b"heic", b"heix", b"hevc", b"mif1", b"msf1"):
        return None
    try:
        import pillow_heif
    except ImportError as error:
        raise ValueError(f"{path.name} is a HEIC file, which pillow-heif reads: pip install pillow-heif") from error
    from PIL import ImageOps

    return ImageOps.exif_transpose(pillow_heif.read_heif(path).to_pillow())


def _deep_pixels(file: Any, path: Path, say: Say) -> Tensor | None:
    """Pixels of an image with 16 bits for each of several channels; None for images that Pillow reads without loss."""
    from invflow.datasets.sixteen_bits import check_tiff, has_sixteen_bits, misread_in_planes, read_sixteen_bits

    if file.format == "TIFF":
        check_tiff(file.tag_v2)
    with path.open("rb") as stream:
        if not has_sixteen_bits(file, stream.read(25)):
            return None
    try:
        if "transparency" in file.info:
            raise ValueError("a transparent colour")
        array = read_sixteen_bits(file, path.read_bytes())
    except (ValueError, RuntimeError, TypeError, zlib.error) as error:
        if file.format == "TIFF" and misread_in_planes(file.tag_v2):
            raise
        say(f"{path.name} has 16 bits per colour, but only 8 are read ({error})")
        return None
    values = _upright(array, file.getexif().get(0x0112, 1))
    if len(values) in (2, 4):
        return _on_white(values[:-1], values[-1:], path.name, say)
    return values.contiguous()


def _upright(array: Any, turned: int) -> Tensor:
    """Convert pixels ``(H, W, C)`` with 16 bits to upright ``(C, H, W)`` in [0, 1]."""
    import numpy as np

    # the eight ways to hold a camera, as EXIF numbers them: mirrored, upside down, on its side
    array = array.swapaxes(0, 1) if turned in (5, 6, 7, 8) else array
    array = array[::-1] if turned in (3, 4, 7, 8) else array
    array = array[:, ::-1] if turned in (2, 3, 6, 7) else array
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32)).permute(2, 0, 1) / 65535


def _levels(file: Any, values: Tensor) -> Tensor:
    """Rescale a TIFF's values if Pillow returns them as they are stored: white may be 0, or the largest of 12 bits."""
    if file.format != "TIFF" or not file.mode.startswith("I;16"):
        return values
    values = values * (65535 / 4095) if file.tag_v2.get(258) == (12,) else values
    return 1 - values if file.tag_v2.get(262) == 0 else values


def _on_white(colour: Tensor, alpha: Tensor, name: str, say: Say) -> Tensor:
    if bool((alpha < 1).any()):
        say(f"{name} is transparent in places: blended with white")
    return colour * alpha + (1 - alpha)


def _pixels(image: Any, name: str, say: Say) -> Tensor:
    import numpy as np

    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        values = torch.from_numpy(np.asarray(image).astype(np.float64))[None]
        limit = 1.0 if image.mode == "F" else 65535.0
        low, high = float(values.min()), float(values.max())
        if not (low >= 0 and high <= limit):  # also for NaN
            raise ValueError(
                f"{name} holds values from {low:.4g} to {high:.4g}, but an image with {image.mode} pixels "
                f"ranges from 0 to {limit:.0f}: save it with 8 or 16 bits"
            )
        return (values / limit).float()
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = torch.from_numpy(np.array(image.convert("RGBA"))).permute(2, 0, 1).float() / 255
        colour = _on_white(rgba[:3], rgba[3:], name, say)
        return colour[:1] if image.mode in ("LA", "La") else colour
    if image.mode in ("CMYK", "YCCK"):
        say(f"{name} is in printing inks ({image.mode}): converted to red, green and blue without a colour profile")
    mode = "L" if image.mode in ("1", "L") else "RGB"
    values = torch.from_numpy(np.array(image.convert(mode))).float() / 255
    return values[None] if mode == "L" else values.permute(2, 0, 1).contiguous()


def _to_channels(image: Tensor, channels: int | None, name: str, say: Say) -> Tensor:
    if channels is None or len(image) == channels:
        return image
    if channels == 3:
        say(f"{name} is grey: its channel was repeated three times")
        return image.expand(3, -1, -1).contiguous()
    if bool((image == image[:1]).all()):  # a grey image saved as colour
        return image[:1]
    say(f"{name} is in colour: converted to grey by its luminance")
    return torch.einsum("chw,c->hw", image, image.new_tensor(_LUMINANCE))[None].clamp(0, 1)


def _read_array(path: Path, say: Say) -> Tensor:
    """A mask or kernel: ``(H, W)`` or ``(C, H, W)``, finite, float32."""
    import numpy as np

    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}")
    if path.suffix.lower() not in (".npy", ".txt"):
        return _to_channels(_read_pixels(path, say), 1, path.name, say)
    try:
        if path.suffix.lower() == ".txt":
            array = np.loadtxt(path, ndmin=2)
        else:
            # never pickled arrays, which can run code. Mapping fails if a header declares more than the file holds
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf" or array.size == 0:
            raise ValueError(f"a {getattr(array, 'dtype', type(array).__name__)} instead of numbers, or empty")
        with np.errstate(over="ignore"):
            values = torch.from_numpy(np.array(array, dtype=np.float32))
    except Exception as error:  # numpy's header is a Python expression: a damaged one can raise any error
        raise ValueError(f"{str(path)!r} holds no array of numbers: {str(error) or type(error).__name__}") from error
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"{str(path)!r} holds values that are not finite")
    return values


def _size(image: Tensor) -> str:
    return f"{image.shape[1]} x {image.shape[2]}"
