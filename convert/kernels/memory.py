"""Parts of tensors that stay in a CPU's cache while several operations pass over them, and how maps lie in memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["blocks", "blocks_of_all", "layout_of", "room_for"]

# Elements of a block.
BLOCK = 2**16


def blocks(x: Tensor, like: Tensor | None = None, elements: int = BLOCK) -> tuple[Tensor, ...]:
    """x (B, ...) in parts along B, of about so many elements of `like` (B, ...) or of x.

    In one piece on other devices, and where autograd follows, which would keep every part.
    """
    like = x if like is None else like
    if like.dim() < 2 or like.device.type != "cpu" or torch.is_grad_enabled():
        return (x,)
    return x.split(max(1, elements * len(like) // max(1, like.numel())))


def blocks_of_all(like: Tensor, *others: Tensor, elements: int = BLOCK) -> Iterator[tuple[Tensor, ...]]:
    """The same parts of `like` (B, ...) and of `others` (B, ...) at a time."""
    return zip(blocks(like, None, elements), *(blocks(each, like, elements) for each in others), strict=True)


def room_for(part: Tensor, count: int) -> Tensor:
    """An empty tensor (count, ...) for parts like this one (b, ...), maps in its memory format."""
    return torch.empty((count, *part.shape[1:]), dtype=part.dtype, device=part.device, memory_format=layout_of(part))


def layout_of(x: Tensor) -> torch.memory_format:
    """Of maps (B, C, H, W): whether channels lie side by side."""
    return torch.channels_last if x.stride(1) == 1 else torch.contiguous_format
