"""Folders of schema 1, which hold a digest of their plan and a report in the place of swaps and history.

What the plan was is found by planning once more, and the digest says whether it is the same. So a rule that came later
may make such a folder unreadable; saved again, it has schema 2 and stays readable.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..core.errors import CheckpointError
from .history import History
from .plan import Method, Plan, plan_conversion

__all__ = ["SCHEMA", "history_of", "plan_of"]

SCHEMA = 1
# What the digest calls swaps: the names that their classes had. Never to be changed.
NAMES = {
    "bcos.linear": "BcosLinear",
    "bcos.conv2d": "BcosConv2d",
    "bcos.conv2d_same": "BcosConv2dSame",
    "bcos.stem_conv2d": "SixChannelBcosConv2d",
    "bcos.stem_conv2d_same": "SixChannelBcosConv2dSame",
    "coda.linear": "CodaLinear",
    "coda.conv2d": "CodaConv2d",
    "coda.conv2d_same": "CodaConv2dSame",
    "coda.stem_conv2d": "SixChannelCodaConv2d",
    "coda.stem_conv2d_same": "SixChannelCodaConv2dSame",
    "common.fading_bias": "BiasScheduled",
    "common.uncentred_batch_norm": "UncentredBatchNorm",
    "common.separate_attention": "SeparateAttention",
    "common.separate_attention_pool2d": "SeparateAttentionPool2d",
    "common.six_channel_input": "SixChannelInput",
    "fa-cnn.class_maps": "ClassMaps",
    "fa-cnn.dampened_skip": "DampenedSkip",
    "fa-cnn.last_map": "LastMap",
    "fa-cnn.last_map_channels_last": "LastMapChannelsLast",
    "fa-cnn.last_tokens": "LastTokens",
    "fa-cnn.place_norm": "PlaceNorm",
    "fa-cnn.place_classifier": "PlaceClassifier",
    "ca-stream.average": "CaStream",
    "ca-stream.token": "CaStreamForToken",
    "kmeans.prototype_linear": "PrototypeLinear",
    "kmeans.prototype_maps": "PrototypeMaps",
}


def plan_of(digest: str, model: nn.Module, method: Method, config: Any, size: tuple[int, int], where: str) -> Plan:
    """The plan with this digest, made again for `model`, which has memory but need not have its weights.

    Raises:
        CheckpointError: today's rules make another one.
    """
    plan = plan_conversion(model, method, config, size)
    if _digest(plan) != digest:
        raise CheckpointError(
            f"{where} has schema {SCHEMA}, which does not hold the swaps of its layers, and the rules of this version "
            f"would swap others. Open and save it once with the version that wrote it or a later one that still reads "
            "it; from schema 2 on folders hold their swaps."
        )
    return plan


def _digest(plan: Plan) -> str:
    swaps = [[step.name, step.found, NAMES.get(step.swap.id)] for step in plan.swaps if step.swap]
    return hashlib.sha256(json.dumps([plan.method, swaps]).encode()).hexdigest()


def history_of(report: Mapping[str, Any]) -> History:
    """The history that a report of facts told; what it does not know goes into the notes."""
    facts = dict(report)
    conversion = {key: facts.pop(key) for key in ("identity_error", "teacher", "lossy_steps") if key in facts}
    found: dict[str, Any] = {"conversion": conversion, "notes": facts}
    if (calibration := facts.pop("calibration", None)) is not None:
        strengths = dict(calibration)
        counts = {key: strengths.pop(key) for key in ("pictures", "layers")}
        found["calibration"] = {**counts, "strengths": strengths}
    if (alignment := facts.pop("alignment", None)) is not None:
        found["alignment"] = alignment
    return History.from_json({"version": 1, **found})
