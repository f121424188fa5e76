"""Attention that torch keeps in one piece, taken apart: separate q, k, v and output layers, the same function.

`nn.MultiheadAttention` packs three projections into one tensor and multiplies by its output projection itself, so no
layer inside can become a B-cos one. Here each is a layer that is called: q, k and v plain with a fading bias, the
output projection B-cos. At B = 1 and beta = 1 the result is that of the source to rounding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .bcos import BcosLinear
from .scheduled import BiasScheduled, convert_in_place

__all__ = ["SeparateAttention", "SeparateAttentionPool2d"]


class SeparateAttention(BiasScheduled):
    """`nn.MultiheadAttention` with layers q_proj, k_proj, v_proj beside out_proj; takes and returns what it does.

    The constants `bias_k` and `bias_v` that some have fade with beta.
    """

    # Its packed tensors are gone. None also keeps `nn.TransformerEncoderLayer` from its fused kernel, which would
    # read the weights of the layers around it without calling them.
    in_proj_weight = in_proj_bias = q_proj_weight = k_proj_weight = v_proj_weight = None

    embed_dim: int
    num_heads: int
    dropout: float
    batch_first: bool
    add_zero_attn: bool
    bias_k: Tensor | None
    bias_v: Tensor | None
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    out_proj: nn.Module

    def start_schedule(self) -> None:
        super().start_schedule()
        packed, bias = self._parameters["in_proj_weight"], self._parameters["in_proj_bias"]
        names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        weights = packed.chunk(3) if packed is not None else [self._parameters[name] for name in names]
        biases = (None, None, None) if bias is None else bias.chunk(3)
        for name in ("in_proj_weight", "in_proj_bias", *names):
            self._parameters.pop(name, None)
        for name, weight, part in zip(("q_proj", "k_proj", "v_proj"), weights, biases, strict=True):
            assert weight is not None
            self.add_module(name, convert_in_place(_linear(weight, part), BiasScheduled))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """query (B, L, E), key and value (B, S, E'), or (L, B, E), ... where not batch_first, or without B."""
        batched = query.dim() == 3
        if not batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(len(k), 1, -1)], 1)
            v = torch.cat([v, self.bias_v.expand(len(v), 1, -1)], 1)
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        if self.add_zero_attn:
            k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
        mask = self._mask(attn_mask, key_padding_mask, q, k.shape[-2])
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            seen = weights @ v
        else:
            seen = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        out = self.out_proj(seen.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), weights

    def _mask(self, attention: Tensor | None, padding: Tensor | None, q: Tensor, keys: int) -> Tensor | None:
        """(B or 1, heads or 1, L or 1, S) to add to the scores; both arguments as torch takes them."""
        total = None
        if attention is not None:
            attention = _additive(attention, q)
            # (L, S) for all, or (B * heads, L, S)
            total = attention[None, None] if attention.dim() == 2 else attention.unflatten(0, (-1, self.num_heads))
        if padding is not None:
            padding = _additive(padding, q)[:, None, None]
            total = padding if total is None else total + padding
        return None if total is None else F.pad(total, (0, keys - total.shape[-1]))


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    """What is added to scores: a boolean mask forbids where it is True."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))
    return mask.to(like.dtype)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A layer of copies, because parts of one tensor could neither be saved nor trained apart."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta", dtype=weight.dtype)
    layer.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
    return layer


class SeparateAttentionPool2d(nn.Module):
    """CLIP's attention pool, by layers: (B, C, H, W) -> (B, D), what the mean's own token sees.

    The source hands the weights of its four layers to one torch function; here they are called.
    """

    positional_embedding: Tensor
    num_heads: int
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    c_proj: BcosLinear

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([x.mean(1, keepdim=True), x], 1) + self.positional_embedding.to(x.dtype)
        tokens = (self.q_proj(x[:, :1]), self.k_proj(x), self.v_proj(x))
        q, k, v = (token.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for token in tokens)
        return self.c_proj(F.scaled_dot_product_attention(q, k, v).flatten(1))
