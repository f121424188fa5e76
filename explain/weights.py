"""Contribution maps that have a gradient to the weights: for losses on what a model explains.

In explanation mode a score is  s = W(x)·x + constants,  and the map is x · W(x). Here the row W(x) is also a function
of the weights through which the input passes, with gates as frozen as they are there. The mode itself keeps weights out
of the graph, so that only the input moves. They are let in between its forward pass and its backward pass, which is a
graph of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.utils import _pair
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from ..linearise import Linearised
from ..linearise.ledger import Ledger, continuous, follows_input, leaves, pulled, tensors
from ..linearise.rules import resolve
from ..linearise.transposed import transposed
from .self_explaining import main_output

__all__ = ["trained_maps"]


def trained_maps(
    model: nn.Module, images: Tensor, directions: Tensor, loss: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """`loss` of the contribution maps (B, H, W) of the scores output · directions (B, D) on `images` (B, 3, H, W).

    Returns the loss (), whose gradient reaches the parameters of `model` with gates held fixed, and the maps, without
    any: `explain`'s of the same scores. Weights get the gradient wherever they multiply what moves with the input,
    as they are or as what a layer makes of them: in convolutions, linear layers, the scales of norms, and the shifts
    that a BatchNorm carries. All other biases, and what only a gate reads, get none. The model must not be compiled, or
    checkpoint its gradients.
    """
    with torch.enable_grad(), torch.autocast(images.device.type, enabled=False):
        mode = _Attached(model)
        with mode, sdpa_kernel(SDPBackend.MATH):
            output = main_output(model(mode.follow(images)))
            score = (output * directions).sum()
        weights = mode.let_in()
        gradients = torch.autograd.grad(score, mode.inputs, create_graph=True)
        pairs = zip(mode.inputs, gradients, strict=True)
        maps = torch.stack([(leaf.detach() * gradient).sum(1) for leaf, gradient in pairs]).sum(0)
        value = loss(maps)
        found = torch.autograd.grad(value, [weight for weight, _ in weights], allow_unused=True)
        # The loss as a linear function of the weights, which any backward pass, of DDP too, takes on from here.
        tangent = torch.stack(
            [
                (twin * gradient).sum().float()
                for (_, twin), gradient in zip(weights, found, strict=True)
                if gradient is not None
            ]
        ).sum()
    return value.detach() + (tangent - tangent.detach()), maps.detach()


def _convolved(
    ledger: Ledger,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor | None:
    """`F.conv2d` as a linear function of x, whose transpose has a fast derivative; None where it is something else."""
    if x.dim() != 4 or isinstance(padding, str) or follows_input(weight) or follows_input(bias):
        return None
    size, stride, padding, dilation = x.shape, _pair(stride), _pair(padding), _pair(dilation)
    value = F.conv2d(x.detach(), weight, bias, stride, padding, dilation, groups)
    out = pulled(
        value, x, lambda grad, weight: transposed(size, grad, weight, stride, padding, dilation, groups), weight
    )
    if bias is not None:
        response = functools.partial(F.conv2d, x.detach(), weight, None, stride, padding, dilation, groups)
        ledger.enter(out, bias.reshape(-1, 1, 1), bias, response)
    return out


class _Attached(Linearised):
    """Explanation mode that knows how each constant was made of parameters."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._weights = _Weights(model)
        self._ledger = self._weights

    def let_in(self) -> list[tuple[Tensor, Tensor]]:
        """After the forward pass: constants made of parameters, which from now on ask for a gradient, and their twins
        in the parameters' own graph."""
        return self._weights.let_in()

    def _recorded_call(
        self, func: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any], given: list[Any]
    ) -> Any:
        args, options = self._ledger.detach((args, options))
        given = leaves((args, options))
        if any(map(follows_input, given)):
            convolved = _convolved(self._ledger, *args, **options) if func is F.conv2d else None
            return self._linearised(func, args, options) if convolved is None else convolved
        out = self._of_constants(func, args, options)
        if not (resolve(func).in_place or "out" in options or options.get("inplace")):
            self._weights.derive(out, func, args, options)
        return self._ledger.inherit(out, given)


class _Weights(Ledger):
    """A ledger that enters no constants but for those that are carried, as nobody asks for their shares, and keeps for
    each that was made of parameters its twin: the same value, with its graph."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._twins: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._held: list[Tensor] = []
        self._cut: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def enter(
        self,
        out: Tensor,
        constant: Tensor | complex,
        source: object,
        response: Callable[[], Tensor] | None = None,
    ) -> None:
        """What is carried of it: a map is made of the input's part alone."""
        if self.carried_share(source):
            super().enter(out, constant, source, response)

    def _enter_share(self, table: dict[str, Tensor], name: str, share: Tensor) -> None:
        """Nothing; it would keep the graph, and the graph this ledger."""

    def derive(self, out: Any, func: Callable[..., Any], args: Any, options: Any) -> None:
        """Makes the twins of `out`, what func(*args, **options) returned of constants."""
        fresh = [value for value in tensors(out) if value not in self._twins]
        if not fresh or not any(value in self._twins for value in tensors((args, options))):
            return
        attached = tree_map_only(Tensor, lambda value: self._twins.get(value, value), (args, options))
        twins = func(*attached[0], **attached[1])
        for value, twin in zip(tensors(out), tensors(twins), strict=True):
            if value not in self._twins and twin.requires_grad:
                self._keep(value, twin)

    def let_in(self) -> list[tuple[Tensor, Tensor]]:
        return [(value.requires_grad_(), self._twins[value]) for value in self._held]

    def _keep(self, value: Tensor, twin: Tensor) -> None:
        self._twins[value] = twin
        self._held.append(value)

    def _detached(self, tensor: Tensor) -> Tensor:
        if self.is_detached(tensor):
            return tensor
        if tensor in self._cut:
            return self._cut[tensor]
        value = self._cut[tensor] = super()._detached(tensor)
        if continuous(value) and not tensor.is_inference():
            self._keep(value, tensor)
        return value
