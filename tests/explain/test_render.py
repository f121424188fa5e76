"""Pictures of explanations: colours, signs, sizes."""

from __future__ import annotations

import dataclasses
from decimal import Decimal

import numpy as np
import pytest
import torch
from bcosify.convert import Agreement
from bcosify.explain import Explanation, explain
from bcosify.explain.lettering import INK, WARNING
from bcosify.explain.render import (
    AGAINST,
    CONSTANT,
    FOR,
    FRAME,
    Part,
    added_up,
    ledger_bar,
    ledger_parts,
    overlay,
    panel,
    rgba,
    signed_map,
    smoothed,
    smoothing,
)
from bcosify.explain.verb import About
from bcosify.explain.views import views_of
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn


def six(*colour: float, size: int = 8) -> torch.Tensor:
    """Weights that are one colour and its complement everywhere."""
    r = torch.tensor(colour).view(3, 1, 1).expand(3, size, size)
    return torch.cat([r, 1 - r])


@pytest.fixture
def photo() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (12, 16, 3), dtype=np.uint8))


@pytest.mark.parametrize("colour", [(1.0, 0.0, 0.0), (0.2, 0.6, 0.4), (1.0, 1.0, 1.0)])
def test_rgba_has_the_colour_of_the_weights(colour):
    pixels = np.asarray(rgba(six(*colour) * 3, torch.ones(8, 8)))
    assert pixels.shape == (8, 8, 4)
    np.testing.assert_allclose(pixels[..., :3] / 255, np.broadcast_to(colour, (8, 8, 3)), atol=0.01)
    assert (pixels[..., 3] == 255).all()


def test_rgba_is_transparent_where_pixels_speak_against():
    contributions = torch.ones(8, 8)
    contributions[:, 4:] = -1
    alpha = np.asarray(rgba(six(0.2, 0.6, 0.4), contributions, smooth=1))[..., 3]
    assert (alpha[:, :4] == 255).all() and (alpha[:, 4:] == 0).all()
    averaged = np.asarray(rgba(six(0.2, 0.6, 0.4), contributions, smooth=3))[..., 3]
    assert 0 < averaged[0, 3] < averaged[0, 2] == 255 and (averaged[:, 4:] == 0).all()


def test_rgba_of_three_channels_takes_the_picture_s_colours(photo):
    with pytest.raises(ValueError, match="3 channels have no colours"):
        rgba(torch.ones(3, 12, 16), torch.ones(12, 16))
    pixels = np.asarray(rgba(torch.ones(3, 12, 16), torch.ones(12, 16), photo))
    np.testing.assert_array_equal(pixels[..., :3], np.asarray(photo))


def test_rgba_of_nothing_is_empty():
    assert not np.asarray(rgba(torch.zeros(6, 4, 4), torch.zeros(4, 4))).any()


def test_signed_map_is_symmetric_around_white():
    contributions = torch.tensor([[-2.0, -1.0, 0.0, 1.0, 2.0]])
    pixels = np.asarray(signed_map(contributions, percentile=100)).astype(int)[0]
    assert (pixels[2] == 255).all()
    assert (pixels[:2, 2] > pixels[:2, 0]).all() and (pixels[3:, 0] > pixels[3:, 2]).all()
    clipped = np.asarray(signed_map(contributions, percentile=40))[0]
    assert (clipped[0] == clipped[1]).all() and (clipped[3] == clipped[4]).all()
    assert (np.asarray(signed_map(torch.zeros(3, 4))) == 255).all()


def test_smoothing_keeps_a_constant_map_up_to_its_border():
    pixels = np.asarray(signed_map(torch.full((9, 9), 0.3), smooth=5))
    assert (pixels == pixels[0, 0]).all() and (pixels[0, 0] != 255).any()


def test_overlay_shows_the_picture_where_nothing_counts(photo):
    contributions = torch.zeros(12, 16)
    contributions[3, 4] = 1.0
    pixels = np.asarray(overlay(photo, contributions, percentile=100)).astype(int)
    assert pixels.shape == (12, 16, 3)
    assert pixels[3, 4, 0] > pixels[3, 4, 2] + 50
    elsewhere = pixels[5:]
    assert (elsewhere[..., 0] == elsewhere[..., 2]).all() and elsewhere.std() > 1


@pytest.mark.parametrize("shape", [(9, 9), (5, 12), (12, 5), (60, 90)])
@pytest.mark.parametrize("side", [1, 3, 7])
def test_smoothing_keeps_the_sum(shape, side):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    averaged = smoothed(values, side)
    assert averaged.shape == shape and torch.equal(averaged, values) == (side == 1)
    torch.testing.assert_close(averaged.sum(), values.sum(), atol=1e-4, rtol=1e-4)
    if side <= min(shape):
        torch.testing.assert_close(averaged[side // 2, side // 2], values[:side, :side].mean())


def test_the_same_squares_are_averaged_in_every_size_of_a_map():
    assert [smoothing(width) for width in (16, 112, 224, 448)] == [1, 3, 7, 15]


@pytest.mark.parametrize("smooth", [None, 1, 5])
@pytest.mark.parametrize("channels", [3, 6])
def test_no_place_is_blue_in_one_tile_and_opaque_in_another(channels, smooth):
    contributions = torch.randn(64, 96, generator=torch.Generator().manual_seed(1))
    photo = Image.new("RGB", (96, 64), (90, 90, 90))
    red, _, blue = np.asarray(signed_map(contributions, smooth=smooth)).astype(int).transpose(2, 0, 1)
    over = np.asarray(overlay(photo, contributions, smooth=smooth)).astype(int)
    opacity = np.asarray(rgba(torch.randn(channels, 64, 96), contributions, photo, smooth=smooth))[..., 3].astype(int)
    assert (blue > red).mean() > 0.2 and (opacity[blue > red] == 0).all()
    clearly = red > blue + 12
    assert clearly.mean() > 0.2 and (opacity[clearly] > 0).all()
    assert (over[..., 0] > over[..., 2])[clearly].all() and (over[..., 0] < over[..., 2])[blue > red + 12].all()
    # As opaque as the map is red: the order of any two places is the same.
    np.testing.assert_allclose(opacity[clearly], 255 * _strengths(contributions, smooth)[clearly], atol=1)


def _strengths(contributions: torch.Tensor, smooth: int | None) -> np.ndarray:
    side = smoothing(contributions.shape[1]) if smooth is None else smooth
    padded = np.pad(contributions.numpy(), side // 2, mode="symmetric")
    averaged = np.lib.stride_tricks.sliding_window_view(padded, (side, side)).mean((2, 3))
    return (averaged / np.percentile(np.abs(averaged), 99.5)).clip(-1, 1)


@given(st.floats(-1, 1), st.lists(st.floats(-1e5, 1e5), min_size=1, max_size=4))
def test_numbers_of_a_ledger_add_up_as_written(extra, values):
    score = sum(values) + extra * 1e-6 * max(map(abs, values))  # rounding of a real ledger
    total, parts = added_up(score, values)
    written = [Decimal(text.replace(",", "")) for text in (total, *parts)]
    assert written[0] == sum(written[1:])
    decimals = -int(written[0].as_tuple().exponent)
    for number, value in zip(written, (score, *values), strict=True):
        assert abs(float(number) - value) <= 3 * 10.0**-decimals


def test_a_ledger_is_written_in_four_digits():
    assert added_up(11.4123, [2.0781, 9.3342]) == ("11.41", ["+2.08", "+9.33"])
    assert added_up(0.31904, [0.2, 0.11904]) == ("0.3190", ["+0.2000", "+0.1190"])
    assert added_up(1.5, [1.5, 0.0, -1e-9]) == ("1.500", ["+1.500", "0.000", "0.000"])
    assert added_up(0.0, [0.0]) == ("0.00", ["0.00"])
    assert added_up(float("nan"), [float("nan")])[0] == "nan"


def test_the_parts_of_a_ledger_are_for_against_carried_and_constants():
    contributions = torch.zeros(1, 1, 8, 8)
    contributions[0, 0, 1, 1], contributions[0, 0, 5, 5] = 3.0, -1.0
    nothing = torch.zeros(1, 1)
    explanation = explain(nn.Sequential(nn.Flatten(), nn.Linear(192, 1)), torch.randn(1, 3, 8, 8), 0)
    known = {"contributions": contributions, "constants": {"a": nothing + 0.5}, "residual": nothing}
    explanation = dataclasses.replace(explanation, scores=nothing + 2.5, **known)
    parts = {part.name: part.value for part in ledger_parts(explanation)}
    assert parts == {"from pixels: for": 3.0, "from pixels: against": -1.0, "from constants": 0.5}
    # Neighbours of both signs cancel where they are averaged.
    assert ledger_parts(explanation, smooth=15)[0].value < 3
    carrying = dataclasses.replace(explanation, direct=contributions / 2, direct_residual=nothing)
    parts = {part.name: part.value for part in ledger_parts(carrying)}
    assert parts["directly from pixels: for"] == 1.5 and parts["from pixels through carried biases"] == 1.0
    assert sum(parts.values()) == pytest.approx(2.5)
    wrong = dataclasses.replace(explanation, scores=nothing + 3.5, residual=nothing + 1)
    assert ledger_parts(wrong)[-1][:2] == ("unaccounted for", 1.0)


def test_the_bar_is_as_long_as_its_parts_and_marks_the_score():
    parts = [Part("for", 6.0, FOR), Part("against", -2.0, AGAINST), Part("constants", 2.0, CONSTANT)]
    drawn = ledger_bar(parts, 6.0, width=1001, size=20)
    row = np.asarray(drawn)[8 + 14]  # through the middle of the bar
    lengths = [(row == colour).all(-1).sum() for colour in (AGAINST, FOR, CONSTANT)]
    assert lengths == pytest.approx([200, 600, 200], abs=8)
    assert (row[:190] == AGAINST).all(-1).sum() > 180 and (row[-190:] == CONSTANT).all(-1).sum() > 180
    (marked,) = (row == INK).all(-1).nonzero()
    assert marked.mean() == pytest.approx(800, abs=3)
    narrow = ledger_bar(parts, 6.0, width=160, size=20)
    assert narrow.width == 160 and narrow.height > drawn.height  # the numbers go over several lines
    assert ledger_bar([Part("nothing", 0.0, FOR)], 0.0).width == 1000


@pytest.mark.parametrize("shape", [(224, 112), (112, 224), (112, 112), (448, 448)], ids=str)
def test_panel_keeps_the_shape_of_the_picture(shape):
    explanation = explain(
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), torch.randn(1, 3, *shape), targets=[0, 1]
    )
    photo = Image.new("RGB", shape[::-1], (10, 200, 30))
    drawn = np.asarray(panel(photo, explanation, "a name of sixty letters, with $dollars_1$ and ümläuts in it" * 2))
    rows, columns = (drawn[:, : 20 + 336] == (10, 200, 30)).all(-1).nonzero()
    assert np.ptp(columns) + 3 == 336 and np.ptp(rows) + 3 == round(336 * shape[0] / shape[1])
    for edge in (drawn[:20], drawn[-20:], drawn[:, :20], drawn[:, -20:]):
        assert (edge == 255).all()


def test_panel_says_in_red_that_constants_decide_and_what_to_doubt(photo):
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2, bias=False))
    explanation = explain(model, torch.randn(1, 3, 12, 16), [0])

    def red(explanation, **options) -> int:
        return int((np.asarray(panel(photo, explanation, "cat", **options)) == WARNING).all(-1).sum())

    assert (
        red(explanation) == 0 and red(explanation, lines=["a line"]) == 0 and red(explanation, doubts=["a doubt"]) > 20
    )
    part = explanation.input_part
    little, much = (
        dataclasses.replace(explanation, scores=part + c * part, constants={"bias": c * part}) for c in (0.9, 1.1)
    )
    assert red(little) == 0 and red(much) > 20


@pytest.mark.parametrize("low", [True, False])
def test_low_agreement_is_in_red(photo, low):
    explanation = explain(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), torch.randn(1, 3, 12, 16), 0)
    agreement = Agreement(0.3 if low else 0.9, low, "The student decides like its teacher on so many.")
    about = About("a student", None, views_of(2), agreement)
    drawn = np.asarray(about.panel(photo, explanation, "cat"))
    assert ((drawn == WARNING).all(-1).sum() > 20) == low
    assert drawn.shape == np.asarray(panel(photo, explanation, "cat", lines=["a line", "another"])).shape


def test_panel_frames_the_patch_in_every_tile():
    explanation = explain(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), torch.randn(1, 3, 56, 56), 0)
    photo = Image.new("RGB", (56, 56), "white")
    assert not (np.asarray(panel(photo, explanation)) == FRAME).all(-1).any()
    drawn = np.asarray(panel(photo, explanation, patch=(1, 5, 7, 7)))
    rows, columns = (drawn == FRAME).all(-1).nonzero()
    for tile in range(4):
        inside = columns[(columns >= 20 + 350 * tile) & (columns < 20 + 350 * tile + 336)] - (20 + 350 * tile)
        assert (inside.min(), inside.max()) == (5 * 48 - 2, 6 * 48 + 1)
    assert np.ptp(rows) == 51


def test_panel_shows_the_colours_of_weights_only_where_they_mean_something(photo):
    explanation = explain(nn.Sequential(nn.Flatten(), nn.Linear(12, 1)), torch.randn(1, 3, 2, 2), 0)
    ones, nothing = torch.ones(1, 1, 8, 8), torch.zeros(1, 1)
    weights = six(1.0, 0.2, 0.6)[None, None]
    explanation = dataclasses.replace(
        explanation, scores=nothing, contributions=ones, encoded_gradients=weights, constants={}, residual=nothing
    )
    grey = Image.new("RGB", (8, 8), (120, 120, 120))

    def last_tile(**options) -> np.ndarray:
        return np.asarray(panel(grey, explanation, **options))[300, 20 + 350 * 3 + 168]

    np.testing.assert_array_equal(last_tile(), (120, 120, 120))
    np.testing.assert_allclose(last_tile(own_colours=True), (255, 51, 153), atol=1)


@pytest.mark.parametrize("size", [160, 336])
@pytest.mark.parametrize("channels", [3, 6])
def test_panel_is_drawn_with_and_without_constants(photo, channels, size):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=channels == 3), nn.GELU(), nn.AdaptiveAvgPool2d(1))
    model.append(nn.Flatten())
    images = torch.randn(2, 3, 12, 16)
    explanation = explain(model, images, targets=[1, 2])
    if channels == 6:
        explanation = explanation.__class__(
            **{**explanation.__dict__, "encoded_gradients": torch.cat([explanation.encoded_gradients] * 2, 2)}
        )
    drawn = panel(photo, explanation, "a caption, " * 20, picture=1, score=1, size=size)
    pixels = np.asarray(drawn)
    assert drawn.mode == "RGB" and drawn.width > 3 * size and drawn.height > size * 12 / 16
    # White all around: nothing is cut off.
    for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]):
        assert (edge == 255).all()


def test_panel_finds_the_picture_of_a_converted_model():
    encoded = six(0.2, 0.6, 0.4)[None]
    nothing = torch.zeros(1, 1)
    explanation = explain(nn.Sequential(nn.Flatten(), nn.Linear(12, 1)), torch.randn(1, 3, 2, 2), 0)
    explanation = Explanation(
        outputs=nothing,
        scores=nothing,
        contributions=torch.ones(1, 1, 8, 8),
        encoded_inputs=encoded,
        encoded_gradients=encoded[:, None],
        constants={},
        residual=nothing,
    )
    drawn = np.asarray(panel(None, explanation, size=100)).astype(int)
    inside = (np.abs(drawn[:, :120] - np.array([51, 153, 102])) <= 1).all(-1)
    assert inside.sum() == 98 * 98  # the first tile, but for the line around it
    broken = explanation.__class__(**{**explanation.__dict__, "encoded_inputs": encoded[:, :3]})
    with pytest.raises(ValueError, match="pass the image"):
        panel(None, broken)
