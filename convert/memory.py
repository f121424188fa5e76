"""Which memory format a model runs fastest in: channels last for convolutional networks, torch's own for all others.

Functions stay the same to rounding. Convolutions answer in the format of their weights or of their input, and all that
follows keeps it, so laying out the convolutions is enough. Files are always written in torch's own format.
"""

from __future__ import annotations

import torch
from torch import nn

from .blocks import WEIGHT_LAYERS

__all__ = ["laid_out", "memory_format_of"]


def memory_format_of(model: nn.Module) -> torch.memory_format:
    """The format that suits `model` and its pictures: channels last where most of its weight layers are Conv2d.

    A ViT has one, which cuts patches. A ConvNeXt has a third, and gains nothing: it turns its maps by itself.
    """
    layers = [module for module in model.modules() if isinstance(module, WEIGHT_LAYERS)]
    maps = sum(isinstance(layer, nn.Conv2d) for layer in layers)
    return torch.channels_last if 2 * maps > len(layers) else torch.contiguous_format


def laid_out(model: nn.Module) -> nn.Module:
    """`model` itself, its convolutions in the format that suits it; for models that nobody else holds."""
    layout = memory_format_of(model)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=layout)
    return model
