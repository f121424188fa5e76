"""The one reader of pictures: every kind of picture becomes upright RGB with 8 bits a channel."""

from __future__ import annotations

import io

import numpy as np
import pytest
import skimage.data
from bcosify.data.pictures import decode
from PIL import Image


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "1", "LA"])
def test_decode_gives_rgb(mode):
    stream = io.BytesIO()
    source = Image.fromarray(skimage.data.chelsea()[::8, ::8]).convert(mode)
    source.save(stream, "TIFF" if mode == "CMYK" else "PNG")
    assert np.array_equal(decode(stream.getvalue()), source.convert("RGB"))


def test_decode_keeps_the_greys_of_sixteen_bits():
    stream = io.BytesIO()
    Image.fromarray((np.arange(64, dtype=np.uint16) * 1024).reshape(8, 8)).save(stream, "PNG")
    assert np.array_equal(np.asarray(decode(stream.getvalue()))[..., 1], (np.arange(64) * 4).reshape(8, 8))


def test_decode_turns_pictures_upright():
    source = Image.fromarray(skimage.data.astronaut()[::8, ::4])
    exif = Image.Exif()
    exif[0x0112] = 6  # to be seen turned by a quarter
    stream = io.BytesIO()
    source.save(stream, "PNG", exif=exif)
    assert np.array_equal(decode(stream.getvalue()), source.transpose(Image.Transpose.ROTATE_270))
