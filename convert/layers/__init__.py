"""The dynamic-linear layers that methods share, one idea a file; a method's own layers lie beside it."""

from .attention import SeparateAttention, SeparateAttentionPool2d
from .batch_norm import UncentredBatchNorm, batch_statistics, estimate_statistics
from .bcos import BcosConv2d, BcosConv2dSame, BcosLinear
from .convolution import DynamicConv2d
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
    at_start,
    convert_in_place,
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
    SixChannelInput,
)
from .watch import watching

__all__ = [
    "STRENGTHS",
    "BcosConv2d",
    "BcosConv2dSame",
    "BcosLinear",
    "BiasScheduled",
    "DynamicConv2d",
    "ReferenceSized",
    "Rescalable",
    "RunningGains",
    "Scheduled",
    "SeparateAttention",
    "SeparateAttentionPool2d",
    "SixChannel",
    "SixChannelBcosConv2d",
    "SixChannelBcosConv2dSame",
    "SixChannelInput",
    "UncentredBatchNorm",
    "at_start",
    "batch_statistics",
    "convert_in_place",
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
