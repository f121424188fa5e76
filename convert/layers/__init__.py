"""Dynamic-linear layers, one idea a file."""

from .bcos import BcosConv2d, BcosConv2dSame, BcosLinear, bcos_scale
from .scheduled import BiasScheduled, UncentredBatchNorm, adopt, scheduled_layers, set_strength
from .stem import SixChannelBcosConv2d, SixChannelBcosConv2dSame, six_channels

__all__ = [
    "BcosConv2d",
    "BcosConv2dSame",
    "BcosLinear",
    "BiasScheduled",
    "SixChannelBcosConv2d",
    "SixChannelBcosConv2dSame",
    "UncentredBatchNorm",
    "adopt",
    "bcos_scale",
    "scheduled_layers",
    "set_strength",
    "six_channels",
]
