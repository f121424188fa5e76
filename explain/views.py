"""The mean of exact explanations over small changes of a picture, which is exact for the mean of the scores. (Ours.)

For views v of a picture with explanations s_v = Σ m_v + Σ_j c_vj + r_v, every part of which is averaged:

    mean(s_v) = Σ mean(m_v) + Σ_j mean(c_vj) + mean(r_v)

with each map m_v moved back to where its pixels came from, so that none of its sum is lost. It is SmoothGrad
(Smilkov et al. 2017, arXiv 1706.03825) for maps that add up: single pixels of both signs cancel, the rest is stable.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import OptionError, TargetError, near_miss
from .attribution import Explanation, explain_scores
from .targets import Target, settled, target_of

__all__ = ["Views", "explain_views", "views_of"]


@dataclasses.dataclass(frozen=True)
class Views:
    """Which views are averaged: the picture itself, and `count` - 1 others.

    Attributes:
        count: how many, 1 or more; `flip` has 2.
        kind: `noise`, Gaussian; `shift`, by whole pixels, with the border repeated; or `flip`, left and right.
        size: of noise the standard deviation, in units of the normalised picture (default 0.2); of shifts the most
            pixels (default a 56th of the side).
        seed: of noise and shifts; the same for every picture.
    """

    count: int = 9
    kind: str = "noise"
    size: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise _wrong(f"knows no {self.kind!r}.{near_miss(self.kind, KINDS)} There are: {', '.join(KINDS)}")
        if isinstance(self.count, bool) or not isinstance(self.count, int) or self.count < 1:
            raise _wrong(f"must be at least 1; got {self.count}")
        if self.kind == "flip" and self.count != 2:
            raise _wrong(f"a picture has 2 views by flips, itself and its mirror image; got {self.count}")
        if self.size is not None and not 0 < self.size < float("inf"):
            raise _wrong(f"size must be above 0; got {self.size}")

    def __str__(self) -> str:
        return f"mean of {self.count} views ({self.kind})"

    def of(self, images: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """For each view: pictures like `images` (B, 3, H, W), and from which rows (H,) and columns (W,) they came."""
        rows, columns = (torch.arange(length) for length in images.shape[-2:])
        yield images, rows, columns
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.count - 1):
            changed, from_rows, from_columns = KINDS[self.kind](self, images, rows, columns, generator)
            yield changed[..., from_rows, :][..., from_columns], from_rows, from_columns


def _wrong(fault: str) -> OptionError:
    return OptionError({"views": fault})


Parts = tuple[Tensor, Tensor, Tensor]


def _noise(views: Views, images: Tensor, rows: Tensor, columns: Tensor, generator: torch.Generator) -> Parts:
    size = 0.2 if views.size is None else views.size
    noise = torch.randn(images.shape[1:], generator=generator).to(images)
    return images + size * noise, rows, columns


def _shift(views: Views, images: Tensor, rows: Tensor, columns: Tensor, generator: torch.Generator) -> Parts:
    most = max(1, round(min(images.shape[-2:]) / 56 if views.size is None else views.size))
    down, right = torch.randint(-most, most + 1, (2,), generator=generator).tolist()
    moved = ((line + by).clamp(0, len(line) - 1) for line, by in ((rows, down), (columns, right)))
    return images, *moved  # type: ignore[return-value]


def _flip(views: Views, images: Tensor, rows: Tensor, columns: Tensor, generator: torch.Generator) -> Parts:
    return images, rows, columns.flip(0)


KINDS: dict[str, Callable[[Views, Tensor, Tensor, Tensor, torch.Generator], Parts]] = {
    "noise": _noise,
    "shift": _shift,
    "flip": _flip,
}


def views_of(given: Views | int | str) -> Views:
    """`Views`, a number of noisy ones, or words as on the command line: `9`, `shift:9`, `flip`.

    Raises OptionError for anything else.
    """
    if isinstance(given, Views):
        return given
    kind, _, count = given.rpartition(":") if isinstance(given, str) else ("", "", given)
    if isinstance(count, str) and not kind and not count.lstrip("-").isdecimal():
        kind, count = count, ""
    if isinstance(count, str):
        if count and not count.lstrip("-").isdecimal():
            raise _wrong(f"must be a number, or {', '.join(f'{name}:NUMBER' for name in KINDS)}; got {given!r}")
        count = int(count) if count else 2 if kind == "flip" else 9
    return Views(count, kind or "noise")


def explain_views(
    model: nn.Module, images: Tensor, target: Any, views: Views | int | str, **options: Any
) -> Explanation:
    """The mean of `explain_scores` over views of `images` (B, 3, H, W), of the target that these have.

    Where a target depends on the output, as the largest class does, that of the picture itself is asked of all views.
    `outputs` are those of the picture itself; scores, maps, constants and residuals are means. There are no
    `encoded_inputs` and `encoded_gradients`: the mean of products is not the product of means.

    Args:
        options: of `explain_scores`. Each view's ledger is checked, so the mean's holds.

    Raises:
        OptionError: `views` are none. Else as `explain_scores`.

    Example: explain_views(student.model, pictures, TopTarget(), 9).contributions
    """
    asked: Target = target_of(target)
    found: list[Explanation] = []
    for pictures, rows, columns in views_of(views).of(images):
        one = explain_scores(model, pictures, asked, **options)
        asked = asked if found else settled(asked, one.outputs)  # the first view is the picture itself
        if one.contributions.shape[-2:] != images.shape[-2:]:
            size = " x ".join(map(str, one.contributions.shape[-2:]))
            raise TargetError(f"views: {type(model).__name__} is explained on {size}, not on its pictures' pixels.")
        direct = None if one.direct is None else _moved_back(one.direct, rows, columns)
        found.append(
            dataclasses.replace(
                one,
                contributions=_moved_back(one.contributions, rows, columns),
                direct=direct,
                encoded_inputs=None,
                encoded_gradients=None,
            )
        )
    return dataclasses.replace(_mean(found), outputs=found[0].outputs)


def _moved_back(maps: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Maps (B, K, H, W) of pictures made of `rows` and `columns` of others, on the pixels of those; sums are kept."""
    for dim, line in ((-2, rows), (-1, columns)):
        maps = torch.zeros_like(maps).index_add_(dim, line.to(maps.device), maps)
    return maps


def _mean(parts: list[Explanation]) -> Explanation:
    """The mean of explanations of the same scores, part by part; a constant that one lacks is 0 there."""

    def mean(tensors: list[Tensor]) -> Tensor:
        return torch.stack(tensors).mean(0)

    def named(field: str) -> dict[str, Tensor]:
        columns = [getattr(part, field) for part in parts]
        names = dict.fromkeys(name for column in columns for name in column)
        nothing = torch.zeros_like(parts[0].scores)
        return {name: mean([column.get(name, nothing) for column in columns]) for name in names}

    tensors = {
        field.name: mean([getattr(part, field.name) for part in parts])
        for field in dataclasses.fields(Explanation)
        if isinstance(getattr(parts[0], field.name), Tensor)
    }
    return Explanation(**tensors, constants=named("constants"), carried=named("carried"), places=parts[0].places)
