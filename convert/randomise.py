"""Random weights under which a check means something.

Fresh models have zero biases, unit gains, tiny LayerScale and empty statistics: an error in any of those would not
show. Used by the sweep over architectures and by the tests; nothing in a conversion needs it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["randomise"]


@torch.no_grad()
def randomise(model: nn.Module, pictures: Tensor, seed: int = 0) -> nn.Module:
    """Makes every number of `model` count, in place; returns it in eval mode.

    Biases, tables and tokens become noise, gains and LayerScale 1 with noise, BatchNorm's statistics those of
    `pictures` (B, 3, H, W), B > 1, somewhat off, so that the signal does not fade with depth.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(like: Tensor, scale: float) -> Tensor:
        return scale * torch.randn(like.shape, generator=generator).to(like)

    for name, parameter in model.named_parameters():
        parent, _, leaf = name.rpartition(".")
        layer_scale = "gamma" in leaf or leaf.startswith("layer_scale") or parent.rpartition(".")[2].startswith("ls")
        if layer_scale or (leaf == "weight" and parameter.dim() == 1):
            parameter.copy_(1 + noise(parameter, 0.1))
        elif parameter.dim() < 2 or not parameter.any():
            parameter.add_(noise(parameter, 0.1))
        elif parameter.std() < 1e-3:
            parameter.add_(noise(parameter, 0.02))
    model.eval()
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.running_mean is not None]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    if norms:
        model(pictures)
    for norm, momentum in zip(norms, momenta, strict=True):
        assert norm.running_mean is not None and norm.running_var is not None
        norm.running_mean.add_(noise(norm.running_mean, 0.1) * norm.running_var.sqrt())
        norm.running_var.mul_(0.5 + torch.rand(norm.running_var.shape, generator=generator).to(norm.running_var))
        norm.momentum = momentum
    return model.eval()
