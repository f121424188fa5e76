"""Pictures as tensors: normalising and back, and thin pictures without their ends."""

from __future__ import annotations

import numpy as np
import pytest
import skimage.data
import torch
from bcosify.core.pictures import THIN, denormalise, normalise, without_ends
from PIL import Image

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def test_normalising_is_per_channel_and_has_an_inverse():
    colours = torch.rand(2, 3, 5, 4)
    found = normalise(colours, MEAN, STD)
    for channel in range(3):
        wanted = (colours[:, channel] - MEAN[channel]) / STD[channel]
        torch.testing.assert_close(found[:, channel], wanted)
    torch.testing.assert_close(denormalise(found, MEAN, STD), colours)
    torch.testing.assert_close(denormalise(found[0], MEAN, STD), colours[0])
    assert normalise(colours.double(), MEAN, STD).dtype == torch.float64


def thin(length: int, shorter: int) -> Image.Image:
    """A strip of a photograph, as if stretched."""
    strip = Image.fromarray(skimage.data.chelsea()[:shorter])
    return strip.resize((length, shorter))


@pytest.mark.parametrize("size", [(57, 38), (38, 57), (1, 1), (160, 10), (10, 170), (359, 10)])
def test_pictures_that_are_not_thin_stay_as_they_are(size):
    picture = Image.new("RGB", size)
    assert without_ends(picture) is picture


@pytest.mark.parametrize(("length", "shorter"), [(3000, 1), (3001, 1), (2000, 7), (1999, 30), (730, 20)])
def test_both_ends_lose_the_same_even_multiple_of_the_shorter_side(length, shorter):
    picture = thin(length, shorter)
    for upright in (False, True):
        seen = picture.transpose(Image.Transpose.TRANSPOSE) if upright else picture
        left = without_ends(seen)
        left = left.transpose(Image.Transpose.TRANSPOSE) if upright else left
        width, height = left.size
        assert height == shorter and THIN <= width / shorter < THIN + 4
        cut = (length - width) / 2
        assert cut > 0 and cut % (2 * shorter) == 0
        assert np.array_equal(left, np.asarray(picture)[:, int(cut) : length - int(cut)])


def test_how_much_is_kept_can_be_said():
    assert without_ends(thin(3000, 10), 64).size == (640, 10)
