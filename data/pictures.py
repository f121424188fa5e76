"""The one reader of pictures, for all verbs: whatever a file holds becomes an upright RGB picture of 8 bits a channel.

| a file holds | what is read |
| --- | --- |
| an EXIF orientation | the picture turned upright; damaged EXIF is ignored, with a PictureWarning |
| 16 bits a channel | the upper 8 bits |
| 32-bit integers, floats | white is guessed, with a PictureWarning: see `WHITES` |
| transparency | the colours as stored, without it: as timm, open_clip and transformers read them |
| CMYK, LAB, a palette | Pillow's conversion to RGB |
| an animation, several pages | the first |
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from ..core.errors import DataError
from ..core.words import printable

__all__ = ["PictureWarning", "check_picture", "decode", "is_plain_jpeg", "read_picture", "reason"]

# 32-bit values have no agreed range: white is the first of these that no value exceeds.
WHITES = {"integers": (255, 65535, 2**31 - 1), "floats": (1, 255, 65535)}
OVERSHOOT = 0.1  # of white: how far values may lie outside, as resampling leaves them; they are clipped
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # of TIFF
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


class PictureWarning(UserWarning):
    """A picture was read, but something about it was guessed or ignored."""


def read_picture(path: str | os.PathLike[str]) -> Image.Image:
    """The picture in a file as upright RGB. Raises DataError where there is none, or where it cannot be read."""
    with _readable(path):
        return decode(Path(path).read_bytes(), f"{path}: ")


def check_picture(path: str | os.PathLike[str]) -> None:
    """Raises DataError for a file that is no picture, by its header alone: its pixels are not read."""
    with _readable(path), Image.open(path):
        pass


@contextlib.contextmanager
def _readable(path: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # on broken bytes Pillow raises OSError, SyntaxError, ValueError, struct.error, ...
        raise DataError(f"{path} is no picture that can be read: {reason(error)}.") from error


def decode(data: bytes, name: str = "") -> Image.Image:
    """The picture in `data` as upright RGB; warnings begin with `name`. Raises what Pillow raises on broken bytes."""
    image = _opened(data, name)
    method = UPRIGHT.get(_orientation(image, name))
    image = _eight_bits(image, name)
    return image if method is None else image.transpose(method)


def is_plain_jpeg(data: bytes) -> bool:
    """Whether `data` is an RGB JPEG that `decode` neither turns nor says anything about."""
    if not data.startswith(JPEG):
        return False
    with Image.open(io.BytesIO(data)) as image:
        return image.format == "JPEG" and image.mode == "RGB" and _orientation(image, "") == 1


def reason(error: Exception) -> str:
    """What Pillow said, without the memory addresses that it sometimes says too."""
    return f"{type(error).__name__}: {re.sub(r' <[^>]* at 0x[^>]*>', '', str(error))}"


def _opened(data: bytes, name: str) -> Image.Image:
    """The picture with its pixels in memory."""
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
        return image
    except Exception:
        if (rest := _without_exif(data)) == data:
            raise
        image = _opened(rest, name)  # Pillow refuses a PNG for a wrong checksum of its EXIF
        _warn(f"{name}its EXIF is damaged, so its orientation is ignored")
        return image


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
        exif = image.getexif()
        orientation = exif.get(ExifTags.Base.Orientation, 1)
        if orientation != 1:
            exif.tobytes()  # fails on damaged values
        return orientation
    except Exception:  # noqa: BLE001 - on damaged values Pillow raises anything
        _warn(f"{name}its EXIF is damaged, so its orientation is ignored")
        return 0


def _eight_bits(image: Image.Image, name: str) -> Image.Image:
    """The same picture as RGB."""
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
    values = np.asarray(image)
    if image.mode.startswith("I;16") or image.format in ("PNG", "PPM"):
        bits = tags.get(BITS_PER_SAMPLE, (16,))[0]  # a TIFF may say 12
        greys = (values >> (bits - 8)).clip(0, 255).astype(np.uint8)
    else:
        white = _white(values, "floats" if image.mode == "F" else "integers", name)
        greys = (values * (255 / white)).round().clip(0, 255).astype(np.uint8)
    return 255 - greys if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO else greys


def _white(values: np.ndarray, kind: str, name: str) -> int:
    """The value of white. Raises ValueError where none of WHITES fits."""
    low, high = float(values.min()), float(values.max())  # NaN, where there is one
    white = next((white for white in WHITES[kind] if high <= (1 + OVERSHOOT) * white), None)
    if white is not None and low >= -OVERSHOOT * white:
        _warn(f"{name}its pixels are 32-bit {kind} without a stated range; 0 is read as black, {white} as white")
        return white
    known = ", ".join(map(str, WHITES[kind]))
    raise ValueError(
        f"its pixels are 32-bit {kind} from {low:g} to {high:g}; they must lie between 0 (black) and one of {known} "
        "(white). Save it with 8 or 16 bits"
    )


def _warn(text: str) -> None:
    warnings.warn(printable(text), PictureWarning, stacklevel=2)
