"""`torch.compile`, block by block: what it changes is speed.

Only a block's `forward` is compiled, never its call. So hooks (taps, gains, DDP, FSDP) stay outside and see each step's
own tensors, where a compiled call would keep the hooks of its first step; names in the state dict stay what they are;
and blocks of one kind share one program. A block with a tap inside stays as it is, as its hook would be compiled with
it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import nn

from ..convert.layers import scheduled_layers
from ..convert.taps import find_blocks
from ..core.torch_internals import allow_programs

__all__ = ["compile_blocks", "eager", "make_eager"]

BACKEND = "inductor"
# Programs that one line of code may have: a CNN's blocks differ in shape, and the teacher's from the student's.
PROGRAMS = 128


def compile_blocks(model: nn.Module, taps: tuple[str, ...], moving: bool) -> tuple[str, ...]:
    """Compiles the blocks of `model` in place; returns their names. `make_eager` takes it back.

    Args:
        taps: names of modules that are hooked while the blocks run compiled.
        moving: B or beta move from step to step, so the layers read the buffers and one program serves all steps;
            else they are constants of it, and short cuts (B = 1, B = 2, beta = 0) are taken.
    """
    names = tuple(n for n in find_blocks(model) if not any(tap.startswith(f"{n}.") for tap in taps))
    if names:
        allow_programs(PROGRAMS)
    for _, layer in scheduled_layers(model):
        layer.reads_buffers = moving
    for name in names:
        block = model.get_submodule(name)
        vars(block)["forward"] = torch.compile(block.forward, backend=BACKEND)
    return names


def make_eager(*models: nn.Module) -> Callable[[], None]:
    """Takes the compiled programs of `models` away; returns what puts them back."""
    modules = [module for model in models for module in model.modules()]
    compiled = [(module, vars(module).pop("forward")) for module in modules if "forward" in vars(module)]
    reading = [layer for model in models for _, layer in scheduled_layers(model) if layer.reads_buffers]
    for layer in reading:
        layer.reads_buffers = False

    def back() -> None:
        for module, forward in compiled:
            vars(module)["forward"] = forward
        for layer in reading:
            layer.reads_buffers = True

    return back


@contextlib.contextmanager
def eager(*models: nn.Module) -> Iterator[None]:
    """Inside, compiled blocks run as they were written: for hooks on what is in them, other sizes, explanations."""
    back = make_eager(*models)
    try:
        yield
    finally:
        back()
