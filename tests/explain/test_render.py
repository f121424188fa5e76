"""Pictures of explanations: colours, signs, sizes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from bcosify.explain import explain
from bcosify.explain.render import overlay, panel, rgba, signed_map
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


@pytest.mark.parametrize("size", [160, 336])
@pytest.mark.parametrize("channels", [3, 6])
def test_panel_is_drawn_with_and_without_constants(photo, channels, size):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=channels == 3), nn.GELU(), nn.AdaptiveAvgPool2d(1))
    model.append(nn.Flatten())
    images = torch.randn(2, 3, 12, 16)
    explanation = explain(model, images, [1, 2])
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
    explanation = explanation.__class__(
        outputs=nothing,
        scores=nothing,
        contributions=torch.ones(1, 1, 8, 8),
        encoded_inputs=encoded,
        encoded_gradients=encoded[:, None],
        constants={},
        residual=nothing,
    )
    drawn = np.asarray(panel(None, explanation, size=100)).astype(int)
    inside = (np.abs(drawn[:, :115] - np.array([51, 153, 102])) <= 1).all(-1)
    assert inside.sum() == 98 * 98  # the first tile, but for the line around it
    broken = explanation.__class__(**{**explanation.__dict__, "encoded_inputs": encoded[:, :3]})
    with pytest.raises(ValueError, match="pass the image"):
        panel(None, broken)
