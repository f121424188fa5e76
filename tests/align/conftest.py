"""Photographs in shards, and tiny converted models."""

from __future__ import annotations

from pathlib import Path

import pytest
from bcosify.data.pack import write_shards
from PIL import Image

from runs import converted


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 crops of photographs from scikit-image."""
    from skimage import data

    folder = tmp_path_factory.mktemp("pictures")
    for name, array in {"cat": data.chelsea(), "coffee": data.coffee(), "rocket": data.rocket()}.items():
        picture = Image.fromarray(array)
        for i in range(16):
            left, top = 12 * i, 6 * i
            picture.crop((left, top, left + 160, top + 160)).resize((96, 96)).save(folder / f"{name}-{i}.jpg")
    out = tmp_path_factory.mktemp("shards") / "all"
    write_shards(folder, out, size=None, per_shard=20, progress=False)
    return out


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT."""
    return converted("test_vit", tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="session")
def cnn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CNN with BatchNorm."""
    return converted("test_resnet", tmp_path_factory.mktemp("run"))
