"""The six-channel stem: normalisation and bias in the weights, and still the source's function, border included."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from bcosify.convert.kernels.six_channels import six_channels
from bcosify.convert.layers import SixChannelBcosConv2d, SixChannelBcosConv2dSame, convert_in_place, set_strength
from bcosify.explain import Linearised
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import Conv2dSame
from torch import Tensor, nn

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def encoded(source: nn.Conv2d) -> nn.Module:
    mixin = SixChannelBcosConv2dSame if isinstance(source, Conv2dSame) else SixChannelBcosConv2d
    layer = convert_in_place(copy.deepcopy(source), mixin)
    layer.encode_with(MEAN, STD)
    return layer


@st.composite
def stems(draw) -> nn.Conv2d:
    torch.manual_seed(draw(st.integers(0, 9)))
    kernel, stride = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    options = {"stride": stride, "dilation": draw(st.integers(1, 2)), "bias": draw(st.booleans())}
    if draw(st.booleans()):
        return Conv2dSame(3, 4, kernel, **options)
    padding = draw(st.sampled_from([0, 1, (2, 0), 3, "valid", *(["same"] if stride == 1 else [])]))
    return nn.Conv2d(3, 4, kernel, padding=padding, **options)


@given(stems(), st.integers(8, 11), st.integers(8, 11))
@settings(max_examples=80, deadline=None, derandomize=True)
def test_stem_is_its_source_on_normalised_pictures(source, height, width):
    source = source.double()
    x = (torch.rand(2, 3, height, width, dtype=torch.float64) - torch.tensor(MEAN).view(3, 1, 1)) / 0.225
    torch.testing.assert_close(encoded(source)(x), source(x), rtol=1e-12, atol=1e-12)


def by_six_channels(layer: SixChannelBcosConv2d, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """B-cos at B = 2 written out: the padded [r, 1-r], its response, and the gate."""
    geometry = (None, layer.stride, 0, layer.dilation)
    encoding = six_channels(x, layer.mean.double(), layer.std.double(), layer.pads(*x.shape[-2:]))
    response = F.conv2d(encoding, layer.weight, *geometry)
    patches = F.conv2d(encoding.square(), torch.ones_like(layer.weight), *geometry)
    size = (patches * layer.weight.square().sum((1, 2, 3)).view(-1, 1, 1)).sqrt()
    return encoding, response, response.abs() / size


@given(stems(), st.integers(8, 11), st.integers(8, 11))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_stem_responds_to_six_channels_and_is_explained_by_them(source, height, width):
    layer, x = encoded(source.double()), torch.randn(2, 3, height, width, dtype=torch.float64)
    set_strength(layer, b=2.0)
    encoding, response, gate = by_six_channels(layer, x)
    torch.testing.assert_close(layer(x), response * gate)
    with Linearised(layer) as mode:
        y = layer(mode.follow(x))
    assert torch.equal(y.detach(), layer(x).detach())
    (leaf,), pulled = mode.inputs, torch.randn_like(y)
    (gradient,), constants = mode.pull((y * pulled).sum())
    left, right, top, bottom = layer.pads(height, width)
    geometry = (layer.stride, 0, layer.dilation)
    wanted = torch.nn.grad.conv2d_input(list(encoding.shape), layer.weight, (gate * pulled).detach(), *geometry)
    inside = (..., slice(top, top + height), slice(left, left + width))
    torch.testing.assert_close(leaf, encoding[inside])
    torch.testing.assert_close(gradient, wanted[inside])
    total = (leaf * gradient).flatten(1).sum(1) + sum(constants.values())
    torch.testing.assert_close(total, (y * pulled).flatten(1).sum(1).detach())
    assert set(constants) <= {"padding"} and bool(constants) == any((left, right, top, bottom))


@pytest.mark.parametrize("beta", [1.0, 0.0])
def test_bias_lives_in_the_weights_so_beta_does_not_touch_it(beta):
    torch.manual_seed(0)
    source, x = nn.Conv2d(3, 4, 3).double(), torch.randn(1, 3, 6, 6, dtype=torch.float64)
    layer = encoded(source)
    set_strength(layer, beta=beta)
    assert set(layer.state_dict()) == {"weight", "b", "beta", "carry"} and layer.weight.shape == (4, 6, 3, 3)
    torch.testing.assert_close(layer(x), source(x), rtol=1e-12, atol=1e-12)


def test_encoding_is_the_picture_and_its_complement_and_pads_with_the_mean_colour():
    picture = torch.rand(1, 3, 2, 2, dtype=torch.float64)
    mean, std = (torch.tensor(v, dtype=torch.float64) for v in (MEAN, STD))
    normalised = (picture - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    out = six_channels(normalised, mean, std, (1, 0, 0, 2))
    assert out.shape == (1, 6, 4, 3)
    torch.testing.assert_close(out[:, :3, :2, 1:], picture)
    torch.testing.assert_close(out[:, :3] + out[:, 3:], torch.ones(1, 3, 4, 3, dtype=torch.float64))
    torch.testing.assert_close(out[0, :3, 3, 0], mean)


@pytest.mark.parametrize("channels", [1, 4, 6])
def test_pictures_of_other_channels_are_refused(channels):
    with pytest.raises(ValueError, match=rf"normalised picture \(B, 3, H, W\), got \(1, {channels}, 8, 8\)"):
        encoded(nn.Conv2d(3, 4, 3))(torch.zeros(1, channels, 8, 8))


@pytest.mark.parametrize(
    "source",
    [nn.Conv2d(1, 4, 3), nn.Conv2d(6, 4, 3), nn.Conv2d(3, 3, 3, groups=3), nn.Conv2d(3, 4, 3, padding_mode="reflect")],
    ids=str,
)
def test_layers_that_do_not_read_rgb_are_refused(source):
    with pytest.raises(ValueError, match="must read three channels, ungrouped, with zero padding"):
        encoded(source)


def test_stem_keeps_precision_and_what_is_trained_and_works_without_memory():
    source = nn.Conv2d(3, 4, 3, dtype=torch.bfloat16, device="meta")
    source.weight.requires_grad_(False)
    weight = encoded(source).weight
    assert (weight.dtype, weight.device.type, weight.requires_grad) == (torch.bfloat16, "meta", False)
