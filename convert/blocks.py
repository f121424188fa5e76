"""The blocks of a model, on any architecture.

Blocks are found, not listed: the members of a container (Sequential, ModuleList, ModuleDict, or any module whose
children are all of one class, such as a RegNet's stage) that hold at least two weight layers and no further blocks.
That gives the blocks of a ViT, and the residual blocks (not the stages) of a CNN.
"""

from __future__ import annotations

from torch import nn

__all__ = ["WEIGHT_LAYERS", "blocks_of"]

WEIGHT_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def blocks_of(module: nn.Module, prefix: str = "") -> tuple[str, ...]:
    """Qualified names of the blocks in `module`, in the order of definition; none where it has no blocks."""
    found: tuple[str, ...] = ()
    for name, child in module.named_children():
        below = blocks_of(child, f"{prefix}{name}.")
        weight_layers = sum(isinstance(part, WEIGHT_LAYERS) for part in child.modules())
        if not below and _contains(module) and weight_layers >= 2:
            below = (f"{prefix}{name}",)
        found += below
    return found


def _contains(module: nn.Module) -> bool:
    children = list(module.children())
    alike = len(children) > 1 and len({type(child) for child in children}) == 1
    return isinstance(module, CONTAINERS) or (alike and not isinstance(children[0], CONTAINERS))
