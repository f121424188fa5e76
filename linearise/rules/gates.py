"""Gates: pointwise activations, what is frozen, statistics, and biases that are carried."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..ledger import Ledger, follows_input, frozen, pulled, with_gradient_of
from .rule import Rule, Run

__all__ = [
    "carried_bias",
    "carrier",
    "clipping",
    "distrusting",
    "freezing",
    "gate",
    "gate_by",
    "gated_half",
    "power",
    "routing",
    "saturation",
    "scaled",
    "with_energy_rule",
    "with_mean_rule",
    "with_statistics_rule",
]


def gate(ledger: Ledger, run: Run, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Pointwise a(x), or x times a gate:  x · sg(a(x) / x), and 0 where x is 0."""
    value = run(*frozen((input, *args)), **frozen(kwargs))
    if not follows_input(input):
        return value
    return scaled(ledger, value, input, _factor(value, input.detach()))


def gate_by(apart: Run, gradient: Run | None = None) -> Rule:
    """As `gate`, for functions that know their gate: apart(x, *others) is the gate and what it makes of x.

    It multiplies x, or something linear in x, of which `gradient` is the transpose.
    """

    def rule(ledger: Ledger, run: Run, input: Tensor, *others: Any, **more: Any) -> Tensor:
        others, more = frozen(others), frozen(more)
        if not follows_input(input):
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
    if follows_input(input) and not run(input.new_zeros(()), *frozen(args), **frozen(kwargs)).any():
        return gate(ledger, run, input, *args, **kwargs)
    return ledger.name(run(*frozen((input, *args)), **frozen(kwargs)), ("clamp output",))


def gated_half(ledger: Ledger, run: Run, input: Tensor, dim: int = -1) -> Tensor:
    """`glu`: the first half of the channels, gated by the second."""
    half, control = input.chunk(2, dim)
    return with_gradient_of(run(input.detach(), dim), half * control.detach().sigmoid())


def freezing(name: str) -> Rule:
    """Known non-linear operations: a constant, named after the operation."""

    def rule(ledger: Ledger, run: Run, *args: Any, **kwargs: Any) -> Any:
        return ledger.name(run(*frozen(args), **frozen(kwargs)), (f"{name} output",))

    return rule


def with_statistics_rule(ledger: Ledger, run: Run, input: Tensor, *args: Any) -> Any:
    """The input itself, and a statistic of it that is only ever part of a gate."""
    with torch.no_grad():
        return input, ledger.name(run(*frozen((input, *args)))[1], ("norm output",))


def with_mean_rule(ledger: Ledger, run: Run, input: Tensor) -> Any:
    """As `with_statistics_rule`, where the first statistic is the mean of every channel, which is linear."""
    _, mean, *others = run(input.detach())
    moving = input.mean([dim for dim in range(input.dim()) if dim != 1])
    return input, with_gradient_of(mean, moving), *ledger.name(others, ("norm output",))


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


def with_energy_rule(ledger: Ledger, run: Run, input: Tensor, dim: Any) -> Any:
    """The input itself, and its sum of squares, as the linear function <x, sg(x)>."""
    value = run(*frozen((input, dim)))[1]
    linear = (input * input.detach()).sum(dim, keepdim=True)
    return input, with_gradient_of(value, linear.to(value.dtype))
