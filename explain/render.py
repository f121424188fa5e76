"""Pictures of explanations.

- `rgba`: the explanation in the picture's own colours, after B-cos networks (Böhle et al., 2022): the weights W of a
  pixel, for r, g, b and their complements, are a colour  W_c / (W_c + W_{1-c}),  opaque where ‖W‖ is large, and
  transparent where the pixel speaks against the score.
- `signed_map`: contributions, red for and blue against, on a scale that is symmetric around white.
- `overlay`: that map over the picture in grey.
- `panel`: all of it side by side, with the score and what it is made of. Models that explain themselves, without
  weights of pixels, have the overlay in place of the explanation in colours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..core.words import one_line
from .attribution import Explanation

__all__ = ["overlay", "panel", "rgba", "signed_map"]

# From blue (against) over white to red (for), in steps of even lightness.
COLOURS = np.array(
    [(5, 48, 97), (33, 102, 172), (67, 147, 195), (146, 197, 222), (255, 255, 255)]
    + [(244, 165, 130), (214, 96, 77), (178, 24, 43), (103, 0, 31)],
    dtype=np.float64,
)
INK, FAINT = (28, 28, 30), (110, 110, 115)


def rgba(
    gradients: Tensor,
    contributions: Tensor,
    image: Image.Image | None = None,
    *,
    percentile: float = 99.5,
    smooth: int = 15,
) -> Image.Image:
    """The explanation from weights (C, H, W) and contributions (H, W), as a transparent picture.

    Six channels [r, 1 - r] have colours of their own. Weights of any other number do not, and take those of `image`.
    Opacity is averaged over `smooth` pixels and is full from `percentile` on.
    """
    weights, contributions = gradients.detach().cpu().float(), contributions.detach().cpu().float()
    opacity = torch.linalg.vector_norm(weights, dim=0).where(contributions > 0, 0)
    opacity = _averaged(opacity, smooth)
    opacity = (opacity / _quantile(opacity, percentile)).clamp(0, 1)
    if len(weights) == 6:
        positive = weights.clamp_min(0) / weights.abs().amax(0).clamp_min(1e-12)
        colour = (positive[:3] / (positive[:3] + positive[3:]).clamp_min(1e-12)).permute(1, 2, 0)
    elif image is not None:
        colour = torch.from_numpy(np.asarray(_fitted(image, opacity.shape), dtype=np.float32) / 255)
    else:
        raise ValueError(f"{len(weights)} channels have no colours of their own; pass the image that was explained.")
    return Image.fromarray(_bytes(torch.cat([colour, opacity[..., None]], -1).numpy()), "RGBA")


def signed_map(contributions: Tensor, *, percentile: float = 99.5, smooth: int = 1) -> Image.Image:
    """Contributions (H, W) in red (for) and blue (against); full colour from `percentile` of their size on."""
    strength, _ = _strength(contributions, percentile, smooth)
    return Image.fromarray(_coloured(strength))


def overlay(
    image: Image.Image, contributions: Tensor, *, percentile: float = 99.5, smooth: int = 1, opacity: float = 0.85
) -> Image.Image:
    """Contributions (H, W) over `image` in pale grey, which stays visible where they are small."""
    strength, _ = _strength(contributions, percentile, smooth)
    grey = np.asarray(_fitted(image, strength.shape).convert("L"), dtype=np.float64)[..., None] / 255
    mask = opacity * np.abs(strength)[..., None]
    return Image.fromarray(_bytes((1 - mask) * (0.35 + 0.65 * grey) + mask * _coloured(strength) / 255))


def panel(
    image: Image.Image | None,
    explanation: Explanation,
    caption: str = "",
    lines: Sequence[str] = (),
    *,
    picture: int = 0,
    score: int = 0,
    percentile: float = 99.5,
    smooth: int = 15,
    size: int = 336,
) -> Image.Image:
    """Input, contributions and explanation of one score of one picture, side by side on white.

    `image` is the picture as the model saw it; None takes it from the encoded input of a converted model. `smooth` is
    given in pixels of a picture 224 wide; `caption` names the target, and `lines` stand below.
    """
    contributions = explanation.contributions[picture, score]
    if image is None:
        image = _decoded(explanation.encoded_inputs, picture)
    kernel = max(1, round(smooth * contributions.shape[-1] / 224)) | 1
    strength, limit = _strength(contributions, percentile, max(1, kernel // 3) | 1)
    if explanation.encoded_gradients is None:
        seen = overlay(image, contributions, percentile=percentile, smooth=kernel)
        colours = "contributions on the input"
    else:
        weights = explanation.encoded_gradients[picture, score]
        seen = rgba(weights, contributions, image, percentile=percentile, smooth=kernel)
        seen = Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen).convert("RGB")
        colours = "in the colours of its weights" if len(weights) == 6 else "in the colours of the input"
    tiles = {
        "Input": image.convert("RGB"),
        "Contributions": Image.fromarray(_coloured(strength)),
        "Explanation": seen,
    }

    unit = size / 336
    margin, gap, head, foot = (round(pixels * unit) for pixels in (20, 14, 34, 84))
    large, small = (ImageFont.load_default(pixels * unit) for pixels in (17, 13))
    height = round(size * contributions.shape[-2] / contributions.shape[-1])
    foot += round(20 * unit) * len(lines)
    canvas = Image.new("RGB", (2 * margin + 3 * size + 2 * gap, margin + head + height + foot), "white")
    draw = ImageDraw.Draw(canvas)
    top = margin + head
    for column, (title, tile) in enumerate(tiles.items()):
        left = margin + column * (size + gap)
        draw.text((left, top - 10 * unit), title, INK, large, anchor="ls")
        canvas.paste(tile.resize((size, height), Image.Resampling.LANCZOS), (left, top))
        draw.rectangle((left, top, left + size - 1, top + height - 1), outline=(205, 205, 210))

    line = top + height + round(14 * unit)
    _scale_bar(canvas, draw, (margin + size + gap, line, size, round(9 * unit)), limit, small, unit)
    row = explanation.row(picture, score)
    draw.text((margin + 2 * (size + gap), line), colours, FAINT, small, anchor="lt")
    draw.text((margin, line), _cut(draw, one_line(caption) or f"score {score}", large, size), INK, large, anchor="lt")
    draw.text((margin, line + 27 * unit), _sums(row), INK, small, anchor="lt")
    draw.text((margin, line + 47 * unit), one_line(_largest(row["constants"])), FAINT, small, anchor="lt")
    for number, text in enumerate(lines):
        draw.text((margin, line + (67 + 20 * number) * unit), one_line(text), INK, small, anchor="lt")
    return canvas


# -------------------------------------------------------------------------------------------------------------- numbers


def _averaged(values: Tensor, kernel: int) -> Tensor:
    """The mean of `values` (H, W) over squares of `kernel` pixels, and over what there is of them at the border."""
    if kernel <= 1:
        return values
    kernel |= 1
    return F.avg_pool2d(values[None, None], kernel, 1, kernel // 2, count_include_pad=False)[0, 0]


def _quantile(values: Tensor, percentile: float) -> float:
    return max(float(np.percentile(values.numpy(), percentile)), 1e-12)


def _strength(contributions: Tensor, percentile: float, smooth: int) -> tuple[np.ndarray, float]:
    """Contributions (H, W) in units of the limit at which they are clipped, within [-1, 1], and that limit."""
    values = _averaged(contributions.detach().cpu().float(), smooth)
    limit = _quantile(values.abs(), percentile)
    return (values / limit).clamp(-1, 1).numpy().astype(np.float64), limit


def _coloured(strength: np.ndarray) -> np.ndarray:
    """Colours (..., 3) of strengths in [-1, 1]."""
    stops = np.linspace(-1, 1, len(COLOURS))
    return np.stack([np.interp(strength, stops, channel) for channel in COLOURS.T], -1).round().astype(np.uint8)


def _bytes(values: np.ndarray) -> np.ndarray:
    return (values.clip(0, 1) * 255).round().astype(np.uint8)


# ------------------------------------------------------------------------------------------------------------- pictures


def _fitted(image: Image.Image, shape: tuple[int, ...]) -> Image.Image:
    """`image` in RGB, with the height and width of a map."""
    return image.convert("RGB").resize((shape[1], shape[0]), Image.Resampling.BICUBIC)


def _decoded(encoded: Tensor | None, picture: int) -> Image.Image:
    """One picture r of [r, 1 - r] (B, 6, H, W)."""
    channels = 0 if encoded is None else encoded.shape[1]
    if encoded is None or channels != 6:
        raise ValueError(f"{channels} explained channels are no picture; pass the image that was explained.")
    return Image.fromarray(_bytes(encoded[picture, :3].permute(1, 2, 0).cpu().numpy()))


def _scale_bar(
    canvas: Image.Image,
    draw: ImageDraw.ImageDraw,
    box: tuple[int, int, int, int],
    limit: float,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    unit: float,
) -> None:
    """The colours of a contribution map from -limit to limit, in a box (left, top, width, height)."""
    left, top, width, height = box
    row = _coloured(np.linspace(-1, 1, width))
    canvas.paste(Image.fromarray(np.broadcast_to(row, (height, width, 3)).copy()), (left, top))
    draw.rectangle((left, top, left + width - 1, top + height - 1), outline=(205, 205, 210))
    below = top + height + 6 * unit
    for x, anchor, text in (
        (left, "lt", _number(-limit)),
        (left + width / 2, "mt", "0"),
        (left + width, "rt", _number(limit, signed=True)),
    ):
        draw.text((x, below), text, FAINT, font, anchor=anchor)


def _sums(row: dict[str, Any]) -> str:
    """The score as the sum of its parts, from a ledger row."""
    parts = {"from the input": row["input"]}
    if "direct" in row:
        parts = {"direct": row["direct"], "carried": row["carried"]}
    parts["from constants"] = sum(row["constants"].values())
    (first, value), *others = parts.items()
    terms = [f"{'+' if value >= 0 else '-'} {_number(abs(value))} {name}" for name, value in others]
    return " ".join([f"{_number(row['score'])} = {_number(value)} {first}", *terms])


def _largest(shares: dict[str, float], most: int = 3) -> str:
    """The constants that weigh most in a score."""
    ranked = sorted(shares, key=lambda name: -abs(shares[name]))
    if not ranked:
        return "no constants"
    shown = [f"{name} {_number(shares[name], signed=True)}" for name in ranked[:most]]
    return "largest constants: " + ",  ".join(shown) + (f"  ({len(ranked)} in all)" if len(ranked) > most else "")


def _number(value: float, signed: bool = False) -> str:
    """A number in three digits."""
    return f"{value:{'+' if signed else ''}.3g}"


def _cut(draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """As much of `text` as fits into `width` pixels."""
    if draw.textlength(text, font) <= width:
        return text
    while text and draw.textlength(f"{text}...", font) > width:
        text = text[:-1]
    return f"{text.rstrip()}..."
