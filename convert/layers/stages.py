"""Feature stages of timm models, as maps of places, and their heads fed apart. Layouts differ; here they do not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["at_one_place", "features_of", "is_column", "places", "stage_count", "weighed"]


def features_of(model: Any, images: Tensor, stages: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
    """What a timm model hands to its head, and its feature stages of these numbers, (B, d_l, h_l, w_l) each.

    The last stage is what the head reads (`feature_info` may stop before a last convolution, as EfficientNet's does).
    """
    # The last norm fits every block of a column; elsewhere only the last stage, which is taken from behind it anyway.
    final, maps = model.forward_intermediates(images, indices=list(stages), norm=is_column(model), output_fmt="NCHW")
    return final, [*maps[:-1], _spatial(model, final, maps[-1])]


def is_column(model: Any) -> bool:
    """Whether every block is a feature stage of its own, as in a ViT."""
    blocks = getattr(model, "blocks", None)
    return isinstance(blocks, nn.ModuleList | nn.Sequential) and len(blocks) == stage_count(model) > 1


def stage_count(model: Any) -> int:
    """How many feature stages timm lists."""
    return len(getattr(model.feature_info, "info", model.feature_info))


def _spatial(model: Any, final: Tensor, last: Tensor) -> Tensor:
    """(B, d, h, w): the places of what the head reads, be it a map of either layout, or tokens behind others."""
    if final.dim() == 3:
        count = last.shape[-2] * last.shape[-1]
        return final[:, final.shape[1] - count :].transpose(1, 2).unflatten(2, last.shape[-2:])
    return final.movedim(-1, 1) if _channels_last(model) else final


def places(stage: Tensor) -> Tensor:
    """(B, h * w, d) of a map (B, d, h, w)."""
    return stage.flatten(2).transpose(1, 2)


def at_one_place(model: Any, pooled: Tensor, final: Tensor) -> Tensor:
    """Features like `final`, in whose average over places only `pooled` (B, d) is left: one place that holds it."""
    if final.dim() == 3:
        others = torch.zeros_like(final[:, : getattr(model, "num_prefix_tokens", 0)])
        return torch.cat([others, pooled.unsqueeze(1)], 1)
    return pooled[:, None, None] if _channels_last(model) else pooled[:, :, None, None]


def _channels_last(model: Any) -> bool:
    return getattr(model, "output_fmt", "NCHW") == "NHWC"


def weighed(
    outputs: Tensor, maps: Tensor, constants: dict[str, Tensor], weights: Callable[[Tensor], Tensor] | None
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """What `SelfExplaining.output_maps` returns, of maps (B, D, h, w) and constants, (B, D) or (D,), of all outputs."""
    if weights is None:
        return outputs, maps, constants
    wanted = weights(outputs.detach())
    shares = {name: (wanted * constant.unsqueeze(-2)).sum(-1) for name, constant in constants.items()}
    return outputs, torch.einsum("bkd,bdhw->bkhw", wanted, maps), shares
