"""Forward hooks that are gone when their block ends, also after an exception."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

__all__ = ["captured_inputs", "hooked"]

Hooks = Iterable[tuple[nn.Module, Callable[..., Any]]]


@contextlib.contextmanager
def hooked(after: Hooks = (), *, before: Hooks = (), with_kwargs: bool = False) -> Iterator[None]:
    """Inside, each module of (module, hook) pairs calls its hook at every forward pass.

    Args:
        after: hooks (module, args, output) that run after the module; what they return, if anything, is the output.
        before: hooks (module, args) that run before it; what they return, if anything, is given to the module.
        with_kwargs: hooks are given the keyword arguments too, behind `args`.
    """
    with contextlib.ExitStack() as handles:
        for module, hook in before:
            handles.enter_context(module.register_forward_pre_hook(hook, with_kwargs=with_kwargs))
        for module, hook in after:
            handles.enter_context(module.register_forward_hook(hook, with_kwargs=with_kwargs))
        yield


@contextlib.contextmanager
def captured_inputs(module: nn.Module) -> Iterator[list[Any]]:
    """The first argument of every call of `module` inside, in their order."""
    inputs: list[Any] = []
    with hooked(before=[(module, lambda module, args: inputs.append(args[0]))]):
        yield inputs
