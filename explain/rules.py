"""The affine form of each torch operation, once gates are frozen: the table that explanation mode looks things up in.

A rule is called as `rule(ledger, run, *arguments)`, where `run` is the operation itself (out of place) and at least
one argument moves with the input. It returns what `run` returns, value for value, as a graph that is affine in what
moves, with every summand that does not move entered in the ledger. With sg = stop-gradient:

- linear operations, max-pooling, selection of extremes (routing):   as they are
- pointwise activations with a(0) = 0:    a(x)             ->  x · sg(a(x) / x)
- normalisers:                            (x - μ) / σ      ->  (x - μ) / sg(σ)
- attention:                              softmax(qkᵀ) v   ->  sg(softmax(qkᵀ)) v
- products of m moving factors:           Π x_i            ->  Σ_i x_i · sg(Π_{j≠i} x_j) / m
- quotients:                              x / y            ->  x / sg(y)
- other known non-linear operations:      f(x)             ->  sg(f(x)), a constant called "f output"
- operations that are not in the table:   f(x)             ->  sg(f(x)), which enters no ledger, so it cannot balance
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from .ledger import Ledger, frozen, graft, moves, tensors

__all__ = ["OPERATIONS", "Operation", "Rule", "gate", "resolve"]

Run = Callable[..., Any]


class Rule(Protocol):
    def __call__(self, ledger: Ledger, run: Run, /, *args: Any, **kwargs: Any) -> Any: ...


class Operation(NamedTuple):
    """What a torch function is called in messages, its affine form, and whether it writes to its first argument."""

    name: str
    rule: Rule
    in_place: bool


# ------------------------------------------------------------------------------------------- linear and affine rules


def linear(ledger: Ledger, run: Run, input: Any, *args: Any, **kwargs: Any) -> Any:
    """Operations that are linear in their first argument: views, sums, average pooling, max-pool's routing."""
    return run(input, *frozen(args), **frozen(kwargs))


def independent(ledger: Ledger, run: Run, *args: Any, **kwargs: Any) -> Any:
    """Operations that look at shape and type only, such as `zeros_like`."""
    return run(*frozen(args), **frozen(kwargs))


def affine(ledger: Ledger, run: Run, *args: Any, **kwargs: Any) -> Any:
    """Operations that join, mask, pad or overwrite: affine in all their floating-point tensors together.

    f(a, b) = linear(a) + linear(b) + f(0, 0), so a constant b adds f(0, b) - f(0, 0), and a number (what a mask
    fills in) adds f(0, 0).
    """
    leaves, tree = tree_flatten((args, kwargs))

    def at(keep: Tensor | None) -> Tensor:
        only = [leaf if leaf is keep or not any(tensors(leaf)) else torch.zeros_like(leaf) for leaf in leaves]
        args, kwargs = tree_unflatten(only, tree)
        return run(*args, **kwargs)

    out = run(*args, **kwargs)
    with torch.no_grad():
        literal = at(None)
        for leaf in {id(leaf): leaf for leaf in tensors(leaves) if not moves(leaf)}.values():
            ledger.enter(out, at(leaf) - literal, leaf)
    ledger.enter(out, literal, None)
    return out


def combination(coefficients: Callable[[Any], tuple[Any, Any]]) -> Rule:
    """Sums and differences, by the coefficients that `alpha` gives to the two operands."""

    def rule(ledger: Ledger, run: Run, input: Any, other: Any, *, alpha: Any = 1) -> Tensor:
        out = run(input, other) if alpha == 1 else run(input, other, alpha=alpha)
        for operand, coefficient in zip((input, other), coefficients(alpha), strict=True):
            if not moves(operand):
                ledger.enter(out, operand * coefficient, operand)
        return out

    return rule


def interpolation(ledger: Ledger, run: Run, input: Tensor, end: Tensor, weight: Any) -> Tensor:
    """`lerp`: affine in both ends; the weight is a gate."""
    weight = frozen(weight)
    return affine(ledger, lambda input, end: run(input, end, weight), input, end)


def extreme(ledger: Ledger, run: Run, *args: Any, **kwargs: Any) -> Any:
    """Maxima, minima and sorting: the value is routed from where it was found, which may be a constant operand."""
    shape = torch.broadcast_shapes(*(leaf.shape for leaf in tensors((args, kwargs))))
    leaves, tree = tree_flatten((args, kwargs))
    followed = [
        ledger.entered(leaf.expand(shape), leaf) if any(tensors(leaf)) and not moves(leaf) else leaf for leaf in leaves
    ]
    args, kwargs = tree_unflatten(followed, tree)
    return run(*args, **kwargs)


def moments(ledger: Ledger, run: Run, input: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """`var_mean` and `std_mean`: the mean is linear, the spread is a statistic."""
    spread, mean = run(input, *args, **kwargs)
    return ledger.name(spread.detach(), ("var_mean output",)), mean


# ---------------------------------------------------------------------------------------------------------- products


def product(ledger: Ledger, run: Run, *args: Any, **kwargs: Any) -> Tensor:
    """Operations that are linear in each of their tensors: m moving factors get 1/m of the product each."""
    leaves, tree = tree_flatten((args, kwargs))
    moving = [index for index, leaf in enumerate(leaves) if moves(leaf)]

    def term(keep: int) -> Tensor:
        args, kwargs = tree_unflatten([leaf if i == keep else frozen(leaf) for i, leaf in enumerate(leaves)], tree)
        return run(*args, **kwargs)

    terms = [term(keep) for keep in moving]
    if len(terms) < 2:
        return terms[0] if terms else run(*args, **kwargs)
    return graft(terms[0], torch.stack(terms).mean(0) if len(terms) > 2 else (terms[0] + terms[1]) / 2)


def quotient(
    ledger: Ledger, run: Run, input: Any, other: Any, *, rounding_mode: str | None = None, **kwargs: Any
) -> Any:
    if rounding_mode is not None or not moves(input):
        return ledger.name(run(frozen(input), frozen(other), **kwargs), ("quotient",))
    return run(input, frozen(other), **kwargs)


def weighted(ledger: Ledger, run: Run, input: Tensor, weight: Tensor, bias: Any = None, *args: Any, **kwargs: Any):
    """`linear` and the convolutions. (A weight that moves makes them products, as in dynamic convolution.)"""
    shape = (-1, *(1,) * (weight.dim() - 2))
    if moves(bias) or (moves(input) and moves(weight)):
        sum_of_products = product(ledger, run, input, weight, None, *args, **kwargs)
        out = sum_of_products if bias is None else ADD(ledger, torch.add, sum_of_products, bias.reshape(shape))
        return graft(run(*frozen((input, weight, bias, *args)), **kwargs), out)
    out = run(input, weight, bias, *args, **kwargs)
    if bias is not None:
        ledger.enter(out, bias.reshape(shape), bias)
    return out


def multiply_add(multiply: Run, multiply_rule: Rule = product) -> Rule:
    """`addmm` and its like:  beta · input + alpha · multiply(a, b)."""

    def rule(ledger: Ledger, run: Run, input: Any, a: Any, b: Any, *, beta: Any = 1, alpha: Any = 1, value: Any = 1):
        scale = alpha * value
        settings = {key: given for key, given in (("beta", beta), ("alpha", alpha), ("value", value)) if given != 1}
        result = ledger.inherit(multiply_rule(ledger, multiply, a, b), (a, b))
        out = ADD(ledger, torch.add, *(ledger.inherit(x * y, x) for x, y in ((input, beta), (result, scale))))
        return graft(run(*frozen((input, a, b)), **settings), out)

    return rule


# ------------------------------------------------------------------------------------------------- gates and freezing


def gate(ledger: Ledger, run: Run, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Pointwise a(x), or x times a gate:  x · sg(a(x) / x), and 0 where x is 0."""
    value = run(*frozen((input, *args)), **frozen(kwargs))
    if not moves(input):
        return value
    x = input.detach()
    return graft(value, input * torch.where(x == 0, 0, value / x))


def clipping(ledger: Ledger, run: Run, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`clamp` and its like: a gate where 0 stays 0, else a known non-linear operation."""
    if moves(input) and not run(torch.zeros_like(input), *frozen(args), **frozen(kwargs)).any():
        return gate(ledger, run, input, *args, **kwargs)
    return ledger.name(run(*frozen((input, *args)), **frozen(kwargs)), ("clamp output",))


def gated_half(ledger: Ledger, run: Run, input: Tensor, dim: int = -1) -> Tensor:
    """`glu`: the first half of the channels, gated by the second."""
    half, control = input.chunk(2, dim)
    return graft(run(input.detach(), dim), half * control.detach().sigmoid())


def freezing(name: str) -> Rule:
    """Known non-linear operations: a constant, named after the operation."""

    def rule(ledger: Ledger, run: Run, *args: Any, **kwargs: Any) -> Any:
        return ledger.name(run(*frozen(args), **frozen(kwargs)), (f"{name} output",))

    return rule


def distrusting(name: str) -> Rule:
    """Operations that are not in the table."""

    def rule(ledger: Ledger, run: Run, *args: Any, **kwargs: Any) -> Any:
        return ledger.distrust(run(*frozen(args), **frozen(kwargs)), name)

    return rule


# -------------------------------------------------------------------------------------------------------- normalisers


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
    out = _standardised(input, dims, eps)
    return _dressed(ledger, run(input.detach(), normalized_shape, *frozen((weight, bias, eps))), out, weight, bias)


def rms_norm(
    ledger: Ledger, run: Run, input: Tensor, normalized_shape: Any, weight: Any = None, eps: float | None = None
) -> Tensor:
    dims = tuple(range(-len(normalized_shape), 0))
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    out = input * input.detach().square().mean(dims, keepdim=True).add(eps).rsqrt()
    return _dressed(ledger, run(input.detach(), normalized_shape, frozen(weight), eps), out, weight, None)


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
    return _dressed(ledger, value, out, *(_per_channel(vector, input) for vector in (weight, bias)), source=bias)


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
        ledger.name(mean, ("batch mean",))
    else:
        value = run(x, running_mean, running_var, *frozen((weight, bias)), False, momentum, eps)
        mean, variance = running_mean, running_var
    scale = (variance + eps).rsqrt() if weight is None else (variance + eps).rsqrt() * weight.detach()
    out = graft(value, input * _per_channel(scale, input))
    ledger.enter(out, _per_channel(-mean * scale, input), mean)
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
        return batch_norm(
            ledger, F.batch_norm, input, running_mean, running_var, weight, bias, False, momentum, eps
        )
    value = run(input.detach(), None, None, *frozen((weight, bias)), True, momentum, eps)
    out = _standardised(input, tuple(range(2, input.dim())), eps)
    return _dressed(ledger, value, out, *(_per_channel(vector, input) for vector in (weight, bias)), source=bias)


def normalize(ledger: Ledger, run: Run, input: Tensor, p: float = 2.0, dim: Any = 1, eps: float = 1e-12) -> Tensor:
    norm = torch.linalg.vector_norm(input.detach(), p, dim, keepdim=True).clamp_min(eps)
    return graft(run(input.detach(), p, dim, eps), input / norm)


def cosine_similarity(ledger: Ledger, run: Run, x1: Any, x2: Any, dim: int = 1, eps: float = 1e-8) -> Tensor:
    units = (x / torch.linalg.vector_norm(x.detach(), 2, dim, keepdim=True).clamp_min(eps) for x in (x1, x2))
    return graft(run(x1.detach(), x2.detach(), dim, eps), product(ledger, torch.mul, *units).sum(dim))


def _standardised(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    """(x - μ) / sg(σ) over `dims`: to subtract a mean is linear, so it moves."""
    variance = x.detach().var(dims, correction=0, keepdim=True)
    return (x - x.mean(dims, keepdim=True)) * (variance + eps).rsqrt()


def _dressed(ledger: Ledger, value: Tensor, out: Tensor, weight: Any, bias: Any, source: Any = None) -> Tensor:
    """`value` with the derivative of out · weight + bias."""
    out = graft(value, out.clone() if weight is None else out * weight.detach())
    if bias is not None:
        ledger.enter(out, bias.detach(), bias if source is None else source)
    return out


def _per_channel(vector: Tensor | None, like: Tensor) -> Tensor | None:
    """`vector` (C,) so that it broadcasts along the channels of `like` (B, C, ...)."""
    return None if vector is None else vector.reshape(-1, *(1,) * (like.dim() - 2))


# ---------------------------------------------------------------------------------------------------------- attention


def attention(ledger: Ledger, run: Run, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Tensor:
    """`scaled_dot_product_attention`, on its fused kernel: who looks where is a gate, what is seen moves."""
    return run(*frozen((query, key)), value, *frozen(args), **frozen(kwargs))


def multi_head_attention(
    ledger: Ledger,
    run: Run,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Any,
    in_proj_bias: Any,
    bias_k: Any,
    bias_v: Any,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Any,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """What `nn.MultiheadAttention` calls, on (S, B, E): softmax(qkᵀ) v, with the projections of v and of the result.

    torch is asked for its attention weights (B, heads, L, S); what they weigh is then projected here. Pictures are
    brought to the front on the way, where the ledger expects them.
    """
    batched = query.dim() == 3
    settings = dict(zip(HEAD_ARGUMENTS, (embed_dim_to_check, num_heads, in_proj_weight, in_proj_bias, bias_k, bias_v,
                                         add_zero_attn, dropout_p, out_proj_weight, out_proj_bias), strict=True))
    call = frozen(settings | options)
    wants_weights, averaged = options.get("need_weights", True), options.get("average_attn_weights", True)
    out_value, weights = run(
        *frozen((query, key, value)), **(call | {"need_weights": True, "average_attn_weights": False})
    )
    dropped = dropout_p > 0 and options.get("training", True)
    if not wants_weights and not dropped:
        # The fused kernel rounds differently; the model would have used it.
        out_value = run(*frozen((query, key, value)), **call)[0]
    weights = weights if batched else weights[None]
    values = options.get("static_v")
    if values is None:
        tokens = value.transpose(0, 1) if batched else value[None]
        width = tokens.shape[-1]
        weight_v = options["v_proj_weight"] if options.get("use_separate_proj_weight") else in_proj_weight[-embed_dim_to_check:]
        bias = None if in_proj_bias is None else ledger.inherit(in_proj_bias[-embed_dim_to_check:], in_proj_bias)
        values = weighted(ledger, F.linear, tokens, weight_v, bias)
    raise NotImplementedError
