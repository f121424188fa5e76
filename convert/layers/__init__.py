"""Dynamic-linear layers, one idea a file."""

from .batch_norm import UncentredBatchNorm, batch_statistics, estimate_statistics
from .bcos import BcosConv2d, BcosConv2dSame, BcosLinear, bcos_scale
from .scheduled import BiasScheduled, adopt, scheduled_layers, set_strength
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
    "batch_statistics",
    "bcos_scale",
    "estimate_statistics",
    "scheduled_layers",
    "set_strength",
    "six_channels",
]
