"""Photographs, in a folder and in shards, whole and broken; a cache for each test."""

from __future__ import annotations

from pathlib import Path

import pytest
import skimage.data
from bcosify.data.index import ShardIndex, index_shards
from bcosify.data.names import expand
from bcosify.data.order import order
from bcosify.data.pack import write_shards
from PIL import Image

from batches import COUNT, bad_bytes, shards_with_bad


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch) -> Path:
    """Each test has a cache of its own."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    return cache


@pytest.fixture(scope="session", autouse=True)
def common_cache(tmp_path_factory):
    """For what tests share, away from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """Pieces of real photographs, all different."""
    folder = tmp_path_factory.mktemp("pictures")
    photos = [skimage.data.chelsea(), skimage.data.coffee(), skimage.data.astronaut()]
    for i in range(COUNT):
        y, x = 40 * (i // 6), 40 * (i % 6)
        Image.fromarray(photos[i % 3][y : y + 90, x : x + 130]).save(folder / f"{i:02d}.jpg", quality=95)
    return folder


@pytest.fixture(scope="session")
def index(folder, tmp_path_factory) -> ShardIndex:
    out = tmp_path_factory.mktemp("shards") / "good"
    write_shards(folder, out, size=48, per_shard=7)
    return index_shards(expand(out))


@pytest.fixture
def broken(folder, tmp_path) -> tuple[ShardIndex, set[int]]:
    """Four broken pictures, two of them neighbours in the order of epoch 0."""
    first = order(COUNT, 3, 0)
    ids = [int(first[i]) for i in (1, 2, 9, COUNT - 1)]
    return shards_with_bad(folder, tmp_path / "bad.tar", dict(zip(ids, bad_bytes(folder), strict=True))), set(ids)


@pytest.fixture
def photos(tmp_path) -> Path:
    """Real photographs, in several formats, and two files that are no pictures."""
    folder = tmp_path / "photos"
    (folder / "a.b").mkdir(parents=True)
    Image.fromarray(skimage.data.chelsea()).save(folder / "cat.1.png")
    Image.fromarray(skimage.data.coffee()).save(folder / "coffee.jpeg", quality=95)
    Image.fromarray(skimage.data.rocket()).save(folder / "a.b" / "rocket.webp")
    Image.fromarray(skimage.data.camera()).save(folder / "a.b" / "camera.JPG")
    Image.fromarray(skimage.data.astronaut()[:40, :30]).save(folder / "small.jpg")
    (folder / "broken.jpg").write_bytes((folder / "coffee.jpeg").read_bytes()[:20000])
    (folder / "text.png").write_text("no picture")
    (folder / "notes.txt").write_text("not even meant to be one")
    (folder / ".hidden.jpg").write_text("not seen")
    return folder
