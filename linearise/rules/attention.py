"""Attention: who looks where is a gate, what is seen moves."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ledger import Ledger, follows_input, frozen, pulled, with_gradient_of
from .affine import affine
from .products import weighted
from .rule import Run

__all__ = ["attention", "multi_head_attention"]


# Attention weights that are held at once in a backward pass on a CPU.
ENTRIES = 2**20


def attention(
    ledger: Ledger,
    run: Run,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention`, on its fused kernel: who looks where is a gate, what is seen moves."""
    query, key, attn_mask = frozen((query, key, attn_mask))
    options = (attn_mask, dropout_p, is_causal)
    more = {"scale": scale, "enable_gqa": enable_gqa}
    plain = attn_mask is None and not dropout_p and not is_causal and query.shape[:-2] == value.shape[:-2]
    if not follows_input(value) or not plain or query.device.type != "cpu":
        return run(query, key, value, *options, **more)

    # torch's backward pass on a CPU makes the gradients of query and key too, wanted or not: five products, not two.
    def pull(grad: Tensor, query: Tensor, key: Tensor) -> Tensor:
        rows = max(1, ENTRIES // key.shape[:-1].numel())
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        parts = zip((query * factor).split(rows, -2), grad.split(rows, -2), strict=True)
        return sum((q @ key.mT).softmax(-1).mT @ part for q, part in parts)  # type: ignore[return-value]

    return pulled(run(query, key, value.detach(), *options, **more), value, pull, query, key)


def multi_head_attention(ledger: Ledger, run: Run, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """What `nn.MultiheadAttention` calls, on (S, B, E): softmax(qkᵀ) v, with the projections of v and of the result.

    torch is asked for its attention weights (B, heads, L, S); what they weigh is then projected here. Pictures are
    brought to the front on the way, where the ledger expects them.
    """
    call = inspect.signature(F.multi_head_attention_forward).bind(*args, **kwargs)
    call.apply_defaults()
    given, constant = SimpleNamespace(**call.arguments), frozen(call.arguments)
    out, weights = run(**constant | {"need_weights": True, "average_attn_weights": False})
    dropped = given.training and given.dropout_p > 0
    if not given.need_weights and not dropped:
        # The model would have used the fused kernel, which rounds differently.
        out, _ = run(**constant)
    shown = (weights.mean(-3) if given.average_attn_weights else weights) if given.need_weights else None
    ledger.name(shown, ("softmax output",))
    if not follows_input(given.value) and not follows_input(given.static_v):
        return ledger.name(out, ("attention output",)), shown

    width, heads = given.embed_dim_to_check, given.num_heads
    weights = weights.reshape(-1, *weights.shape[-3:])
    values = given.static_v
    if values is None:
        tokens = given.value if given.value.dim() == 3 else given.value[:, None]
        weight = given.v_proj_weight if given.use_separate_proj_weight else given.in_proj_weight[-width:]
        bias = None if given.in_proj_bias is None else ledger.inherit(given.in_proj_bias[-width:], given.in_proj_bias)
        values = weighted(ledger, F.linear, tokens.transpose(0, 1), weight, bias)
        if given.bias_v is not None:
            extra = given.bias_v.expand(len(values), 1, width)
            values = affine(ledger, torch.cat, (values, ledger.inherit(extra, given.bias_v)), 1)
        values = values.unflatten(-1, (heads, -1)).transpose(1, 2)
    values = values.reshape(len(weights), heads, -1, width // heads)
    seen = weights @ F.pad(values, (0, 0, 0, int(given.add_zero_attn)))
    seen = weighted(ledger, F.linear, seen.transpose(1, 2).flatten(2), given.out_proj_weight, given.out_proj_bias)
    return with_gradient_of(out, seen.transpose(0, 1).reshape(out.shape).clone()), shown
