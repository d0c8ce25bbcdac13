"""Decoding: orientation, odd modes, damage; and what a placement does to pixels."""

import contextlib
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_sample_image

from kubetuner.config.sections.geometry import Geometry
from kubetuner.data.geometry import Placement, place
from kubetuner.data.pictures import PictureError, check_picture, measure, open_picture, to_pixels

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def quarters() -> Image.Image:
    """48x32: red and green above, blue and white below."""
    image = Image.new("RGB", (48, 32))
    for box, colour in (
        ((0, 0, 24, 16), RED),
        ((24, 0, 48, 16), GREEN),
        ((0, 16, 24, 32), BLUE),
        ((24, 16, 48, 32), WHITE),
    ):
        image.paste(colour, box)
    return image


def corners(image: Image.Image) -> list[tuple[int, ...]]:
    """Colours at upper left, upper right, lower left, lower right, rounded to full or none."""
    points = [(4, 4), (image.width - 5, 4), (4, image.height - 5), (image.width - 5, image.height - 5)]
    pixels = [image.getpixel(point) for point in points]
    return [tuple(255 * (value > 127) for value in pixel) for pixel in pixels if isinstance(pixel, tuple)]


# Turned back to upright by hand: what a viewer shows for each orientation of the same stored pixels.
@pytest.mark.parametrize(
    ("orientation", "shown"),
    [
        (1, [RED, GREEN, BLUE, WHITE]),
        (2, [GREEN, RED, WHITE, BLUE]),
        (3, [WHITE, BLUE, GREEN, RED]),
        (4, [BLUE, WHITE, RED, GREEN]),
        (5, [RED, BLUE, GREEN, WHITE]),
        (6, [BLUE, RED, WHITE, GREEN]),
        (7, [WHITE, GREEN, BLUE, RED]),
        (8, [GREEN, WHITE, RED, BLUE]),
        (99, [RED, GREEN, BLUE, WHITE]),
    ],
)
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_exif_orientation(tmp_path: Path, suffix: str, orientation: int, shown: list[tuple[int, ...]]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned.{suffix}"
    quarters().save(path, exif=exif, quality=95)
    image = open_picture(path)
    assert corners(image) == shown
    size = (32, 48) if orientation in (5, 6, 7, 8) else (48, 32)
    assert image.size == size
    assert measure(path.read_bytes()) == size
    info = check_picture(path.read_bytes())
    assert (info.width, info.height, info.extension) == (*size, suffix)


# Pillow warns about the block; that the picture is opened all the same is the point.
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")
def test_a_damaged_exif_block_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "a.webp"
    quarters().save(path, exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert open_picture(path).size == measure(path.read_bytes()) == (48, 32)


def test_transparent_pixels_are_shown_on_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    image.putpixel((0, 0), (0, 0, 255, 255))
    image.save(tmp_path / "a.png")
    opened = open_picture(tmp_path / "a.png")
    assert opened.getpixel((0, 0)) == BLUE
    assert opened.getpixel((5, 5)) == WHITE


def test_transparent_palette(tmp_path: Path) -> None:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([*BLUE, *RED])
    image.putpixel((0, 0), 0)
    for name, transparency in (("index.gif", 1), ("bytes.png", b"\xff\x00")):
        image.save(tmp_path / name, transparency=transparency)
        opened = open_picture(tmp_path / name)
        assert opened.getpixel((0, 0)) == BLUE
        assert opened.getpixel((5, 5)) == WHITE


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "CMYK", "YCbCr"])
def test_other_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.tif" if mode in ("CMYK", "YCbCr") else "a.png")
    quarters().convert("L").convert("RGB").convert(mode.replace("LA", "L")).convert(mode).save(path)
    opened = open_picture(path)
    assert (opened.mode, opened.size) == ("RGB", (48, 32))
    assert opened.getpixel((40, 28)) == pytest.approx(WHITE, abs=2)


def test_cmyk_jpeg_keeps_its_colours(tmp_path: Path) -> None:
    quarters().convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    assert corners(open_picture(tmp_path / "a.jpg")) == [RED, GREEN, BLUE, WHITE]


def test_sixteen_bit_grey_keeps_its_upper_byte(tmp_path: Path) -> None:
    image = Image.new("I;16", (4, 4), 0x8040)
    image.save(tmp_path / "a.png")
    assert open_picture(tmp_path / "a.png").getpixel((1, 1)) == (0x80, 0x80, 0x80)


def test_floating_point_pixels_are_refused(tmp_path: Path) -> None:
    Image.new("F", (4, 4), 0.5).save(tmp_path / "a.tif")
    with pytest.raises(PictureError, match="floating-point"):
        open_picture(tmp_path / "a.tif")


def png_claiming(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header claims ``width`` x ``height``."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(bytes(100)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")


def jpeg_bytes() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(load_sample_image("china.jpg")).save(stream, "JPEG")
    return stream.getvalue()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file|not a picture"),
        (b"I am a caption, not a picture.\n", "not a picture"),
        (jpeg_bytes()[: len(jpeg_bytes()) // 2], "damaged.*truncated"),
        (png_claiming(100_000, 100_000), "more than 89478485 pixels"),
        (png_claiming(11_000, 11_000), "more than 89478485 pixels"),
        (png_claiming(64, 64), "damaged"),
    ],
    ids=["empty", "text", "truncated", "bomb", "large", "short"],
)
def test_damage_has_a_reason_and_a_name(tmp_path: Path, data: bytes, reason: str) -> None:
    path = tmp_path / "broken.png"
    path.write_bytes(data)
    with pytest.raises(PictureError, match=f"broken.png: ({reason})"):
        open_picture(path)
    with pytest.raises(PictureError, match=reason):
        check_picture(data)


# Pillow warns of damage that it reads past.
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
@given(changes=st.dictionaries(st.integers(0, 400), st.integers(0, 255), max_size=8), kept=st.integers(1, 2000))
def test_damage_anywhere_is_a_picture_error_or_a_picture(kind: str, changes: dict[int, int], kept: int) -> None:
    stream = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    quarters().save(stream, kind, **({"exif": exif} if kind in ("JPEG", "PNG", "WEBP") else {}))
    data = bytearray(stream.getvalue())
    for position, value in changes.items():
        data[position % len(data)] = value
    with contextlib.suppress(PictureError):
        assert check_picture(bytes(data[:kept])).width > 0


def test_measure_says_what_it_cannot_measure() -> None:
    for data, reason in ((b"", "empty"), (b"no", "not a picture"), (png_claiming(100_000, 100_000), "more than")):
        with pytest.raises(PictureError, match=reason):
            measure(data)


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "gif", "ppm", "tif", "jp2", "webp"])
def test_measure_needs_no_pixels(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.effect_noise((400, 300), 50).save(path)
    assert path.stat().st_size > 20_000
    assert measure(path.read_bytes()[:4096]) == (400, 300)


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("RGB", {}),
        ("RGBA", {}),
        ("RGB", {"lossless": True}),
        ("RGBA", {"lossless": True}),
        ("RGB", {"icc_profile": b"x"}),
    ],
)
def test_kinds_of_webp(mode: str, options: dict[str, Any]) -> None:
    stream = io.BytesIO()
    noise = Image.effect_noise((321, 123), 50)
    image = noise.convert("RGB") if mode == "RGB" else Image.merge("RGBA", (noise, noise, noise, noise))
    image.save(stream, "WEBP", **options)
    assert measure(stream.getvalue()[:100]) == (321, 123)
    turned = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(turned, "WEBP", exif=exif, **options)
    assert measure(turned.getvalue()) == (123, 321)
    with pytest.raises(PictureError):
        measure(turned.getvalue()[:100])


def test_a_missing_file_is_a_picture_error(tmp_path: Path) -> None:
    with pytest.raises(PictureError, match=r"gone.png: cannot be read \(No such file"):
        open_picture(tmp_path / "gone.png")
    with pytest.raises(PictureError, match="cannot be read"):
        open_picture(tmp_path)


def test_to_pixels_cuts_where_the_placement_says() -> None:
    placement = Placement(intermediary_size=(48, 32), crop=(8, 16), target_size=(16, 12), bucket="1.33")
    pixels = to_pixels(quarters(), placement)
    assert pixels.shape == (3, 12, 16)
    assert pixels.dtype == torch.float32
    assert pixels.permute(1, 2, 0).is_contiguous(), "not in the order in which Pillow has them"
    assert pixels[:, 0, 0].tolist() == [1, -1, -1]
    assert pixels[:, 0, 15].tolist() == [-1, 1, -1]
    assert pixels[:, 11, 0].tolist() == [-1, -1, 1]
    assert pixels[:, 11, 15].tolist() == [1, 1, 1]


def test_to_pixels_takes_rgb_only() -> None:
    placement = Placement((8, 8), (0, 0), (8, 8), "1.0")
    with pytest.raises(ValueError, match="mode L"):
        to_pixels(Image.new("L", (8, 8)), placement)


@pytest.mark.parametrize("box", [(0, 0, 640, 427), (0, 0, 640, 300), (100, 0, 350, 427), (0, 0, 427, 427)])
@pytest.mark.parametrize("name", ["china.jpg", "flower.jpg"])
@pytest.mark.parametrize("crop", [True, False])
def test_real_photographs(tmp_path: Path, name: str, box: tuple[int, int, int, int], crop: bool) -> None:
    photograph = Image.fromarray(load_sample_image(name)).crop(box)
    photograph.save(tmp_path / name, quality=95)
    image = open_picture(tmp_path / name)
    placement = place(Geometry(resolution=256, crop=crop), *measure((tmp_path / name).read_bytes()), name)
    assert isinstance(placement, Placement)
    pixels = to_pixels(image, placement)
    assert pixels.shape == (3, placement.target_size[1], placement.target_size[0])
    assert -1 <= pixels.min() < -0.5
    assert 0.3 < pixels.max() <= 1
    left, top = placement.crop[1], placement.crop[0]
    scaled = photograph.resize(placement.intermediary_size, Image.Resampling.LANCZOS)
    expected = scaled.getpixel((left + 30, top + 40))
    assert isinstance(expected, tuple)
    assert ((pixels[:, 40, 30] + 1) * 127.5).tolist() == pytest.approx(expected, abs=30)
