"""Pictures of explanations.

Tiles are drawn from contributions (H, W). They are averaged over the same squares (`smoothing`) and clipped at the same
limit in all of them, so a place that is blue in one is transparent in another, never opaque:

- `signed_map`: contributions, red for and blue against, on a scale that is symmetric around white.
- `overlay`: that map over the picture in grey.
- `rgba`: what speaks for the score, in the picture's own colours, or in those of the weights W of six channels, after
  B-cos networks (Böhle et al., 2022): a pixel's weights for r, g, b and their complements are W_c / (W_c + W_{1-c}).
  They are opaque there where ||W|| is large, and here where the map is red.

`ledger_parts` and `ledger_bar` draw what a score is the sum of, and `panel` puts it all together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from .attribution import Explanation
from .lettering import FAINT, INK, LINE, WARNING, Colour, beside, label, paragraph, stacked

__all__ = ["Part", "ledger_bar", "ledger_parts", "overlay", "panel", "rgba", "signed_map", "smoothed", "smoothing"]

# From blue (against) over white to red (for), in steps of even lightness.
COLOURS = np.array(
    [(5, 48, 97), (33, 102, 172), (67, 147, 195), (146, 197, 222), (255, 255, 255)]
    + [(244, 165, 130), (214, 96, 77), (178, 24, 43), (103, 0, 31)],
    dtype=np.float64,
)
FOR, AGAINST, CARRIED, CONSTANT = (214, 40, 40), (33, 90, 190), (238, 154, 64), (150, 150, 156)
FRAME = (255, 220, 0)
SQUARES = 30  # maps are averaged over squares of their width by this


def smoothing(width: int, squares: int = SQUARES) -> int:
    """The side of the squares that a map of that width is averaged over, in pixels: odd, 7 of 224."""
    return max(1, width // squares) | 1


def smoothed(contributions: Tensor, side: int) -> Tensor:
    """Contributions (H, W) averaged over squares of `side` pixels (odd), mirrored at the border: the sum stays."""
    values = contributions.detach().cpu().float()
    if side <= 1:
        return values
    mirrored = torch.from_numpy(np.pad(values.numpy(), side // 2, mode="symmetric"))
    return F.avg_pool2d(mirrored[None, None], side // 2 * 2 + 1, 1)[0, 0]


# ---------------------------------------------------------------------------------------------------------------- tiles


def signed_map(contributions: Tensor, *, percentile: float = 99.5, smooth: int | None = None) -> Image.Image:
    """Contributions (H, W) in red (for) and blue (against), RGB.

    Args:
        percentile: of their sizes, from which on the colour is full.
        smooth: side of the squares that are averaged, in pixels; None is `smoothing` of the width.
    """
    return Image.fromarray(_coloured(_strength(contributions, percentile, smooth)[0]))


def overlay(
    image: Image.Image,
    contributions: Tensor,
    *,
    percentile: float = 99.5,
    smooth: int | None = None,
    opacity: float = 0.85,
) -> Image.Image:
    """Contributions (H, W) in red (for) and blue (against) over `image` in grey, RGB; `np.asarray` of it is (H, W, 3).

    The picture stays visible where they are small. Options as of `signed_map`; `opacity` is that of full colour.
    """
    strength, _ = _strength(contributions, percentile, smooth)
    grey = np.asarray(_fitted(image, strength.shape).convert("L"), dtype=np.float64)[..., None] / 255
    mask = opacity * np.abs(strength)[..., None]
    colour = np.where(strength[..., None] > 0, FOR, AGAINST) / 255
    return Image.fromarray(_bytes((1 - mask) * (0.35 + 0.6 * grey) + mask * colour))


def rgba(
    gradients: Tensor | None,
    contributions: Tensor,
    image: Image.Image | None = None,
    *,
    percentile: float = 99.5,
    smooth: int | None = None,
) -> Image.Image:
    """What speaks for the score, as opaque as `signed_map` of the same options is red there, and transparent elsewhere.

    Weights (6, H, W) of the channels [r, 1 - r] have colours of their own, averaged as the contributions (H, W) are.
    Those of any other number have not, and take the colours of `image`, as None does.
    """
    strength, _ = _strength(contributions, percentile, smooth)
    if gradients is not None and len(gradients) == 6:
        side = smoothing(strength.shape[1]) if smooth is None else smooth
        weights = torch.stack([smoothed(channel, side) for channel in gradients])
        positive = weights.clamp_min(0) / weights.abs().amax(0).clamp_min(1e-12)
        colour = (positive[:3] / (positive[:3] + positive[3:]).clamp_min(1e-12)).permute(1, 2, 0).numpy()
    elif image is not None:
        colour = np.asarray(_fitted(image, strength.shape), dtype=np.float64) / 255
    else:
        channels = 0 if gradients is None else len(gradients)
        raise ValueError(f"{channels} channels have no colours of their own; pass the image that was explained.")
    return Image.fromarray(_bytes(np.concatenate([colour, strength.clip(0)[..., None]], -1)), "RGBA")


# --------------------------------------------------------------------------------------------------------------- ledger


class Part(NamedTuple):
    """What a score is made of: a name, a value, and the colour in which it is drawn."""

    name: str
    value: float
    colour: Colour


def ledger_parts(
    explanation: Explanation, picture: int = 0, score: int = 0, *, smooth: int | None = None
) -> list[Part]:
    """What adds up to one score of one picture: what speaks for it and against it, carried biases, constants.

    For and against are sums over what a map shows that is averaged over `smooth` pixels (None is `smoothing` of the
    width): single pixels of both signs cancel there. What goes through carried biases is in the map too, but is a part
    of its own; it is only there where a model carries biases. What is unaccounted for is one where that is more than
    rounding.
    """
    direct = explanation.direct_contributions[picture, score]
    seen = smoothed(direct, smoothing(direct.shape[-1]) if smooth is None else smooth).double()
    origin = _origin(explanation)
    row = explanation.row(picture, score)
    how = "directly " if "carried" in row else ""
    parts = [
        Part(f"{how}from {origin}: for", float(seen.clamp_min(0).sum()), FOR),
        Part(f"{how}from {origin}: against", float(seen.clamp_max(0).sum()), AGAINST),
    ]
    if "carried" in row:
        parts.append(Part(f"from {origin} through carried biases", row["carried"], CARRIED))
    parts.append(Part("from constants", sum(row["constants"].values()), CONSTANT))
    if not explanation.balanced()[picture, score]:
        parts.append(Part("unaccounted for", row["residual"], INK))
    return parts


def added_up(score: float, values: Sequence[float]) -> tuple[str, list[str]]:
    """`score`, and what adds up to it, in decimals that add up as they are written.

    The score has four digits, or fewer where its parts are a thousand times as large. What rounding leaves over goes to
    the largest part.
    """
    sizes = [abs(value) for value in values]
    if not all(map(math.isfinite, (score, *values))) or not sizes:
        return f"{score:.4g}", [f"{value:+.4g}" for value in values]
    size = max(abs(score), max(sizes) / 1000)
    decimals = min(9, max(0, 3 - math.floor(math.log10(size)))) if size else 2
    total, *rounded = (round(value * 10**decimals) for value in (score, *values))
    rounded[int(np.argmax(sizes))] += total - sum(rounded)
    texts = [f"{one / 10**decimals:{'+' if one else ''},.{decimals}f}" for one in rounded]
    return f"{total / 10**decimals:,.{decimals}f}", texts


def ledger_bar(parts: Sequence[Part], score: float, *, width: int = 1000, size: float = 13) -> Image.Image:
    """Parts of a score as one bar on white, RGB: what is above zero to the right, what is below to the left.

    A black line marks the score, where the bar's two sides balance. Below, the numbers, which add up as written.

    Args:
        width: of the picture, in pixels; its height follows from how many lines the numbers take.
        size: of letters, in pixels.
    """
    high = round(1.4 * size)
    bar = Image.new("RGB", (width, high + round(0.8 * size)), "white")
    draw = ImageDraw.Draw(bar)
    top, bottom = round(0.4 * size), round(0.4 * size) + high
    below = sum(-part.value for part in parts if part.value < 0)
    length = (sum(part.value for part in parts if part.value > 0) + below) or 1.0

    def place(value: float) -> int:
        return round((value + below) / length * (width - 1))

    ends = [0.0, 0.0]
    for part in parts:
        side = int(part.value > 0)
        left, right = sorted((ends[side], ends[side] + part.value))
        ends[side] += part.value
        if place(right) > place(left):
            draw.rectangle((place(left), top, place(right), bottom), part.colour)
    draw.rectangle((0, top, width - 1, bottom), outline=LINE)
    draw.line((place(0), 0, place(0), bar.height), FAINT)
    stroke = max(2, round(0.25 * size))
    at = min(max(place(score), stroke // 2), width - 1 - stroke // 2)
    draw.rectangle((at - stroke // 2, 0, at + stroke // 2, bar.height), INK)
    return stacked([bar, _legend(parts, score, width, size)], round(0.3 * size))


def _legend(parts: Sequence[Part], score: float, width: int, size: float) -> Image.Image:
    """`score X = +A from ... -B from ...`, a square of its colour before each part, over as many lines as it takes."""
    total, numbers = added_up(score, [part.value for part in parts])
    side, gap = round(0.75 * size), round(1.3 * size)
    marks = [(max(2, side // 3), INK), *((side, part.colour) for part in parts)]
    texts = [f"score {total} =", *(f"{number} {part.name}" for number, part in zip(numbers, parts, strict=True))]
    entries = []
    for (across, colour), text in zip(marks, texts, strict=True):
        words = label(text, width - 2 * side, size)
        entry = Image.new("RGB", (across + side // 2 + words.width, words.height), "white")
        entry.paste(words, (across + side // 2, 0))
        entry.paste(colour, (0, round(0.95 * size) - side, across, round(0.95 * size)))
        entries.append(entry)
    lines: list[list[Image.Image]] = [[]]
    for entry in entries:
        if lines[-1] and sum(one.width + gap for one in lines[-1]) + entry.width > width:
            lines.append([])
        lines[-1].append(entry)
    return stacked([beside(line, gap) for line in lines])


# ---------------------------------------------------------------------------------------------------------------- panel


def panel(
    image: Image.Image | None,
    explanation: Explanation,
    caption: str = "",
    lines: Sequence[str] = (),
    *,
    picture: int = 0,
    score: int = 0,
    standing: str = "",
    doubts: Sequence[str] = (),
    patch: Sequence[int] | None = None,
    own_colours: bool = False,
    percentile: float = 99.5,
    smooth: int | None = None,
    size: int = 336,
) -> Image.Image:
    """One score of one picture on white: the picture, what adds to the score where, and the ledger below.

    Args:
        image: the picture as the model saw it; None takes it from the encoded input of a converted model.
        caption: the name of what is explained. It wraps where it is long.
        lines: stand below. doubts: stand below in red.
        standing: how the score compares with others, in words.
        patch: (row, column, rows, columns): the place in a grid that is framed.
        own_colours: whether weights of six channels have colours that mean something, as those of aligned students do.
        percentile, smooth: as of `signed_map`, for all tiles.
        size: width of a tile, in pixels.
    """
    contributions = explanation.contributions[picture, score]
    if image is None:
        image = _decoded(explanation.encoded_inputs, picture)
    gradients = explanation.encoded_gradients
    gradients = gradients[picture, score] if own_colours and gradients is not None else None
    coloured = rgba(gradients, contributions, image, percentile=percentile, smooth=smooth)
    places = "pixel" if explanation.places is None else f"of {_origin(explanation)}"
    whose = "the weights' own colours" if gradients is not None and len(gradients) == 6 else "the picture's colours"
    tiles = {
        "The picture as the model sees it" + ("" if patch is None else "; its patch is framed"): image.convert("RGB"),
        f"What each {places} adds: red for, blue against": (
            signed_map(contributions, percentile=percentile, smooth=smooth)
        ),
        "The same over the picture in grey": overlay(image, contributions, percentile=percentile, smooth=smooth),
        f"Only what speaks for it, in {whose}": _on_white(coloured),
    }
    _, limit = _strength(contributions, percentile, smooth)

    unit = max(0.85, size / 336)
    letters, gap, margin = 13 * unit, round(14 * unit), round(20 * unit)
    whole = len(tiles) * size + (len(tiles) - 1) * gap
    height = max(1, round(size * contributions.shape[-2] / contributions.shape[-1]))
    blank = Image.new("RGB", (size, 1), "white")
    row = explanation.row(picture, score)
    parts = ledger_parts(explanation, picture, score, smooth=smooth)
    constants, decide = _constants(row["constants"], float(explanation.constant_share[picture, score]))
    rows = [
        paragraph(caption or f"score {score}", whole, 21 * unit),
        *([paragraph(standing, whole, 15 * unit)] if standing else []),
        beside([paragraph(title, size, 15 * unit) for title in tiles], gap),
        beside([_framed(tile.resize((size, height), Image.Resampling.LANCZOS), patch) for tile in tiles.values()], gap),
        beside([blank, _scale(limit * _pixels_a_place(explanation), places, size, letters), blank, blank], gap),
        ledger_bar(parts, row["score"], width=whole, size=letters),
        stacked(
            [
                paragraph(constants, whole, letters, WARNING if decide else INK),
                *(paragraph(doubt, whole, letters, WARNING) for doubt in doubts),
                *(paragraph(line, whole, letters) for line in lines),
            ]
        ),
    ]
    inside = stacked(rows, round(7 * unit))
    canvas = Image.new("RGB", (inside.width + 2 * margin, inside.height + 2 * margin), "white")
    canvas.paste(inside, (margin, margin))
    return canvas


def _framed(tile: Image.Image, patch: Sequence[int] | None) -> Image.Image:
    """`tile` in a thin line, and in it the place (row, column) of a grid of (rows, columns) in a thick one."""
    draw, (width, height) = ImageDraw.Draw(tile), tile.size
    draw.rectangle((0, 0, width - 1, height - 1), outline=LINE)
    if patch is not None:
        row, column, rows, columns = patch
        left, right = (round(line * width / columns) for line in (column, column + 1))
        top, bottom = (round(line * height / rows) for line in (row, row + 1))
        draw.rectangle((left - 3, top - 3, right + 2, bottom + 2), outline=INK, width=1)
        draw.rectangle((left - 2, top - 2, right + 1, bottom + 1), outline=FRAME, width=2)
        draw.rectangle((left, top, right - 1, bottom - 1), outline=INK, width=1)
    return tile


def _scale(limit: float, places: str, width: int, size: float) -> Image.Image:
    """The colours of a contribution map from -limit to limit, and what they mean."""
    colours = _coloured(np.linspace(-1, 1, width - 2))
    scale = Image.new("RGB", (width, round(0.8 * size)), LINE)
    scale.paste(Image.fromarray(np.broadcast_to(colours, (scale.height - 2, *colours.shape)).copy()), (1, 1))
    ends = [label(text, 2 * width // 5, size, FAINT) for text in (f"against {-limit:.3g}", f"for {limit:+.3g}")]
    between = paragraph(f"each {places}", width - sum(end.width for end in ends), size, FAINT, 0.5)
    words = [ends[0], between, ends[1]]
    return stacked([scale, beside(words)], 1)


# -------------------------------------------------------------------------------------------------------------- numbers


def _origin(explanation: Explanation) -> str:
    """Where contributions come from: pixels, or the places of a map that the model makes itself."""
    return "pixels" if explanation.places is None else f"{math.prod(explanation.places)} places"


def _pixels_a_place(explanation: Explanation) -> float:
    """How many pixels of the maps stand for one place."""
    places = explanation.places
    return 1.0 if places is None else math.prod(explanation.contributions.shape[-2:]) / math.prod(places)


def _strength(contributions: Tensor, percentile: float, smooth: int | None) -> tuple[np.ndarray, float]:
    """Contributions (H, W) in units of the limit at which they are clipped, within [-1, 1], and that limit."""
    values = smoothed(contributions, smoothing(contributions.shape[-1]) if smooth is None else smooth).numpy()
    limit = max(float(np.percentile(np.abs(values), percentile)), 1e-12)
    return (values / limit).clip(-1, 1).astype(np.float64), limit


def _coloured(strength: np.ndarray) -> np.ndarray:
    """Colours (..., 3) of strengths in [-1, 1]."""
    stops = np.linspace(-1, 1, len(COLOURS))
    return np.stack([np.interp(strength, stops, channel) for channel in COLOURS.T], -1).round().astype(np.uint8)


def _bytes(values: np.ndarray) -> np.ndarray:
    return (values.clip(0, 1) * 255).round().astype(np.uint8)


def _constants(values: dict[str, float], share: float, most: int = 3) -> tuple[str, bool]:
    """How much of a score constants make, by size, which are the largest, and whether they decide it."""
    decide = share > 0.5
    said = f"Constants make {'under 1%' if 0 < share < 0.01 else f'{share:.0%}'} of this score"
    if decide:
        said = f"Constants decide: they make {share:.0%} of this score, and no map shows them"
    ranked = sorted(values, key=lambda name: -abs(values[name]))
    if ranked:
        said += "; largest: " + ", ".join(f"{name} {values[name]:+.3g}" for name in ranked[:most])
    return said + (f" ({len(ranked)} in all)" if len(ranked) > most else ""), decide


# ------------------------------------------------------------------------------------------------------------- pictures


def _fitted(image: Image.Image, shape: tuple[int, ...]) -> Image.Image:
    """`image` in RGB, with the height and width of a map."""
    return image.convert("RGB").resize((shape[1], shape[0]), Image.Resampling.BICUBIC)


def _on_white(image: Image.Image) -> Image.Image:
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _decoded(encoded: Tensor | None, picture: int) -> Image.Image:
    """One picture r of [r, 1 - r] (B, 6, H, W)."""
    channels = 0 if encoded is None else encoded.shape[1]
    if encoded is None or channels != 6:
        raise ValueError(f"{channels} explained channels are no picture; pass the image that was explained.")
    return Image.fromarray(_bytes(encoded[picture, :3].permute(1, 2, 0).cpu().numpy()))
