"""Random weights under which a check means something.

Fresh models have zero biases, unit gains, tiny LayerScale and empty statistics: an error in any of those would not
show. Used where a conversion tries out how a model is built, by the sweep over architectures and by the tests.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core.hooks import hooked
from ..core.torch_internals import AnyBatchNorm

__all__ = ["randomise"]


@torch.no_grad()
def randomise(model: nn.Module, pictures: Tensor | None = None, seed: int = 0) -> nn.Module:
    """Makes every number of `model` count, in place; returns it in eval mode.

    Biases, tables and tokens become noise, gains and LayerScale 1 with noise, BatchNorm's statistics those of
    `pictures` (B, 3, H, W), B > 1, off, so that the signal neither fades nor explodes with depth; noise without them.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(like: Tensor, scale: float) -> Tensor:
        return scale * torch.randn(like.shape, generator=generator).to(like)

    for name, parameter in model.named_parameters():
        parent, _, leaf = name.rpartition(".")
        layer_scale = "gamma" in leaf or leaf.startswith("layer_scale") or parent.rpartition(".")[2].startswith("ls")
        if layer_scale or (leaf == "weight" and parameter.dim() == 1):
            # A gain of 0 ends a residual branch: one of 1 in each would make a deep network chaotic.
            start = 1.0 if layer_scale or parameter.any() else 0.3
            parameter.copy_(start + noise(parameter, 0.1))
        elif parameter.dim() < 2 or not parameter.any():
            parameter.add_(noise(parameter, 0.1))
        elif parameter.std() < 1e-3:
            parameter.add_(noise(parameter, 0.02))
    norms = [
        module for module in model.modules() if isinstance(module, AnyBatchNorm) and module.running_mean is not None
    ]
    seen: set[nn.Module] = set()

    def measure(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Statistics of what the layer really gets, once those before it have theirs."""
        if norm in seen:
            return
        seen.add(norm)
        assert isinstance(norm, AnyBatchNorm) and norm.running_mean is not None and norm.running_var is not None
        values = args[0].transpose(0, 1).flatten(1)
        mean, variance = values.mean(1), values.var(1, correction=0)
        # A channel that is nearly the same everywhere, or next to nothing beside the others, has a variance to divide
        # by that would blow rounding up to the size of the signal.
        square = variance + mean.square()
        variance = variance + 0.1 * square + 0.1 * square.mean()
        # Shifted so that most of what comes is positive: where every rectifier folds half of it, random networks with
        # batch norm are chaotic, and a rounding error grows by a fifth in each layer (arXiv 1902.08129).
        norm.running_mean.copy_(mean - (1.5 + noise(mean, 0.1)) * variance.sqrt())
        norm.running_var.copy_(variance * (0.75 + torch.rand(mean.shape, generator=generator).to(mean)))

    model.eval()
    if pictures is None:
        for norm in norms:
            assert norm.running_mean is not None and norm.running_var is not None
            norm.running_mean.copy_(noise(norm.running_mean, 0.3))
            norm.running_var.copy_(0.5 + 1.5 * torch.rand(norm.running_var.shape, generator=generator))
    elif norms:
        with hooked(before=[(norm, measure) for norm in norms]):
            model(pictures)
    return model
