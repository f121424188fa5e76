"""Models whose weights make a check of the ledger mean something."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from bcosify.convert.randomise import randomise
from torch import Tensor, nn


def draw(size: int, batch: int = 2, seed: int = 1) -> Tensor:
    """A batch of noise, (B, 3, size, size)."""
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def make() -> Callable[..., nn.Module]:
    """Builds a timm model for pictures of a size, with random weights, in eval mode."""

    def build(name: str, size: int, told: bool = False) -> nn.Module:
        torch.manual_seed(0)
        model = timm.create_model(name, pretrained=False, num_classes=10, **({"img_size": size} if told else {}))
        return randomise(model, draw(size, batch=4, seed=2))

    return build


@pytest.fixture(name="randomise")
def _randomise() -> Callable[..., nn.Module]:
    return randomise


@pytest.fixture
def pictures() -> Callable[..., Tensor]:
    return draw
