"""One forward pass, watched: which layers run, and which of them read the picture itself."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from ..core.errors import PlanError
from ..core.hooks import hooked
from ..core.pictures import fitted, noise_pictures
from ..linearise import Linearised

__all__ = ["Trace", "reads_colours", "trace_forward"]


@dataclasses.dataclass(frozen=True)
class Trace:
    """Qualified names from one forward pass.

    Attributes:
        called: modules with own parameters whose forward ran, in the order of their first call.
        readers: the innermost of them whose first argument is the picture itself.
        elsewhere: whether the picture also gets into the model any other way.
        size: (height, width) of the picture, in pixels.
    """

    called: tuple[str, ...]
    readers: frozenset[str]
    elsewhere: bool
    size: tuple[int, int]


def reads_colours(model: nn.Module) -> bool:
    """Whether the first convolution of `model`, if it has one, is made for three channels."""
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    return first is None or first.in_channels == 3


def _check_channels(model: nn.Module, called: Mapping[str, None], readers: set[str]) -> None:
    """Raises PlanError where the layer that was called last cannot read a picture of three channels."""
    last = next(reversed(called), "")
    layer = model.get_submodule(last)
    if last in readers and isinstance(layer, nn.Conv2d) and layer.in_channels != 3:
        count = layer.in_channels
        raise PlanError(
            f"{type(model).__name__} does not run on pictures of three channels, red, green and blue: its {last} reads "
            f"{count}. In Python, explain(MODULE, pictures (B, {count}, H, W), TARGET) "
            "explains it as it is."
        )


def trace_forward(model: nn.Module, size: tuple[int, int]) -> Trace:
    """Runs `model` once on a noise picture of `size`; nothing of the hooks stays.

    Raises:
        PlanError: the model does not take a picture of this size.
    """
    if min(size) < 1:
        raise PlanError(
            f"{type(model).__name__} does not run on a picture of {size[0]}x{size[1]}. Pass another --image-size."
        )
    if any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()]):
        model = _readable(model)
    picture = fitted(noise_pictures(1, size), model)
    called: dict[str, None] = {}
    readers: set[str] = set()

    def watch(name: str):
        def hook(module: nn.Module, args: tuple) -> None:
            called[name] = None
            if any(_is_picture(arg, picture) for arg in args[:1]):
                readers.add(name)

        return hook

    def cut(module: nn.Module, args: tuple) -> tuple:
        return (args[0].detach(), *args[1:])

    try:
        with torch.no_grad(), hooked(before=((module, watch(name)) for name, module in _own_parameters(model))):
            model(picture)
        readers = _innermost(readers)
        # What still moves with the picture once its readers do not let it through came in another way.
        with hooked(before=((model.get_submodule(name), cut) for name in readers)), Linearised(model) as mode:
            leaves = _leaves(model(mode.follow(picture)))
        moves = any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves)
    except Exception as error:
        _check_channels(model, called, readers)
        raise PlanError(
            f"{type(model).__name__} does not run on a picture of {size[0]}x{size[1]}: {error}. "
            f"Pass --image-size with a size "
            "that the model takes."
        ) from error
    return Trace(tuple(called), frozenset(readers), elsewhere=moves, size=size)


def _innermost(names: set[str]) -> set[str]:
    """Those below which no other lies: a container that holds a class token only hands the picture on."""
    return {name for name in names if not any(other.startswith(f"{name}.") for other in names)}


def _leaves(output: object) -> list[object]:
    """What is in a model's output, whatever holds it."""
    if isinstance(output, Mapping):
        return [leaf for value in output.values() for leaf in _leaves(value)]
    return [leaf for value in output for leaf in _leaves(value)] if isinstance(output, list | tuple) else [output]


def _readable(model: nn.Module) -> nn.Module:
    """A copy of a model on the meta device that runs, full of zeros: enough to see which layers do.

    To be read only: one number stands for a whole tensor, so a copy of a model of any size costs nothing.
    """
    copied = copy.deepcopy(model)
    for module in copied.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                module._parameters[name] = nn.Parameter(_zero(parameter), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = _zero(buffer)
    return copied


def _zero(tensor: Tensor) -> Tensor:
    return torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)


def _own_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, module) for name, module in model.named_modules() if name and [*module.parameters(recurse=False)])


def _is_picture(argument: object, picture: Tensor) -> bool:
    return isinstance(argument, Tensor) and argument.shape == picture.shape and torch.equal(argument, picture)
