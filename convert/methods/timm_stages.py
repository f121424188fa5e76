"""What methods that work beside a frozen backbone must know of a timm model. It is tried out, not guessed by name."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from ...core.errors import PlanError
from ...core.tensors import relative_error
from ..layers.stages import at_one_place, features_of, is_column, places, stage_count
from ..plan import check_whole

__all__ = ["check_timm", "head_reads", "last_stages", "seen_stages"]


def check_timm(model: Any) -> None:
    """Raises PlanError for a model that does not take its stages and its head apart, or has no weights."""
    if not (hasattr(model, "forward_intermediates") and hasattr(model, "forward_head")):
        raise PlanError(
            f"{type(model).__name__} does not show its feature stages as timm's models do (forward_intermediates)"
        )
    check_whole(model)


def last_stages(model: Any, count: int) -> tuple[int, ...]:
    """Numbers of the last `count` of timm's feature stages; of quarters of the depth where there is a stage a block."""
    known = stage_count(model)
    quarters = sorted({max(known * quarter // 4, 1) - 1 for quarter in (1, 2, 3, 4)})
    every = quarters if is_column(model) else list(range(known))
    if count > len(every):
        raise PlanError(f"stages={count}: {type(model).__name__} has {len(every)}")
    return tuple(every[-count:])


def seen_stages(model: Any, picture: Tensor, stages: tuple[int, ...]) -> tuple[Tensor, list[Tensor]]:
    """`features_of`; raises PlanError where what the head reads is no map with a feature at every place."""
    try:
        final, maps = features_of(model, picture, stages)
        tidy = all(stage.dim() == 4 and stage.numel() for stage in maps)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:  # each family in its own way
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise PlanError(f"its feature stages cannot be read as maps of places ({reason})") from error
    if not tidy:
        raise PlanError(f"its feature stages are no maps of places: {', '.join(str(tuple(s.shape)) for s in maps)}")
    return final, maps


def head_reads(model: Any, picture: Tensor, final: Tensor, last: Tensor) -> Literal["average", "token"]:
    """What the head reads of the features `final`, whose places are `last` (B, d, h, w).

    Raises PlanError for any other head.
    """
    if not _same(model(picture), _tried(model, final, pre_logits=False)):
        raise PlanError("its forward pass is more than features and then a head, so a head cannot be fed apart")
    # In front of the classifier, whose weights may be zero in a fresh skeleton.
    expected = model.forward_head(final, pre_logits=True)
    if _same(expected, _tried(model, at_one_place(model, places(last).mean(1), final))):
        return "average"
    token = final[:, :1]
    if (
        final.dim() == 3
        and _same(expected, _tried(model, token))
        and _tried(model, token, pre_logits=False) is not None
    ):
        return "token"  # also without the patches, which some heads read beside it (VOLO)
    raise PlanError("its head neither averages over places first nor reads the class token alone")


def _tried(model: Any, features: Tensor, pre_logits: bool = True) -> Tensor | None:
    try:
        return model.forward_head(features, pre_logits=pre_logits)
    except (RuntimeError, IndexError, ValueError):  # a head that needs more tokens says so in its own way
        return None


def _same(expected: Tensor, found: Tensor | None) -> bool:
    if found is None or found.shape != expected.shape:
        return False
    return relative_error(found, expected) <= 1e-4
