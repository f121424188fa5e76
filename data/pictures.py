"""The one reader of pictures, for all verbs: whatever a file holds becomes an upright RGB picture of 8 bits a channel.

| a file holds | what is read |
| --- | --- |
| an EXIF orientation | the picture turned upright; damaged EXIF is ignored, with a PictureWarning |
| 16 bits a channel | the upper 8 bits |
| 32-bit integers, floats | white is guessed, with a PictureWarning: see `WHITES` |
| transparency | the colours as stored, without it: as timm, open_clip and transformers read them |
| CMYK, LAB, a palette | Pillow's conversion to RGB |
| an animation, several pages | the first |
| more pixels than the limit | a JPEG at 1/2, 1/4 or 1/8 of its size, with a PictureWarning; others are refused |

Only FORMATS are opened: some of Pillow's other formats start programs (Ghostscript for EPS).
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import struct
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
from PIL import ExifTags, Image

from ..core.errors import DataError, DataWarning, first_line
from ..core.files import check_file
from ..core.words import printable

__all__ = [
    "MAX_PIXELS",
    "MAX_PIXELS_VARIABLE",
    "PictureWarning",
    "as_rgb",
    "check_picture",
    "decode",
    "is_plain_jpeg",
    "pixel_limit",
    "read_picture",
    "reason",
]

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "PPM", "JPEG2000", "AVIF", "TGA")
FORMATS += ("DIB", "ICO", "PCX", "PSD", "QOI", "SGI")
MAX_PIXELS = 100_000_000  # Pillow takes 4 bytes for each, and turning or converting a picture needs two copies
MAX_PIXELS_VARIABLE = "BCOSIFY_MAX_PIXELS"
MAX_BYTES = 1 << 30  # of a file

# 32-bit values have no agreed range: white is the first of these that no value exceeds.
WHITES = {
    "16-bit signed integers": (255, 2**15 - 1),
    "32-bit integers": (255, 65535, 2**31 - 1),
    "32-bit floats": (1, 255, 65535),
}
OVERSHOOT = 0.1  # of white: how far values may lie outside, as resampling leaves them; they are clipped
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # of TIFF
PLANAR, SEPARATE = 284, 2
PNG, JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"

UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class PictureWarning(DataWarning):
    """A picture was read, but something about it was guessed or ignored."""


def pixel_limit(max_pixels: int | None = None) -> int:
    """How many pixels a picture may have: `max_pixels`, else $BCOSIFY_MAX_PIXELS, else MAX_PIXELS.

    Raises DataError where that is no number above 0.
    """
    given = os.environ.get(MAX_PIXELS_VARIABLE) if max_pixels is None else str(max_pixels)
    if not given:
        return MAX_PIXELS
    if not given.isdecimal() or not int(given):
        what = MAX_PIXELS_VARIABLE if max_pixels is None else "max_pixels"
        raise DataError(f"{what} is {given!r}; it is a number of pixels, at least 1, such as {MAX_PIXELS}.")
    return int(given)


def read_picture(path: str | os.PathLike[str], max_pixels: int | None = None) -> Image.Image:
    """The picture in a file as upright RGB. Raises DataError where there is none, or where it cannot be read."""
    limit = pixel_limit(max_pixels)
    with _readable(path):
        return decode(Path(path).read_bytes(), f"{path}: ", limit)


def check_picture(path: str | os.PathLike[str]) -> None:
    """Raises DataError for a file that is no picture, by its header alone: its pixels are not read."""
    with _readable(path), _header(path):
        pass


@contextlib.contextmanager
def _readable(path: str | os.PathLike[str]) -> Iterator[None]:
    try:
        check_file(Path(path), MAX_BYTES, DataError)
        yield
    except Exception as error:  # on broken bytes Pillow raises OSError, SyntaxError, ValueError, struct.error, ...
        said = first_line(error) if isinstance(error, DataError) else reason(error)
        raise DataError(f"{path} is no picture that can be read: {said.rstrip('.')}.") from error


def decode(data: bytes, name: str = "", max_pixels: int | None = None) -> Image.Image:
    """The picture in `data` as upright RGB; warnings begin with `name`. Raises what Pillow raises on broken bytes,
    and ValueError where it has more than `pixel_limit` pixels."""
    return as_rgb(_opened(data, name, pixel_limit(max_pixels)), name)


def as_rgb(image: Image.Image, name: str = "") -> Image.Image:
    """A picture that Pillow has opened or made, as upright RGB by the same rules; it may be the very same picture."""
    method = UPRIGHT.get(_orientation(image, name))
    image = _eight_bits(image, name)
    if method is None:
        return image
    turned = image.transpose(method)
    turned.info = {}  # the orientation would still be there, and turn it once more
    return turned


def is_plain_jpeg(data: bytes, max_pixels: int | None = None) -> bool:
    """Whether `data` is an RGB JPEG that `decode` neither turns nor says anything about."""
    if not data.startswith(JPEG):
        return False
    with _header(io.BytesIO(data)) as image:
        plain = image.format == "JPEG" and image.mode == "RGB" and image.width * image.height <= pixel_limit(max_pixels)
        return plain and _orientation(image, "") == 1


def reason(error: Exception) -> str:
    """What Pillow said, without the memory addresses that it sometimes says too."""
    return f"{type(error).__name__}: {re.sub(r' <[^>]* at 0x[^>]*>', '', str(error))}"


def _opened(data: bytes, name: str, limit: int) -> Image.Image:
    """The picture with its pixels in memory."""
    try:
        image = _header(io.BytesIO(data))
        _shrink(image, name, limit)
        image.load()
        return image
    except Exception:
        if (rest := _without_exif(data)) == data:
            raise
        image = _opened(rest, name, limit)  # Pillow refuses a PNG for a wrong checksum of its EXIF
        _warn(f"{name}its EXIF is damaged, so its orientation is ignored")
        return image


_pillows_limit = threading.Lock()


def _header(source: str | os.PathLike[str] | IO[bytes]) -> Image.Image:
    """An opened picture, whose pixels are not read; its size is for others to judge."""
    with _pillows_limit:  # a global of Pillow's, which is checked where a picture is opened
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(source, formats=FORMATS)
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _shrink(image: Image.Image, name: str, limit: int) -> None:
    """Lets a JPEG that is too large be decoded at a part of its size. Raises ValueError where that does not help."""
    width, height = image.size
    if width * height <= limit:
        return
    # A progressive one is kept whole in memory, at whatever size it is decoded.
    if image.format in ("JPEG", "MPO") and not image.info.get("progressive"):
        for part in (2, 4, 8):
            if -(-width // part) * -(-height // part) <= limit:
                image.draft(None, (width // part, height // part))  # pyright: ignore[reportArgumentType]
                if image.size != (width, height):
                    _warn(
                        f"{name}it has {width} x {height} pixels, and the limit is {limit}, so it is read at 1/{part} "
                        "of its size"
                    )
                    return
    raise ValueError(
        f"it has {width} x {height} pixels, and the limit is {limit}. Make it smaller, or raise the limit: "
        f"--max-pixels {width * height}, or {MAX_PIXELS_VARIABLE}={width * height} in the environment"
    )


def _without_exif(data: bytes) -> bytes:
    """A PNG without its eXIf chunk; everything else as it is."""
    kept, here = data[: len(PNG)], len(PNG)
    while data.startswith(PNG) and here + 8 <= len(data):
        length, kind = struct.unpack(">I4s", data[here : here + 8])
        end = here + 12 + length  # length, kind, payload, checksum
        kept += b"" if kind == b"eXIf" else data[here:end]
        here = end
    return kept if data.startswith(PNG) else data


def _orientation(image: Image.Image, name: str) -> int:
    """1 to 8, as EXIF counts them; 0 where EXIF is damaged anywhere: its orientation is not trusted then."""
    try:
        _check_directory(image.info.get("exif") or b"")
        exif = image.getexif()
        orientation = exif.get(ExifTags.Base.Orientation, 1)
        if orientation != 1:
            exif.tobytes()  # fails on damaged values
        return orientation
    except Exception:  # noqa: BLE001 - on damaged values Pillow raises anything
        _warn(f"{name}its EXIF is damaged, so its orientation is ignored")
        return 0


def _check_directory(exif: bytes) -> None:
    """Raises ValueError or struct.error where the bytes end before the first directory does: Pillow drops its entries,
    the orientation among them, with a warning that names no picture."""
    if not exif:
        return
    block = exif.removeprefix(b"Exif\0\0")
    order = ">" if block.startswith(b"MM") else "<"
    (start,) = struct.unpack_from(f"{order}I", block, 4)
    (entries,) = struct.unpack_from(f"{order}H", block, start)
    if start + 2 + 12 * entries > len(block):
        raise ValueError("the directory is cut")


def _eight_bits(image: Image.Image, name: str) -> Image.Image:
    """The same picture as RGB."""
    tags = getattr(image, "tag_v2", {})
    if tags.get(PLANAR) == SEPARATE and max(tags.get(BITS_PER_SAMPLE, (8,))) > 8:
        raise ValueError("it is a TIFF of 16 bits with each channel on its own, which Pillow reads wrongly")
    if image.mode == "RGB":
        return image
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_greys(image, name)).convert("RGB")
    if "transparency" in image.info and image.mode == "P":
        image = image.convert("RGBA")  # Pillow warns where a palette with transparency becomes RGB at once
    return image.convert("RGB")


def _greys(image: Image.Image, name: str) -> np.ndarray:
    """(H, W) uint8 of a grey picture with more than 8 bits, which Pillow's own conversion clips to white."""
    tags = getattr(image, "tag_v2", {})
    values, bits = np.asarray(image), tags.get(BITS_PER_SAMPLE, (16,))[0]  # a TIFF may say 12
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        greys = (values >> (bits - 8)).clip(0, 255).astype(np.uint8)
    else:
        signed = "16-bit signed integers" if bits == 16 and tags else "32-bit integers"
        white = _white(values, "32-bit floats" if image.mode == "F" else signed, name)
        greys = (values * (255 / white)).round().clip(0, 255).astype(np.uint8)
    return 255 - greys if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO else greys


def _white(values: np.ndarray, kind: str, name: str) -> int:
    """The value of white. Raises ValueError where none of WHITES fits."""
    low, high = float(values.min()), float(values.max())  # NaN, where there is one
    white = next((white for white in WHITES[kind] if high <= (1 + OVERSHOOT) * white), None)
    if white is not None and low >= -OVERSHOOT * white:
        _warn(f"{name}its pixels are {kind} without a stated range; 0 is read as black, {white} as white")
        return white
    known = ", ".join(map(str, WHITES[kind]))
    raise ValueError(
        f"its pixels are {kind} from {low:g} to {high:g}; they must lie between 0 (black) and one of {known} "
        "(white). Save it with 8 or 16 bits"
    )


def _warn(text: str) -> None:
    warnings.warn(printable(text), PictureWarning, stacklevel=2)
