"""Optimizers of a phase, one parameter a group, so that every weight may have a learning rate of its own size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.optim.muon import Muon
from torch import nn

from ..convert.layers import scheduled_layers
from .recipe import Phase, Recipe

__all__ = ["OPTIMIZERS", "make_optimizer", "scales"]


def _adamw(groups: list[dict[str, Any]], **settings: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, fused=True, **settings)


def _muon(groups: list[dict[str, Any]], **settings: Any) -> torch.optim.Optimizer:
    """Steps as large as AdamW's, so that one learning rate means the same for both."""
    return Muon(groups, adjust_lr_fn="match_rms_adamw", nesterov=True, **settings)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"adamw": _adamw, "muon": _muon}


def make_optimizer(model: nn.Module, phase: Phase, recipe: Recipe, scales: tuple[float, ...]) -> torch.optim.Optimizer:
    """The optimizer of `phase`; each group's `scale` multiplies the learning rate of its one parameter."""
    groups = [{"params": [p], "scale": s} for p, s in zip(model.parameters(), scales, strict=True)]
    settings = {"lr": phase.learning_rate, "weight_decay": recipe.weight_decay, "betas": recipe.betas}
    return OPTIMIZERS[phase.optimizer](groups, **settings)


@torch.no_grad()
def scales(model: nn.Module, relative: bool) -> tuple[float, ...]:
    """Root mean square of every parameter, or ones; at least the size that a layer names for what starts at zero."""
    named = {
        id(layer.get_parameter(name)): size
        for _, layer in scheduled_layers(model)
        for name, size in layer.natural_sizes.items()
    }
    # Never so small that a parameter could not leave zero.
    return tuple(
        max(float(p.square().mean().sqrt()), named.get(id(p), 1e-4)) if relative else 1.0 for p in model.parameters()
    )
