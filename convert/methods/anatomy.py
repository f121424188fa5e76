"""Where a model's last map is, how the map becomes the output, and which blocks keep the shape of what they are given.

Found by looking at one forward pass, on any architecture of any library: the vector that the output layer is given is
compared with the mean over places of what every module returned. A copy with random weights is looked at: with those
of a fresh or a pruned model, different modules may compute the same by chance.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...core.errors import PlanError
from ...core.hooks import hooked
from ...core.pictures import fitted, noise_pictures
from ...core.torch_internals import written_times
from ..blocks import blocks_of
from ..plan import check_whole, class_path
from ..randomise import randomise
from . import kinds

__all__ = ["Anatomy", "Head", "Layout", "look"]

Layout = Literal["BCHW", "BHWC", "BNC"]
PLACES: dict[Layout, tuple[int, ...]] = {"BCHW": (2, 3), "BHWC": (1, 2), "BNC": (1,)}
# Norms over the channels of a pooled vector that know nothing else: weight, bias, eps.
POOLED_NORMS = (
    "torch.nn.modules.normalization.LayerNorm",
    *(f"timm.layers.norm.{name}" for name in ("LayerNorm", "LayerNormFp32", "LayerNorm2d", "LayerNorm2dFp32")),
    *(f"open_clip.transformer.{name}" for name in ("LayerNorm", "LayerNormFp32")),
)
SILENT = (nn.Identity, nn.Dropout, nn.Flatten)


@dataclasses.dataclass(frozen=True)
class Head:
    """How the output is made: of the mean over places of what `last_map` returns, by `norm`, then by `output`.

    Attributes:
        last_map: qualified name of the module. layout: of what it returns.
        norm: a layer norm over the pooled vector's channels, if any.
        output: a linear layer or 1x1 convolution; None where the pooled vector itself is the output.
    """

    last_map: str
    layout: Layout
    norm: str | None
    output: str | None


@dataclasses.dataclass(frozen=True)
class Anatomy:
    """What was found.

    Attributes:
        output: the layer that makes the output, if that is linear.
        head: None where the output is no linear function of pooled places. problem: why, then.
        blocks: name of every block -> why it has no place for a skip, empty where it has one.
    """

    output: str | None
    head: Head | None
    problem: str
    blocks: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class _Value:
    """What is kept of a tensor: its shape, itself if it is one vector a picture, and else its means over places."""

    shape: tuple[int, ...]
    vector: Tensor | None
    means: Mapping[Layout, Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> _Value:
        sizes = tuple(tensor.shape[1:])
        if tensor.dim() < 3 or max(sizes, default=1) == tensor[0].numel():
            return cls(sizes, tensor.flatten(1) if tensor.dim() > 1 else None, {})
        layouts: list[Layout] = [layout for layout in PLACES if len(PLACES[layout]) + 2 == tensor.dim()]
        return cls(sizes, None, {layout: tensor.mean(PLACES[layout]) for layout in layouts})

    def layout_of_mean(self, vector: Tensor) -> Layout | None:
        """The layout in which the mean over places is `vector`."""
        return next((layout for layout, mean in self.means.items() if _same(mean, vector)), None)


@dataclasses.dataclass(frozen=True)
class _Call:
    """A module's last call: the first tensor that it was given, and what it returned, if that was one tensor."""

    given: _Value | None
    returned: _Value | None
    overwrites: bool


def look(model: nn.Module, size: tuple[int, int]) -> Anatomy:
    """The anatomy of `model`, which stays as it is, on pictures of `size`.

    Raises:
        PlanError: the model does not run on such a picture, or has no weights.
    """
    check_whole(model)
    copied = copy.deepcopy(model).float()
    pictures = fitted(noise_pictures(2, size), copied)
    try:
        with torch.no_grad():
            calls, output = _watched(randomise(copied, pictures), pictures)
    except Exception as error:
        raise PlanError(f"{type(model).__name__} does not run on a picture of {size[0]}x{size[1]}: {error}.") from error
    modules = dict(model.named_modules())
    layer = _last(calls, lambda name, call: _classifies(modules[name]) and _is(call.returned, output))
    given = calls[layer].given if layer else None
    vector = given.vector if given else output
    blocks = blocks_of(model)
    head, problem = None, "it is given a map, not a pooled vector"
    if vector is not None:
        head = _head(modules, calls, layer, vector)
        problem = "" if head else _problem(modules, calls, layer, vector, blocks)
    return Anatomy(layer, head, problem, {name: _no_skip(calls.get(name)) for name in blocks})


def _watched(model: nn.Module, pictures: Tensor) -> tuple[dict[str, _Call], Tensor]:
    """The calls of every module, in the order in which they ended, and the model's output (B, D)."""
    calls: dict[str, _Call] = {}
    versions: dict[str, int] = {}

    def begin(name: str):
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensor = _first(args, kwargs)
            versions[name] = 0 if tensor is None else written_times(tensor)

        return hook

    def end(name: str):
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            tensor = _first(args, kwargs)
            given = None if tensor is None else _Value.of(tensor)
            returned = _Value.of(output) if isinstance(output, Tensor) else None
            calls.pop(name, None)
            calls[name] = _Call(given, returned, tensor is not None and written_times(tensor) != versions[name])

        return hook

    parts = [(name, module) for name, module in model.named_modules() if name]
    before, after = ([(module, hook(name)) for name, module in parts] for hook in (begin, end))
    with hooked(after, before=before, with_kwargs=True):
        output = model(pictures)
    if not isinstance(output, Tensor) or output.dim() != 2:
        raise PlanError("it does not return one vector a picture")
    return calls, output


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    return next((value for value in [*args, *kwargs.values()] if isinstance(value, Tensor)), None)


def _last(calls: dict[str, _Call], wanted: Callable[[str, _Call], bool]) -> str | None:
    return next((name for name in reversed(calls) if wanted(name, calls[name])), None)


def _same(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and torch.allclose(ours, theirs, 1e-3, 1e-4 * float(theirs.abs().max()))


def _is(value: _Value | None, vector: Tensor | None) -> bool:
    return value is not None and value.vector is not None and vector is not None and _same(value.vector, vector)


def _classifies(module: nn.Module) -> bool:
    """Whether it is linear, and may as well be applied to every place."""
    path = class_path(module)
    if path in kinds.CONVOLUTIONS and isinstance(module, nn.Conv2d):
        return (module.kernel_size, module.stride, module.groups) == ((1, 1), (1, 1), 1) and not any(module.padding)
    return path in kinds.LINEARS


def _head(modules: Mapping[str, nn.Module], calls: dict[str, _Call], output: str | None, vector: Tensor) -> Head | None:
    """The head whose output layer is given `vector` (B, C), if that is pooled."""
    found = _map_of(calls, vector)
    if found:
        return Head(*found, None, output)
    norm = _last(calls, lambda name, call: class_path(modules[name]) in POOLED_NORMS and _is(call.returned, vector))
    given = calls[norm].given if norm else None
    found = _map_of(calls, given.vector) if given and given.vector is not None else None
    return Head(*found, norm, output) if found else None


def _map_of(calls: dict[str, _Call], vector: Tensor) -> tuple[str, Layout] | None:
    """The outermost module that returned a map whose mean over places is `vector`, and the map's layout."""
    for name in reversed(calls):
        returned = calls[name].returned
        layout = returned.layout_of_mean(vector) if returned else None
        if layout:
            return name, layout
    return None


def _problem(
    modules: Mapping[str, nn.Module],
    calls: dict[str, _Call],
    output: str | None,
    vector: Tensor,
    blocks: tuple[str, ...],
) -> str:
    """Why `vector` is no mean of a map, in words."""
    # Inside blocks pooled vectors make gates, or a skip is pooled where it gets smaller.
    names = [name for name in calls if not any(name == block or name.startswith(f"{block}.") for block in blocks)]
    pooled = next((number for number, name in enumerate(names) if _follows_a_pool(calls, name)), len(names))
    after = [
        f"{name} ({type(modules[name]).__name__})"
        for name in names[pooled:]
        if name != output and not [*modules[name].children()] and not isinstance(modules[name], SILENT)
    ]
    if after:
        return f"after the pooling come {', '.join(after)}, which a mean over places does not commute with"
    if any(_is(call.returned, vector) and call.returned and len(call.returned.shape) == 3 for call in calls.values()):
        return "the last map has one place only: there is nothing to tell apart. Pass a larger --image-size"
    return "what it is given is no mean over places (a class token, or pooling by attention)"


def _follows_a_pool(calls: dict[str, _Call], name: str) -> bool:
    given = calls[name].given
    return given is not None and given.vector is not None and _map_of(calls, given.vector) is not None


def _no_skip(call: _Call | None) -> str:
    """Why what a block is given cannot be mixed with what it returns; empty where it can."""
    if call is None:
        return "forward never calls it"
    if call.given is None or call.returned is None:
        return "does not take one tensor and return one"
    if call.given.shape != call.returned.shape:
        return f"changes {call.given.shape} to {call.returned.shape}: there is no skip through it"
    return "overwrites what it is given" if call.overwrites else ""
