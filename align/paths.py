"""Gentler ways from the teacher to the student: the teacher's help inside the student, taken away as a phase goes on.

blend        every block of the student gives a mixture of its own output and of the teacher's block's on the same
             input, while the student is trained end to end. (Ours; Progressive Module Replacing of BERT-of-Theseus,
             arXiv 2002.02925, without its dice.)
own inputs   a unit that is fitted alone sees the student's own input in a share of the places, the teacher's in the
             others, and is fitted to the teacher's output everywhere. (As QDrop, arXiv 2203.05740, by places.)

Both are arithmetic on (seed, step), and leave nothing behind.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..convert.blocks import blocks_of
from ..convert.taps import Call, is_channels_last
from ..core.hooks import hooked
from ..core.torch_internals import tree_flatten, tree_map, tree_unflatten

__all__ = ["Draw", "blended", "with_own_inputs"]


@contextlib.contextmanager
def blended(student: nn.Module, teacher: nn.Module, share: float) -> Iterator[None]:
    """Inside, every block of `student` returns `share` · the teacher's block's output + (1 - share) · its own.

    Both blocks see the student's input, and the gradient reaches that input through both. The student's block always
    runs, so each of its parameters has a gradient (at a share of 1 it is 0). What is backpropagated must be so inside
    too: gradient checkpointing runs blocks again.
    """
    blocks = blocks_of(student) if share else ()
    mixers = ((student.get_submodule(name), _mixer(teacher.get_submodule(name), share)) for name in blocks)
    with hooked(mixers, with_kwargs=True):
        yield


def _mixer(block: nn.Module, share: float) -> Callable[..., Any]:
    """A forward hook that mixes what `block` makes of the same input into the output."""

    def mix(ours: Any, theirs: Any) -> Any:
        return torch.lerp(ours, theirs.to(ours.dtype), share) if _continuous(ours) else ours

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return tree_map(mix, output, block(*args, **kwargs))

    return hook


@dataclasses.dataclass(frozen=True)
class Draw:
    """The dice of one step: a number for every place of every picture, the same for any number of processes and parts.

    Attributes:
        batch: pictures of the step, over all processes. first: the place in it of the pictures at hand.
    """

    seed: int
    step: int
    batch: int
    first: int

    def generator(self, unit: str) -> torch.Generator:
        key = hashlib.blake2b(f"{self.seed} {self.step} {unit}".encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)

    def numbers(self, unit: str, pictures: int, places: int) -> Tensor:
        """(pictures, places): uniform in [0, 1), for `pictures` from `first` on."""
        drawn = torch.rand(self.batch, places, generator=self.generator(unit))
        return drawn[self.first : self.first + pictures]


def with_own_inputs(
    calls: Mapping[str, Call], own: Mapping[str, Call], share: float, pictures: int, draw: Draw
) -> dict[str, Call]:
    """`calls` of the teacher on so many `pictures`, with the student's own input in a `share` of the places.

    Args:
        own: the student's calls of the same units.

    The output to be fitted stays the teacher's. Inputs that differ in shape, or do not hold the pictures one after the
    other, stay the teacher's.
    """
    return {
        name: _mixed(call, own[name], lambda places, unit=name: draw.numbers(unit, pictures, places) < share, pictures)
        if name in own
        else call
        for name, call in calls.items()
    }


def _mixed(call: Call, own: Call, chosen: Callable[[int], Tensor], pictures: int) -> Call:
    """`call` with its first tensor taken from `own` in those places that chosen(places a picture) says."""
    (leaves, tree), (others, _) = (tree_flatten((one.args, one.kwargs)) for one in (call, own))
    at = next((i for i, leaf in enumerate(leaves) if _continuous(leaf)), None)
    if at is None or len(others) != len(leaves):
        return call
    theirs, ours = leaves[at], others[at]
    if not isinstance(ours, Tensor) or ours.shape != theirs.shape or len(theirs) % pictures:
        return call
    last = theirs.dim() != 4 or is_channels_last(theirs)
    shape = (*theirs.shape[:-1], 1) if last else (len(theirs), 1, *theirs.shape[2:])
    mask = chosen(torch.Size(shape).numel() // pictures).reshape(shape).to(theirs.device)
    leaves[at] = torch.where(mask, ours.to(theirs.dtype), theirs)
    args, kwargs = tree_unflatten(leaves, tree)
    return dataclasses.replace(call, args=args, kwargs=kwargs)


def _continuous(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
