"""Sums under kernels, by whichever way a device and a layout take, and their transpose."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from bcosify.convert.kernels.windows import Window, pools, sums, sums_over, sums_under
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

layouts = st.sampled_from([torch.contiguous_format, torch.channels_last])


@st.composite
def windows(draw) -> tuple[tuple[int, int], Window]:
    def pair(least: int, most: int) -> tuple[int, int]:
        return draw(st.integers(least, most)), draw(st.integers(least, most))

    kernel, window = pair(1, 4), Window(pair(1, 3), pair(0, 3), pair(1, 2))
    assume(all(9 + 2 * p >= d * (k - 1) + 1 for k, p, d in zip(kernel, window.padding, window.dilation, strict=True)))
    return kernel, window


def maps(layout: torch.memory_format, channels: int) -> Tensor:
    return torch.randn(2, channels, 9, 9, dtype=torch.float64).contiguous(memory_format=layout)


def by_ones(x: Tensor, kernel: tuple[int, int], window: Window) -> Tensor:
    return F.conv2d(x, torch.ones(x.shape[1], 1, *kernel, dtype=x.dtype), None, *window, x.shape[1])


@settings(deadline=None, max_examples=60)
@given(windows(), layouts, st.integers(1, 3))
def test_sums_are_those_of_a_kernel_of_ones(shape, layout, channels):
    kernel, window = shape
    x = maps(layout, channels)
    wanted = by_ones(x, kernel, window)
    torch.testing.assert_close(sums_under(x, kernel, window), wanted)
    torch.testing.assert_close(sums(x, kernel, window), wanted)


@pytest.mark.parametrize("exporting", [False, True])
@settings(deadline=None, max_examples=60)
@given(windows(), layouts)
def test_pools_are_the_same(exporting, shape, layout):
    kernel, window = shape
    window = window._replace(dilation=(1, 1))
    assume(all(2 * p <= k for p, k in zip(window.padding, kernel, strict=True)))
    x = maps(layout, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_exporting", lambda: exporting)
        found = pools(x, kernel, window)
    torch.testing.assert_close(found, by_ones(x, kernel, window))


@settings(deadline=None, max_examples=60)
@given(windows(), layouts, st.integers(1, 3))
def test_the_transpose_is_one(shape, layout, channels):
    kernel, window = shape
    x = maps(layout, channels)
    under = sums_under(x, kernel, window)
    pull = torch.randn_like(under)
    torch.testing.assert_close((under * pull).sum(), (x * sums_over(pull, kernel, window, x.shape)).sum())
