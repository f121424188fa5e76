"""The affine form of each torch operation, once gates are frozen: the table that explanation mode looks things up in.

A rule is called as `rule(ledger, run, *arguments)`, where `run` is the operation itself (out of place) and at least
one argument moves with the input. It returns what `run` returns, value for value, as a graph that is affine in what
moves, with every summand that does not move entered in the ledger. With sg = stop-gradient:

- linear operations, max-pooling, selection of extremes (routing):   as they are
- pointwise activations with a(0) = 0:    a(x)             ->  x · sg(a(x) / x)
- tanh:                                   the same, but frozen where it multiplies something that moves
- normalisers:                            (x - μ) / σ      ->  (x - μ) / sg(σ)
- attention:                              softmax(qkᵀ) v   ->  sg(softmax(qkᵀ)) v
- products of m moving factors:           Π x_i            ->  Σ_i x_i · sg(Π_{j≠i} x_j) / m
- whole powers:                           x^n              ->  x · sg(x^(n-1)), which is the same
- quotients:                              x / y            ->  x / sg(y)
- other known non-linear operations:      f(x)             ->  sg(f(x)), a constant called "f output"
- operations that are not in the table:   f(x)             ->  sg(f(x)), which enters no ledger, so it cannot balance
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from .ledger import Ledger, continuous, frozen, graft, moves, pulled, tensors

__all__ = [
    "IN_PLACE",
    "OPERATIONS",
    "PROPERTIES",
    "Operation",
    "Rule",
    "beside",
    "beside_energy",
    "beside_mean",
    "carried_bias",
    "carrier",
    "colours",
    "encoding",
    "gate",
    "gate_by",
    "linear",
    "linear_in_encoding",
    "resolve",
]

Run = Callable[..., Any]


class Rule(Protocol):
    def __call__(self, ledger: Ledger, run: Run, /, *args: Any, **kwargs: Any) -> Any: ...


class Operation(NamedTuple):
    """What a torch function is called in messages, its affine form, and whether it writes to its first argument."""

    name: str
    rule: Rule
    in_place: bool


# ---------------------------------------------------------------------------------------------- linear and affine rules


def linear(ledger: Ledger, run: Run, input: Any, *args: Any, **kwargs: Any) -> Any:
    """Operations that are linear in their first argument: views, sums, average pooling, max-pool's routing."""
    out = run(input, *frozen(args), **frozen(kwargs))
    return ledger.mark(out) if ledger.gates(input) else out


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
        only = [leaf if leaf is keep or not continuous(leaf) else torch.zeros_like(leaf) for leaf in leaves]
        args, kwargs = tree_unflatten(only, tree)
        return run(*args, **kwargs)

    out = run(*args, **kwargs)
    if not moves(out):
        return out
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
        first, second = zip((input, other), coefficients(alpha), strict=True)
        for (operand, coefficient), (rest, factor) in ((first, second), (second, first)):
            if not moves(operand):
                ledger.enter(out, operand * coefficient, operand, lambda rest=rest, factor=factor: rest * factor)
        return _still_gate(ledger, out, input, other)

    return rule


def padding(ledger: Ledger, run: Run, input: Tensor, widths: Any, *args: Any, **kwargs: Any) -> Tensor:
    """`pad`: linear, unless it fills in a number."""
    fills = any(isinstance(option, int | float) and option for option in (*args, *kwargs.values()))
    return (affine if fills else linear)(ledger, run, input, widths, *args, **kwargs)


def interpolation(ledger: Ledger, run: Run, input: Tensor, end: Tensor, weight: Any) -> Tensor:
    """`lerp`: affine in both ends; the weight is a gate."""
    weight = frozen(weight)
    return affine(ledger, lambda input, end: run(input, end, weight), input, end)


def extreme(ledger: Ledger, run: Run, *args: Any, **kwargs: Any) -> Any:
    """Maxima, minima and sorting: the value is routed from where it was found, which may be a constant operand."""
    shape = torch.broadcast_shapes(*(leaf.shape for leaf in tensors((args, kwargs))))
    leaves, tree = tree_flatten((args, kwargs))
    followed = [
        ledger.entered(leaf.expand(shape), leaf) if continuous(leaf) and not moves(leaf) else leaf for leaf in leaves
    ]
    args, kwargs = tree_unflatten(followed, tree)
    return run(*args, **kwargs)


def moments(ledger: Ledger, run: Run, input: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """`var_mean` and `std_mean`: the mean is linear, the spread is a statistic."""
    spread, mean = run(input, *args, **kwargs)
    return ledger.name(spread.detach(), ("spread",)), mean


# ------------------------------------------------------------------------------------------------------------- products


def product(ledger: Ledger, run: Run, *args: Any, **kwargs: Any) -> Tensor:
    """Operations that are linear in each of their tensors: m moving factors get 1/m of the product each."""
    leaves, tree = tree_flatten((args, kwargs))
    moving = [index for index, leaf in enumerate(leaves) if moves(leaf)]
    moving = [index for index in moving if not ledger.gates(leaves[index])] or moving

    def term(keep: int) -> Tensor:
        args, kwargs = tree_unflatten([leaf if i == keep else frozen(leaf) for i, leaf in enumerate(leaves)], tree)
        return run(*args, **kwargs)

    terms = [term(keep) for keep in moving]
    if len(terms) < 2:
        return _still_gate(ledger, terms[0] if terms else run(*args, **kwargs), *leaves)
    return graft(terms[0], torch.stack(terms).mean(0) if len(terms) > 2 else (terms[0] + terms[1]) / 2)


def _still_gate(ledger: Ledger, out: Tensor, *operands: Any) -> Tensor:
    """Marks `out` as a gate where it is one tensor that is a gate, shifted or scaled by a number."""
    factors = [operand for operand in operands if isinstance(operand, Tensor)]
    return ledger.mark(out) if len(factors) == 1 and ledger.gates(factors[0]) else out


def quotient(
    ledger: Ledger, run: Run, input: Any, other: Any, *, rounding_mode: str | None = None, **kwargs: Any
) -> Any:
    """Division by something that moves: the divisor is a gate."""
    if rounding_mode is not None or not moves(input):
        value = run(*frozen((input, other)), rounding_mode=rounding_mode, **kwargs)
        return ledger.name(value, ("div output",))
    return _still_gate(ledger, run(input, frozen(other), **kwargs), input, other)


def projection(ledger: Ledger, run: Run, input: Tensor, weight: Tensor, bias: Any = None) -> Tensor:
    """`linear`. (A weight that moves makes it a product.)"""
    if moves(weight) or moves(bias) or not moves(input):
        return weighted(ledger, run, input, weight, bias)
    out = pulled(run(input.detach(), weight, bias), input, _through, weight)
    if bias is not None:
        ledger.enter(out, bias, bias, lambda: run(input.detach(), weight))
    return out


def _through(grad: Tensor, weight: Tensor) -> Tensor:
    """grad · weight, without those first and last outputs that have no gradient: q and k, beside v in one product."""
    if grad.numel() and not grad[(0,) * (grad.dim() - 1)].all():
        used = grad.reshape(-1, grad.shape[-1]).any(0).nonzero()
        low, high = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 0)
        grad, weight = grad[..., low:high], weight[low:high]
    return grad @ weight


def weighted(ledger: Ledger, run: Run, input: Tensor, weight: Tensor, bias: Any = None, *args: Any, **kwargs: Any):
    """The convolutions. (A weight that moves makes them products, as in dynamic convolution.)"""
    shape = (-1, *(1,) * (weight.dim() - 2))
    if moves(bias) or (moves(input) and moves(weight)):
        sum_of_products = product(ledger, run, input, weight, None, *args, **kwargs)
        out = sum_of_products if bias is None else ADD(ledger, torch.add, sum_of_products, bias.reshape(shape))
        return graft(run(*frozen((input, weight, bias, *args)), **kwargs), out)
    out = run(input, weight, bias, *args, **kwargs)
    if bias is not None:
        ledger.enter(out, bias.reshape(shape), bias, lambda: run(input.detach(), weight, None, *args, **kwargs))
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


# --------------------------------------------------------------------------------------------------- gates and freezing


def gate(ledger: Ledger, run: Run, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Pointwise a(x), or x times a gate:  x · sg(a(x) / x), and 0 where x is 0."""
    value = run(*frozen((input, *args)), **frozen(kwargs))
    if not moves(input):
        return value
    return scaled(ledger, value, input, _factor(value, input.detach()))


def gate_by(apart: Run, gradient: Run | None = None) -> Rule:
    """As `gate`, for functions that know their gate: apart(x, *others) is the gate and what it makes of x.

    It multiplies x, or something linear in x, of which `gradient` is the transpose.
    """

    def rule(ledger: Ledger, run: Run, input: Tensor, *others: Any, **more: Any) -> Tensor:
        others, more = frozen(others), frozen(more)
        if not moves(input):
            return run(input, *others, **more)
        with torch.no_grad():
            # Not `detach`: what is written over x, which nothing reads again, would show as a change of a view.
            factor, value = apart(input.data, *others, **more)
        if gradient is None:
            return scaled(ledger, value, input, factor)  # the graph keeps none of the others
        return scaled(ledger, value, input, factor, _transpose(gradient, input.shape, others, more))

    return rule


def _transpose(gradient: Run, size: torch.Size, others: Any, more: Any) -> Callable[[Tensor], Tensor]:
    return lambda grad: gradient(size, grad, *others, **more)


def scaled(
    ledger: Ledger,
    value: Tensor,
    input: Tensor,
    factor: Tensor,
    through: Callable[[Tensor], Tensor] = lambda grad: grad,
) -> Tensor:
    """`value` as `input` times the constant `factor`, a fresh tensor of the value's shape.

    Or as a linear map of `input`, whose transpose is `through`, times it.
    """

    def pull(grad: Tensor, factor: Tensor) -> Tensor:
        # After the last score nothing reads the factor again, and fresh memory costs more than the product.
        return through(factor.mul_(grad) if ledger.last else grad * factor)

    return pulled(value, input, pull, factor)


def routing(ledger: Ledger, run: Run, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`relu`: its own derivative, 0 or 1, is its gate."""
    return run(input, *args, **kwargs)


def _factor(value: Tensor, x: Tensor) -> Tensor:
    """value / x, and 0 where x is 0."""
    return torch.nan_to_num_(value / x, 0, torch.inf, -torch.inf)


def saturation(ledger: Ledger, run: Run, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`tanh`: an activation in some models, and in others a gate that multiplies one, as in GELU written out."""
    return ledger.mark(gate(ledger, run, input, *args, **kwargs))


def power(ledger: Ledger, run: Run, input: Any, exponent: Any) -> Tensor:
    """A whole power x^n is a product of n equal factors:  x · sg(x^(n-1)). Any other is non-linear."""
    if isinstance(exponent, int | float) and exponent >= 1 and exponent == int(exponent):
        return gate(ledger, run, input, exponent)
    return ledger.name(run(*frozen((input, exponent))), ("pow output",))


def clipping(ledger: Ledger, run: Run, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`clamp` and its like: a gate where 0 stays 0, else a known non-linear operation."""
    if moves(input) and not run(input.new_zeros(()), *frozen(args), **frozen(kwargs)).any():
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


def beside(ledger: Ledger, run: Run, input: Tensor, *args: Any) -> Any:
    """The input itself, and a statistic of it that is only ever part of a gate."""
    with torch.no_grad():
        return input, ledger.name(run(*frozen((input, *args)))[1], ("norm output",))


def beside_mean(ledger: Ledger, run: Run, input: Tensor) -> Any:
    """As `beside`, where the first statistic is the mean of every channel, which is linear."""
    _, mean, *others = run(input.detach())
    moving = input.mean([dim for dim in range(input.dim()) if dim != 1])
    return input, graft(mean, moving), *ledger.name(others, ("norm output",))


def distrusting(name: str) -> Rule:
    """Operations that are not in the table."""

    def rule(ledger: Ledger, run: Run, *args: Any, **kwargs: Any) -> Any:
        return ledger.distrust(run(*frozen(args), **frozen(kwargs)), name)

    return rule


# ------------------------------------------------------------------------------------------------------- carried biases


def carried_bias(ledger: Ledger, run: Run, bias: Tensor, beta: Any, carry: Any) -> Tensor:
    """(beta + carry) · bias, of which carry · bias counts as part of what it will be added to."""
    total = float(beta) + float(carry)
    return ledger.carry(run(*frozen((bias, beta, carry))), bias, float(carry) / total if total else 0.0)


def carrier(ledger: Ledger, run: Run, term: Tensor, bias: Any) -> Tensor:
    """A term that moves and carries a bias."""
    return ledger.carries(run(term, frozen(bias)), bias)


def beside_energy(ledger: Ledger, run: Run, input: Tensor, dim: Any) -> Any:
    """The input itself, and its sum of squares, as the linear function <x, sg(x)>."""
    value = run(*frozen((input, dim)))[1]
    linear = (input * input.detach()).sum(dim, keepdim=True)
    return input, graft(value, linear.to(value.dtype))


# ---------------------------------------------------------------------------------------------------------- normalisers


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
    return _dressed(ledger, value, out, weight, bias, per_channel=True)


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
    return _dressed(ledger, value, out, weight, bias, per_channel=True)


def normalize(ledger: Ledger, run: Run, input: Tensor, p: float = 2.0, dim: Any = 1, eps: float = 1e-12) -> Tensor:
    norm = torch.linalg.vector_norm(input.detach(), p, dim, keepdim=True).clamp_min(eps)
    return graft(run(input.detach(), p, dim, eps), input / norm)


def cosine_similarity(ledger: Ledger, run: Run, x1: Any, x2: Any, dim: int = 1, eps: float = 1e-8) -> Tensor:
    units = (x / torch.linalg.vector_norm(x.detach(), 2, dim, keepdim=True).clamp_min(eps) for x in (x1, x2))
    return graft(run(x1.detach(), x2.detach(), dim, eps), product(ledger, torch.mul, *units).sum(dim))


def _standardised(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    """(x - μ) / sg(σ) over `dims`: to subtract a mean is linear, so it moves."""
    centred = x - x.mean(dims, keepdim=True)
    count = math.prod(x.shape[dim] for dim in dims)
    variance = torch.linalg.vector_norm(centred.detach(), dim=dims, keepdim=True).square() / count
    return centred * (variance + eps).rsqrt()


def _dressed(ledger: Ledger, value: Tensor, out: Tensor, weight: Any, bias: Any, per_channel: bool = False) -> Tensor:
    """`value` with the derivative of out · weight + bias, which lie along the last axes or else the channels."""
    align = _per_channel if per_channel else lambda vector, like: vector
    bare = out
    if weight is None:
        out = graft(value, out.clone())
    else:
        out = pulled(value, out, lambda grad, weight: grad * align(weight, grad), frozen(weight))
    if bias is not None:
        ledger.enter(out, align(bias, out), bias, lambda: bare if weight is None else bare * align(weight, bare))
    return out


def _per_channel(vector: Tensor, like: Tensor) -> Tensor:
    """`vector` (C,) so that it broadcasts along the channels of `like` (B, C, ...)."""
    return vector.reshape(-1, *(1,) * (like.dim() - 2))


# ------------------------------------------------------------------------------------------------------------ attention


# Attention weights that are held at once in a backward pass on a CPU.
WEIGHTS = 2**20


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
    if not moves(value) or not plain or query.device.type != "cpu":
        return run(query, key, value, *options, **more)

    # torch's backward pass on a CPU makes the gradients of query and key too, wanted or not: five products, not two.
    def pull(grad: Tensor, query: Tensor, key: Tensor) -> Tensor:
        rows = max(1, WEIGHTS // key.shape[:-1].numel())
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
    if not moves(given.value) and not moves(given.static_v):
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
    return graft(out, seen.transpose(0, 1).reshape(out.shape).clone()), shown


# --------------------------------------------------------------------------------------------------------- input layers


def encoding(
    ledger: Ledger, run: Run, x: Tensor, mean: Any, std: Any, padding: tuple[int, int, int, int] = (0, 0, 0, 0)
) -> Tensor:
    """Functions that encode the picture: what they return is explained, and their border is a constant."""
    x, mean, std = frozen((x, mean, std))
    leaf = ledger.encode(run(x, mean, std, (0, 0, 0, 0)))
    value = run(x, mean, std, padding)
    out = graft(value, F.pad(leaf, padding) if any(padding) else leaf.clone())
    inside = F.pad(torch.ones_like(leaf, dtype=torch.bool), padding)
    ledger.enter(out, value.masked_fill(inside, 0), "padding")
    return out


def linear_in_encoding(encode: Run, gradient: Run) -> Rule:
    """Functions that are linear in what `encode` makes of the picture, and compute it from the picture itself."""

    def rule(ledger: Ledger, run: Run, x: Tensor, mean: Any, std: Any, padding: Any, *others: Any) -> Tensor:
        others = frozen(others)
        encoded = encoding(ledger, encode, x, mean, std, padding)
        value, size = run(*frozen((x, mean, std, padding)), *others), encoded.shape
        return pulled(value, encoded, lambda grad: gradient(size, grad, *others))

    return rule


def colours(ledger: Ledger, run: Run, x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """The normalised picture as a linear function of [r, 1 - r], which is explained; r + (1 - r) = 1 spares a constant.

    z = (r - mean) / std = r (1/(2 std) + k) + (1 - r) (-1/(2 std) + k),  k = (1 - 2 mean) / (2 std).
    """
    x, mean, std = frozen((x, mean.view(-1, 1, 1), std.view(-1, 1, 1)))
    r = x * std + mean
    leaf = ledger.encode(torch.cat([r, 1 - r], 1))
    half, k = 1 / (2 * std), (1 - 2 * mean) / (2 * std)
    return graft(run(x, mean, std).clone(), leaf[:, :3] * (k + half) + leaf[:, 3:] * (k - half))


# ------------------------------------------------------------------------------------------------------------ the table

ADD = combination(lambda alpha: (1, alpha))
SUBTRACT = combination(lambda alpha: (1, -alpha))
# These keep nothing of what they read or return, and can write over it.
IN_PLACE = (linear, ADD, SUBTRACT)

LINEAR = """
    view view_as reshape reshape_as expand expand_as broadcast_to flatten unflatten ravel squeeze unsqueeze transpose
    swapaxes swapdims permute movedim moveaxis t adjoint narrow select chunk split split_with_sizes tensor_split hsplit
    vsplit dsplit unbind unfold fold diagonal diag diag_embed as_strided contiguous clone roll flip fliplr flipud rot90
    repeat repeat_interleave tile gather take take_along_dim index_select masked_select tril triu trace __getitem__
    __iter__ __reversed__ atleast_1d atleast_2d atleast_3d view_as_real view_as_complex resolve_conj resolve_neg
    sum mean cumsum nansum sum_to_size neg negative positive __neg__ __pos__ conj alias
    to float double half bfloat16 type type_as cpu cuda requires_grad_ as_subclass
    avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
    max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d
    max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices adaptive_max_pool2d_with_indices
    fractional_max_pool2d fractional_max_pool3d max_unpool1d max_unpool2d max_unpool3d
    interpolate upsample grid_sample pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle
    dropout dropout1d dropout2d dropout3d feature_dropout alpha_dropout feature_alpha_dropout
    fft ifft rfft irfft fft2 ifft2 rfft2 irfft2 fftn ifftn rfftn irfftn fftshift ifftshift
""".split()

INDEPENDENT = """
    zeros_like ones_like empty_like full_like rand_like randn_like randint_like
    new_zeros new_ones new_empty new_full new_tensor new_empty_strided
""".split()

AFFINE = """
    cat concat concatenate stack hstack vstack dstack column_stack row_stack where
    masked_fill masked_scatter index_fill index_copy index_put index_add scatter scatter_add
    select_scatter slice_scatter diagonal_scatter
    copy_ fill_ zero_ __setitem__
""".split()

EXTREME = "max min amax amin maximum minimum fmax fmin topk sort msort kthvalue median aminmax".split()

PRODUCT = """
    mul multiply matmul mm bmm mv dot vdot inner outer ger tensordot kron einsum chain_matmul multi_dot
    linalg_multi_dot vecdot linalg_vecdot
""".split()

GATED = """
    relu6 leaky_relu prelu rrelu elu selu celu gelu silu mish hardswish softsign tanhshrink hardshrink softshrink
    local_response_norm
""".split()

CLIPPED = "clamp clip clamp_min clamp_max hardtanh threshold".split()

FROZEN = """
    softmax log_softmax softmin gumbel_softmax sigmoid hardsigmoid logsigmoid softplus exp exp2 expm1 log log2
    log10 log1p logsumexp logcumsumexp logaddexp sqrt rsqrt reciprocal __rpow__ float_power norm
    linalg_vector_norm linalg_norm linalg_matrix_norm vector_norm matrix_norm cdist dist abs absolute sign sgn floor
    ceil round trunc frac remainder fmod __floordiv__ floor_divide __mod__ std var sin cos tan asin acos atan atan2
    sinh cosh erf erfc erfinv logit heaviside bernoulli nan_to_num detach prod cumprod __rfloordiv__ __rmod__
""".split()

RULES: dict[str, Rule] = {
    **dict.fromkeys(LINEAR, linear),
    **dict.fromkeys(INDEPENDENT, independent),
    **dict.fromkeys(AFFINE, affine),
    **dict.fromkeys(EXTREME, extreme),
    **dict.fromkeys(PRODUCT, product),
    **dict.fromkeys(GATED, gate),
    **dict.fromkeys(CLIPPED, clipping),
    **{name: freezing(name.strip("_")) for name in FROZEN},
    **dict.fromkeys(("add", "__add__", "__radd__"), ADD),
    **dict.fromkeys(("sub", "subtract", "__sub__"), SUBTRACT),
    **dict.fromkeys(("rsub", "__rsub__"), combination(lambda alpha: (-alpha, 1))),
    **dict.fromkeys(("div", "divide", "true_divide", "__truediv__", "__div__"), quotient),
    **dict.fromkeys(("__rdiv__", "__rtruediv__"), freezing("reciprocal")),
    "linear": projection,
    **dict.fromkeys((f"conv{n}d" for n in (1, 2, 3)), weighted),
    **dict.fromkeys((f"conv_transpose{n}d" for n in (1, 2, 3)), weighted),
    **dict.fromkeys(("var_mean", "std_mean"), moments),
    **dict.fromkeys(("pow", "__pow__"), power),
    **dict.fromkeys(("pad", "constant_pad_nd"), padding),
    "relu": routing,
    "square": gate,
    "tanh": saturation,
    "lerp": interpolation,
    "addmm": multiply_add(torch.mm),
    "addbmm": multiply_add(lambda a, b: torch.bmm(a, b).sum(0)),
    "baddbmm": multiply_add(torch.bmm),
    "addmv": multiply_add(torch.mv),
    "addr": multiply_add(torch.outer),
    "addcmul": multiply_add(torch.mul),
    "addcdiv": multiply_add(torch.div, quotient),
    "glu": gated_half,
    "layer_norm": layer_norm,
    "rms_norm": rms_norm,
    "group_norm": group_norm,
    "normalize": normalize,
    "cosine_similarity": cosine_similarity,
    "scaled_dot_product_attention": attention,
}

# These take other arguments in torch than they do in torch.nn.functional.
FUNCTIONAL_RULES: dict[Callable[..., Any], Rule] = {
    F.batch_norm: batch_norm,
    F.instance_norm: instance_norm,
    F.multi_head_attention_forward: multi_head_attention,
}

PROPERTY_RULES: dict[str, Rule] = {
    **dict.fromkeys(("T", "mT", "H", "mH", "real", "imag"), linear),
    "data": freezing("detach"),
}

SPACES = (torch, Tensor, F, torch.linalg, torch.special, torch.fft)


def _operations() -> Iterator[tuple[Callable[..., Any], Operation]]:
    """Each spelling of each rule: torch function, method, torch.nn.functional, and in place."""
    for name, rule in RULES.items():
        for spelling in (name, f"{name}_"):
            for space in SPACES:
                if callable(function := getattr(space, spelling, None)):
                    # A linear operation is as it is in place, too; some only change the shape.
                    yield function, Operation(name, rule, _writes(spelling) and rule is not linear)
    for function, rule in FUNCTIONAL_RULES.items():
        yield function, Operation(function.__name__, rule, False)
    for name, rule in PROPERTY_RULES.items():
        yield getattr(Tensor, name).__get__, Operation(name, rule, False)


def _writes(spelling: str) -> bool:
    """Whether a function of this name writes to its first argument."""
    return spelling == "__setitem__" or (spelling.endswith("_") and spelling[-2:] != "__")


OPERATIONS: dict[Callable[..., Any], Operation] = dict(_operations())

# What returns no tensor, and is asked so often that looking further would show.
PROPERTIES = frozenset(
    [getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "is_cuda", "layout")]
    + [Tensor.dim, Tensor.size, Tensor.is_floating_point, Tensor.is_contiguous, Tensor.stride, Tensor.numel]
)


def resolve(function: Callable[..., Any]) -> Operation:
    """What is known of a torch function."""
    known = OPERATIONS.get(function)
    if known is not None:
        return known
    name = getattr(function, "__name__", str(function))
    if name == "__get__":
        name = getattr(getattr(function, "__self__", None), "__name__", name)
    return Operation(name, distrusting(name), _writes(name))
