"""Grad-ECLIP: what the class token takes from each patch in the last attention, weighted by the gradient of the score.

Made for a picture's cosine with a text, which is a direction in the space of features; any other score will do.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ...core.errors import NotApplicable
from ...explain.self_explaining import main_output
from ..decisions import Decisions
from ..subject import Subject
from .registry import method
from .shared import enlarged, patch_grid


@dataclasses.dataclass(frozen=True, eq=False)
class AttentionCall:
    """Queries, keys and values (B, N, C) of a call, heads side by side, and its output, which is in the graph.

    Attributes:
        output: (B, N, C), or (N, B, C') after `projection` (C', C), where torch multiplies by that too.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    projection: Tensor | None = None

    def seen(self, gradient: Tensor) -> Tensor:
        """The gradient (B, N, C) with respect to what was seen, of that with respect to `output`."""
        if self.projection is None:
            return gradient.transpose(1, 2).flatten(2)
        return gradient.transpose(0, 1) @ self.projection


class AttentionCalls(TorchFunctionMode):
    """Records the calls of torch's attention functions between tokens of one kind, as many queries as keys."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[AttentionCall] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
            parts = [given[name] for name in ("query", "key", "value")]
            if parts[0].shape == parts[1].shape == parts[2].shape and parts[0].dim() == 4:
                query, key, value = (part.detach().transpose(1, 2).flatten(2) for part in parts)
                self.found.append(AttentionCall(query, key, value, output))
        if func is F.multi_head_attention_forward:
            given = inspect.signature(func).bind(*args, **(kwargs or {})).arguments
            if given["query"].shape == given["key"].shape and given["query"].dim() == 3:
                self.found.append(_projected(given, output[0]))
        return output


def _projected(given: dict[str, Any], output: Tensor) -> AttentionCall:
    """Of torch's own attention, which takes tokens (N, B, C) and has the projections inside."""
    names = ("query", "key", "value")
    if given.get("use_separate_proj_weight"):
        weights = [given[f"{name[0]}_proj_weight"] for name in names]
    else:
        weights = given["in_proj_weight"].chunk(3)
    biases = [None] * 3 if given["in_proj_bias"] is None else given["in_proj_bias"].chunk(3)
    query, key, value = (
        F.linear(given[name].detach(), weight, bias).transpose(0, 1).detach()
        for name, weight, bias in zip(names, weights, biases, strict=True)
    )
    return AttentionCall(query, key, value, output, given["out_proj_weight"].detach())


@method("grad-eclip", 2, "Zhao et al. 2025, arXiv 2502.18816; last attention", in_score_units=False)
def _grad_eclip(subject: Subject, images: Tensor, decisions: Decisions, seed: int) -> Tensor:
    """relu(sum over channels of gradient x value), times how alike the class token's query and the patch's key are.

    The gradient is of the class token's part of the attention's output, and the likeness a cosine, brought to [0, 1].
    """
    with torch.enable_grad(), AttentionCalls() as mode:
        score = decisions.scores(main_output(subject.model(images.requires_grad_()))).sum()
    calls = [call for call in mode.found if len(call.query) == len(images)]
    if not calls:
        raise NotApplicable("no call of torch's attention between all tokens was seen in this model")
    rows, columns = patch_grid(subject, images)
    call = calls[-1]
    prefix = call.query.shape[1] - rows * columns
    if prefix < 1:
        raise NotApplicable(f"{call.query.shape[1]} tokens, {rows} x {columns} patches: it has no class token")
    (gradient,) = torch.autograd.grad(score, call.output)
    if not call.seen(gradient)[:, 0].any():
        raise NotApplicable("its score does not depend on what the class token sees last, if it has one")
    contributions = (call.seen(gradient)[:, :1] * call.value[:, prefix:]).sum(-1)
    alike = F.cosine_similarity(call.query[:, :1], call.key[:, prefix:], -1)
    low, high = alike.amin(1, keepdim=True), alike.amax(1, keepdim=True)
    loosened = (alike - low) / (high - low).clamp_min(torch.finfo(alike.dtype).tiny)
    return enlarged((contributions * loosened).relu().unflatten(1, (rows, columns))[:, None], images)
