"""Optimizers of a phase, one parameter a group, so that every weight may have a learning rate of its own size."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from timm.optim import muon
from torch import nn

from ..convert.layers import scheduled_layers
from ..convert.taps import find_blocks
from .recipe import Phase, Recipe

__all__ = ["OPTIMIZERS", "make_optimizer", "scales"]


def _adamw(groups: list[dict[str, Any]], **settings: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, fused=True, **settings)


class CpuMuon(muon.Muon):
    """timm's Muon, orthogonalising in float32: most CPUs compute bfloat16 step by step.

    A training step of EfficientNet-Lite0 on 8 views took 24 seconds before; with this and `hidden` the optimizer's part
    of it takes 0.2 (AVX2, one thread).
    """

    def step(self, closure: Any = None) -> Any:
        whole = functools.partial(muon.zeropower_via_newtonschulz, dtype=torch.float32)
        with mock.patch.object(muon, "zeropower_via_newtonschulz", whole):
            return super().step(closure)


def _muon(groups: list[dict[str, Any]], **settings: Any) -> torch.optim.Optimizer:
    """Steps as large as AdamW's, so that one learning rate means the same for both."""
    kind = CpuMuon if groups[0]["params"][0].device.type == "cpu" else muon.Muon
    return kind(groups, adjust_lr_fn="match_rms_adamw", nesterov=True, **settings)


def hidden(model: nn.Module) -> set[int]:
    """ids of the parameters that are orthogonalised: matrices and kernels inside blocks, but for depthwise kernels.

    Stem, classifier and vectors are AdamW's (Jordan et al. 2024, Muon); a depthwise kernel is no map between channels.
    In a model without blocks all weight layers count as such (see `find_blocks`).
    """
    inside = {id(p): p for name in find_blocks(model) for p in model.get_submodule(name).parameters()}
    return {key for key, p in inside.items() if p.dim() > 1 and p.shape[1] > 1}


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"adamw": _adamw, "muon": _muon}


def make_optimizer(model: nn.Module, phase: Phase, recipe: Recipe, scales: tuple[float, ...]) -> torch.optim.Optimizer:
    """The optimizer of `phase`; each group's `scale` multiplies the learning rate of its one parameter."""
    groups: list[dict[str, Any]] = [
        {"params": [p], "scale": s} for p, s in zip(model.parameters(), scales, strict=True)
    ]
    if phase.optimizer == "muon":
        orthogonal = hidden(model)
        groups = [group | {"use_fallback": id(group["params"][0]) not in orthogonal} for group in groups]
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
