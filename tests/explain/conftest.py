"""Models whose weights make a check of the ledger mean something."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn

BatchNorm = nn.modules.batchnorm._BatchNorm


def draw(size: int, batch: int = 2, seed: int = 1) -> Tensor:
    """A batch of noise, (B, 3, size, size)."""
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def randomise(model: nn.Module, example: Tensor | None, seed: int = 0) -> nn.Module:
    """Random biases, tables and scales, and residual branches that count, in place of initial zeros.

    BatchNorm statistics are those of `example`, somewhat off, so that the signal does not fade with depth.
    """
    random = torch.Generator().manual_seed(seed)

    def noise(like: Tensor, scale: float) -> Tensor:
        return scale * torch.randn(like.shape, generator=random, dtype=like.dtype)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parent, _, leaf = name.rpartition(".")
            layer_scale = (
                "gamma" in leaf or leaf.startswith("layer_scale") or parent.rpartition(".")[2].startswith("ls")
            )
            if layer_scale or (leaf == "weight" and parameter.dim() == 1):
                parameter.copy_(1 + noise(parameter, 0.1))
            elif parameter.dim() < 2 or not parameter.any():
                parameter.add_(noise(parameter, 0.1))
            elif parameter.std() < 1e-3:
                parameter.add_(noise(parameter, 0.02))
        norms = [module for module in model.modules() if isinstance(module, BatchNorm)]
        if norms:
            for norm in norms:
                norm.momentum = 1.0
            model.train()(example)
            for norm in norms:
                norm.running_mean.add_(noise(norm.running_mean, 0.1) * norm.running_var.sqrt())
                norm.running_var.mul_(0.5 + torch.rand(norm.running_var.shape, generator=random))
    return model.eval()


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
