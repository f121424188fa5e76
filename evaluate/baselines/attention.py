"""From attention matrices, which fused attention hides from hooks."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ...core.errors import NotApplicable
from ..decisions import Decisions
from ..subject import Subject
from .registry import method
from .shared import enlarged, patch_grid


class AttentionWeights(TorchFunctionMode):
    """Records the attention matrices (B, heads, N, N) of all calls inside, fused or not, from any library."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            given = inspect.signature(func).bind(*args, **kwargs).arguments
            self.found.append(func(**{**given, "need_weights": True, "average_attn_weights": False})[1].detach())
            return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            self.found.append(_attention(*args, **kwargs))
            return func(*args, **kwargs)
        output = func(*args, **kwargs)
        if func in SOFTMAX and output.dim() == 4 and output.shape[-1] == output.shape[-2]:
            self.found.append(output.detach())
        return output


SOFTMAX = (torch.softmax, F.softmax, Tensor.softmax)


def _attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *_: Any, **named: Any) -> Tensor:
    logits = q @ k.transpose(-1, -2) * (named.get("scale") or q.shape[-1] ** -0.5)
    if attn_mask is not None:
        logits = logits.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else logits + attn_mask
    return logits.softmax(-1).detach()


def _recorded(subject: Subject, images: Tensor) -> list[Tensor]:
    """(B, N, N) of every layer, mean over heads."""
    with torch.no_grad(), AttentionWeights() as mode:
        subject.model(images)
    layers = [weights.mean(1) for weights in mode.found if weights.shape[-1] == weights.shape[-2]]
    if not layers:
        raise NotApplicable("no attention over all tokens was seen in this model")
    if len({layer.shape for layer in layers}) > 1 or len(layers[0]) != len(images):
        raise NotApplicable("its attention is within windows, or between tokens of several sizes")
    return layers


def _from_tokens(subject: Subject, images: Tensor, attention: Tensor) -> Tensor:
    """The class token's row of attention (B, N, N) over patches, or the mean row where no token stands before them."""
    rows, columns = patch_grid(subject, images)
    prefix = attention.shape[-1] - rows * columns
    if prefix < 0:
        raise NotApplicable(f"its attention is between {attention.shape[-1]} tokens, not {rows} x {columns} patches")
    row = attention[:, 0] if prefix else attention.mean(1)
    return enlarged(row[:, prefix:].unflatten(1, (rows, columns))[:, None], images)


@method("attention", 1, "the last layer's, mean over heads", in_score_units=False)
def _raw_attention(subject: Subject, images: Tensor, decisions: Decisions, seed: int) -> Tensor:
    return _from_tokens(subject, images, _recorded(subject, images)[-1])


@method("rollout", 1, "Abnar and Zuidema 2020, arXiv 2005.00928", in_score_units=False)
def _rollout(subject: Subject, images: Tensor, decisions: Decisions, seed: int) -> Tensor:
    return _from_tokens(subject, images, rollout(_recorded(subject, images)))


def rollout(layers: list[Tensor]) -> Tensor:
    """(B, N, N): the product, last layer first, of half attention (B, N, N) and half identity (residual)."""
    identity = torch.eye(layers[0].shape[-1]).to(layers[0])
    return functools.reduce(lambda total, layer: (layer + identity) / 2 @ total, layers, identity)
