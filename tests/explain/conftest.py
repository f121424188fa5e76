"""Models whose weights make a check of the ledger mean something."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from bcosify.convert.randomise import randomise
from torch import nn


@pytest.fixture
def make(pictures) -> Callable[..., nn.Module]:
    """Builds a timm model for pictures of a size, with random weights, in eval mode."""

    def build(name: str, size: int, told: bool = False) -> nn.Module:
        torch.manual_seed(0)
        model = timm.create_model(name, pretrained=False, num_classes=10, **({"img_size": size} if told else {}))
        return randomise(model, pictures(size, batch=4, seed=2))

    return build
