"""The one reader of pictures: every kind of picture becomes upright RGB with 8 bits a channel."""

from __future__ import annotations

import io
import os
import struct
import tracemalloc
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from bcosify.core.errors import DataError
from bcosify.data.pictures import MAX_PIXELS, PictureWarning, as_rgb, check_picture, decode, pixel_limit, read_picture
from PIL import Image, ImageOps

from exif import CAT, DAMAGED, encoded, exif_block, jpeg_with_exif, png_with_exif

GREY = np.asarray(Image.fromarray(CAT).convert("L"))


@pytest.fixture(autouse=True)
def warnings_are_errors():
    """A picture is read without a word, unless a test says otherwise."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def pixels(picture: Image.Image) -> np.ndarray:
    assert picture.mode == "RGB"
    return np.asarray(picture)


def grey(picture: Image.Image) -> np.ndarray:
    """(H, W), of a picture whose channels are alike."""
    found = pixels(picture)
    assert (found == found[..., :1]).all()
    return found[..., 0]


def tiff(values: bytes, shape: tuple[int, int], bits: int, photometric: int = 1, format: int = 1) -> bytes:
    """A grey TIFF; Pillow itself writes only some kinds. `format`: 1 unsigned, 2 signed, 3 floats."""
    tags = [
        (256, 3, shape[1]), (257, 3, shape[0]), (258, 3, bits), (259, 3, 1), (262, 3, photometric), (273, 4, 8),
        (277, 3, 1), (278, 3, shape[0]), (279, 4, len(values)), (339, 3, format),
    ]  # fmt: skip
    table = b"".join(struct.pack("<HHIHH" if kind == 3 else "<HHII", tag, kind, 1, value, *([0] * (kind == 3)))
                     for tag, kind, value in tags)  # fmt: skip
    return struct.pack("<2sHI", b"II", 42, 8 + len(values)) + values + struct.pack("<H", len(tags)) + table + bytes(4)


# --------------------------------------------------------------------------------------------------------------- kinds


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "1", "LA"])
def test_decode_gives_rgb(mode):
    source = Image.fromarray(CAT).convert(mode)
    data = encoded(source, "TIFF" if mode == "CMYK" else "PNG")
    assert np.array_equal(decode(data), source.convert("RGB"))


@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
def test_cmyk_and_lab_keep_their_colours(format):
    for mode in ("CMYK", "LAB") if format == "TIFF" else ("CMYK",):
        found = pixels(decode(encoded(Image.fromarray(CAT).convert(mode), format)))
        assert np.abs(found.astype(int) - CAT).mean() < 6


def test_transparent_pixels_keep_their_colours():
    """As every library reads them; a palette's too, of which Pillow warns."""
    alpha = np.zeros(GREY.shape, np.uint8)
    alpha[:, ::2] = 255
    assert np.array_equal(pixels(decode(encoded(Image.fromarray(np.dstack([CAT, alpha])), "PNG"))), CAT)
    palette = Image.fromarray(CAT).convert("P", palette=Image.Palette.ADAPTIVE)
    for transparency in (3, bytes(range(256))):
        data = encoded(palette, "PNG", transparency=transparency)
        assert np.array_equal(pixels(decode(data)), np.asarray(palette.convert("RGB")))


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_an_animation_is_its_first_picture(format):
    first, second = Image.fromarray(GREY), Image.fromarray(255 - GREY)
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(first, format, save_all=True, append_images=[second], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 2  # pyright: ignore[reportAttributeAccessIssue]
    assert np.array_equal(grey(decode(data)), GREY)


# --------------------------------------------------------------------------------------------------------------- depth


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_decode_keeps_the_greys_of_sixteen_bits(format):
    values = (np.arange(64, dtype=np.uint16) * 1024).reshape(8, 8)
    assert np.array_equal(grey(decode(encoded(Image.fromarray(values), format))), (np.arange(64) * 4).reshape(8, 8))
    dark = encoded(Image.fromarray(GREY.astype(np.uint16)), format)  # nothing is stretched
    assert (grey(decode(dark)) == 0).all()


def test_all_depths_of_grey_are_the_same_picture():
    wide = GREY.astype(np.uint16) * 257
    order = wide.astype(">u2").tobytes()
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
        for body in (
            b"IHDR" + struct.pack(">IIBBBBB", GREY.shape[1], GREY.shape[0], 16, 0, 0, 0, 0),
            b"IDAT" + zlib.compress(b"".join(b"\0" + order[i : i + 2 * GREY.shape[1]]
                                             for i in range(0, len(order), 2 * GREY.shape[1]))),
            b"IEND",
        )
    )  # fmt: skip
    for data in (encoded(Image.fromarray(GREY), "PNG"), png, tiff(wide.tobytes(), GREY.shape, 16)):
        assert np.array_equal(grey(decode(data)), GREY)


def test_sixteen_bits_of_rgb_are_the_same_picture():
    wide = (CAT.astype(">u2") * 257).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in wide)
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
        for body in (
            b"IHDR" + struct.pack(">IIBBBBB", CAT.shape[1], CAT.shape[0], 16, 2, 0, 0, 0),
            b"IDAT" + zlib.compress(rows),
            b"IEND",
        )
    )
    assert np.array_equal(pixels(decode(png)), CAT)


def test_white_may_be_zero_and_twelve_bits_are_their_own_range():
    wide = GREY.astype(np.uint16) * 257
    assert np.array_equal(grey(decode(tiff(wide.tobytes(), GREY.shape, 16, photometric=0))), 255 - GREY)
    packed = bytes([0xFF, 0xF8, 0x00])  # 4095 and 2048
    assert grey(decode(tiff(packed, (1, 2), 12))).tolist() == [[255, 128]]


@pytest.mark.parametrize(
    ("values", "white"),
    [
        (GREY.astype(np.int32), 255),
        (GREY.astype(np.int32) * 257, 65535),
        (GREY.astype(np.int32) << 23, 2**31 - 1),
        ((GREY / 255).astype(np.float32), 1),
        (GREY.astype(np.float32), 255),
        (GREY.astype(np.float32) * 257, 65535),
    ],
)
def test_the_range_of_32_bits_is_guessed_and_said(values, white):
    for data in (
        encoded(Image.fromarray(values), "TIFF"),
        tiff(values.tobytes(), values.shape, 32, format=3 if values.dtype.kind == "f" else 2),
    ):
        with pytest.warns(PictureWarning, match=rf"^a\.tif: its pixels are 32-bit .* 0 is .* black, {white} as white"):
            found = grey(decode(data, "a.tif: "))
        assert np.abs(found.astype(int) - GREY).max() <= (1 if white == 2**31 - 1 else 0)


def test_what_resampling_leaves_outside_of_the_range_is_clipped():
    values = (GREY / 255).astype(np.float32)
    values[0, :2] = -0.05, 1.07
    with pytest.warns(PictureWarning, match="1 as white"):
        found = grey(decode(encoded(Image.fromarray(values), "TIFF")))
    assert found[0, :2].tolist() == [0, 255] and np.array_equal(found[1:], GREY[1:])


@pytest.mark.parametrize("wrong", [-1.0, np.nan, np.inf, 1e6])
def test_a_range_that_cannot_be_guessed_is_refused(wrong, tmp_path):
    values = (GREY / 255).astype(np.float32)
    values[3, 3] = wrong
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(
        DataError, match=r"a\.tif is no picture that can be read: .*floats from .* Save it with 8 or 16"
    ):
        read_picture(tmp_path / "a.tif")


@pytest.mark.parametrize("deep", [False, True])
def test_channels_on_their_own_are_read_rightly_or_refused(tmp_path, deep):
    values = np.ascontiguousarray(CAT.transpose(2, 0, 1))
    tifffile.imwrite(
        tmp_path / "a.tif",
        values.astype(np.uint16) * 257 if deep else values,
        photometric="rgb",
        planarconfig="separate",
    )
    if deep:
        with pytest.raises(DataError, match="each channel on its own, which Pillow reads wrongly"):
            read_picture(tmp_path / "a.tif")
    else:
        assert np.array_equal(read_picture(tmp_path / "a.tif"), CAT)


def test_signed_integers_and_portable_floats_have_a_white_of_their_own():
    with pytest.warns(PictureWarning, match="16-bit signed integers without a stated range; .* 32767 as white"):
        found = grey(decode(tiff((GREY.astype(np.int16) * 128).tobytes(), GREY.shape, 16, format=2)))
    assert np.abs(found.astype(int) - GREY).max() <= 1
    with pytest.warns(PictureWarning, match="32-bit floats .* 1 as white"):
        assert np.array_equal(grey(decode(encoded(Image.fromarray((GREY / 255).astype(np.float32)), "PPM"))), GREY)


# --------------------------------------------------------------------------------------------------------------- size


def test_a_small_file_with_very_many_pixels_is_refused_before_they_are_made():
    data = encoded(Image.new("1", (13300, 13300)), "PNG")
    assert len(data) < 22000
    tracemalloc.start()
    with pytest.raises(
        ValueError, match=r"13300 x 13300 pixels, and the limit is 100000000\..* --max-pixels 176890000"
    ):
        decode(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_the_limit_is_an_option(monkeypatch, tmp_path):
    assert pixel_limit() == MAX_PIXELS and pixel_limit(7) == 7
    Image.fromarray(CAT).save(tmp_path / "a.png")
    said = r"a\.png is .* 57 x 38 pixels, and the limit is 2165\..*BCOSIFY_MAX_PIXELS=2166"
    with pytest.raises(DataError, match=said):
        read_picture(tmp_path / "a.png", 57 * 38 - 1)
    assert read_picture(tmp_path / "a.png", 57 * 38).size == (57, 38)
    monkeypatch.setenv("BCOSIFY_MAX_PIXELS", "2000")
    with pytest.raises(DataError, match="the limit is 2000"):
        read_picture(tmp_path / "a.png")
    assert read_picture(tmp_path / "a.png", 3000).size == (57, 38)  # an option goes before the environment
    for wrong in ("many", "0", "-1", "1e6"):
        monkeypatch.setenv("BCOSIFY_MAX_PIXELS", wrong)
        with pytest.raises(DataError, match="BCOSIFY_MAX_PIXELS is .* at least 1"):
            decode(b"")
    with pytest.raises(DataError, match="max_pixels is '-3'"):
        pixel_limit(-3)


def test_pillows_own_limit_is_left_as_it_is(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert decode(encoded(Image.fromarray(CAT), "PNG")).size == (57, 38)
    assert Image.MAX_IMAGE_PIXELS == 10


def test_a_jpeg_that_is_too_large_is_read_smaller_and_said():
    data = encoded(Image.fromarray(CAT).resize((456, 304)), "JPEG", quality=95)
    with pytest.warns(PictureWarning, match=r"^a: it has 456 x 304 pixels, and the limit is 9000, so .* at 1/4"):
        found = decode(data, "a: ", 9000)
    assert found.size == (114, 76)
    wanted = np.asarray(Image.fromarray(CAT).resize((114, 76)), int)
    assert np.abs(pixels(found).astype(int) - wanted).mean() < 4
    with pytest.raises(ValueError, match="456 x 304 pixels"):
        decode(data, "", 2000)  # less than an eighth
    progressive = encoded(Image.fromarray(CAT), "JPEG", progressive=True)
    with pytest.raises(ValueError, match="57 x 38 pixels"):
        decode(progressive, "", 1000)


def test_formats_that_start_programs_are_not_opened(tmp_path):
    Image.fromarray(CAT).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    with pytest.raises(DataError, match="UnidentifiedImageError"):
        read_picture(tmp_path / "a.png")


@pytest.mark.parametrize("look", [read_picture, check_picture])
def test_what_is_no_regular_file_is_no_picture(tmp_path, look):
    os.mkfifo(tmp_path / "a.png")
    for path, says in (("a.png", "a pipe"), (".", "a folder"), ("a\0b", "null byte")):
        with pytest.raises(DataError, match=f"no picture that can be read: .*{says}"):
            look(f"{tmp_path}/{path}")
    with (tmp_path / "b.png").open("wb") as file:
        file.truncate(1 << 31)
    with pytest.raises(DataError, match="2,147,483,648 bytes; such a file has at most 1,073,741,824"):
        look(tmp_path / "b.png")


# ---------------------------------------------------------------------------------------------------------------- EXIF


def test_a_picture_is_turned_once():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.fromarray(CAT), "PNG", exif=exif)
    upright = decode(data)
    assert np.array_equal(as_rgb(upright), upright) and upright.size == (38, 57)
    assert np.array_equal(as_rgb(Image.open(io.BytesIO(data))), upright)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_decode_turns_pictures_upright(format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format == "WEBP" else {}
    plain = encoded(Image.fromarray(CAT), format, **options)
    data = encoded(Image.fromarray(CAT), format, exif=exif, **options)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert np.array_equal(decode(data), upright.convert("RGB"))
    if orientation == 6:  # to be seen turned by a quarter
        assert np.array_equal(decode(data), decode(plain).transpose(Image.Transpose.ROTATE_270))


def test_a_deep_picture_is_turned_too():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.fromarray(GREY.astype(np.uint16) * 257), "PNG", exif=exif)
    assert np.array_equal(grey(decode(data)), np.rot90(GREY, -1))


def test_whole_exif_as_these_tests_write_it():
    for data in (jpeg_with_exif(exif_block((72, 1))), png_with_exif(exif_block((72, 1)))):
        assert decode(data).size == CAT.shape[:2]


@pytest.mark.parametrize(
    "data",
    [
        jpeg_with_exif(DAMAGED),
        png_with_exif(DAMAGED),
        png_with_exif(b"no exif at all"),
        jpeg_with_exif(exif_block((72, 1))[:20]),
        png_with_exif(exif_block((72, 1))[:20]),
        jpeg_with_exif(b"II*\0\xff\xff\xff\x7f"),
        png_with_exif(exif_block((72, 1)), checksum=1),
    ],
    ids=[
        "jpeg, rational",
        "png, rational",
        "png, text",
        "jpeg, cut",
        "png, cut",
        "jpeg, no directory",
        "png, checksum",
    ],
)
def test_of_damaged_exif_the_pixels_are_used_and_the_orientation_is_not(data):
    plain = encoded(Image.fromarray(CAT), "JPEG" if data[:2] == b"\xff\xd8" else "PNG")
    with pytest.warns(UserWarning) as seen:  # of which some are Pillow's own, which name no picture
        assert np.array_equal(decode(data, "cat: "), decode(plain))
    ours = [str(one.message) for one in seen if issubclass(one.category, PictureWarning)]
    assert ours == ["cat: its EXIF is damaged, so its orientation is ignored"]


def test_a_broken_png_with_exif_is_broken():
    data = png_with_exif(exif_block((72, 1)))
    with pytest.raises(OSError):
        decode(data[: len(data) // 2])


# --------------------------------------------------------------------------------------------------------------- files


def test_read_picture_reads_files(tmp_path):
    Image.fromarray(CAT).save(tmp_path / "a.png")
    assert np.array_equal(read_picture(tmp_path / "a.png"), CAT)
    assert np.array_equal(read_picture(str(tmp_path / "a.png")), CAT)


@pytest.mark.parametrize("content", [None, b"", b"no picture", b"\x89PNG\r\n\x1a\n broken", b"\xff\xd8\xff\xe0 cut"])
def test_what_is_no_picture_is_a_data_error(tmp_path, content):
    path = tmp_path / "a.png"
    if content is not None:
        path.write_bytes(content)
    why = r"\S+a\.png is missing\.$" if content is None else r"\w+: "
    for look in (read_picture, check_picture):
        with pytest.raises(DataError, match=rf"a\.png is no picture that can be read: {why}"):
            look(path)


def test_the_pixels_are_not_part_of_the_check(tmp_path):
    whole = encoded(Image.fromarray(CAT), "PNG")
    path: Path = tmp_path / "a.png"
    path.write_bytes(whole[: len(whole) // 2])
    check_picture(path)
    with pytest.raises(DataError, match=r"a\.png is no picture that can be read"):
        read_picture(path)
