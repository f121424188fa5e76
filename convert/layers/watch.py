"""What layers may keep and share, found by watching a model run once, as it does when it is converted or loaded."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Hashable, Iterator

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import TensorWeakRef

from .reference import ReferenceSized
from .shared import Identity, Share, identity, shares

__all__ = ["InputShared", "OutputKept", "watching"]


class OutputKept(ReferenceSized):
    """Mixin: a layer whose backward pass reads its output, so that nothing else of its size is kept."""

    # Whether what follows writes into the output, as `ReLU(inplace=True)` does.
    overwritten: bool = False

    def _given(self, y: Tensor) -> Tensor:
        """What others get of the output: a copy where they would overwrite what the backward pass needs."""
        return y.clone() if self.overwritten and torch.is_grad_enabled() else y


class InputShared(nn.Module):
    """Mixin: a layer that takes sums of squares of its input, which other layers may have taken already."""

    # Its part in them; None where no other layer reads the same input.
    share: Share | None = None

    @property
    def statistic(self) -> Hashable:
        """Layers that differ in this take other sums of the same input; None where a layer takes none of it."""
        raise NotImplementedError


@contextlib.contextmanager
def watching(model: nn.Module) -> Iterator[None]:
    """Finds, while `model` runs inside, what its layers must not keep and what they may share.

    Where what follows a layer writes to its output, the backward pass needs that as it was: such layers give a copy
    away when they train, which costs memory; all others need none. Where layers read the same input one after the
    other, the first takes its sums of squares for all.
    """
    with contextlib.ExitStack() as hooks, _Watch() as watch:
        for layer in model.modules():
            if isinstance(layer, OutputKept):
                hooks.enter_context(layer.register_forward_hook(watch.note_output))
            if isinstance(layer, InputShared):
                hooks.enter_context(layer.register_forward_pre_hook(watch.note_input))
        yield
    watch.share_inputs()


class _Watch(TorchFunctionMode):
    """Looks after every call whether it wrote to an output; holds none of them, which in a large model are many."""

    def __init__(self) -> None:
        super().__init__()
        self._outputs: list[tuple[TensorWeakRef, OutputKept, int]] = []
        self._readers: list[list[InputShared]] = []  # of each input
        self._alive: dict[tuple[Identity, Hashable], list[InputShared]] = {}  # those that may have more

    def note_output(self, layer: nn.Module, _: object, output: Tensor) -> None:
        """A forward hook."""
        assert isinstance(layer, OutputKept)
        version = output._version  # a call too, behind which the list is another
        self._outputs.append((TensorWeakRef(output), layer, version))

    def note_input(self, layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        """A hook before forward."""
        assert isinstance(layer, InputShared)
        if arguments and layer.statistic is not None:  # not given by name
            with torch._C.DisableTorchFunction():
                key = identity(arguments[0]), layer.statistic
            # What is gone is let go of: thousands of small leftovers would cut the heap into pieces.
            self._alive = {each: readers for each, readers in self._alive.items() if not each[0].storage.expired()}
            if key not in self._alive:
                self._alive[key] = []
                self._readers.append(self._alive[key])
            self._alive[key].append(layer)

    def share_inputs(self) -> None:
        """Gives layers that read the same input their shares; none to a layer that runs more than once."""
        runs = Counter(id(layer) for readers in self._readers for layer in readers)
        for readers in self._readers:
            once = [layer for layer in readers if runs[id(layer)] == 1]
            for layer, share in zip(once, shares(len(once)), strict=True):
                layer.share = share

    def __torch_function__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204, ARG002 - torch's own signature
        result, alive = func(*args, **(kwargs or {})), []
        for reference, layer, version in self._outputs:
            output = reference()
            if output is not None:
                layer.overwritten |= output._version != version
                alive.append((reference, layer, version))
        self._outputs = alive
        return result
