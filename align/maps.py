"""Map matching: what the student explains of a score, against where the teacher's last features say it. (Ours.)

The score is the teacher's decision minus a random other class, or, for embeddings, the output along the teacher's own
direction around its mean. The teacher's map of it is exact at its last feature map, where a network still knows where
its classes are: features times the gradient of the score there, in explanation mode, summed over channels. The
student's is its exact map at its own input, pooled to that grid. No label is needed, and no size is compared: the loss
is 1 - cos.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..convert.blocks import blocks_of
from ..convert.taps import first_tensor, is_channels_last
from ..core.errors import LedgerError, RecipeError
from ..core.hooks import hooked
from ..core.pictures import fitted, noise_pictures
from ..core.torch_internals import tree_flatten, tree_unflatten
from ..explain.self_explaining import SelfExplaining
from ..explain.weights import trained_maps
from ..linearise import Linearised
from .losses import cosine_distance
from .paths import Draw
from .recipe import Recipe

__all__ = ["Aim", "check_maps", "decided", "map_error", "own_directions", "teacher_maps"]


@dataclasses.dataclass(frozen=True)
class Aim:
    """What the maps of the first b pictures of a batch are to be.

    Attributes:
        directions: (b, D): a score is output · direction. maps: (b, h, w): the teacher's.
    """

    directions: Tensor
    maps: Tensor


def decided(output: Tensor, draw: Draw) -> Tensor:
    """(b, K): the class that logits (b, K) decide on minus a random other one, drawn by picture and step."""
    classes = output.shape[1]
    first = output.argmax(1)
    drawn = (draw.numbers("map class", len(output), 1)[:, 0] * (classes - 1)).long().to(output.device)
    other = drawn + (drawn >= first)
    return F.one_hot(first, classes).float() - F.one_hot(other, classes).float()


def own_directions(output: Tensor, mean: Tensor) -> Tensor:
    """(b, D): the direction in which each of embeddings (b, D) lies from their `mean` (D,)."""
    return F.normalize(output.float() - mean.float())


def teacher_maps(teacher: nn.Module, pictures: Tensor, directions: Tensor) -> Tensor:
    """(b, h, w): what each place of the last features of `teacher` adds to output · directions (b, D).

    The last features are the output of the last block where that is a map (b, C, h, w), and its input where it is
    tokens (b, N, C): behind the last block a class token no longer looks at any place.
    """
    block = teacher.get_submodule(blocks_of(teacher)[-1])
    with torch.autocast(pictures.device.type, enabled=False), Linearised(teacher) as mode:

        def into(module: nn.Module, args: Any, kwargs: Any) -> Any:
            leaves, tree = tree_flatten((args, kwargs))
            at = next(i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
            if leaves[at].dim() == 3:
                leaves[at] = mode.follow(leaves[at])
            return tree_unflatten(leaves, tree)

        def out_of(module: nn.Module, args: Any, output: Any) -> Any:
            leaves, tree = tree_flatten(output)
            at = next(i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
            if leaves[at].dim() == 4 and not mode.inputs:
                leaves[at] = mode.follow(leaves[at])
            return tree_unflatten(leaves, tree)

        with hooked(before=[(block, into)], with_kwargs=True), hooked([(block, out_of)]):
            score = (first_tensor(teacher(pictures)) * directions).sum()
        (gradient, *_), _ = mode.pull(score)
    features = mode.inputs[0].detach()
    added = features * gradient
    if added.dim() == 4:
        return added.sum(-1 if is_channels_last(added) else 1)
    return _on_grid(added.sum(-1), getattr(teacher, "num_prefix_tokens", None))


def _on_grid(tokens: Tensor, prefix: int | None) -> Tensor:
    """(b, side, side) of (b, N) tokens of square pictures, without the `prefix` ones in front."""
    count = tokens.shape[1]
    side = math.isqrt(count - (prefix or 0))
    return tokens[:, count - side * side :].unflatten(1, (side, side))


def map_error(student: nn.Module, pictures: Tensor, aim: Aim) -> Tensor:
    """Mean of 1 - cos between the student's maps, pooled to the teacher's grid, and the teacher's; in [0, 2].

    Pooled by mean, which cosines do not know from a sum. The gradient is `trained_maps`'.
    """

    def error(maps: Tensor) -> Tensor:
        rows, columns = aim.maps.shape[-2:]
        pooled = F.adaptive_avg_pool2d(maps[:, None], (rows, columns))
        return cosine_distance(pooled.flatten(1), aim.maps.flatten(1))

    return trained_maps(student, pictures, aim.directions, error)[0]


def check_maps(recipe: Recipe, student: nn.Module, teacher: nn.Module) -> None:
    """Raises RecipeError where a phase compares maps, and there are none to match."""
    for number, phase in enumerate(recipe.phases):
        if phase.settings.get("map_weight"):
            for fault in _faults(recipe, student, teacher):
                raise RecipeError(f"phases.{number}.objective.{phase.objective}.{fault}")


def _faults(recipe: Recipe, student: nn.Module, teacher: nn.Module) -> Iterator[str]:
    for key in ("gradient_checkpointing", "compile"):
        if getattr(recipe, key):
            yield f"map_weight: with {key} an explanation cannot see into the blocks. Set {key}=false or map_weight=0"
    if isinstance(student, SelfExplaining):
        yield f"map_weight: {type(student).__name__} explains itself, and has no other map. Set map_weight=0"
    if not blocks_of(teacher):
        yield f"map_weight: {type(teacher).__name__} has no blocks, so no last features. Set map_weight=0"
    pictures = fitted(noise_pictures(1, (recipe.image_size, recipe.image_size)), teacher)
    try:
        with torch.no_grad():
            direction = first_tensor(teacher(pictures))
        shape = tuple(teacher_maps(teacher, pictures, direction).shape)
    except (LedgerError, IndexError, StopIteration) as error:
        yield f"map_weight: {type(teacher).__name__} has no map at its last block ({error}). Set map_weight=0"
        return
    if len(shape) != 3 or shape[-2:] == (1, 1):
        yield (
            f"map_weight: the last features of {type(teacher).__name__} at {recipe.image_size} pixels have one place, "
            "so there is no map to match. Take larger pictures, or set map_weight=0"
        )
