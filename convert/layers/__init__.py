"""Dynamic-linear layers, one idea a file."""

from .attention import SeparateAttention, SeparateAttentionPool2d
from .batch_norm import UncentredBatchNorm, batch_statistics, estimate_statistics
from .bcos import BcosConv2d, BcosConv2dSame, BcosLinear, bcos_scale
from .scheduled import BiasScheduled, adopt, join, scheduled_layers, set_strength
from .stem import SixChannelBcosConv2d, SixChannelBcosConv2dSame, SixChannelInput, from_six_channels, six_channels

__all__ = [
    "BcosConv2d",
    "BcosConv2dSame",
    "BcosLinear",
    "BiasScheduled",
    "SeparateAttention",
    "SeparateAttentionPool2d",
    "SixChannelBcosConv2d",
    "SixChannelBcosConv2dSame",
    "SixChannelInput",
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
]
