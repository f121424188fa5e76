"""Pictures as colours and their complements, [r, 1-r], and products with them that cost three channels.

For a normalised picture z = (r - mean) / std with r in [0, 1] (formulas: `layers.stem`; ours).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...linearise.mode import input_colours, input_encoding, linear_in, with_statistics
from .squares import sum_of_squares
from .windows import Pads, Pair, Window, input_gradient, sums_under, zero_padded

__all__ = [
    "encoding_weights",
    "from_six_channels",
    "six_channel_products",
    "six_channels",
    "with_six_channel_norms",
]


@input_encoding
def six_channels(x: Tensor, mean: Tensor, std: Tensor, padding: Pads = (0, 0, 0, 0)) -> Tensor:
    """Normalised x (B, 3, H, W) -> [r, 1-r] (B, 6, H+t+b, W+l+r), r in [0, 1]; `padding` (l, r, t, b) is the mean
    colour.

    `mean` and `std` are (3,).
    """
    r = (F.pad(x, padding) if any(padding) else x) * std.view(-1, 1, 1) + mean.view(-1, 1, 1)
    return torch.cat([r, 1 - r], dim=1)


@input_colours
def from_six_channels(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Normalised x (B, 3, H, W), itself; in explanation mode as a linear function of [r, 1-r] (B, 6, H, W)."""
    return x


def encoding_weights(weight: Tensor, bias: Tensor | None, mean: Tensor, std: Tensor) -> Tensor:
    """W6 (K, 6, k, l), with W6.[r, 1-r] = W.z + bias, in the precision of W (K, 3, k, l).

    W6 = [W / (2 std) + a, -W / (2 std) + a],  a = (bias - sum(W mean/std) + sum(W / (2 std))) / (3 k l)
    """
    # float64: the folded constant is a sum over the whole patch.
    w = weight.detach().double()
    mu, sigma = (constant.to(w).view(-1, 1, 1) for constant in (mean, std))
    constant = (w / (2 * sigma) - w * mu / sigma).sum((1, 2, 3))
    if bias is not None:
        constant = constant + bias.detach().double()
    a = (constant / w[0].numel()).view(-1, 1, 1, 1)
    half = w / (2 * sigma)
    return torch.cat([half + a, a - half], dim=1).to(weight.dtype)


# -------------------------------------------------------------------------------------- without making the six channels


def _gradient(size: torch.Size, grad: Tensor, kernel: Tensor, stride: Pair, dilation: Pair) -> Tensor:
    """At six channels of `size`, from `grad` (B, K, H', W') at the response of `kernel` to them."""
    return input_gradient(size, grad, kernel, Window(stride, (0, 0), dilation))


@linear_in(six_channels, _gradient)
def six_channel_products(
    x: Tensor, mean: Tensor, std: Tensor, padding: Pads, kernel: Tensor, stride: Pair, dilation: Pair
) -> Tensor:
    """(B, K, H', W'): kernel (K, 6, k, l) on `six_channels(x, mean, std, padding)`, by a product of three channels.

    W6.[r, 1-r] = (W_r - W_c) std . z + sum(W_r mean + W_c (1 - mean))
    """
    colour, complement = kernel.chunk(2, dim=1)
    middle, width = mean.view(-1, 1, 1), std.view(-1, 1, 1)
    constant = (colour * middle + complement * (1 - middle)).sum((1, 2, 3))
    x, native = zero_padded(x, padding)
    return F.conv2d(x, (colour - complement) * width, constant, stride, native, dilation)


@with_statistics
def with_six_channel_norms(
    x: Tensor, mean: Tensor, std: Tensor, padding: Pads, kernel: Pair, window: Window
) -> tuple[Tensor, Tensor]:
    """x (B, 3, H, W), and |patch|^2 (B, 1, H', W') of `six_channels(x, mean, std, padding)`.

    |[r, 1-r]|^2 = 2 |r - 1/2|^2 + 3/2. In explanation mode the norms are constants.
    """
    from_middle = torch.addcmul((mean - 0.5).view(-1, 1, 1), F.pad(x, padding), std.view(-1, 1, 1))
    return x, sums_under(2 * sum_of_squares(from_middle, 1) + len(mean) / 2, kernel, window)
