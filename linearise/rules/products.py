"""Products of what moves and what does not, and of several factors that move."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..ledger import Ledger, follows_input, frozen, pulled, with_gradient_of
from .affine import ADD, still_gate
from .rule import Rule, Run

__all__ = ["multiply_add", "product", "projection", "quotient", "weighted"]


def product(ledger: Ledger, run: Run, *args: Any, **kwargs: Any) -> Tensor:
    """Operations that are linear in each of their tensors: m moving factors get 1/m of the product each."""
    leaves, tree = tree_flatten((args, kwargs))
    moving = [index for index, leaf in enumerate(leaves) if follows_input(leaf)]
    moving = [index for index in moving if not ledger.gates(leaves[index])] or moving

    def term(keep: int) -> Tensor:
        args, kwargs = tree_unflatten([leaf if i == keep else frozen(leaf) for i, leaf in enumerate(leaves)], tree)
        return run(*args, **kwargs)

    terms = [term(keep) for keep in moving]
    if len(terms) < 2:
        return still_gate(ledger, terms[0] if terms else run(*args, **kwargs), *leaves)
    return with_gradient_of(terms[0], torch.stack(terms).mean(0) if len(terms) > 2 else (terms[0] + terms[1]) / 2)


def quotient(
    ledger: Ledger, run: Run, input: Any, other: Any, *, rounding_mode: str | None = None, **kwargs: Any
) -> Any:
    """Division by something that moves: the divisor is a gate."""
    if rounding_mode is not None or not follows_input(input):
        value = run(*frozen((input, other)), rounding_mode=rounding_mode, **kwargs)
        return ledger.name(value, ("div output",))
    return still_gate(ledger, run(input, frozen(other), **kwargs), input, other)


def projection(ledger: Ledger, run: Run, input: Tensor, weight: Tensor, bias: Any = None) -> Tensor:
    """`linear`. (A weight that moves makes it a product.)"""
    if follows_input(weight) or follows_input(bias) or not follows_input(input):
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
    if follows_input(bias) or (follows_input(input) and follows_input(weight)):
        sum_of_products = product(ledger, run, input, weight, None, *args, **kwargs)
        out = sum_of_products if bias is None else ADD(ledger, torch.add, sum_of_products, bias.reshape(shape))
        return with_gradient_of(run(*frozen((input, weight, bias, *args)), **kwargs), out)
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
        return with_gradient_of(run(*frozen((input, a, b)), **settings), out)

    return rule
