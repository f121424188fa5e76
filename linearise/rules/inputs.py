"""Input layers: what is explained in place of the picture."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ledger import Ledger, frozen, pulled, with_gradient_of
from .rule import Rule, Run

__all__ = ["colours", "encoding", "linear_in_encoding"]


def encoding(
    ledger: Ledger, run: Run, x: Tensor, mean: Any, std: Any, padding: tuple[int, int, int, int] = (0, 0, 0, 0)
) -> Tensor:
    """Functions that encode the picture: what they return is explained, and their border is a constant."""
    x, mean, std = frozen((x, mean, std))
    leaf = ledger.encode(run(x, mean, std, (0, 0, 0, 0)))
    value = run(x, mean, std, padding)
    out = with_gradient_of(value, F.pad(leaf, padding) if any(padding) else leaf.clone())
    inside = F.pad(torch.ones_like(leaf, dtype=torch.bool), padding)
    ledger.enter(out, value.masked_fill(inside, 0), "padding")
    return out


def linear_in_encoding(encode: Run, gradient: Run) -> Rule:
    """Functions that are linear in what `encode` makes of the picture, and compute it from the picture itself."""

    def rule(ledger: Ledger, run: Run, x: Tensor, mean: Any, std: Any, padding: Any, *others: Any) -> Tensor:
        others = frozen(others)
        encoded = encoding(ledger, encode, x, mean, std, padding)
        value, size = run(*frozen((x, mean, std, padding)), *others), encoded.shape
        return pulled(value, encoded, lambda grad: gradient(size, grad, *others))

    return rule


def colours(ledger: Ledger, run: Run, x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """The normalised picture as a linear function of [r, 1 - r], which is explained; r + (1 - r) = 1 spares a constant.

    z = (r - mean) / std = r (1/(2 std) + k) + (1 - r) (-1/(2 std) + k),  k = (1 - 2 mean) / (2 std).
    """
    x, mean, std = frozen((x, mean.view(-1, 1, 1), std.view(-1, 1, 1)))
    r = x * std + mean
    leaf = ledger.encode(torch.cat([r, 1 - r], 1))
    half, k = 1 / (2 * std), (1 - 2 * mean) / (2 * std)
    return with_gradient_of(run(x, mean, std).clone(), leaf[:, :3] * (k + half) + leaf[:, 3:] * (k - half))
