"""Features of many pictures at several depths, from one pass each, kept under a name made from the weights themselves.

A cache keyed by a model's name would give old features back after the next training step. The key is the digest of
weights, pictures and preprocessing, so it can only be right or unused.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..convert.taps import channels_last, depth_taps, find_blocks, record
from ..core.errors import BcosifyError
from ..core.files import cache_root, new_file
from ..core.pictures import fitted
from ..explain.self_explaining import main_output
from .subject import Subject, weights_digest

__all__ = ["DENSE", "OUTPUT", "cache_key", "features_of", "kept"]

SCHEMA = 1
OUTPUT, DENSE = "output", "dense"
# Patch features are large: of so many pictures only.
DENSE_PICTURES = 256


def cache_key(subject: Subject, data: str) -> str:
    """What the features of `data` (a digest of pictures and preprocessing) are kept under."""
    return hashlib.sha256(json.dumps([SCHEMA, weights_digest(subject.model), data]).encode()).hexdigest()[:32]


def kept(key: str | None) -> bool:
    """Whether the features of this key were made before."""
    return key is not None and _place(key).is_file()


def _place(key: str) -> Path:
    return cache_root() / "features" / f"{key}.safetensors"


def features_of(subject: Subject, batches: Iterable[Tensor], key: str | None = None) -> dict[str, Tensor]:
    """Name -> features on the CPU, of batches (B, 3, H, W), the last one however small.

    Args:
        key: of `cache_key`; None neither reads nor writes the cache.

    Returns:
        output: (N, D). A block's name, at a third, two thirds and all of the depth: (N, C), mean over places.
        dense: (min(N, 256), C, rows, columns), where the model has a grid of patches.
    """
    path = None if key is None else _place(key)
    if path is not None and path.is_file():
        with contextlib.suppress(OSError, SafetensorError):  # half a cache is none
            return load_file(path)
    found = _computed(subject, batches)
    if path is not None:
        # A cache that cannot be written costs time, nothing else.
        with contextlib.suppress(BcosifyError, OSError, SafetensorError), new_file(path) as scratch:
            save_file({name: values.contiguous() for name, values in found.items()}, scratch)
    return found


@torch.no_grad()
def _computed(subject: Subject, batches: Iterable[Tensor]) -> dict[str, Tensor]:
    taps = depth_taps(find_blocks(subject.model))
    parts: dict[str, list[Tensor]] = {}
    seen = 0
    for batch in batches:
        batch = fitted(batch, subject.model)
        with record(subject.model, taps) as calls:
            parts.setdefault(OUTPUT, []).append(main_output(subject.model(batch)))
        for name in taps:
            pooled = channels_last(calls[name].output).unflatten(0, (len(batch), -1)).mean(1)
            parts.setdefault(name, []).append(pooled)
        if subject.tokens is not None and seen < DENSE_PICTURES:
            parts.setdefault(DENSE, []).append(subject.tokens(subject.model, batch[: DENSE_PICTURES - seen]))
        seen += len(batch)
    return {name: torch.cat([part.float().cpu() for part in several]) for name, several in parts.items()}
