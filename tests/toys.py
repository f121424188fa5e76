"""Models whose explanations are known in closed form."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Linear(nn.Module):
    """outputs (B, K) = weights (K, 3, H, W) · pictures + biases (K,): its contributions are weights times picture."""

    def __init__(self, weights: Tensor, biases: Tensor | None = None) -> None:
        super().__init__()
        self.head = nn.Linear(weights[0].numel(), len(weights))
        with torch.no_grad():
            self.head.weight.copy_(weights.flatten(1))
            self.head.bias.copy_(torch.zeros(len(weights)) if biases is None else biases)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.head(pictures.flatten(1))


class CellSums(nn.Module):
    """Class k's logit is the sum of colour k's positive values: takes any size, and sees every colour where it is."""

    def forward(self, pictures: Tensor) -> Tensor:
        return pictures.clamp_min(0).sum((2, 3))
