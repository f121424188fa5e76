"""Taps: named modules whose inputs and outputs are recorded in one forward pass, on any architecture."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from ..core.errors import RecipeError, near_miss
from ..core.hooks import hooked
from .blocks import WEIGHT_LAYERS, blocks_of
from .layers import BiasScheduled

__all__ = [
    "Call",
    "channels_last",
    "check_taps",
    "depth_taps",
    "find_blocks",
    "find_units",
    "first_tensor",
    "is_channels_last",
    "record",
]


@dataclasses.dataclass(frozen=True)
class Call:
    """What went into a module and what came out; `output` is the first tensor where a module returns several."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor


def find_blocks(model: nn.Module) -> tuple[str, ...]:
    """Qualified names of the blocks, in the order of definition; of all weight layers where a model has no blocks."""
    layers = (name for name, module in model.named_modules() if isinstance(module, WEIGHT_LAYERS))
    return blocks_of(model) or tuple(layers)


def depth_taps(blocks: tuple[str, ...], depths: Iterable[float] = (1 / 3, 2 / 3, 1.0)) -> tuple[str, ...]:
    """The blocks after which these shares of the depth, each in (0, 1], are done (rounded down).

    The default is ALOEv2's: a third, two thirds, and the last block too.
    """
    # A hair more, as 2/3 of 12 must be 8 in floating point too.
    done = {int(len(blocks) * depth + 1e-6) for depth in depths}
    return tuple(blocks[depth - 1] for depth in sorted(done) if depth)


def find_units(student: nn.Module, blocks: tuple[str, ...]) -> tuple[str, ...]:
    """Parts that are fitted on their own, and together hold every converted layer: blocks, and layers outside them."""
    outside = [
        name
        for name, module in student.named_modules()
        if isinstance(module, BiasScheduled) and not any(name == b or name.startswith(f"{b}.") for b in blocks)
    ]
    return (*(name for name in blocks if name not in outside), *outside)


def check_taps(model: nn.Module, names: Iterable[str]) -> None:
    """Raises RecipeError for a name that is no module of `model`."""
    known = [name for name, _ in model.named_modules() if name]
    for name in names:
        if name not in known:
            raise RecipeError(f"tap {name!r} is no module of the model.{near_miss(name, known)}")


@contextlib.contextmanager
def record(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Call]]:
    """Fills the yielded dict with the last call of every named module; the hooks go when the block ends."""
    calls: dict[str, Call] = {}

    def watch(name: str):
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            calls[name] = Call(args, kwargs, first_tensor(output))

        return hook

    with hooked(((model.get_submodule(name), watch(name)) for name in names), with_kwargs=True):
        yield calls


def first_tensor(output: Any) -> Tensor:
    """The tensor itself, or the first one of a tuple or list."""
    return output if isinstance(output, Tensor) else next(part for part in output if isinstance(part, Tensor))


def channels_last(features: Tensor) -> Tensor:
    """(rows, C): tokens (B, N, C), maps (B, C, H, W) or (B, H, W, C), or vectors (B, C), one row a place.

    A map is channels-last when its two middle sizes agree and its last does not (Swin's), else channels-first.
    """
    if features.dim() == 4 and not is_channels_last(features):
        features = features.movedim(1, -1)
    return features.reshape(-1, features.shape[-1])


def is_channels_last(features: Tensor) -> bool:
    """Whether a map (B, C, H, W) or (B, H, W, C) is the latter: its two middle sizes agree and its last does not."""
    return features.shape[1] == features.shape[2] != features.shape[3]
