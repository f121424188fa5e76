"""What is made of a library's model here is compared with the library itself, when the model is loaded.

Pictures: the record of preprocessing against the library's own processor, on an odd-sized picture, wide and upright.
Outputs: the teacher against the library's own forward pass, on a picture of the model's own size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor, nn

from ...core.errors import SourceError, first_line
from ...core.pictures import fitted, noise_pictures
from ...core.tensors import relative_error
from .base import Preprocess

__all__ = ["check_extent", "check_outputs", "check_pictures", "odd_pictures", "odd_square", "picture_difference"]

# Of numbers around 1; both sides do the same arithmetic in float32.
PICTURE_LIMIT = 1e-4
# Relative. Position tables that are resampled where they should not be differ by more than 1e-3.
OUTPUT_LIMIT = 1e-5
MOST_PIXELS = 4096  # a side; a picture of it is prepared whenever a model is loaded

Transform = Callable[[Image.Image], Tensor]


@functools.cache
def odd_pictures() -> tuple[Image.Image, ...]:
    """A wide picture with odd sides and three unlike channels, and an upright one; the same on every machine."""
    noise = noise_pictures(1, (237, 331))[0] * 40
    shades = noise + torch.tensor([100.0, 128.0, 160.0]).view(3, 1, 1)
    wide = Image.fromarray(shades.clamp(0, 255).round().byte().permute(1, 2, 0).contiguous().numpy())
    return wide, wide.transpose(Image.Transpose.ROTATE_90)


@functools.cache
def odd_square() -> tuple[Image.Image, ...]:
    """The middle of the odd pictures, for what shows squares alone as the library does."""
    return (odd_pictures()[0].crop((40, 0, 277, 237)),)


def picture_difference(ours: Transform, theirs: Transform, pictures: Sequence[Image.Image] = ()) -> float:
    """The largest difference of two transforms on odd pictures, over their largest number where that is above 1.

    Infinite where their shapes differ.
    """
    worst = 0.0
    for picture in pictures or odd_pictures():
        found, wanted = ours(picture), theirs(picture)
        if found.shape != wanted.shape:
            return float("inf")
        worst = max(worst, float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1)))
    return worst


def check_pictures(
    reference: str, record: Preprocess, theirs: Transform, name: str, pictures: Sequence[Image.Image] = ()
) -> Preprocess:
    """`record` itself; raises SourceError where its transform is not `theirs`, that of the library's `name`."""
    check_extent(reference, record, name)
    try:
        error = picture_difference(record.transform(), theirs, pictures)
    except SourceError:
        raise
    except Exception as failure:  # either may refuse what the other takes, in its own way
        raise SourceError(
            f"{reference}: {name} does not prepare an ordinary photograph: {first_line(failure)}. "
            "Mend its settings, or pass a model with another one."
        ) from failure
    if not error <= PICTURE_LIMIT:
        raise SourceError(
            f"{reference}: {name} prepares pictures in a way that is not followed here: an odd-sized picture differs "
            f"by {error:.2g} from what its settings say ({_told(record)}). Followed are resizing to one size, a crop "
            "of the centre, rescaling and normalising."
        )
    return record


def check_extent(reference: str, record: Preprocess, name: str) -> None:
    """Raises SourceError for pictures that are larger than those of any model; call it before one is prepared."""
    largest = max(record.size) / record.crop_pct
    if not largest <= MOST_PIXELS:
        raise SourceError(
            f"{reference}: {name} makes pictures of {largest:,.0f} pixels a side; the most is {MOST_PIXELS:,}. "
            "Mend its settings."
        )


def _told(record: Preprocess) -> str:
    """What resizes and crops in a record, in words."""
    height, width = record.size
    return f"{height} x {width}, {record.interpolation}, {record.crop_mode}, crop_pct {record.crop_pct:.4g}"


@torch.no_grad()
def check_outputs(reference: str, ours: nn.Module, theirs: Tensor, pictures: Tensor, name: str) -> None:
    """Raises SourceError where `ours` of `pictures` (B, 3, H, W) is not `theirs`, what the library's `name` says."""
    found = ours(fitted(pictures, ours))
    if found.is_meta:  # shapes alone, under torch.device("meta"): nothing to compare
        return
    same = found.shape == theirs.shape
    error = relative_error(found.float(), theirs.float()) if same else float("inf")
    if not error <= OUTPUT_LIMIT:
        size = " x ".join(map(str, pictures.shape[-2:]))
        raise SourceError(
            f"{reference}: the teacher differs from the library's own {name} by {error:.1e} on a picture of {size}, "
            "the model's own size. It is not followed rightly here, and nothing was converted. Please report it with "
            "the versions of your libraries."
        )
