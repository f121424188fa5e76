"""Paragraphs: they wrap, and no letter of a name is lost."""

from __future__ import annotations

import numpy as np
import pytest
from bcosify.explain import lettering
from bcosify.explain.lettering import beside, label, paragraph, stacked
from PIL import Image


def ink(block: Image.Image) -> np.ndarray:
    return (np.asarray(block) < 200).any(-1)


@pytest.mark.parametrize("text", ["three short words " * 20, "W" * 200, "a " + "W" * 200])
def test_long_texts_wrap_and_nothing_is_cut_off(text):
    whole = ink(label(text, 10**5, 16)).sum()
    block = paragraph(text, 150, 16)
    drawn = ink(block)
    assert block.width == 150 and block.height > 60
    assert drawn.sum() == pytest.approx(whole, rel=0.05)
    assert not drawn[:, -1].any() and not drawn[-1].any()


def test_a_paragraph_of_words_breaks_between_them():
    font = lettering._font("", 16)
    assert font is not None
    lines = lettering._lines("one two three four five six", font, 80)
    assert " ".join(lines) == "one two three four five six" and len(lines) > 1
    assert all(font.getlength(line) <= 80 for line in lines)
    assert "".join(lettering._lines("W" * 50, font, 80)) == "W" * 50


def test_there_is_no_markup():
    written, _ = lettering._set("costs $5 and $x_1^2$ \\alpha", 16)
    assert written == "costs $5 and $x_1^2$ \\alpha"


def test_letters_that_no_font_has_are_written_in_ascii(monkeypatch):
    monkeypatch.setattr(lettering, "FONTS", ("", "there-is-no-such-font.ttf"))
    assert lettering._set("crème brûlée", 16)[0] == "creme brulee"
    assert lettering._set("cre\u0301me", 16)[0] == "creme"
    assert lettering._set("\u732b and \U0001f600", 16)[0] == r"\u732b and \U0001f600"
    assert lettering._set("two\nlines\x1b", 16)[0] == r"two lines\x1b"


def test_another_font_is_taken_where_it_has_more_letters(monkeypatch):
    monkeypatch.setattr(lettering, "_has", lambda name, letter: name == "b.ttf" or letter.isascii())
    monkeypatch.setattr(lettering, "_font", lambda name, size: name)
    monkeypatch.setattr(lettering, "FONTS", ("", "a.ttf", "b.ttf"))
    assert lettering._set("猫", 16) == ("猫", "b.ttf") and lettering._set("cat", 16) == ("cat", "")


def test_pictures_are_put_together_in_line():
    high, low = Image.new("RGB", (4, 9), "black"), Image.new("RGB", (6, 3), "black")
    row, column = ink(beside([high, low], 2)), ink(stacked([high, low], 2))
    assert row.shape == (9, 12) and row[:, :4].all() and row[6:, 6:].all() and row.sum() == 36 + 18
    assert column.shape == (14, 6) and column[:9, :4].all() and column[11:].all() and column.sum() == 36 + 18
