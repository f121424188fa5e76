"""block-own: every block is fed what the student's earlier blocks make, without a gradient to them, and fitted to the
teacher's output. Inputs are those that it will have; errors still do not run through. (Ours.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...convert.taps import Call, find_blocks
from .base import FeatureConfig, Objective, objective

__all__ = ["BlockOwn"]


@objective("block-own", FeatureConfig)
class BlockOwn(Objective):
    """Every block on the student's own input of it, which gives no gradient to what made it."""

    def __init__(self, student: nn.Module, config: FeatureConfig) -> None:
        self.blocks = find_blocks(student)
        super().__init__(student, config, self.blocks)

    def forward(self, pictures: Tensor, calls: dict[str, Call], output: Tensor) -> dict[str, Tensor]:
        handles = [self.student.get_submodule(name).register_forward_pre_hook(_cut) for name in self.blocks]
        try:
            pairs, ours_output = self._compared(pictures, calls)
        finally:
            for handle in handles:
                handle.remove()
        losses = {name: self._distance(name, *pair) for name, pair in pairs.items()}
        losses["output"] = self._distance("output", ours_output, output)
        return {**losses, "total": torch.stack(list(losses.values())).sum()}


def _cut(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value.detach() if isinstance(value, Tensor) else value for value in args)
