"""The classifier before the pooling: one map for each class, whose mean over places is the logit.

With F (C, Z) the last map at its Z places, p its mean, and logits W p + b:

    M = W F + b,   logits = mean over places of M            (pure pooling: exact, as a mean is linear)
    M = W (g (F - mean_c F) / sigma(p)) + W beta + b         (a layer norm between: its sigma is the pooled vector's)

The explanation of a class is M without its constants, over Z, and needs no backward pass: d logit_c / d M_k = 1/Z for
k = c and 0 for all others, so Grad-CAM at M is M_c / Z, before its ReLU. (GAP heads: Lin et al., arXiv 1312.4400; the
identity: FA-CNN, Farvardin & Chapman, arXiv 2603.25798; moving a pretrained head and the form with a norm: ours.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....core.hooks import hooked
from ...layers.stages import weighed
from .dampening import DampenedSkip, skipping

__all__ = ["ClassMaps", "LastMap", "LastMapChannelsLast", "LastTokens", "PlaceClassifier", "PlaceNorm"]


class LastMap(nn.Module):
    """Mixin: the class maps are made of what this module returns, (B, C, h, w)."""

    def to_maps(self, output: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, C, h, w)."""
        return output


class LastMapChannelsLast(LastMap):
    """Mixin: the same for (B, h, w, C)."""

    def to_maps(self, output: Tensor, size: tuple[int, int]) -> Tensor:
        return output.movedim(-1, 1)


class LastTokens(LastMap):
    """Mixin: the same for (B, N, C), one token a place and no others, in rows."""

    def to_maps(self, output: Tensor, size: tuple[int, int]) -> Tensor:
        tokens = output.shape[1]
        rows = round((tokens * size[0] / size[1]) ** 0.5)
        if tokens % rows:
            raise ValueError(f"{tokens} tokens of a picture of {size[0]}x{size[1]} are no grid")
        return output.movedim(-1, 1).unflatten(2, (rows, tokens // rows))


class PlaceNorm(nn.Module):
    """Mixin over a layer norm of the pooled vector: centres every place, divides it by the pooled vector's sigma."""

    eps: float

    def at_places(self, maps: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w), without the bias."""
        sigma = (maps.mean((2, 3), keepdim=True).var(1, correction=0, keepdim=True) + self.eps).sqrt()
        normed = (maps - maps.mean(1, keepdim=True)) / sigma
        weight = self._parameters.get("weight")
        return normed if weight is None else normed * weight.view(-1, 1, 1)


class PlaceClassifier(nn.Module):
    """Mixin over a linear layer or 1x1 convolution: classifies every place too."""

    weight: nn.Parameter

    def at_places(self, maps: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, K, h, w), without the bias."""
        return F.conv2d(maps, self.weight.flatten(1)[..., None, None])


PartT = TypeVar("PartT", bound=nn.Module)


class ClassMaps(nn.Module):
    """Mixin over a whole model, of which a `LastMap` is a part: its output (B, K) is the mean of its class maps.

    Attributes:
        class_maps: what the maps (B, K, h, w) go through, constants and all; a place for hooks.
    """

    class_maps: nn.Module

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self._mapped(x, *args, **kwargs)[0].mean((2, 3))

    def output_maps(
        self, images: Tensor, weights: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """See `explain.SelfExplaining`."""
        maps, constants = self._mapped(images)
        constant = sum(constants.values(), maps.new_zeros(()))
        shares = (maps - constant.view(-1, 1, 1)) / maps[0, 0].numel()
        return weighed(maps.mean((2, 3)), shares, constants, weights)

    @torch.no_grad()
    def maps_by_depth(self, images: Tensor) -> dict[str, Tensor]:
        """Class maps (B, K, h, w) that the skips alone would carry on from each depth; the last are the model's own.

        Under the name of a dampened block: as if no later block with a skip added anything; blocks without a skip
        are run. "" stands for no block at all. What two neighbours differ in is what the later block adds, and these
        differences add up to the class maps. (Ours, after FA-CNN's maps that morph from layer to layer.)
        """
        blocks = [(name, part) for name, part in self.named_modules() if isinstance(part, DampenedSkip)]
        found = {}
        for depth, name in enumerate(["", *(name for name, _ in blocks)]):
            with skipping(part for _, part in blocks[depth:]):
                found[name] = self._mapped(images)[0]
        return found

    def _mapped(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Class maps with their constants, and these by name."""
        maps, constants = self._last_map(x, *args, **kwargs), {}
        for name, part in [*self._parts(PlaceNorm), *self._parts(PlaceClassifier)]:
            maps = part.at_places(maps)
            constants = {known: part.at_places(value.view(1, -1, 1, 1)).flatten() for known, value in constants.items()}
            if part._parameters.get("bias") is not None:
                constants[f"{name}.bias"] = part._parameters["bias"]
        for constant in constants.values():
            maps = maps + constant.view(-1, 1, 1)
        return self.class_maps(maps), constants

    def _last_map(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(B, C, h, w): what the model computes before it pools; the little that it does afterwards goes unused."""
        ((_, part),) = self._parts(LastMap)
        found: list[Tensor] = []
        with hooked([(part, lambda module, args, output: found.append(output))]):
            super().forward(x, *args, **kwargs)  # type: ignore[misc]
        return part.to_maps(found[-1], (x.shape[-2], x.shape[-1]))

    def _parts(self, kind: type[PartT]) -> list[tuple[str, PartT]]:
        return [(name, part) for name, part in self.named_modules() if isinstance(part, kind)]
