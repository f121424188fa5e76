"""Per-channel gains from a few pictures, so that a student at B > 1 without biases starts near its teacher.

|cos|^(B-1) shrinks every response, and removed biases shift it. Layer by layer, in the order of the forward pass, each
output channel of the student is scaled by the one number that brings it closest to the teacher's same channel (least
squares), or to its size (root mean square); later layers see the corrected input. A positive gain folds into the
weights of a B-cos layer, because a cosine does not see it, and into the gain that an alignment unit has anyway: nothing
is left behind. (Ours; data-dependent initialisation, LSUV, is its ancestor.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from ..core.hooks import hooked
from ..core.torch_internals import AnyBatchNorm
from .layers.scheduled import BiasScheduled, Rescalable, scheduled_layers

__all__ = ["Gain", "calibrate"]

Gain = Literal["least-squares", "rms"]
# Rows (picture and place) that a layer's gains are estimated from: bounds the memory, whatever the model's size.
ROWS = 4096
SMALLEST, LARGEST = 1e-3, 1e3


@torch.no_grad()
def calibrate(
    student: nn.Module,
    teacher: nn.Module,
    pictures: Tensor,
    gain: Gain = "least-squares",
    run: Callable[[], object] | None = None,
) -> dict[str, float]:
    """Scales the weights of `student`, in place, towards `teacher` at the student's present B and beta.

    Args:
        student: a converted model.
        teacher: its original, or a student at B = 1, beta = 1; layers are paired by name.
        pictures: (N, 3, H, W) normalised; 64 are enough for a start.
        run: how the student is run on them; by default from the picture to its output. Parts that will be trained on
        the
            teacher's features are better run on those.

    Returns:
        Mean gain of every calibrated layer.
    """
    layers = {name: layer for name, layer in scheduled_layers(student) if isinstance(layer, Rescalable)}
    targets: dict[str, Tensor] = {}
    gains: dict[str, float] = {}
    generator = torch.Generator().manual_seed(0)
    places: dict[str, Tensor] = {}

    def record(name: str):
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if name in targets:  # a shared layer counts where it runs first, as in `adjust`
                return
            rows = _rows(module, _response(module, args[0], output))
            places[name] = torch.randperm(len(rows), generator=generator)[:ROWS].to(rows.device)
            targets[name] = rows[places[name]] - _constant(layers[name])

        return hook

    def adjust(name: str):
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if name not in targets:
                return None
            rows = _rows(module, _response(module, args[0], output))[places.pop(name)] - _constant(layers[name])
            found = _gain(rows, targets.pop(name), gain)
            layers[name].rescale(found)
            gains[name] = float(found.mean())
            return module.forward(*args)

        return hook

    with hooked((teacher.get_submodule(name), record(name)) for name in layers):
        teacher(pictures)
    with hooked((student.get_submodule(name), adjust(name)) for name in layers):
        student(pictures) if run is None else run()
    return gains


def _response(module: nn.Module, x: Tensor, output: Tensor) -> Tensor:
    """The layer's own response, before an activation that its class has built in."""
    return AnyBatchNorm.forward(module, x) if isinstance(module, AnyBatchNorm) else output  # type: ignore[arg-type]


def _rows(module: nn.Module, response: Tensor) -> Tensor:
    """(rows, C) float32, whatever the layout."""
    channels_last = response if isinstance(module, nn.Linear) else response.movedim(1, -1)
    return channels_last.reshape(-1, channels_last.shape[-1]).float()


def _constant(layer: BiasScheduled) -> Tensor | float:
    """What beta leaves of the bias: both sides are compared without it, as a gain does not scale it."""
    return 0.0 if layer.bias is None else layer.bias.float()


def _gain(rows: Tensor, target: Tensor, kind: Gain) -> Tensor:
    """(C,) positive; 1 where a channel is dead on either side."""
    energy, wanted = rows.square().sum(0), target.square().sum(0)
    gain = (rows * target).sum(0) / energy if kind == "least-squares" else (wanted / energy).sqrt()
    alive = (energy > 0) & (wanted > 0) & gain.isfinite()
    return torch.where(alive, gain.clamp(SMALLEST, LARGEST), torch.ones_like(gain))
