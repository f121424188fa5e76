"""The six-channel stem: the normalised picture becomes [r, 1-r] inside the first layer, and nothing else changes.

Outside, a converted model takes what its teacher takes: 3 channels, normalised, z = (r - mean) / std with r in [0,
1]. The stem undoes that. Because r + (1-r) = 1, any constant can be written as equal weights on a pixel and its
complement, so

    W6 = [W / (2 std) + a,  -W / (2 std) + a],   a = (bias - sum(W mean/std) + sum(W / (2 std))) / (3 kh kw)

gives W6.[r, 1-r] = W.z + bias exactly: normalisation and bias live in the weights. Zeros that a convolution pads after
normalisation are the colour `mean`, so the stem pads before it encodes, and the border is right to the last bit too.
(Ours.)

The six channels are what gets explained, and what the weights are of; to respond to them takes three:

    W6.[r, 1-r] = (W_r - W_c) std . z + sum(W_r mean + W_c (1 - mean))

with zeros around z, and |[r, 1-r]|^2 = 2 |r - 1/2|^2 + 3/2 for three colours. So a stem costs what its source costs,
also after training, and [r, 1-r] is made in explanation mode only.

A picture that gets into the model any other way (cut into patches for a linear layer, folded into more channels,
resized for a second branch, normalised again) is encoded at the entrance instead: the model goes on seeing z, and in
explanation mode z is the linear function

    z = r (1/(2 std) + k) + (1-r) (-1/(2 std) + k),   k = (1 - 2 mean) / (2 std)

of the six channels, without a constant, again because r + (1-r) = 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.six_channels import (
    encoding_weights,
    from_six_channels,
    six_channel_products,
    with_six_channel_norms,
)
from ..kernels.windows import Pads, Pair
from .bcos import BcosConv2d, BcosConv2dSame
from .convolution import DynamicConv2d

__all__ = [
    "SixChannel",
    "SixChannelBcosConv2d",
    "SixChannelBcosConv2dSame",
    "SixChannelInput",
]


def _constants(mean: tuple[float, ...], std: tuple[float, ...], like: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both as (3,) tensors where `like` is; on the CPU where that has no memory, since they are in no checkpoint."""
    device = None if like is None or like.is_meta else like.device
    return torch.tensor(mean, device=device), torch.tensor(std, device=device)


class SixChannelInput(nn.Module):
    """Mixin over a whole model: its first argument, the normalised picture, is explained as [r, 1-r]."""

    mean_colour: Tensor
    std_colour: Tensor

    def encode_with(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        """Keeps the normalisation; nothing that the model computes changes."""
        constants = _constants(mean, std, next(self.parameters(), None))
        for name, constant in zip(("mean_colour", "std_colour"), constants, strict=True):
            self.register_buffer(name, constant, persistent=False)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        mean, std = self.mean_colour.to(x.dtype), self.std_colour.to(x.dtype)
        return super().forward(from_six_channels(x, mean, std), *args, **kwargs)  # type: ignore[misc]


class SixChannel(DynamicConv2d):
    """Mixin over a convolution: encodes the picture first."""

    mean: Tensor
    std: Tensor

    def encode_with(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        """Folds normalisation and bias into six-channel weights; ValueError for a layer that does not read RGB."""
        weight, bias = self._parameters["weight"], self._parameters["bias"]
        if weight is None or weight.shape[1] != 3 or self.padding_mode != "zeros":
            raise ValueError("the first convolution must read three channels, ungrouped, with zero padding")
        for name, constant in zip(("mean", "std"), _constants(mean, std, weight), strict=True):
            self.register_buffer(name, constant, persistent=False)
        # From the buffers: it must undo what forward does.
        six = encoding_weights(weight, bias, self.mean, self.std)
        self.weight = nn.Parameter(six, requires_grad=weight.requires_grad)
        self._parameters["bias"] = None
        self.in_channels = 6

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != 3:
            raise ValueError(
                f"expected a normalised picture (B, 3, H, W), got {tuple(x.shape)}: the six "
                f"channels are made inside the model"
            )
        return self.respond(x, (0, 0))

    def product(self, x: Tensor, padding: Pair, kernel: Tensor, bias: Tensor | None = None) -> Tensor:
        assert bias is None  # it is in the kernel
        return six_channel_products(*self._encoding(x), kernel, self.stride, self.dilation)

    def products(self, x: Tensor, padding: Pair, *kernels: Tensor) -> list[Tensor]:
        # At once: what is encoded twice is explained twice.
        return list(self.product(x, padding, torch.cat(kernels)).split([*map(len, kernels)], dim=1))

    def with_patch_norms(self, x: Tensor, padding: Pair) -> tuple[Tensor, Tensor]:
        return with_six_channel_norms(*self._encoding(x), self.kernel_size, self.window(padding))

    def _encoding(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Pads]:
        """The arguments of `six_channels`."""
        return x, self.mean.to(x.dtype), self.std.to(x.dtype), self.pads(*x.shape[-2:])


class SixChannelBcosConv2d(SixChannel, BcosConv2d):
    """Six-channel stem over `nn.Conv2d`, B-cos."""


class SixChannelBcosConv2dSame(SixChannel, BcosConv2dSame):
    """Six-channel stem over timm's `Conv2dSame`, B-cos."""
