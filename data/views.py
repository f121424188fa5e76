"""Views: how a picture is cropped, turned and coloured, how the views of a batch are mixed, and at which size.

What is drawn is a function of seeds: views draw from torch's global generator, which `loader` seeds for each picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torchvision.transforms import InterpolationMode, v2

from ..core.pictures import normalise, without_ends

__all__ = ["MIXES", "Augment", "CentreCrop", "Mix", "Mixing", "mixed", "size_at", "to_model_input"]

GREY = 127  # of 255: the corners of turned pictures


@dataclass(frozen=True)
class Augment:
    """A random crop of `scale` (share of the area) and `ratio` (width to height), flipped with probability `flip`.

    It is turned by at most `turn` degrees (0 to 180) either way, with grey corners, and its colours are changed with
    strength `colour` (0 to 1; SimCLR's, arXiv 2002.05709 appendix A). Neither changes which crops are drawn. On
    tensors: torchvision then resizes in half the time that Pillow takes.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    turn: float = 0.0
    colour: float = 0.0

    def view(self, size: int) -> torch.nn.Module:
        crop = v2.RandomResizedCrop(size, self.scale, self.ratio, InterpolationMode.BICUBIC, antialias=True)
        steps = [v2.PILToTensor(), crop, v2.RandomHorizontalFlip(self.flip)]
        if self.turn:
            steps.append(v2.RandomRotation((-self.turn, self.turn), InterpolationMode.BILINEAR, fill=GREY))
        if self.colour:
            strong, weak = 0.8 * self.colour, 0.2 * self.colour
            steps.append(v2.ColorJitter(strong, strong, strong, hue=weak))
        return v2.Compose(steps)


@dataclass(frozen=True)
class CentreCrop:
    """The shorter side resized to size / crop_pct, then the centre; on Pillow's pictures, exactly as timm evaluates."""

    crop_pct: float = 1.0

    def view(self, size: int) -> torch.nn.Module:
        resize = v2.Resize(int(size / self.crop_pct), InterpolationMode.BICUBIC, antialias=True)
        return v2.Compose([v2.Lambda(without_ends), resize, v2.CenterCrop(size), v2.PILToTensor()])


class Mix(NamedTuple):
    """How the pictures of one step are mixed: a key of MIXES, and the seed of its share and its box."""

    how: str
    seed: int


@dataclass(frozen=True)
class Mixing:
    """With which chance the pictures of a batch are mixed, and how; `mixup` + `cutmix` is at most 1."""

    mixup: float = 0.0
    cutmix: float = 0.0

    def at(self, seed: int, step: int) -> Mix | None:
        """How step `step` of a run with this seed is mixed, if it is."""
        if not self.mixup + self.cutmix:
            return None
        drawn = np.random.default_rng([seed, step, 1])  # two numbers are those of `size_at`
        chance, own = float(drawn.random()), int(drawn.integers(2**63))
        if chance < self.mixup:
            return Mix("mixup", own)
        return Mix("cutmix", own) if chance < self.mixup + self.cutmix else None


# Of torchvision's classes the parts that need no labels.
MIXES: dict[str, v2.MixUp | v2.CutMix] = {"mixup": v2.MixUp(), "cutmix": v2.CutMix()}


def mixed(views: torch.Tensor, before: torch.Tensor, mix: Mix) -> torch.Tensor:
    """`views` (B, 3, S, S) uint8, each mixed with the one before it; before the first comes `before` (3, S, S).

    Draws from the global generator, which it seeds.
    """
    torch.default_generator.manual_seed(mix.seed)
    transform, batch = MIXES[mix.how], torch.cat([before[None], views])
    params = {"labels": None, "batch_size": len(batch), **transform.make_params([batch])}
    # It mixes each row with the one before, the first with the last: of no use here, so the first is left out.
    return transform.transform(batch.float(), params)[1:].round().to(torch.uint8)


def size_at(sizes: Sequence[int], seed: int, step: int) -> int:
    """The one of `sizes` that step `step` of a run with this seed trains at; all are drawn alike often."""
    if len(sizes) == 1:
        return sizes[0]
    return sizes[int(np.random.default_rng([seed, step]).integers(len(sizes)))]


def to_model_input(
    pictures: torch.Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """uint8 (B, 3, S, S) to what models take, (x / 255 - mean) / std, computed on the device."""
    colours = pictures.to(device, non_blocking=True).to(torch.float32) / 255
    return normalise(colours, mean, std).to(dtype)
