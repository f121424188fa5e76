"""Operations that are linear in one tensor, or affine in all of them together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..ledger import Ledger, continuous, follows_input, frozen, tensors
from .rule import Rule, Run

__all__ = [
    "ADD",
    "SUBTRACT",
    "affine",
    "combination",
    "extreme",
    "independent",
    "interpolation",
    "linear",
    "moments",
    "padding",
    "still_gate",
]


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
    if not follows_input(out):
        return out
    with torch.no_grad():
        literal = at(None)
        for leaf in {id(leaf): leaf for leaf in tensors(leaves) if not follows_input(leaf)}.values():
            ledger.enter(out, at(leaf) - literal, leaf)
    ledger.enter(out, literal, None)
    return out


def combination(coefficients: Callable[[Any], tuple[Any, Any]]) -> Rule:
    """Sums and differences, by the coefficients that `alpha` gives to the two operands."""

    def rule(ledger: Ledger, run: Run, input: Any, other: Any, *, alpha: Any = 1) -> Tensor:
        out = run(input, other) if alpha == 1 else run(input, other, alpha=alpha)
        first, second = zip((input, other), coefficients(alpha), strict=True)
        for (operand, coefficient), (rest, factor) in ((first, second), (second, first)):
            if not follows_input(operand):
                ledger.enter(out, operand * coefficient, operand, lambda rest=rest, factor=factor: rest * factor)
        return still_gate(ledger, out, input, other)

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
        ledger.recorded(leaf.expand(shape), leaf) if continuous(leaf) and not follows_input(leaf) else leaf
        for leaf in leaves
    ]
    args, kwargs = tree_unflatten(followed, tree)
    return run(*args, **kwargs)


def moments(ledger: Ledger, run: Run, input: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """`var_mean` and `std_mean`: the mean is linear, the spread is a statistic."""
    spread, mean = run(input, *args, **kwargs)
    return ledger.name(spread.detach(), ("spread",)), mean


def still_gate(ledger: Ledger, out: Tensor, *operands: Any) -> Tensor:
    """Marks `out` as a gate where it is one tensor that is a gate, shifted or scaled by a number."""
    factors = [operand for operand in operands if isinstance(operand, Tensor)]
    return ledger.mark(out) if len(factors) == 1 and ledger.gates(factors[0]) else out


ADD = combination(lambda alpha: (1, alpha))
SUBTRACT = combination(lambda alpha: (1, -alpha))
