"""Models that explain themselves, alone or inside of wrappers: how they are found, and what they are given there.

Also what counts as the output of a model, explaining itself or not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..core.errors import LedgerError, TargetError
from ..core.hooks import hooked
from ..linearise import Linearised

__all__ = ["Own", "SelfExplaining", "main_output", "self_explaining", "standing_in", "unwrapped", "vectors"]

# In which entry models that return several tensors by name put logits or pooled features, best first.
OUTPUT_NAMES = ("logits", "image_embeds", "image_features", "pooler_output", "x_norm_clstoken")


@runtime_checkable
class SelfExplaining(Protocol):
    """A model whose forward pass holds its explanation."""

    def output_maps(
        self, images: Tensor, weights: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Mapping[str, Tensor]]:
        """Of normalised `images` (B, 3, H, W): what `forward` returns, and what every place adds to some scores of it.

        Args:
            weights: outputs (B, D) -> (B, K, D): the scores are weights · outputs. None asks for every output itself.

        Returns:
            outputs (B, D); maps (B, K, h, w), on any grid that tiles the picture evenly; constants, name -> (B, K) or
            (K,). weights · outputs = maps summed over places + all constants. K is D where there are no weights.
        """
        ...


def main_output(output: object) -> Tensor:
    """The logits or pooled features in what a model returned: a tensor, or the first of several."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        named = [output[name] for name in OUTPUT_NAMES if isinstance(output.get(name), Tensor)]
        return main_output([*named, *output.values()])
    if isinstance(output, Sequence):
        for item in output:
            if isinstance(item, Tensor | Mapping | list | tuple):
                return main_output(item)
    raise TargetError(f"The model returned {type(output).__name__}, which holds no tensor to explain.")


def vectors(output: Tensor, images: Tensor) -> Tensor:
    """(B, D): one value a picture, (B,), is a vector of one."""
    return output[:, None] if output.shape == images.shape[:1] else output


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside what torch.compile, which hides the calls inside, and data parallelism make of it."""
    inside = getattr(model, "_orig_mod", None)
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        inside = model.module
    return model if inside is None else unwrapped(inside)


@dataclass(frozen=True, eq=False)
class Own:
    """A `SelfExplaining` model that is `inside` the `whole`, or is the whole.

    Attributes:
        given: (B, C, H, W) what it is given of the pictures.
    """

    whole: nn.Module
    inside: Any
    given: Tensor

    def output(self, images: Tensor, inner: Tensor) -> Tensor:
        """What the whole returns of `images` where the model inside returns `inner`."""
        if self.inside is self.whole:
            return inner
        with standing_in(self.inside, lambda *_, **__: inner):
            return vectors(main_output(self.whole(images)), images)


def self_explaining(model: nn.Module, images: Tensor) -> Own | None:
    """The model that explains itself, whatever wraps it; None where there is none, or its forward is not called.

    Raises LedgerError where what it says of its places says nothing of the pictures' pixels, or not all.
    """
    if isinstance(model, SelfExplaining):
        return Own(model, model, images)
    found: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, SelfExplaining) and not any(name.startswith(f"{outer}.") for outer in found):
            found.append(name)
    # Pixels in another order: what acts on each pixel alone makes the same of them, in that order.
    order = torch.randperm(images[0, 0].numel(), generator=torch.Generator().manual_seed(0)).to(images.device)
    moved = images.flatten(2)[:, :, order].view_as(images)
    for name in found:
        inside = model.get_submodule(name)
        with torch.no_grad(), Linearised(model):
            given, of_moved = (_given(model, inside, pictures) for pictures in (images, moved))
            if given is None or of_moved is None:
                continue
            own = Own(model, inside, given)
            alone = given.shape[-2:] == images.shape[-2:] and torch.allclose(
                given.flatten(2)[:, :, order], of_moved.flatten(2), 1e-4, 1e-5
            )
            inner = main_output(inside(given))
            once = _calls(model, inside, images) == 1
            if alone and once and torch.equal(own.output(images, inner), own.output(moved, inner)):
                return own
        raise LedgerError(
            f"{type(model).__name__} holds {name} ({type(inside).__name__}), which explains itself, but it feeds it "
            "other pictures than its own (moved, cropped, resized), or more than once, or reads them beside it: its "
            f"map of places is not the whole's. Explain model.get_submodule({name!r}) on what it is given."
        )
    return None


class _Reached(Exception):
    """Carries what a module was given."""


def _given(model: nn.Module, inside: nn.Module, images: Tensor) -> Tensor | None:
    """What `inside` is given when `model` runs on `images`; None where it is not called, or not with one tensor."""

    def reached(*args: Any, **options: Any) -> Tensor:
        raise _Reached(*args, *options.values())

    try:
        with standing_in(inside, reached):
            model(images)
    except _Reached as call:
        (given,) = call.args if len(call.args) == 1 else (None,)
        return given if isinstance(given, Tensor) and given.dim() == 4 else None
    return None


def _calls(model: nn.Module, inside: nn.Module, images: Tensor) -> int:
    """How often `inside` runs when `model` runs on `images`."""
    calls: list[None] = []
    with hooked(before=[(inside, lambda *_: calls.append(None))]):
        model(images)
    return len(calls)


@contextlib.contextmanager
def standing_in(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside, `forward` runs in place of the module's own."""
    before = vars(module).get("forward")
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before  # type: ignore[method-assign]
