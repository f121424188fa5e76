"""Features of many pictures at several depths, from one pass each, kept under a name made from the weights themselves.

A cache keyed by a model's name would give old features back after the next training step. The key is the digest of
weights, pictures and preprocessing, so it can only be right or unused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..convert.taps import channels_last, depth_taps, find_blocks, record
from ..core.errors import BcosifyError
from ..core.files import cache_root, new_file
from ..core.hooks import hooked
from ..core.pictures import fitted
from ..explain.self_explaining import main_output, standing_in
from .subject import Subject, weights_digest

__all__ = ["DENSE", "OUTPUT", "cache_key", "features_of", "kept"]

SCHEMA = 1
OUTPUT, DENSE = "output", "dense"
# Patch features are large: of so many pictures only.
DENSE_PICTURES = 256
# Bytes of a batch's blocks that are held, so that they need not run again for patch features.
AT_ONCE = 2**29


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
    blocks = find_blocks(subject.model)
    taps = depth_taps(blocks)
    parts: dict[str, list[Tensor]] = {}
    seen = 0
    for batch in batches:
        batch = fitted(batch, subject.model)
        dense = subject.tokens is not None and seen < DENSE_PICTURES
        with record(subject.model, taps) as calls, _recorded(subject.model, blocks if dense else ()) as passed:
            parts.setdefault(OUTPUT, []).append(main_output(subject.model(batch)))
        for name in taps:
            pooled = channels_last(calls[name].output).unflatten(0, (len(batch), -1)).mean(1)
            parts.setdefault(name, []).append(pooled)
        if subject.tokens is not None and dense:
            few = DENSE_PICTURES - seen
            # Their pass is the same but for its end, so blocks need not run again.
            with contextlib.nullcontext() if few < len(batch) else _replayed(passed):
                parts.setdefault(DENSE, []).append(subject.tokens(subject.model, batch[:few]))
        seen += len(batch)
    return {name: torch.cat([part.float().cpu() for part in several]) for name, several in parts.items()}


@dataclasses.dataclass(frozen=True, eq=False)
class _Passed:
    """What went into a block and what came out; `version` is the output's, which grows when it is written over."""

    block: nn.Module
    given: Tensor
    output: Tensor
    version: int


@contextlib.contextmanager
def _recorded(model: nn.Module, blocks: Iterable[str]) -> Iterator[list[_Passed]]:
    """Fills the yielded list with the calls of blocks that take and give one tensor."""
    passed: list[_Passed] = []

    def keep(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:
        if len(args) == 1 and not options and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            passed.append(_Passed(module, args[0], output, output._version))

    with hooked(((model.get_submodule(name), keep) for name in blocks), with_kwargs=True):
        yield passed


@contextlib.contextmanager
def _replayed(passed: Sequence[_Passed]) -> Iterator[None]:
    """Inside, a block that is given what it was given before returns what it returned, unless that was written over."""

    def forward(call: _Passed, own: Callable[..., Any], *args: Any, **options: Any) -> Any:
        same = len(args) == 1 and not options and isinstance(args[0], Tensor) and args[0].shape == call.given.shape
        same = same and call.output._version == call.version
        return call.output if same and torch.equal(args[0], call.given) else own(*args, **options)

    with contextlib.ExitStack() as stack:
        if sum(call.output.nbytes for call in passed) <= AT_ONCE:
            for call in passed:
                stack.enter_context(standing_in(call.block, partial(forward, call, call.block.forward)))
        yield
