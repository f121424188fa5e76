"""Normalisers: statistics are constants, and what subtracts a mean stays linear."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ledger import Ledger, frozen, pulled, with_gradient_of
from .products import product
from .rule import Run

__all__ = ["batch_norm", "cosine_similarity", "group_norm", "instance_norm", "layer_norm", "normalize", "rms_norm"]


def layer_norm(
    ledger: Ledger,
    run: Run,
    input: Tensor,
    normalized_shape: Any,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    dims = tuple(range(-len(normalized_shape), 0))
    # What `run` calls; it has 1 / σ at hand.
    x, gain, shift = frozen((input, weight, bias))
    value, inverse = torch.native_layer_norm(x, normalized_shape, gain, shift, eps)[::2]
    inverse = inverse.to(x.dtype)

    def pull(grad: Tensor, inverse: Tensor) -> Tensor:
        grad = grad if gain is None else grad * gain
        return (grad - grad.mean(dims, keepdim=True)).mul_(inverse)

    out = pulled(value, input, pull, inverse)
    if bias is not None:
        ledger.enter(out, bias, bias, lambda: torch.native_layer_norm(x, normalized_shape, gain, None, eps)[0])
    return out


def rms_norm(
    ledger: Ledger, run: Run, input: Tensor, normalized_shape: Any, weight: Any = None, eps: float | None = None
) -> Tensor:
    dims = tuple(range(-len(normalized_shape), 0))
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    out = input * input.detach().square().mean(dims, keepdim=True).add(eps).rsqrt()
    return _apply_affine(ledger, run(input.detach(), normalized_shape, frozen(weight), eps), out, weight, None)


def group_norm(
    ledger: Ledger,
    run: Run,
    input: Tensor,
    num_groups: int,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    out = _standardised(input.reshape(input.shape[0], num_groups, -1), (-1,), eps).reshape(input.shape)
    value = run(input.detach(), num_groups, *frozen((weight, bias, eps)))
    return _apply_affine(ledger, value, out, weight, bias, per_channel=True)


def batch_norm(
    ledger: Ledger,
    run: Run,
    input: Tensor,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Both statistics are constants. In training they are the batch's, and the running ones are left as they are."""
    x = input.detach()
    if training:
        value = run(x, None, None, *frozen((weight, bias)), True, momentum, eps)
        dims = tuple(dim for dim in range(input.dim()) if dim != 1)
        variance, mean = torch.var_mean(x, dims, correction=0)
    else:
        value = run(x, running_mean, running_var, *frozen((weight, bias)), False, momentum, eps)
        mean, variance = running_mean, running_var
    inverse = (variance + eps).rsqrt()
    kept: tuple[Tensor, ...] = () if weight is None else (frozen(weight),)
    scale = inverse * kept[0] if kept else inverse

    def pull(grad: Tensor, inverse: Tensor, *kept: Tensor) -> Tensor:
        return grad * _per_channel(inverse * kept[0] if kept else inverse, grad)

    out = pulled(value, input, pull, inverse, *kept)
    ledger.enter(out, _per_channel(-mean * scale, input), "batch mean" if training else running_mean)
    if bias is not None:
        ledger.enter(out, _per_channel(bias, input), bias)
    return out


def instance_norm(
    ledger: Ledger,
    run: Run,
    input: Tensor,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not use_input_stats:
        return batch_norm(ledger, F.batch_norm, input, running_mean, running_var, weight, bias, False, momentum, eps)
    value = run(input.detach(), None, None, *frozen((weight, bias)), True, momentum, eps)
    out = _standardised(input, tuple(range(2, input.dim())), eps)
    return _apply_affine(ledger, value, out, weight, bias, per_channel=True)


def normalize(ledger: Ledger, run: Run, input: Tensor, p: float = 2.0, dim: Any = 1, eps: float = 1e-12) -> Tensor:
    norm = torch.linalg.vector_norm(input.detach(), p, dim, keepdim=True).clamp_min(eps)
    return with_gradient_of(run(input.detach(), p, dim, eps), input / norm)


def cosine_similarity(ledger: Ledger, run: Run, x1: Any, x2: Any, dim: int = 1, eps: float = 1e-8) -> Tensor:
    units = (x / torch.linalg.vector_norm(x.detach(), 2, dim, keepdim=True).clamp_min(eps) for x in (x1, x2))
    return with_gradient_of(run(x1.detach(), x2.detach(), dim, eps), product(ledger, torch.mul, *units).sum(dim))


def _standardised(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    """(x - μ) / sg(σ) over `dims`: to subtract a mean is linear, so it moves."""
    centred = x - x.mean(dims, keepdim=True)
    count = math.prod(x.shape[dim] for dim in dims)
    variance = torch.linalg.vector_norm(centred.detach(), dim=dims, keepdim=True).square() / count
    return centred * (variance + eps).rsqrt()


def _apply_affine(
    ledger: Ledger, value: Tensor, out: Tensor, weight: Any, bias: Any, per_channel: bool = False
) -> Tensor:
    """`value` with the derivative of out · weight + bias, which lie along the last axes or else the channels."""
    align = _per_channel if per_channel else lambda vector, like: vector
    bare = out
    if weight is None:
        out = with_gradient_of(value, out.clone())
    else:
        out = pulled(value, out, lambda grad, weight: grad * align(weight, grad), frozen(weight))
    if bias is not None:
        ledger.enter(out, align(bias, out), bias, lambda: bare if weight is None else bare * align(weight, bare))
    return out


def _per_channel(vector: Tensor, like: Tensor) -> Tensor:
    """`vector` (C,) so that it broadcasts along the channels of `like` (B, C, ...)."""
    return vector.reshape(-1, *(1,) * (like.dim() - 2))
