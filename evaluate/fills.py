"""What stands in for parts of a picture that are taken away. Fills act on the picture, before the model encodes it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from .subject import Subject

__all__ = ["FILLS"]


def _grey(subject: Subject, images: Tensor) -> Tensor:
    return subject.normalised(torch.full_like(images, 0.5))


def _mean(subject: Subject, images: Tensor) -> Tensor:
    return torch.zeros_like(images)


def _blur(subject: Subject, images: Tensor) -> Tensor:
    size = 2 * (min(images.shape[-2:]) // 8) + 1
    return gaussian_blur(images, [size, size], [size / 4, size / 4])


def _complement(subject: Subject, images: Tensor) -> Tensor:
    return subject.normalised(1 - subject.colours(images))


# Name -> what stands in for removed regions. `grey` is one half in every colour: its own complement, so it favours
# neither half of [r, 1 - r]. `mean` is the normalisation's mean colour, `blur` the picture without detail (a Gaussian
# of about a sixteenth of the side), `complement` the picture in its complementary colours.
FILLS: dict[str, Callable[[Subject, Tensor], Tensor]] = {
    "grey": _grey,
    "mean": _mean,
    "blur": _blur,
    "complement": _complement,
}
