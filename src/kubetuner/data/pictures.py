"""Opening, measuring and resizing pictures.

Every way in applies the EXIF orientation, so width and height mean what a person sees. Transparent pixels are shown
on white; 16-bit pictures keep their upper 8 bits. Only what ends in tensors needs torch.
"""

import hashlib
import io
import os
import struct
import zlib
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, UnidentifiedImageError

from kubetuner.data.geometry import MAX_PIXELS, Placement
from kubetuner.errors import ArtifactError, DatasetError
from kubetuner.threads import available_cpus

if TYPE_CHECKING:
    from torch import Tensor

NOT_FINITE = "the VAE gave latents that are not finite; remove the picture, or choose another VAE if there are many"
"""Why a picture is left out that was decoded well."""

# A GPU encodes a picture in less time than a thread decodes it, so many threads pay off; each may hold a whole picture.
MAX_DECODING_THREADS = 16

_EXIF_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TURNS_SIDEWAYS = {5, 6, 7, 8}
# What Pillow's decoders raise on damaged files, besides OSError.
_DAMAGE = (
    SyntaxError,
    ValueError,
    TypeError,
    IndexError,
    EOFError,
    ArithmeticError,
    RuntimeError,
    struct.error,
    zlib.error,
)
_EXTENSIONS = {"jpeg": "jpg", "mpo": "jpg", "tiff": "tif"}


class PictureError(DatasetError):
    """A picture that cannot be used; ``reason`` says why without naming it."""

    def __init__(self, reason: str, path: Path | str | None = None) -> None:
        self.reason = reason
        super().__init__(f"{path}: {reason}" if path else reason)


@dataclass(frozen=True)
class PictureInfo:
    """What decoding a picture's bytes showed.

    Attributes:
        width: Pixels, EXIF orientation applied.
        height: Pixels, EXIF orientation applied.
        extension: Usual file extension of the format the bytes really have, without a dot.
    """

    width: int
    height: int
    extension: str


def open_picture(path: Path) -> Image.Image:
    """Decode ``path`` to an upright RGB picture.

    Raises:
        PictureError: It is missing, damaged, too large or no picture.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise PictureError(f"cannot be read ({error.strerror or error})", path) from error
    return decode_picture(data, path)


def decode_picture(data: bytes, path: Path | str) -> Image.Image:
    """Decode the bytes of the file ``path`` to an upright RGB picture.

    Raises:
        PictureError: They are damaged, too large or no picture.
    """
    return _decode(data, path)[0]


def check_picture(data: bytes) -> PictureInfo:
    """Decode a picture's bytes completely and describe it.

    Raises:
        PictureError: The bytes are damaged, too large or no picture.
    """
    image, kind = _decode(data, None)
    return PictureInfo(image.width, image.height, _EXTENSIONS.get(kind, kind))


def decode_layers(data: bytes) -> Image.Image:
    """A picture's bytes as an upright picture: RGB, or RGBA where a part may be transparent.

    Raises:
        PictureError: They are damaged, too large or no picture.
    """
    return _decode(data, None, lambda image: image.convert("RGBA") if image.has_transparency_data else _to_rgb(image))[
        0
    ]


def decode_mask(data: bytes) -> tuple[Image.Image, str]:
    """A mask's bytes as an upright RGB picture, and the usual file extension of their format.

    Raises:
        PictureError: They are damaged, too large or no picture, or a part is transparent: whether that counts or not
            nobody can tell, and shown on white, as pictures are, it would count in full.
    """
    image, kind = _decode(data, None, _opaque_to_rgb)
    return image, _EXTENSIONS.get(kind, kind)


def measure(header: bytes) -> tuple[int, int]:
    """(width, height) of the upright picture, from its first bytes; no pixels are decoded.

    Raises:
        PictureError: The header is missing or damaged or goes on after these bytes, or the picture is too large.
    """
    if not header:
        raise PictureError("empty file")
    if (size := _webp_size(header)) is not None:
        return size
    try:
        with closing(Image.open(io.BytesIO(header))) as image:
            _refuse_bomb(image)
            width, height = image.size
            return (height, width) if _orientation(image) in _TURNS_SIDEWAYS else (width, height)
    except (OSError, *_DAMAGE, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise PictureError(_explain(error)) from error


def _webp_size(header: bytes) -> tuple[int, int] | None:
    """(width, height) by the first chunk of a WebP file (RFC 9649), which Pillow only tells with the whole file.

    ``None`` for other files, and where EXIF data at the file's end may turn the picture.
    """
    body = header[20:30]
    if header[:4] != b"RIFF" or header[8:12] != b"WEBP" or len(body) < 10:
        return None

    def number(start: int, stop: int) -> int:
        return int.from_bytes(body[start:stop], "little")

    kind, size = header[12:16], None
    if kind == b"VP8X" and not body[0] & 0x08:
        size = (number(4, 7) + 1, number(7, 10) + 1)
    elif kind == b"VP8L" and body[0] == 0x2F:
        size = ((number(1, 5) & 0x3FFF) + 1, (number(1, 5) >> 14 & 0x3FFF) + 1)
    elif kind == b"VP8 " and body[3:6] == b"\x9d\x01\x2a":
        size = (number(6, 8) & 0x3FFF, number(8, 10) & 0x3FFF)
    return size if size and 0 < size[0] * size[1] <= MAX_PIXELS else None


def to_bytes(image: Image.Image, placement: Placement) -> "Tensor":
    """Resize (Lanczos) and cut an RGB picture: uint8 of shape [3, height, width].

    In memory a pixel's colours stay side by side, as Pillow gives them and autoencoders take them.
    """
    import torch

    if image.mode != "RGB":
        raise ValueError(f"to_bytes takes an RGB picture, got mode {image.mode}; open it with open_picture")
    if image.size != placement.intermediary_size:
        image = image.resize(placement.intermediary_size, Image.Resampling.LANCZOS)
    top, left = placement.crop
    width, height = placement.target_size
    if image.size != placement.target_size:
        image = image.crop((left, top, left + width, top + height))
    colours = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return colours.view(height, width, 3).permute(2, 0, 1)


def read_pixels(path: Path | str, sha256: str, sample: str, placement: Placement) -> "Tensor":
    """As :func:`to_bytes`, of the file ``path``; the bytes that are decoded are the ones that were hashed.

    Raises:
        ArtifactError: The picture is not there, or is not what ``sha256`` says; names it as ``sample``.
    """
    data = b""
    if os.path.isfile(path):
        with open(path, "rb") as stream:
            data = stream.read()
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ArtifactError(f"{path}, the picture of {sample}, is missing or damaged; run download_dataset again")
    return to_bytes(decode_picture(data, path), placement)


def decoding_threads() -> int:
    """How many threads should call :func:`read_pixels`."""
    return min(MAX_DECODING_THREADS, available_cpus())


def to_floats(colours: "Tensor") -> "Tensor":
    """Float32 in -1..1 of uint8 colours, of the same shape and on the same device."""
    import torch

    return colours.to(torch.float32).div_(127.5).sub_(1.0)


def to_pixels(image: Image.Image, placement: Placement) -> "Tensor":
    """Resize (Lanczos) and cut an RGB picture: float32 of shape [3, height, width] in -1..1."""
    return to_floats(to_bytes(image, placement))


def _decode(
    data: bytes, path: Path | str | None, convert: Callable[[Image.Image], Image.Image] | None = None
) -> tuple[Image.Image, str]:
    """The upright RGB picture, as ``convert`` (default: on white) makes it, and the lower-case name of its format."""
    if not data:
        raise PictureError("empty file", path)
    try:
        with Image.open(io.BytesIO(data)) as image:  # Its end closes the stream; closing(image) would take the pixels.
            _refuse_bomb(image)
            kind = (image.format or "bin").lower()
            image.load()
            orientation = _orientation(image)
            upright = (convert or _to_rgb)(image)
    except (OSError, *_DAMAGE, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise PictureError(_explain(error), path) from error
    return (upright.transpose(_TURNS[orientation]) if orientation in _TURNS else upright), kind


def _refuse_bomb(image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise Image.DecompressionBombError


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation; 1 where there is none or the EXIF block is damaged."""
    try:
        # Not image.getexif(): for PNG that decodes the pixels, in search of a block after them.
        value = Image.Image.getexif(image).get(_EXIF_ORIENTATION, 1)
    except _DAMAGE:
        return 1
    return value if isinstance(value, int) else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if image.mode == "I" or image.mode.startswith("I;16"):
        return image.convert("I").point(lambda value: value * (1 / 256)).convert("L").convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")  # convert would copy what is RGB already.


def _opaque_to_rgb(image: Image.Image) -> Image.Image:
    if image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema() != (255, 255):
        raise PictureError("a part of it is transparent; save it without transparency: white counts, black does not")
    return _to_rgb(image)


def _explain(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read ({error.strerror})"
    if isinstance(error, UnidentifiedImageError):
        return "not a picture in a format that Pillow knows"
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return f"more than {MAX_PIXELS} pixels; make it smaller"
    return f"damaged ({error})"
