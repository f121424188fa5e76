"""Dynamic-linear layers, one idea a file."""

from .attention import SeparateAttention, SeparateAttentionPool2d
from .bcos import BcosConv2d, BcosConv2dSame, BcosLinear, bcos_scale
from .scheduled import BiasScheduled, UncentredBatchNorm, adopt, join, scheduled_layers, set_strength
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
    "bcos_scale",
    "from_six_channels",
    "join",
    "scheduled_layers",
    "set_strength",
    "six_channels",
]
