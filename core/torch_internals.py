"""Private and undocumented names of torch that the project reads: what each is for, and since when torch has it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad
from torch.nn.modules import module as registration
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

__all__ = [
    "AnyBatchNorm",
    "TorchDispatchMode",
    "allow_programs",
    "channels_last_moments",
    "convolution_backward",
    "end_workers",
    "gradients_are_batched",
    "in_forward_mode",
    "on_registration",
    "transforms_active",
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
    It waits for a few seconds and then sends SIGTERM, which ours ignore.
    """
    if isinstance(batches, _MultiProcessingDataLoaderIter):
        batches._shutdown_workers()
        for worker in batches._workers:
            if worker.is_alive():
                worker.kill()


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


Pair = tuple[int, int]


def transforms_active() -> bool:
    """Whether a transform of `torch.func` (vmap, grad, jvp ...) is running.

    `torch._C._are_functorch_transforms_active`, since torch 2.0: torch's own `autograd.Function.apply` asks it. There
    is no public question of this kind.
    """
    return torch._C._are_functorch_transforms_active()


def in_forward_mode() -> bool:
    """Whether derivatives are being taken in forward mode.

    `forward_ad._current_level`, since torch 1.8, is at least 0 inside `dual_level`; torch offers no reader.
    """
    return forward_ad._current_level >= 0


def gradients_are_batched(x: Tensor) -> bool:
    """Whether `x` stands for many gradients at once (`torch.autograd.grad(..., is_grads_batched=True)`).

    `torch._C._functorch.is_legacy_batchedtensor`, since torch 2.1: these batches are not of `torch.func`, and
    `transforms_active` does not see them.
    """
    return is_legacy_batchedtensor(x)


def convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    wanted: tuple[bool, bool],
) -> tuple[Tensor, Tensor]:
    """The gradients of a convolution at x (B, C, H, W) and at `weight` where `wanted`, from `grad` (B, K, H', W').

    `torch.ops.aten.convolution_backward`, since torch 1.11. The public `torch.nn.grad.conv2d_input` and `conv2d_weight`
    each take one gradient of the two, and answer in one memory format always.
    """
    settings: tuple[Any, ...] = (None, stride, padding, dilation, False, (0, 0), groups, (*wanted, False))
    of_x, of_weight, _ = torch.ops.aten.convolution_backward(grad, x, weight, *settings)
    return of_x, of_weight


def channels_last_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (C,) of the channels of x (B, C, ...), in one pass; quick where channels lie side by side.

    `torch.batch_norm_update_stats`, since torch 1.2: a public name without documentation. `torch.var_mean` takes
    several times as long in that layout on a CPU.
    """
    return torch.batch_norm_update_stats(x, None, None, 0.0)
