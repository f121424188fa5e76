"""For all tests: one thread, so that they run side by side and add up the same way everywhere; noise to look at."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from bcosify.convert.randomise import randomise
from torch import Tensor, nn

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # and of the commands that tests start


def draw(size: int, batch: int = 2, seed: int = 1) -> Tensor:
    """A batch of noise, (B, 3, size, size)."""
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(name="randomise")
def _randomise() -> Callable[..., nn.Module]:
    return randomise


@pytest.fixture
def pictures() -> Callable[..., Tensor]:
    return draw
