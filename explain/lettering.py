"""Words in pictures: paragraphs that wrap, in whatever letters a name has, and pictures put together.

Pillow's own font knows ASCII alone. Names with other letters are written in a font of the system, and letters that no
font has in ASCII: without their accent, or as their number, `\\u732b`. There is no markup: a dollar sign is one.
"""

from __future__ import annotations

import bisect
import functools
import math
import unicodedata
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from ..core.words import one_line

__all__ = ["FAINT", "GOOD", "INK", "LINE", "WARNING", "beside", "label", "padded", "paragraph", "stacked"]

Colour = tuple[int, int, int]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

INK, FAINT, WARNING, GOOD = (28, 28, 30), (110, 110, 115), (190, 20, 35), (26, 127, 55)
LINE = (205, 205, 210)
# Pillow's own first, then what Linux, macOS and Windows have.
FONTS = ("", "DejaVuSans.ttf", "NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "msyh.ttc")
LEADING = 1.35


def paragraph(text: str, width: int, size: float, colour: Colour = INK, across: float = 0) -> Image.Image:
    """`text` as one paragraph on white, `width` pixels wide and as high as its lines; none of it is cut off.

    `across` says where lines lie that are shorter: 0 at the left, 1 at the right.
    """
    written, font = _set(text, size)
    lines, leading = _lines(written, font, width - 1), round(LEADING * size)
    block = Image.new("RGB", (width, leading * len(lines)), "white")
    draw = ImageDraw.Draw(block)
    for number, line in enumerate(lines):
        place = across * (width - font.getlength(line)), round(number * leading + 0.95 * size)
        draw.text(place, line, colour, font, anchor="ls")
    return block


def label(text: str, most: int, size: float, colour: Colour = INK) -> Image.Image:
    """`text` as a paragraph that is as wide as it needs to be, but at most `most` pixels."""
    written, font = _set(text, size)
    return paragraph(text, min(most, math.ceil(font.getlength(written)) + 1), size, colour)


def stacked(parts: Sequence[Image.Image], gap: int = 0) -> Image.Image:
    """One picture of several, from top to bottom on white, `gap` pixels apart."""
    height = sum(part.height for part in parts) + gap * (len(parts) - 1)
    sheet, top = Image.new("RGB", (max(part.width for part in parts), height), "white"), 0
    for part in parts:
        sheet.paste(part, (0, top))
        top += part.height + gap
    return sheet


def beside(parts: Sequence[Image.Image], gap: int = 0) -> Image.Image:
    """One picture of several, from left to right on white, `gap` pixels apart, with their lower edges in line."""
    height, left = max(part.height for part in parts), 0
    row = Image.new("RGB", (sum(part.width for part in parts) + gap * (len(parts) - 1), height), "white")
    for part in parts:
        row.paste(part, (left, height - part.height))
        left += part.width + gap
    return row


def padded(picture: Image.Image, height: int) -> Image.Image:
    """`picture` at the top of white of at least that height."""
    return stacked([picture, Image.new("RGB", (1, max(0, height - picture.height)), "white")])


def _set(text: str, size: float) -> tuple[str, Font]:
    """`text` on one line in letters that the font has, and the font: the first that has most of them."""
    text = unicodedata.normalize("NFC", one_line(text))
    lacks = {
        name: sum(not _has(name, letter) for letter in set(text)) for name in FONTS[: 1 if text.isascii() else None]
    }
    name = min(lacks, key=lambda name: lacks[name])
    font = _font(name, size)
    assert font is not None
    return "".join(letter if _has(name, letter) else _in_ascii(letter) for letter in text), font


def _lines(text: str, font: Font, width: int) -> list[str]:
    """Lines of words that are at most `width` pixels long; a word that is longer goes over several."""
    lines, line = [], ""
    for word in text.split(" "):
        if line and font.getlength(f"{line} {word}") > width:
            lines.append(line)
            line = ""
        line = f"{line} {word}" if line else word
        while font.getlength(line) > width and len(line) > 1:
            lengths = range(1, len(line))
            fits = max(1, bisect.bisect_right(lengths, width, key=lambda n: font.getlength(line[:n])))
            lines.append(line[:fits])
            line = line[fits:]
    return [*lines, line]


@functools.lru_cache(maxsize=64)
def _font(name: str, size: float) -> Font | None:
    """The font of that file name; Pillow's own where it has none, and None where the system has no such font."""
    try:
        return ImageFont.truetype(name, size) if name else ImageFont.load_default(size)
    except OSError:
        return None


@functools.lru_cache(maxsize=4096)
def _has(name: str, letter: str) -> bool:
    """Whether the font has `letter`: it draws another thing than for what is no letter."""
    font = _font(name, 16)
    return font is not None and (letter == " " or _drawn(font, letter) != _drawn(font, "\uffff"))


def _drawn(font: Font, letter: str) -> bytes:
    block = Image.new("L", (64, 64))
    ImageDraw.Draw(block).text((16, 16), letter, 255, font)
    return block.tobytes()


def _in_ascii(letter: str) -> str:
    """`letter` without its accent where that leaves ASCII, else its number."""
    plain = unicodedata.normalize("NFKD", letter).encode("ascii", "ignore").decode()
    return plain or (f"\\u{ord(letter):04x}" if ord(letter) < 2**16 else f"\\U{ord(letter):08x}")
