"""Which form of a kernel runs: the plain formula wherever something follows what torch does, else the lean one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from ...core.torch_internals import gradients_are_batched, in_forward_mode, transforms_active

__all__ = ["backward_is_followed", "followed", "gradients_of", "is_exactly", "lean"]

P = ParamSpec("P")
ResultT = TypeVar("ResultT")


def followed() -> bool:
    """Whether a compiler, an exporter, a transform of `torch.func` or forward mode follows what is done with tensors.

    What is followed must not write to memory, and must consist of operations of which torch knows every derivative.
    """
    return torch.compiler.is_compiling() or transforms_active() or in_forward_mode()


def lean(
    plain: Callable[P, ResultT], fused: Callable[..., Any], inference: Callable[..., Any] | None = None
) -> Callable[P, ResultT]:
    """`plain`, by its lean forms in eager mode: `fused`, and `inference` where gradients are off.

    `fused` is the `apply` of an `autograd.Function`; `inference` may write over its first argument.
    """

    @functools.wraps(plain)
    def run(*args: P.args, **kwargs: P.kwargs) -> ResultT:
        if followed():
            return plain(*args, **kwargs)
        if inference is not None and not torch.is_grad_enabled():
            return inference(*args, **kwargs)
        return fused(*args, **kwargs)

    return run


def backward_is_followed(*grads: Tensor | None) -> bool:
    """Whether a backward pass is itself differentiated, or takes several gradients at once."""
    batched = any(grad is not None and gradients_are_batched(grad) for grad in grads)
    return batched or torch.is_grad_enabled() or followed()


def gradients_of(
    plain: Callable[..., Any], arguments: Sequence[Any], wanted: Sequence[bool], grads: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """The gradients of the `wanted` arguments of `plain` from those of its outputs, None for all others.

    For a backward pass that is followed: they have every derivative that `plain` has.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, so that the gradients depend on the arguments, through whose own graphs they do not run.
        inputs = [each.view_as(each) if want else each for each, want in zip(arguments, wanted, strict=True)]
        leaves = [each.requires_grad_() for each, want in zip(inputs, wanted, strict=True) if want]
        outputs = plain(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        known = [(output, grad) for output, grad in zip(outputs, grads, strict=True) if grad is not None]
        found = iter(
            torch.autograd.grad(
                [output for output, _ in known], leaves, [grad for _, grad in known], create_graph=again
            )
        )
    return tuple(next(found) if want else None for want in wanted)


def is_exactly(strength: float | Tensor, value: float) -> bool:
    """Whether a short cut may be taken; never for a buffer, which only the device could tell."""
    return not isinstance(strength, Tensor) and strength == value
