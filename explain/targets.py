"""What to explain: scores that are linear in a model's output, so that they stay inside the ledger.

A target maps the output y (B, D) of a model, logits or features, to K scores for each picture. Text and image
similarity are cosines; their feature norm is a gate like any other: s = y / sg(‖y‖) · d / ‖d‖. (Were it not frozen, the
cosine would be homogeneous of degree 0 in y, and all contributions would sum to zero.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, SupportsIndex, cast

import numpy as np
import torch
from torch import Tensor, nn

from ..core.errors import TargetError, near_miss

__all__ = [
    "ClassTarget",
    "DirectionTarget",
    "FunctionTarget",
    "PatchFeature",
    "SelfTarget",
    "SideBySide",
    "SimilarityTarget",
    "Target",
    "TopTarget",
    "ZeroShotTarget",
    "find_class",
    "settled",
    "target_of",
]


class Target(Protocol):
    """What `explain` asks of a target; anything that keeps to it is one."""

    def scores(self, output: Tensor) -> Tensor:
        """The scores (B, K) of a model's output (B, D), linear in it but for gates."""
        ...

    def rows(self, pictures: slice) -> Target:
        """The target of some pictures of the batch."""
        ...


class _ForAll:
    """Targets that are the same for every picture."""

    def rows(self, pictures: slice) -> Target:
        return self  # type: ignore[return-value]


@dataclass(frozen=True, eq=False)
class ClassTarget:
    """Outputs by index: one index, or K for every picture (K,), or K for each picture (B, K).

    A list is for every picture here, where captum means one for each: that is (B, 1) here. Indices are whole numbers of
    any kind: Python's, numpy's, torch's.
    """

    indices: int | Sequence[int] | Sequence[Sequence[int]] | Tensor | np.ndarray | np.integer

    def scores(self, output: Tensor) -> Tensor:
        return output.gather(1, self.classes(output))

    def classes(self, output: Tensor) -> Tensor:
        """The indices (B, K) of what `scores` returns."""
        batch, classes = _shape(output)
        indices = torch.atleast_1d(_whole_numbers(self.indices)).to(output.device)
        if indices.dim() > 2 or indices.numel() == 0:
            raise TargetError(f"Class indices must be integers of shape (K,) or (B, K), not {self.indices!r}.")
        wrong = indices[(indices < 0) | (indices >= classes)]
        if len(wrong):
            raise TargetError(f"There is no class {wrong[0]}: the model has {classes}, numbered 0 to {classes - 1}.")
        if indices.dim() == 2 and len(indices) != batch:
            raise TargetError(
                f"There are {len(indices)} rows of classes for {batch} pictures; pass a row for each. Several classes "
                "for every picture are ClassTarget([1, 2])."
            )
        return indices.expand(batch, indices.shape[-1])

    def rows(self, pictures: slice) -> Target:
        indices = _whole_numbers(self.indices)
        return ClassTarget(indices[pictures]) if indices.dim() == 2 else self


@dataclass(frozen=True)
class TopTarget(_ForAll):
    """The `k` highest outputs of each picture, highest first."""

    k: int = 1

    def scores(self, output: Tensor) -> Tensor:
        return output.gather(1, self.classes(output))

    def classes(self, output: Tensor) -> Tensor:
        """The indices (B, K) of what `scores` returns."""
        _, classes = _shape(output)
        if not 1 <= self.k <= classes:
            raise TargetError(f"There is no top {self.k} of {classes} outputs; pass 1 to {classes}.")
        return output.detach().topk(self.k, dim=1).indices

    def settled(self, output: Tensor) -> ClassTarget:
        return ClassTarget(self.classes(output))


@dataclass(frozen=True, eq=False)
class DirectionTarget:
    """The dot products of the output with K directions, (K, D) for every picture or (B, K, D)."""

    directions: Tensor

    def scores(self, output: Tensor) -> Tensor:
        batch, width = _shape(output)
        directions = torch.atleast_2d(self.directions).to(output)
        if directions.shape[-1] != width:
            raise TargetError(f"Directions have {directions.shape[-1]} entries, but the model's output has {width}.")
        if directions.dim() > 3 or (directions.dim() == 3 and len(directions) != batch):
            raise TargetError(
                f"Directions must be (K, {width}) or ({batch}, K, {width}), not {tuple(self.directions.shape)}."
            )
        return (directions @ output.unsqueeze(-1)).squeeze(-1)

    def rows(self, pictures: slice) -> Target:
        return type(self)(self.directions[pictures]) if self.directions.dim() == 3 else self


class SimilarityTarget(DirectionTarget):
    """The cosines of the output with K directions (text or image embeddings); the output's norm is a gate."""

    def scores(self, output: Tensor) -> Tensor:
        _shape(output)
        return DirectionTarget(_unit(self.directions)).scores(output / _norm(output.detach()))


@dataclass(frozen=True, eq=False)
class ZeroShotTarget(_ForAll):
    """Some of the cosines with N label embeddings (N, D), as if these were a classifier's N outputs.

    `then` chooses among them (`TopTarget(3)`, `ClassTarget([0, 7])`), all from one forward pass.
    """

    embeddings: Tensor
    then: TopTarget | ClassTarget = TopTarget(1)

    def scores(self, output: Tensor) -> Tensor:
        return self.then.scores(self.similarities(output))

    def similarities(self, output: Tensor) -> Tensor:
        """All cosines (B, N) of a model's output (B, D)."""
        return SimilarityTarget(self.embeddings).scores(output)

    def settled(self, output: Tensor) -> Target:
        return SimilarityTarget(self.embeddings.to(output)[self.then.classes(self.similarities(output))])


@dataclass(frozen=True)
class SelfTarget(_ForAll):
    """The output along its own direction, which is its norm: what made these features, for models without a head."""

    def scores(self, output: Tensor) -> Tensor:
        _shape(output)
        return (output * _unit(output.detach())).sum(1, keepdim=True)

    def settled(self, output: Tensor) -> DirectionTarget:
        return DirectionTarget(_unit(output.detach())[:, None])


@dataclass(frozen=True, eq=False)
class SideBySide:
    """The scores of several targets beside each other, from one forward pass: (B, K) of K scores in all."""

    targets: tuple[Target, ...]

    def scores(self, output: Tensor) -> Tensor:
        return torch.cat([target.scores(output) for target in self.targets], 1)

    def rows(self, pictures: slice) -> SideBySide:
        return SideBySide(tuple(target.rows(pictures) for target in self.targets))


@dataclass(frozen=True)
class FunctionTarget(_ForAll):
    """What a function makes of the output (B, D): a score for each picture (B,), or several (B, K).

    It should be linear in the output, but for gates; the ledger shows whether it is. Example, a difference of classes:
    `FunctionTarget(lambda y: y[:, 281] - y[:, 282])`.
    """

    function: Callable[[Tensor], Tensor]

    def scores(self, output: Tensor) -> Tensor:
        batch, _ = _shape(output)
        found = self.function(output)
        if not isinstance(found, Tensor) or found.dim() not in (1, 2) or len(found) != batch:
            what = f"a tensor {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
            raise TargetError(
                f"target: the function returned {what} for outputs {tuple(output.shape)}. Return a score for each "
                "picture, (B,) or (B, K), such as y[:, 281] - y[:, 282]."
            )
        return found if found.dim() == 2 else found[:, None]


class PatchFeature(nn.Module):
    """A model whose output is the feature of one patch, (B, 3, H, W) -> (B, C): a dense explanation's start.

    `tokens(model, images)` returns the features of all patches (B, C, rows, columns). With `SelfTarget` it is explained
    what made this patch's feature; with `DirectionTarget` or `SimilarityTarget`, what turned it towards a direction.

    Attributes:
        grid: rows and columns of the patches of the last pictures; None before there were any.
    """

    grid: tuple[int, int] | None = None

    def __init__(self, model: nn.Module, tokens: Callable[[nn.Module, Tensor], Tensor], row: int, column: int) -> None:
        super().__init__()
        self.model = model
        self.tokens = tokens
        self.row, self.column = row, column

    def forward(self, images: Tensor) -> Tensor:
        grid = self.tokens(self.model, images)
        rows, columns = self.grid = (grid.shape[-2], grid.shape[-1])
        if not (0 <= self.row < rows and 0 <= self.column < columns):
            raise TargetError(
                f"There is no patch {self.row},{self.column}: a picture of {images.shape[-2]}x{images.shape[-1]} has "
                f"{rows} rows and {columns} columns of patches here, numbered from 0."
            )
        return grid[:, :, self.row, self.column]

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        # The ledger should call constants what they are called in the model itself.
        return self.model.named_modules(*args, **kwargs)


def target_of(given: Any, by_picture: bool = False) -> Target:
    """The target that `given` is, or the classes that it names.

    A whole number is a class. An array or a tensor goes by picture: a class for each (B,), or several (B, K); so does a
    list of rows. A function of the output is a `FunctionTarget`.

    Args:
        by_picture: a list of numbers goes by picture, too, as captum has it. Such a list once meant all of them for
            every picture, so for one release it is refused elsewhere; then it goes by picture everywhere.

    Raises:
        TargetError: for anything else: texts, floats, truth values.
    """
    if isinstance(given, type):
        hint = f"Pass {given.__name__}(...), with its arguments." if hasattr(given, "scores") else TAKEN
        raise TargetError(f"target {given.__name__} is a class of Python. {hint}")
    if callable(getattr(given, "scores", None)) and callable(getattr(given, "rows", None)):
        return given
    if isinstance(given, SupportsIndex) and getattr(given, "ndim", 0) == 0 and not isinstance(given, bool):
        return ClassTarget(_whole_numbers(given))
    listed = isinstance(given, Sequence) and not isinstance(given, str | bytes)
    if listed or hasattr(given, "__array__"):
        indices = _whole_numbers(given)
        if listed and indices.dim() == 1 and not by_picture:
            check_list(cast(Sequence[Any], given), "class numbers")
            return ClassTarget(indices)
        return ClassTarget(indices[:, None] if indices.dim() == 1 else indices)
    if callable(given):
        return FunctionTarget(cast(Callable[[Tensor], Tensor], given))
    raise TargetError(f"target {given!r:.80} is a {type(given).__name__}. {TAKEN}")


def check_list(given: Sequence[Any], what: str) -> None:
    """Raises TargetError for a list of several scores, which may be meant for every picture, or one for each."""
    if len(given) > 1:
        words = any(isinstance(one, str) for one in given)
        shown = ", ".join(repr(str(one)) if words else str(one) for one in list(given)[:3])
        shown = f"[{shown}, ...]" if len(given) > 3 else f"[{shown}]"
        every, each = ("", "numpy.array") if words else (f" (or ClassTarget({shown}))", "torch.tensor")
        raise TargetError(
            f"target {shown} is a list of {len(given)} {what}. That meant all of them for every picture; in the next "
            f"release it means one for each picture. Say which: targets={shown}{every} for every picture, "
            f"target={each}({shown}) for one each."
        )


def settled(target: Target, output: Tensor) -> Target:
    """What `target` asks of pictures with this `output` (B, D), as a target that asks it of any others, one for one.

    The largest class becomes a class, one's own direction a direction. A target of one's own may have such a method.
    """
    settle = getattr(target, "settled", None)
    return target if settle is None else settle(output)


TAKEN = (
    "Pass a class number, an array or a tensor with one for each picture (B,) or a row for each (B, K), a Target such "
    "as TopTarget() or ClassTarget([1, 2]), or a function of the output."
)


def _whole_numbers(given: Any) -> Tensor:
    """Class numbers of any kind as int64, in the shape that they have; raises TargetError for what are none."""
    try:
        found = given if isinstance(given, Tensor) else torch.as_tensor(np.asarray(given))
    except (TypeError, ValueError, RuntimeError):  # texts, rows of several lengths, objects
        found = torch.empty(0)
    if found.dtype == torch.bool or found.is_floating_point() or found.is_complex() or _holds_truth(given):
        raise TargetError(f"Class indices must be integers, not {given!r:.80}. {TAKEN}")
    return found.detach().to(torch.int64)


def _holds_truth(given: Any) -> bool:
    """Whether a truth value is among the numbers of a list, where numpy would take it for one."""
    if isinstance(given, Sequence) and not isinstance(given, str | bytes):
        return any(map(_holds_truth, given))
    return isinstance(given, bool | np.bool_)


def find_class(labels: Sequence[str], text: str) -> int:
    """The index of the label that `text` is: a number, a name or one of its synonyms, or a part of one label only.

    Labels may hold synonyms between commas, such as `tabby, tabby cat`. `class 7` is a number whatever labels are
    called. Raises TargetError, with what comes close, where there is no such label, and with the candidates where there
    are several.
    """
    wanted = text.strip().casefold()
    names = [label.casefold() for label in labels]
    called = [index for index, name in enumerate(names) if name.strip() == wanted]
    number = wanted if called else wanted.removeprefix("class ")
    if number.isdecimal() and not (called and int(number) >= len(labels)):
        index = int(number)
        if index >= len(labels):
            raise TargetError(
                f"There is no class {number}: the model has {len(labels)}, numbered 0 to {len(labels) - 1}."
            )
        if called and called != [index]:
            raise TargetError(
                f"{text!r} may be {_listed(labels, [index, *called])}. Pass 'class {index}' or 'class {called[0]}'."
            )
        return index
    synonyms = [[synonym.strip() for synonym in name.split(",")] for name in names]
    for found in (
        [index for index, name in enumerate(names) if name.strip() == wanted],
        [index for index, several in enumerate(synonyms) if wanted in several],
        [index for index, name in enumerate(names) if wanted and wanted in name],
    ):
        if len(found) == 1:
            return found[0]
        if found:
            raise TargetError(f"{text!r} may be {_listed(labels, found)}. Pass one of these numbers or a full name.")
    hint = near_miss(wanted, (synonym for several in synonyms for synonym in several))
    raise TargetError(f"No class is called {text!r}.{hint} The model has {len(labels)} classes; a number works too.")


def _listed(labels: Sequence[str], indices: Iterable[int], most: int = 8) -> str:
    shown = [f"{index} ({labels[index]})" for index in indices]
    return ", ".join(shown[:most]) + (f" and {len(shown) - most} more" if len(shown) > most else "")


def _shape(output: Tensor) -> tuple[int, int]:
    if output.dim() != 2:
        raise TargetError(
            f"The model returns {tuple(output.shape)}, but targets need one vector a picture, (B, D). "
            "Pool or select the tokens first."
        )
    return output.shape[0], output.shape[1]


def _norm(vectors: Tensor) -> Tensor:
    """Norms along the last axis, never 0."""
    return torch.linalg.vector_norm(vectors, dim=-1, keepdim=True).clamp_min(torch.finfo(vectors.dtype).tiny)


def _unit(vectors: Tensor) -> Tensor:
    return vectors / _norm(vectors)
