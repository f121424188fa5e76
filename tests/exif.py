"""Pictures with whole and damaged EXIF."""

from __future__ import annotations

import io
import struct
import zlib

import skimage.data
from PIL import Image

CAT = skimage.data.chelsea()[::8, ::8]  # (38, 57, 3)


def encoded(picture: Image.Image, format: str, **options) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, format, **options)
    return stream.getvalue()


def exif_block(resolution: tuple[int, int]) -> bytes:
    """EXIF with orientation 6 and a signed rational."""
    head = b"II*\0" + struct.pack("<I", 8)
    entries = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0) + struct.pack("<HHII", 0x011A, 10, 1, 38)
    return head + struct.pack("<H", 2) + entries + struct.pack("<I", 0) + struct.pack("<iI", *resolution)


def png_with_exif(block: bytes, checksum: int | None = None) -> bytes:
    data = encoded(Image.fromarray(CAT), "PNG")
    body = b"eXIf" + block
    checksum = zlib.crc32(body) if checksum is None else checksum
    return data[:33] + struct.pack(">I", len(block)) + body + struct.pack(">I", checksum) + data[33:]


def jpeg_with_exif(block: bytes) -> bytes:
    return encoded(Image.fromarray(CAT), "JPEG", exif=b"Exif\0\0" + block)


# A signed rational without a value, which Pillow reads and cannot write.
DAMAGED = exif_block((-1, 0))
