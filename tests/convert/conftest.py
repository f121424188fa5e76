"""Teachers: real weights once a session, tiny timm models whose every number counts, and photographs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from bcosify.convert import Preprocess, Source, Student, Teacher, convert, load_teacher
from PIL import Image
from torch import Tensor, nn

from folders import write_hf, write_hf_clip, write_open_clip
from tiny import tiny_teacher

PHOTOGRAPHS = ("chelsea.png", "coffee.png", "rocket.jpg", "astronaut.png")


@pytest.fixture(autouse=True)
def offline(monkeypatch) -> None:
    """No test here asks the hub for anything."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def tiny() -> Callable[..., Teacher]:
    """tiny(NAME, size=...): as `tiny_teacher`."""
    return tiny_teacher


@pytest.fixture
def teach() -> Callable[..., Teacher]:
    """teach(MODEL): a Teacher of any module that takes a picture."""

    def make(model: nn.Module, size: int = 16) -> Teacher:
        preprocess = Preprocess((size, size), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        return Teacher(model.eval(), Source("timm:own", "timm", "own"), preprocess)

    return make


@pytest.fixture(scope="session")
def real_teachers() -> dict[str, Teacher]:
    """Both models whose real weights pip packages carry."""
    return {name: load_teacher(f"bundled:{name}") for name in ("efficientnet_lite0", "dinov2_small")}


@pytest.fixture(scope="session")
def _real_students(real_teachers) -> dict[str, Student]:
    return {name: convert(teacher) for name, teacher in real_teachers.items()}


@pytest.fixture
def real_student(_real_students) -> Callable[[str], Student]:
    """real_student(NAME): a fresh copy, free to be changed."""
    import copy

    return lambda name: dataclasses.replace(_real_students[name], model=copy.deepcopy(_real_students[name].model))


@pytest.fixture(scope="session")
def photographs() -> Callable[..., Tensor]:
    """photographs(PREPROCESS, count): (count, 3, H, W) normalised, from scikit-image's own files."""
    spec = find_spec("skimage")
    assert spec is not None and spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0]) / "data"

    def read(preprocess: Preprocess, count: int = len(PHOTOGRAPHS)) -> Tensor:
        transform = preprocess.transform()
        return torch.stack([transform(Image.open(folder / name)) for name in PHOTOGRAPHS[:count]])

    return read


@pytest.fixture
def hf_folder(tmp_path) -> Callable[..., Path]:
    """hf_folder(MODEL CLASS, CONFIG CLASS, SETTINGS...): a folder that save_pretrained wrote, of randomised weights."""
    return lambda model, config, folder="hf", **settings: write_hf(tmp_path / folder, model, config, **settings)


@pytest.fixture
def hf_clip(tmp_path) -> Path:
    """A CLIP with image processor and tokenizer."""
    return write_hf_clip(tmp_path / "hf")


@pytest.fixture
def open_clip_folder(tmp_path) -> Callable[..., Path]:
    """open_clip_folder(VISION SETTINGS...): a folder as open_clip writes it, of randomised weights."""
    return lambda folder="open_clip", **settings: write_open_clip(tmp_path / folder, **settings)
