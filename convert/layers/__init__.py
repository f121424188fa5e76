"""Dynamic-linear layers, one idea a file."""

from .attention import SeparateAttention, SeparateAttentionPool2d
from .batch_norm import UncentredBatchNorm, batch_statistics, estimate_statistics
from .bcos import BcosConv2d, BcosConv2dSame, BcosLinear, bcos_scale
from .class_maps import ClassMaps, LastMap, LastMapChannelsLast, LastTokens, PlaceClassifier, PlaceNorm
from .dampening import DampenedSkip, Dampening
from .scheduled import BiasScheduled, Scheduled, adopt, at_start, join, scheduled_layers, set_strength
from .stem import SixChannelBcosConv2d, SixChannelBcosConv2dSame, SixChannelInput, from_six_channels, six_channels

__all__ = [
    "BcosConv2d",
    "BcosConv2dSame",
    "BcosLinear",
    "BiasScheduled",
    "ClassMaps",
    "DampenedSkip",
    "Dampening",
    "LastMap",
    "LastMapChannelsLast",
    "LastTokens",
    "PlaceClassifier",
    "PlaceNorm",
    "Scheduled",
    "SeparateAttention",
    "SeparateAttentionPool2d",
    "SixChannelBcosConv2d",
    "SixChannelBcosConv2dSame",
    "SixChannelInput",
    "UncentredBatchNorm",
    "adopt",
    "at_start",
    "batch_statistics",
    "bcos_scale",
    "estimate_statistics",
    "from_six_channels",
    "join",
    "scheduled_layers",
    "set_strength",
    "six_channels",
]
