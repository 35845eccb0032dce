"""Image files of cameras and editors: all sixteen bits, all eight orientations, ink colours and transparency."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from invflow.datasets.files import read_image, write_image
from invflow.datasets.pictures import read_picture, write_picture
from invflow.datasets.sixteen_bits import encode_png, encode_tiff

COLOUR = (np.arange(5 * 7 * 3).reshape(5, 7, 3) * 619 % 65536).astype(np.uint16)
EXACT = torch.from_numpy(COLOUR / 65535).permute(2, 0, 1)


class Said(list[str]):
    """Collects what is said."""

    def __call__(self, message: str) -> None:
        self.append(message)


def silent(message: str) -> None:
    raise AssertionError(f"nothing was to be said, but: {message}")


def png(pixels: np.ndarray, colour_type: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG written by the book: 16 bits, no filter."""
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, colour_type, 0, 0, 0)
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in pixels)
    extra = b"".join(chunk(*pair) for pair in chunks)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(lines))
            + chunk(b"IEND", b""))


def tiff(pixels: np.ndarray, order: str = "<", deflate: bool = False, difference: bool = False, rows: int = 2,
         planes: bool = False, lzw: bool = False, **tags: int | None) -> bytes:
    """A TIFF written by the book, in strips of two rows, its directory at the end; t262=None leaves tag 262 out."""
    height, _, channels = pixels.shape
    values = np.diff(pixels, axis=1, prepend=pixels[:, :1] * 0) if difference else pixels
    kind = values.dtype.newbyteorder(order)
    strips = [part.astype(kind).tobytes() for plane in (np.split(values, channels, 2) if planes else [values])
              for part in np.split(plane, range(rows, height, rows))]
    strips = [zlib.compress(s) if deflate else literal_lzw(s) if lzw else s for s in strips]
    data, starts = bytearray({"<": b"II", ">": b"MM"}[order] + struct.pack(f"{order}HI", 42, 0)), []
    def put(values: list[int], kind: str) -> int:
        at = len(data)
        data.extend(struct.pack(f"{order}{len(values)}{kind}", *values))
        return at
    for strip in strips:
        starts.append(len(data))
        data.extend(strip)
    size = 8 * kind.itemsize
    bits = [0, size, size * 65537][channels] if channels < 3 else put([size] * channels, "H")
    offsets, lengths = put(starts, "I"), put([len(s) for s in strips], "I")
    entries = {256: (4, 1, pixels.shape[1]), 257: (4, 1, height), 258: (3, channels, bits),
               259: (3, 1, 8 if deflate else 5 if lzw else 1),
               262: (3, 1, 2), 273: (4, len(strips), offsets), 277: (3, 1, channels), 278: (3, 1, rows),
               279: (4, len(strips), lengths), 284: (3, 1, 2 if planes else 1), 317: (3, 1, 2 if difference else 1)}
    entries |= {int(key[1:]): (3, 1, value) for key, value in tags.items() if value is not None}
    for key in [key for key, value in tags.items() if value is None]:
        del entries[int(key[1:])]
    if len(strips) == 1:
        entries |= {273: (4, 1, starts[0]), 279: (4, 1, len(strips[0]))}
    data[4:8] = struct.pack(f"{order}I", len(data))
    data.extend(struct.pack(f"{order}H", len(entries)))
    for tag, (form, count, value) in sorted(entries.items()):
        packed = struct.pack(f"{order}HH", value, 0) if form == 3 and count == 1 else struct.pack(f"{order}I", value)
        data.extend(struct.pack(f"{order}HHI", tag, form, count) + packed)
    return bytes(data + struct.pack(f"{order}I", 0))


def literal_lzw(strip: bytes) -> bytes:
    """LZW that never looks back: codes of nine bits, as long as there are few of them."""
    assert len(strip) < 250
    bits = "".join(f"{code:09b}" for code in (256, *strip, 257))
    return int(bits.ljust(-(-len(bits) // 8) * 8, "0"), 2).to_bytes(-(-len(bits) // 8), "big")


@pytest.mark.parametrize("data", [
    png(COLOUR, 2), encode_png(COLOUR), encode_tiff(COLOUR), tiff(COLOUR), tiff(COLOUR, ">"), tiff(COLOUR, rows=5),
    tiff(COLOUR, deflate=True), tiff(COLOUR, ">", deflate=True, difference=True), tiff(COLOUR, difference=True),
], ids=["png", "own-png", "own-tiff", "tiff", "tiff-big-endian", "tiff-one-strip", "deflated", "deflated-differences",
        "differences"])
def test_sixteen_bit_colour_is_exact(tmp_path, data: bytes) -> None:
    (tmp_path / "a").write_bytes(data)
    image = read_image(tmp_path / "a", say=silent)
    assert image.dtype == torch.float32
    torch.testing.assert_close(image.double(), EXACT, rtol=0, atol=1e-7)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("rows", [2, 5])
@pytest.mark.parametrize(("deflate", "difference"), [(False, False), (True, False), (True, True)])
def test_planes_of_colour_are_exact(tmp_path, order: str, rows: int, deflate: bool, difference: bool) -> None:
    (tmp_path / "a").write_bytes(tiff(COLOUR, order, deflate, difference, rows, planes=True))
    torch.testing.assert_close(read_image(tmp_path / "a", say=silent).double(), EXACT, rtol=0, atol=1e-7)
    four = np.concatenate([COLOUR, COLOUR[..., :1]], 2)  # a fourth channel of no meaning
    for planes in (True, False):
        (tmp_path / "a").write_bytes(tiff(four, order, deflate, difference, rows, planes=planes, t338=0))
        torch.testing.assert_close(read_image(tmp_path / "a", say=silent).double(), EXACT, rtol=0, atol=1e-7)
    eight = (COLOUR >> 8).astype(np.uint8)
    (tmp_path / "a").write_bytes(tiff(eight, order, deflate, difference, rows, planes=True))
    expected = torch.from_numpy(eight / 255).permute(2, 0, 1)
    torch.testing.assert_close(read_image(tmp_path / "a", say=silent).double(), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("rows", [2, 5])
@pytest.mark.parametrize("white", [True, False])
@pytest.mark.parametrize(("deflate", "difference"), [(False, False), (True, False), (True, True)])
def test_grey_is_exact_whether_white_or_black_is_zero(tmp_path, order: str, rows: int, white: bool, deflate: bool,
                                                      difference: bool) -> None:
    grey = COLOUR[..., :1]
    for pixels, top in ((grey, 65535), ((grey >> 8).astype(np.uint8), 255)):
        (tmp_path / "a").write_bytes(tiff(top - pixels if white else pixels, order, deflate, difference, rows,
                                          t262=0 if white else 1))
        torch.testing.assert_close(read_image(tmp_path / "a", say=silent).double(),
                                   torch.from_numpy(pixels / top).permute(2, 0, 1), rtol=0, atol=1e-7)


@pytest.mark.parametrize("order", ["<", ">"])
def test_several_negatives_are_said(tmp_path, order: str) -> None:
    data = bytearray(tiff(65535 - COLOUR[..., :1], order, t262=0))
    data[-4:] = data[4:8]  # a second image, which is the first
    (tmp_path / "a").write_bytes(data)
    said = Said()
    torch.testing.assert_close(read_image(tmp_path / "a", say=said).double(), EXACT[:1], rtol=0, atol=1e-7)
    assert order == "<" or said == ["a holds several images: using the first"]


def test_packed_tiffs_of_sixteen_bits(tmp_path) -> None:
    (tmp_path / "a").write_bytes(tiff(65535 - COLOUR[..., :1], lzw=True, t262=0))
    torch.testing.assert_close(read_image(tmp_path / "a", say=silent).double(), EXACT[:1], rtol=0, atol=1e-7)
    said = Said()
    for planes in (True, False):
        (tmp_path / "a").write_bytes(tiff(COLOUR, lzw=True, planes=planes))
        assert (read_image(tmp_path / "a", say=said) - EXACT).abs().max() < 0.005
    assert ["but only 8 are read (TIFF with 3 channels" in s for s in said] == [True, True]


def test_twelve_bits_are_as_light_as_sixteen(tmp_path) -> None:
    twelve = COLOUR[:, :6, 0] >> 4
    bits = "".join(f"{value:012b}" for value in twelve.ravel())
    packed = np.frombuffer(int(bits, 2).to_bytes(len(bits) // 8, "big"), np.uint8).reshape(5, 9, 1)
    (tmp_path / "a").write_bytes(tiff(packed, t256=6, t258=12, t262=1))
    expected = torch.from_numpy(twelve / 4095)[None]
    torch.testing.assert_close(read_image(tmp_path / "a", say=silent).double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("data", "words"), [
    (tiff(COLOUR[..., :1].astype(np.int16), t262=1, t339=2), "16 bits, signed"),
    (tiff(COLOUR[..., :1].astype(np.int8), t262=1, t339=2), "8 bits, signed"),
    (tiff(COLOUR.astype(np.int16), t339=2), "16 bits, signed"),
    (tiff(COLOUR[..., :1].astype(np.uint32) * 65537, t262=1), "32 bits, unsigned"),
    (tiff(COLOUR.astype(np.float16), t339=3), "16 bits, floating-point"),
    (tiff(EXACT.permute(1, 2, 0).numpy().astype(np.float32), t339=3), "32 bits, floating-point"),
    (tiff(EXACT[:1].permute(1, 2, 0).numpy().astype(np.float32), t262=0, t339=3), "photometric interpretation 0"),
    (tiff(COLOUR[..., :1], t262=None), "photometric interpretation None"),
    (tiff((COLOUR >> 8).astype(np.uint8), t262=6), "photometric interpretation 6"),
    (tiff(np.concatenate([COLOUR, COLOUR[..., :1]], 2), planes=True, t262=5), "planes in strips"),
    (tiff(np.concatenate([COLOUR, COLOUR[..., :1]], 2), planes=True, t338=1), "planes in strips"),
    (tiff(COLOUR[..., :2], t262=1, t338=2), "2 channels of 16 bits"),
    (tiff(COLOUR[..., :1], ">", lzw=True, t262=0), "compression 5"),
    (tiff(COLOUR[..., :1], ">", t262=0, t266=2), "photometric interpretation 0"),
])
def test_tiffs_of_other_kinds_are_refused_by_their_kind(tmp_path, data: bytes, words: str) -> None:
    (tmp_path / "a.tif").write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.tif.* cannot be read: TIFF with .*, which is not read here") as error:
        read_image(tmp_path / "a.tif", say=silent)
    assert words in str(error.value)


def test_planes_in_tiles_are_refused(tmp_path) -> None:
    tile = np.zeros((16, 16), np.uint16)
    tile[:5, :7] = COLOUR[..., 0]
    data = bytearray(tiff(np.stack([tile] * 3, 2), rows=16, planes=True))
    for tag, other in ((273, 324), (279, 325), (278, 323), (317, 322)):  # a directory of tiles, each one plane
        at = data.index(struct.pack("<HHI", tag, 3 if tag in (278, 317) else 4, 1 if tag in (278, 317) else 3))
        data[at : at + 2] = struct.pack("<H", other)
        if tag == 317:
            data[at + 8 : at + 10] = struct.pack("<H", 16)
    (tmp_path / "a.tif").write_bytes(data)
    with pytest.raises(ValueError, match="planes in tiles, which is not read here"):
        read_image(tmp_path / "a.tif", say=silent)


def in_one_tile(pixels: np.ndarray) -> bytes:
    """A TIFF of ``(5, 7, 3)`` pixels in one tile of 16 x 16."""
    tile = np.zeros((16, 16, 3), pixels.dtype)
    tile[:5, :7] = pixels
    data = bytearray(tiff(tile, rows=16))
    for tag, other, form, value in ((256, 256, 3, 7), (257, 257, 3, 5), (273, 324, 4, None), (278, 323, 3, 16),
                                    (279, 325, 4, None), (284, 284, 3, 1), (317, 322, 3, 16)):
        at = next(data.index(key) for key in (struct.pack("<HHI", tag, form, 1), struct.pack("<HHI", tag, 4, 1))
                  if key in data)
        data[at : at + 2] = struct.pack("<H", other)
        if value is not None:
            data[at + 8 : at + 10] = struct.pack("<H", value)
    return bytes(data)


def test_sixteen_bits_in_tiles_are_read_as_eight_and_it_is_said(tmp_path) -> None:
    said = Said()
    (tmp_path / "a.tif").write_bytes(in_one_tile(COLOUR))
    assert (read_image(tmp_path / "a.tif", say=said) - EXACT).abs().max() < 0.005
    assert ["but only 8 are read (TIFF with 3 channels of 16 bits" in s and "in tiles" in s for s in said] == [True]


def test_colour_in_floating_point_is_refused_by_its_kind_with_a_range_too(tmp_path) -> None:
    (tmp_path / "a.tif").write_bytes(tiff(EXACT.permute(1, 2, 0).numpy().astype(np.float32), t339=3))
    for value_range in (None, (0.0, 1.0)):
        with pytest.raises(ValueError, match=r"TIFF with 3 channels of 32 bits, floating-point .* not read here"):
            read_picture(tmp_path / "a.tif", value_range=value_range, say=silent)


def test_exif_that_a_deep_tiff_loses_is_said(tmp_path) -> None:
    (tmp_path / "a.tif").write_bytes(tiff(COLOUR, t296=2))  # the unit of its resolution
    picture, said = read_picture(tmp_path / "a.tif", say=silent), Said()
    assert (picture.bits, picture.exif is not None) == (16, True)
    torch.testing.assert_close(picture.values.double(), EXACT, rtol=0, atol=1e-7)
    write_picture(picture, tmp_path / "b.tif", say=said)
    assert said == ["b.tif is written without its EXIF: it cannot be stored in a TIFF with 16 bits here"]
    torch.testing.assert_close(read_image(tmp_path / "b.tif", say=silent).double(), EXACT, rtol=0, atol=1e-7)


def test_sixteen_bits_with_transparency_are_laid_on_white(tmp_path) -> None:
    alpha = np.full((5, 7, 1), 65535, np.uint16)
    (tmp_path / "a.png").write_bytes(png(np.concatenate([COLOUR, alpha], 2), 6))
    torch.testing.assert_close(read_image(tmp_path / "a.png", say=silent).double(), EXACT, rtol=0, atol=1e-7)
    alpha[2] = 13107
    for name, data in (("a.png", png(np.concatenate([COLOUR, alpha], 2), 6)), ("a.tif", tiff(np.concatenate(
            [COLOUR, alpha], 2), t338=2))):
        said = Said()
        (tmp_path / name).write_bytes(data)
        image = read_image(tmp_path / name, say=said)
        assert ["blended with white" in s for s in said] == [True]
        torch.testing.assert_close(image.double()[:, 2], 0.2 * EXACT[:, 2] + 0.8, rtol=0, atol=1e-6)
        torch.testing.assert_close(image.double()[:, :2], EXACT[:, :2], rtol=0, atol=1e-6)
    grey = np.concatenate([COLOUR[..., :1], np.full((5, 7, 1), 65535, np.uint16)], 2)
    (tmp_path / "grey.png").write_bytes(png(grey, 4))
    torch.testing.assert_close(read_image(tmp_path / "grey.png", say=silent).double(), EXACT[:1], rtol=0, atol=1e-7)


def test_what_keeps_eight_bits_is_said(tmp_path) -> None:
    said, eight = Said(), torch.from_numpy(COLOUR // 256).permute(2, 0, 1) / 255
    (tmp_path / "a.png").write_bytes(png(COLOUR, 2, (b"tRNS", struct.pack(">3H", 1, 2, 3))))
    assert (read_image(tmp_path / "a.png", say=said) - eight).abs().max() < 0.01
    (tmp_path / "a.tif").write_bytes(tiff(COLOUR, t317=3))  # a predictor for floating-point numbers
    assert read_image(tmp_path / "a.tif", say=said).shape == (3, 5, 7)
    assert ["but only 8 are read" in s for s in said] == [True, True]
    Image.fromarray((COLOUR >> 8).astype(np.uint8)).save(tmp_path / "lzw.tif", compression="tiff_lzw")
    assert torch.equal(read_image(tmp_path / "lzw.tif", say=silent),
                       torch.from_numpy((COLOUR >> 8).astype(np.uint8)).permute(2, 0, 1) / 255)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_files_are_refused_or_said(tmp_path) -> None:
    """Every cut of a deep file is an error that names it, or a picture; nothing else."""
    errors: list[ValueError] = []
    for name, data in (("a.png", png(COLOUR, 2)), ("a.tif", tiff(COLOUR, deflate=True))):
        for cut in range(20, len(data), 23):
            (tmp_path / name).write_bytes(data[:cut])
            try:
                assert read_image(tmp_path / name, say=Said()).shape[0] in (1, 3)
            except ValueError as error:
                errors.append(error)
    assert len(errors) > 5
    assert all("a.png" in str(error) or "a.tif" in str(error) for error in errors)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("deep", [False, True])
def test_all_eight_ways_to_hold_a_camera(tmp_path, orientation: int, deep: bool) -> None:
    eight = (COLOUR >> 8).astype(np.uint8)
    exif = Image.Exif()
    exif[274] = orientation
    path = tmp_path / "a.png"
    if deep:
        path.write_bytes(png(COLOUR, 2, (b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))))
    else:
        Image.fromarray(eight).save(path, exif=exif)
    reference = Image.fromarray(eight)
    reference.getexif()[274] = orientation
    expected = torch.from_numpy(np.array(ImageOps.exif_transpose(reference))).permute(2, 0, 1) / 255
    image = read_image(path, say=silent)
    assert image.shape == ((3, 7, 5) if orientation > 4 else (3, 5, 7))
    torch.testing.assert_close(image, expected, rtol=0, atol=1 / 255 if deep else 1e-7)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("order", ["<", ">"])
def test_tiffs_are_turned_upright(tmp_path, orientation: int, order: str) -> None:
    reference = Image.fromarray((COLOUR >> 8).astype(np.uint8))
    reference.getexif()[274] = orientation
    expected = torch.from_numpy(np.array(ImageOps.exif_transpose(reference))).permute(2, 0, 1) / 255
    for planes in (True, False):
        (tmp_path / "a.tif").write_bytes(tiff(COLOUR, order, planes=planes, t274=orientation))
        torch.testing.assert_close(read_image(tmp_path / "a.tif", say=silent), expected, rtol=0, atol=1 / 255)
    (tmp_path / "a.tif").write_bytes(tiff(65535 - COLOUR[..., :1], order, t262=0, t274=orientation))
    torch.testing.assert_close(read_image(tmp_path / "a.tif", say=silent), expected[:1], rtol=0, atol=1 / 255)


def test_jpegs_webps_palettes_and_inks(tmp_path) -> None:
    smooth = np.stack([*np.meshgrid(np.linspace(40, 200, 48), np.linspace(30, 220, 32)), np.full((32, 48), 90.0)], 2)
    picture = Image.fromarray(smooth.astype(np.uint8))
    expected = torch.from_numpy(smooth).permute(2, 0, 1) / 255
    exif = Image.Exif()
    exif[274] = 8
    picture.save(tmp_path / "a.jpg", quality=98, subsampling=0, exif=exif)
    turned = read_image(tmp_path / "a.jpg", say=silent)
    assert (turned - expected.rot90(1, (1, 2))).abs().max() < 0.03
    picture.save(tmp_path / "a.webp", lossless=True)
    assert (read_image(tmp_path / "a.webp", say=silent) - expected).abs().max() < 0.01
    said = Said()
    picture.convert("CMYK").save(tmp_path / "inks.jpg", quality=98)
    assert (read_image(tmp_path / "inks.jpg", say=said) - expected).abs().max() < 0.05
    assert any("inks" in s for s in said)
    picture.quantize(256).save(tmp_path / "palette.png")
    assert (read_image(tmp_path / "palette.png", say=silent) - expected).abs().mean() < 0.02


@pytest.mark.parametrize("suffix", [".png", ".tif", ".tiff"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("bits", [8, 16])
def test_what_is_written_is_read_again(tmp_path, suffix: str, channels: int, bits: int) -> None:
    image = torch.rand(channels, 6, 9, generator=torch.Generator().manual_seed(0))
    image[:, 0, 0], image[:, 0, 1] = -0.5, 1.5
    write_image(image, tmp_path / f"a{suffix}", bits=bits)
    found = read_image(tmp_path / f"a{suffix}", say=silent)
    assert (found - image.clamp(0, 1)).abs().max() <= 0.5001 / (2**bits - 1)
    assert Image.open(tmp_path / f"a{suffix}").size == (9, 6)  # others can read it too


def test_jpegs_are_written_well_and_sixteen_bits_refused(tmp_path) -> None:
    ramp = torch.linspace(0, 1, 64).expand(3, 48, 64)
    write_image(ramp, tmp_path / "a.jpg")
    assert (read_image(tmp_path / "a.jpg", say=silent) - ramp).abs().max() < 0.03
    for path, bits in (("a.jpg", 16), ("a.png", 12)):
        with pytest.raises(ValueError, match=rf"{bits} bits is not supported.* \.png or \.tif"):
            write_image(ramp, tmp_path / path, bits=bits)
