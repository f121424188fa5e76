"""Dynamic-linear layers, one idea a file."""

from .attention import SeparateAttention, SeparateAttentionPool2d
from .batch_norm import UncentredBatchNorm, batch_statistics, estimate_statistics
from .bcos import BcosConv2d, BcosConv2dSame, BcosLinear
from .ca_stream import CaStream, CaStreamForToken, Stream
from .class_maps import ClassMaps, LastMap, LastMapChannelsLast, LastTokens, PlaceClassifier, PlaceNorm
from .coda import CodaConv2d, CodaConv2dSame, CodaLinear, Squash
from .convolution import DynamicConv2d
from .dampening import DampenedSkip, Dampening
from .prototypes import Concepts, PrototypeLinear, PrototypeMaps
from .reference import (
    ReferenceSized,
    RunningGains,
    estimate_gains,
    fold_gains,
    mean_sizes,
    recording,
    reference_gains,
)
from .scheduled import (
    STRENGTHS,
    BiasScheduled,
    Rescalable,
    Scheduled,
    adopt,
    at_start,
    described,
    join,
    scheduled_layers,
    set_strength,
    strength_spans,
)
from .stem import (
    SixChannel,
    SixChannelBcosConv2d,
    SixChannelBcosConv2dSame,
    SixChannelCodaConv2d,
    SixChannelCodaConv2dSame,
    SixChannelInput,
)
from .watch import watching

__all__ = [
    "STRENGTHS",
    "BcosConv2d",
    "BcosConv2dSame",
    "BcosLinear",
    "BiasScheduled",
    "CaStream",
    "CaStreamForToken",
    "ClassMaps",
    "CodaConv2d",
    "CodaConv2dSame",
    "CodaLinear",
    "Concepts",
    "DampenedSkip",
    "Dampening",
    "DynamicConv2d",
    "LastMap",
    "LastMapChannelsLast",
    "LastTokens",
    "PlaceClassifier",
    "PlaceNorm",
    "PrototypeLinear",
    "PrototypeMaps",
    "ReferenceSized",
    "Rescalable",
    "RunningGains",
    "Scheduled",
    "SeparateAttention",
    "SeparateAttentionPool2d",
    "SixChannel",
    "SixChannelBcosConv2d",
    "SixChannelBcosConv2dSame",
    "SixChannelCodaConv2d",
    "SixChannelCodaConv2dSame",
    "SixChannelInput",
    "Squash",
    "Stream",
    "UncentredBatchNorm",
    "adopt",
    "at_start",
    "batch_statistics",
    "described",
    "estimate_gains",
    "estimate_statistics",
    "fold_gains",
    "join",
    "mean_sizes",
    "recording",
    "reference_gains",
    "scheduled_layers",
    "set_strength",
    "strength_spans",
    "watching",
]
