"""Sums of squares, |x|^2, which every norm of a patch or a filter is made of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...linearise.mode import with_energy, with_statistics
from .dispatch import backward_is_followed, gradients_of, lean
from .memory import blocks
from .precision import wide

__all__ = ["sum_of_squares", "with_moving_squares", "with_squares"]

Dims = int | tuple[int, ...]


def squares(x: Tensor, dim: Dims) -> Tensor:
    """|x|^2 over `dim`, which stays; in float32 at least."""
    return x.to(wide(x)).square().sum(dim, keepdim=True)


def input_and_squares(x: Tensor, dim: Dims) -> tuple[Tensor, Tensor]:
    """x, and its `squares`."""
    return x, squares(x, dim)


# ----------------------------------------------------------------------------------------------------------- lean forms


def _squares(x: Tensor, dim: Dims) -> Tensor:
    if isinstance(dim, int) and x.shape[dim] == 1:
        return x.to(wide(x)).square()
    if not isinstance(dim, int) or x.stride(dim) == 1:
        return torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=wide(x)).square()
    # Of numbers that lie apart torch takes a norm one by one.
    return torch.cat([squares(part, dim) for part in blocks(x)])


sum_of_squares = lean(squares, _squares)


class _SquaresBeside(torch.autograd.Function):
    """`input_and_squares`: the gradients of both meet in one pass over x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: Dims) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x)
        ctx.set_materialize_grads(False)
        ctx.dim = dim
        return x.view_as(x), _squares(x, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, of_squares: Tensor | None) -> tuple[Tensor | None, ...]:
        if of_squares is None:
            return grad, None
        (x,) = ctx.saved_tensors
        if backward_is_followed(grad, of_squares):
            return gradients_of(input_and_squares, (x, ctx.dim), (True, False), (grad, of_squares))
        of_squares = of_squares.to(x.dtype)
        if grad is None:
            return 2 * x * of_squares, None
        # In place: nobody else has this gradient, as only the layer's own product reads x behind this function.
        return grad.addcmul_(x, of_squares, value=2), None


with_squares_of = lean(input_and_squares, _SquaresBeside.apply, lambda x, dim: (x, _squares(x, dim)))


@with_statistics
def with_squares(x: Tensor, dim: Dims) -> tuple[Tensor, Tensor]:
    """x, to be read on, and its sum of squares over `dim`, which stays; in float32 at least.

    In explanation mode the sum is a constant.
    """
    return with_squares_of(x, dim)


@with_energy
def with_moving_squares(x: Tensor, dim: Dims) -> tuple[Tensor, Tensor]:
    """As `with_squares`; in explanation mode the sum is <x, sg(x)>, linear in x."""
    return with_squares_of(x, dim)
