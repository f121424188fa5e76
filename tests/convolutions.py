"""Convolutions of any kind, for property tests, and what they pad."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

__all__ = ["convolutions", "source_pads"]

pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


@st.composite
def convolutions(draw, mode: str) -> tuple[nn.Conv2d, Tensor]:
    """A float64 convolution of any kind, and a picture that it takes."""
    groups, kernel, dilation = draw(st.integers(1, 3)), draw(pairs), draw(st.integers(1, 2))
    padding = draw(st.one_of(st.tuples(st.integers(0, 3), st.integers(0, 3)), st.sampled_from(["same", "valid"])))
    torch.manual_seed(draw(st.integers(0, 9)))
    convolution = nn.Conv2d(
        groups * draw(st.integers(1, 2)),
        groups * draw(st.integers(1, 2)),
        kernel,
        stride=1 if padding == "same" else draw(pairs),
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=mode,
        dtype=torch.float64,
    )
    size = draw(st.tuples(st.integers(5, 8), st.integers(5, 8)))
    return convolution, torch.randn(draw(st.integers(1, 2)), convolution.in_channels, *size, dtype=torch.float64)


def source_pads(layer: nn.Conv2d) -> list[int]:
    """(left, right, top, bottom), written out from torch's documentation."""
    if layer.padding == "same":
        totals = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        return [side for total in reversed(totals) for side in (total // 2, total - total // 2)]
    rows, columns = (0, 0) if layer.padding == "valid" else layer.padding
    return [columns, columns, rows, rows]
