"""Pictures as tensors: normalised and back, of noise, as a model takes them, and thin ones cropped before resizing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor, nn

__all__ = ["denormalise", "fitted", "noise_pictures", "normalise", "without_ends"]

THIN = 32  # a picture's longer side over its shorter one, beyond which its ends are cut off before it is resized


def normalise(colours: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Colours (..., 3, H, W) in [0, 1] as models take them: (colours - mean) / std for each channel."""
    centre, scale = (colours.new_tensor(values).view(-1, 1, 1) for values in (mean, std))
    return (colours - centre) / scale


def denormalise(pictures: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalised pictures (..., 3, H, W) as colours in [0, 1], but for rounding: the inverse of `normalise`."""
    centre, scale = (pictures.new_tensor(values).view(-1, 1, 1) for values in (mean, std))
    return pictures * scale + centre


def noise_pictures(count: int, size: tuple[int, int], seed: int = 0) -> Tensor:
    """Normalised pictures of smooth noise (count, 3, H, W), the same for the same arguments on every machine."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, max(size[0] // 16, 2), max(size[1] // 16, 2), generator=generator)
    smooth = nn.functional.interpolate(coarse, size=size, mode="bilinear")
    return smooth + 0.2 * torch.randn(count, 3, *size, generator=generator)


def fitted(pictures: Tensor, model: nn.Module) -> Tensor:
    """`pictures` with the precision and on the device of `model`."""
    parameter = next(model.parameters(), None)
    return pictures if parameter is None else pictures.to(parameter)


def without_ends(picture: Image.Image, longest: float = THIN) -> Image.Image:
    """A thin picture without its far ends; others as they are.

    It is for what resizes the shorter side and keeps the centre: a picture of 1 x 3000 pixels would be enlarged to
    256 x 768,000 (590 MB) first. Between `longest` and `longest` + 4 shorter sides are kept, and both ends lose the
    same even multiple of the shorter side: so resizing enlarges alike, and the centre is rounded alike.
    """
    width, height = picture.size
    short, long = min(picture.size), max(picture.size)
    cut = max(0, int((long / short - longest) / 4)) * 2 * short
    if not cut:
        return picture
    return picture.crop((cut, 0, width - cut, height) if width > height else (0, cut, width, height - cut))
