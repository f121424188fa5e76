"""Which layers must not keep their own output: found by running the model once, when it is converted or loaded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import TensorWeakRef

from .reference import ReferenceSized

__all__ = ["OutputKept", "watching"]


class OutputKept(ReferenceSized):
    """Mixin: a layer whose backward pass reads its output, so that nothing else of its size is kept."""

    # Whether what follows writes into the output, as `ReLU(inplace=True)` does.
    overwritten: bool = False

    def _given(self, y: Tensor) -> Tensor:
        """What others get of the output: a copy where they would overwrite what the backward pass needs."""
        return y.clone() if self.overwritten and torch.is_grad_enabled() else y


@contextlib.contextmanager
def watching(model: nn.Module) -> Iterator[None]:
    """Finds, while `model` runs inside, which layers' outputs are written to by what follows.

    Their backward pass needs the output as it was, so in training they give a copy away, which costs memory. All other
    layers need none.
    """
    with contextlib.ExitStack() as hooks, _Watch() as watch:
        for layer in model.modules():
            if isinstance(layer, OutputKept):
                hooks.enter_context(layer.register_forward_hook(watch.note_output))
        yield


class _Watch(TorchFunctionMode):
    """Looks after every call whether it wrote to an output; holds none of them, which in a large model are many."""

    def __init__(self) -> None:
        super().__init__()
        self._outputs: list[tuple[TensorWeakRef, OutputKept, int]] = []

    def note_output(self, layer: nn.Module, _: object, output: Tensor) -> None:
        """A forward hook."""
        assert isinstance(layer, OutputKept)
        version = output._version  # a call too, behind which the list is another
        self._outputs.append((TensorWeakRef(output), layer, version))

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result, alive = func(*args, **(kwargs or {})), []
        for reference, layer, version in self._outputs:
            output = reference()
            if output is not None:
                layer.overwritten |= output._version != version
                alive.append((reference, layer, version))
        self._outputs = alive
        return result
