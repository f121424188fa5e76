"""Subjects: any module, and tiny timm models whose every number counts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
from bcosify.convert import token_grid
from bcosify.evaluate.subject import Subject
from torch import nn

from tiny import tiny_teacher

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


@pytest.fixture(autouse=True)
def offline(monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="session")
def subject_of() -> Callable[..., Subject]:
    """subject_of(MODEL, ...): a Subject of any module."""

    def make(model: nn.Module, name: str = "teacher", classifier: bool = True, **more) -> Subject:
        more = {"tokens": None, "mean": MEAN, "std": STD, "batch_size": 5, **more}
        return Subject(name, model.eval().requires_grad_(False), classifier=classifier, **more)

    return make


@pytest.fixture(scope="session")
def tiny_subject() -> Callable[..., Subject]:
    """tiny_subject(ARCHITECTURE): a randomised timm model at 64 pixels."""

    def make(architecture: str = "test_vit", model: nn.Module | None = None, **more) -> Subject:
        teacher = tiny_teacher(architecture)
        preprocess = teacher.preprocess
        tokens = partial(token_grid, teacher.source)
        found = (model or teacher.model).eval().requires_grad_(False)
        more = {"name": "teacher", "classifier": True, "batch_size": 4, **more}
        return Subject(model=found, tokens=tokens, mean=preprocess.mean, std=preprocess.std, **more)

    return make
