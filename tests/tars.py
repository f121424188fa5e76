"""Tars for tests, with pictures of noise; webdataset's own reader is the judge."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image


def jpeg(seed: int = 0, size: tuple[int, int] = (24, 16)) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)
    Image.fromarray(pixels).save(stream, "JPEG")
    return stream.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def simple_tar(path: Path, count: int = 5, first: int = 0) -> Path:
    return write_tar(path, [(f"k{i:04d}.jpg", jpeg(i)) for i in range(first, first + count)])


def samples_of(path: Path) -> list[dict]:
    """What webdataset reads."""
    return list(webdataset.WebDataset(str(path), shardshuffle=False))
