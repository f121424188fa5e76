"""Batches of a few small pictures, some of them broken."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import torch
from bcosify.data.index import ShardIndex, index_shards
from bcosify.data.loader import Batch, training_batches
from PIL import Image

SIZE = 16
COUNT = 24


def shards_with_bad(folder: Path, out: Path, bad: dict[int, bytes]) -> ShardIndex:
    """The pictures of `folder` in one shard, some of them with other bytes."""
    with tarfile.open(out, "w") as archive:
        for i, path in enumerate(sorted(folder.iterdir())):
            data = bad.get(i, path.read_bytes())
            info = tarfile.TarInfo(path.name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return index_shards([out])


def train(index: ShardIndex, **changes) -> list[Batch]:
    return list(training_batches(index, **{"seed": 3, "global_batch": 4, "steps": 8, "size": SIZE} | changes))


def assert_same(left: list[Batch], right: list[Batch]) -> None:
    assert len(left) == len(right) > 0
    for a, b in zip(left, right, strict=True):
        assert a.ids.tolist() == b.ids.tolist()
        assert torch.equal(a.pictures, b.pictures)
        assert a.bad == b.bad


def bad_bytes(folder: Path) -> list[bytes]:
    """A picture that was cut, text, nothing, and a header that lies."""
    whole = (folder / "00.jpg").read_bytes()
    png = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(png, "PNG")
    return [whole[: len(whole) // 2], b"<html>404</html>", b"", png.getvalue()[:40] + b"\0" * 30]
