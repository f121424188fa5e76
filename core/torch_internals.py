"""Private and undocumented names of torch that the project reads: what each is for, and since when torch has it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as registration
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

__all__ = [
    "AnyBatchNorm",
    "TorchDispatchMode",
    "allow_programs",
    "end_workers",
    "on_registration",
    "tree_flatten",
    "tree_map",
    "tree_unflatten",
    "written_times",
]

# The common class of BatchNorm1d, 2d, 3d and SyncBatchNorm, since torch 0.1; there is no public one.
AnyBatchNorm = _BatchNorm

# `torch.utils._pytree`'s functions, since torch 1.8, take nested arguments apart and put them together again; torch has
# no public ones.

# `torch.utils._python_dispatch.TorchDispatchMode`, since torch 1.13, sees every operation below autograd; torch
# documents it in notes only.


def written_times(tensor: Tensor) -> int:
    """How often `tensor` was written to in place.

    `Tensor._version`, since torch 0.4: autograd compares it to find out whether a saved tensor is still what it was.
    """
    return tensor._version


def end_workers(batches: Iterator[Any]) -> None:
    """Ends the worker processes of a DataLoader's iterator now, whoever else holds it.

    `_MultiProcessingDataLoaderIter._shutdown_workers`, since torch 1.2; else they end when the iterator is collected.
    """
    if isinstance(batches, _MultiProcessingDataLoaderIter):
        batches._shutdown_workers()


def allow_programs(count: int) -> None:
    """Lets one line of code be compiled into `count` programs, in this process, before torch gives up compiling it.

    `torch._dynamo.config`, since torch 2.0; the limits only ever rise.
    """
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, count)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 8 * count)


def on_registration(hook: Callable[[nn.Module, str, Tensor | None], None]) -> list[Any]:
    """Calls `hook` for every parameter and buffer that any module gets; returns handles to `remove` it.

    `torch.nn.modules.module.register_module_parameter_registration_hook` and `..._buffer_...`, since torch 2.0:
    documented, but in no public namespace.
    """
    return [
        registration.register_module_parameter_registration_hook(hook),
        registration.register_module_buffer_registration_hook(hook),
    ]
