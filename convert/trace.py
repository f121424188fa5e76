"""One forward pass, watched: which layers run, and which of them read the picture itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..errors import PlanError

__all__ = ["Trace", "fitted", "noise_pictures", "trace_forward"]


@dataclasses.dataclass(frozen=True)
class Trace:
    """Qualified names from one forward pass.

    Attributes:
        called: modules with own parameters whose forward ran, in the order of their first call.
        readers: those of them whose first argument is the picture itself.
    """

    called: tuple[str, ...]
    readers: frozenset[str]


def noise_pictures(count: int, size: tuple[int, int], seed: int = 0) -> Tensor:
    """Normalised pictures of smooth noise (count, 3, H, W), the same for the same arguments on every machine."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, max(size[0] // 16, 2), max(size[1] // 16, 2), generator=generator)
    smooth = nn.functional.interpolate(coarse, size=size, mode="bilinear")
    return smooth + 0.2 * torch.randn(count, 3, *size, generator=generator)


def fitted(pictures: Tensor, model: nn.Module) -> Tensor:
    """`pictures` with the precision and on the device of `model`."""
    parameter = next(model.parameters(), None)
    return pictures if parameter is None else pictures.to(parameter)


def trace_forward(model: nn.Module, size: tuple[int, int]) -> Trace:
    """Runs `model` once on a noise picture of `size`; nothing of the hooks stays.

    Raises:
        PlanError: the model does not take a picture of this size.
    """
    if min(size) < 1:
        raise PlanError(
            f"{type(model).__name__} does not run on a picture of {size[0]}x{size[1]}. Pass another --image-size."
        )
    picture = fitted(noise_pictures(1, size), model)
    called: dict[str, None] = {}
    readers: set[str] = set()

    def watch(name: str):  # noqa: ANN202 - a hook
        def hook(module: nn.Module, args: tuple) -> None:
            called[name] = None
            if any(_is_picture(arg, picture) for arg in args[:1]):
                readers.add(name)

        return hook

    hooks = [module.register_forward_pre_hook(watch(name)) for name, module in _own_parameters(model)]
    try:
        with torch.no_grad():
            model(picture)
    except Exception as error:
        raise PlanError(
            f"{type(model).__name__} does not run on a picture of {size[0]}x{size[1]}: {error}. "
            f"Pass --image-size with a size "
            "that the model takes."
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return Trace(tuple(called), frozenset(readers))


def _own_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, module) for name, module in model.named_modules() if name and [*module.parameters(recurse=False)])


def _is_picture(argument: object, picture: Tensor) -> bool:
    return isinstance(argument, Tensor) and argument.shape == picture.shape and torch.equal(argument, picture)
