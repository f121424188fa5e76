"""Dynamic-linear layers, one idea a file."""

from .attention import SeparateAttention, SeparateAttentionPool2d
from .batch_norm import UncentredBatchNorm, batch_statistics, estimate_statistics
from .bcos import BcosConv2d, BcosConv2dSame, BcosLinear, bcos_scale
from .coda import CodaConv2d, CodaConv2dSame, CodaLinear, Squash, squashed
from .convolution import DynamicConv2d
from .scheduled import BiasScheduled, Rescalable, adopt, join, scheduled_layers, set_strength
from .stem import (
    SixChannel,
    SixChannelBcosConv2d,
    SixChannelBcosConv2dSame,
    SixChannelCodaConv2d,
    SixChannelCodaConv2dSame,
    SixChannelInput,
    from_six_channels,
    six_channels,
)

__all__ = [
    "BcosConv2d",
    "BcosConv2dSame",
    "BcosLinear",
    "BiasScheduled",
    "CodaConv2d",
    "CodaConv2dSame",
    "CodaLinear",
    "DynamicConv2d",
    "Rescalable",
    "SeparateAttention",
    "SeparateAttentionPool2d",
    "SixChannel",
    "SixChannelBcosConv2d",
    "SixChannelBcosConv2dSame",
    "SixChannelCodaConv2d",
    "SixChannelCodaConv2dSame",
    "SixChannelInput",
    "Squash",
    "UncentredBatchNorm",
    "adopt",
    "batch_statistics",
    "bcos_scale",
    "estimate_statistics",
    "from_six_channels",
    "join",
    "scheduled_layers",
    "set_strength",
    "six_channels",
    "squashed",
]
