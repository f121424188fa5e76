"""What all dynamic-linear convolutions share: the source's padding, and the norm of every patch."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor, is_legacy_batchedtensor
from torch.autograd import forward_ad

from ...explain.linearise import with_energy, with_statistics
from ...explain.transposed import transposed
from .scheduled import BiasScheduled, without_autocast

__all__ = [
    "DynamicConv2d",
    "Pair",
    "SamePadding",
    "Window",
    "applied",
    "convolution_gradients",
    "in_blocks",
    "input_gradient",
    "layout_of",
    "sum_of_squares",
    "sums_over",
    "sums_under",
    "unobserved",
    "with_moving_squares",
    "with_squares",
    "zero_padded",
]


# Elements of a block that stays in a core's cache while several operations pass over it.
BLOCK = 2**16


def _in_forward_mode() -> bool:
    """Whether derivatives are being taken in forward mode, by whichever transform."""
    return forward_ad._current_level >= 0


def applied(function: type[torch.autograd.Function], *args: Any) -> Any:
    """`function` of `args`; in forward mode what it computes, of which torch knows every derivative.

    So no function needs a `jvp` of its own: torch does not compile those that have one.
    """
    return function.forward(*args) if _in_forward_mode() else function.apply(*args)


def unobserved(*tensors: Tensor) -> bool:
    """Whether no graph, transform or compiler follows what is done with `tensors`, so that memory may be written to."""
    return not torch.is_grad_enabled() and not _transformed(*tensors)


def _transformed(*tensors: Tensor) -> bool:
    """Whether a transform or compiler follows what is done with `tensors`."""
    if torch.compiler.is_compiling() or _in_forward_mode():
        return True
    return any(is_functorch_wrapped_tensor(tensor) or is_legacy_batchedtensor(tensor) for tensor in tensors)


def in_blocks(x: Tensor, like: Tensor | None = None, elements: int | None = None) -> tuple[Tensor, ...]:
    """`x` (B, ...) in parts along B, of so many elements of `like` (B, ...) or x, which suit a CPU; whole elsewhere."""
    like = x if like is None else like
    if like.dim() < 2 or like.device.type != "cpu" or not unobserved(x, like):
        return (x,)
    return x.split(max(1, (elements or BLOCK) * len(like) // max(1, like.numel())))


def sum_of_squares(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Over `dim`, which stays. In float32 at least: 300 squared is already infinite in float16."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if isinstance(dim, int) and x.shape[dim] == 1:
        return x.to(dtype).square()
    if not isinstance(dim, int) or x.stride(dim) == 1:
        return torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=dtype).square()
    # Of numbers that lie apart torch takes a norm one by one.
    return torch.cat([part.to(dtype).square().sum(dim, keepdim=True) for part in in_blocks(x)])


class _WithSquares(torch.autograd.Function):
    """x beside its sum of squares, so that the gradients of both meet in one pass over x."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, dim: int | tuple[int, ...]) -> tuple[Tensor, Tensor]:
        return x.view_as(x), sum_of_squares(x, dim)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # noqa: ANN001, ARG004 - torch's own signature
        ctx.save_for_backward(inputs[0])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad: Tensor | None, grad_squares: Tensor | None):  # noqa: ANN001, ANN205 - torch's own signature
        if grad_squares is None:
            return grad, None
        (x,) = ctx.saved_tensors
        of_squares = grad_squares.to(x.dtype)
        if grad is None:
            return 2 * x * of_squares, None
        # Nobody else has this gradient: only the layer's own product reads x behind this function.
        add = grad.addcmul_ if unobserved(grad, x, of_squares) else grad.addcmul
        return add(x, of_squares, value=2), None


@with_energy
def with_moving_squares(x: Tensor, dim: int | tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """As `with_squares`; in explanation mode the sum is <x, sg(x)>, linear in x."""
    return _with_squares(x, dim)


@with_statistics
def with_squares(x: Tensor, dim: int | tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """x, to be read on, and its sum of squares over `dim`, which stays; in float32 at least.

    In explanation mode the sum is a constant.
    """
    return _with_squares(x, dim)


def _with_squares(x: Tensor, dim: int | tuple[int, ...]) -> tuple[Tensor, Tensor]:
    if torch.is_grad_enabled() and x.requires_grad:
        return applied(_WithSquares, x, dim)
    return x, sum_of_squares(x, dim)


def zero_padded(x: Tensor, pads: tuple[int, int, int, int]) -> tuple[Tensor, tuple[int, int]]:
    """x (B, C, H, W) with `pads` (left, right, top, bottom), and what (rows, columns) a convolution still pads."""
    left, right, top, bottom = pads
    return (x, (top, left)) if left == right and top == bottom else (F.pad(x, pads), (0, 0))


class DynamicConv2d(BiasScheduled):
    """Mixin over `nn.Conv2d`: (B, C, H, W) -> (B, K, H', W'), any stride, padding, padding mode, dilation, groups."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    padding_mode: str
    _reversed_padding_repeated_twice: tuple[int, int, int, int]

    def pads(self, height: int, width: int) -> tuple[int, int, int, int]:  # noqa: ARG002 - sizes matter to subclasses
        """(left, right, top, bottom) that the source pads a picture of this size with."""
        return self._reversed_padding_repeated_twice  # torch's own, in this order, with `same` and `valid` resolved

    def forward(self, x: Tensor) -> Tensor:
        return self._respond(*self.padded(x))

    def padded(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """x (B, C, H, W), padded where a convolution cannot do it itself, and what (rows, columns) it still pads."""
        pads = self.pads(*x.shape[-2:])
        if self.padding_mode == "zeros":
            return zero_padded(x, pads)
        return F.pad(x, pads, mode=self.padding_mode), (0, 0)

    def _respond(self, x: Tensor, padding: tuple[int, int]) -> Tensor:
        """The layer's formula, on x with zeros (rows, columns) still to be padded."""
        raise NotImplementedError

    def products(
        self, x: Tensor, padding: tuple[int, int], *kernels: Tensor, bias: Tensor | None = None
    ) -> list[Tensor]:
        """(B, K, H', W') of each of `kernels` (K, C/G, k, l), on x with zeros (rows, columns) still to be padded."""
        return [F.conv2d(x, kernel, bias, self.stride, padding, self.dilation, self.groups) for kernel in kernels]

    def with_patch_norms(self, x: Tensor, padding: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """x, to be read on, and the squared norm (B, G, 1, H', W') of every patch, in float32 at least."""
        return _with_patch_norms(x, self.groups, self.kernel_size, self.window(padding))

    def window(self, padding: Pair) -> Window:
        """Where the kernel is put, with zeros (rows, columns) still to be padded."""
        return Window(self.stride, padding, self.dilation)

    def under_patches(self, squares: Tensor, padding: tuple[int, int]) -> Tensor:
        """(B, G, 1, H, W) -> (B, G, 1, H', W'): the sum of `squares` under every patch."""
        return _under_patches(squares, self.kernel_size, self.window(padding))


Pair = tuple[int, int]


class Window(NamedTuple):
    """Where a convolution's kernel is put: (rows, columns) each."""

    stride: Pair
    padding: Pair
    dilation: Pair


@with_statistics
def _with_patch_norms(x: Tensor, groups: int, kernel: Pair, window: Window) -> tuple[Tensor, Tensor]:
    """One call, and not a dozen that explanation mode would have to look at."""
    grouped, squares = with_squares(x.unflatten(1, (groups, -1)), 2)
    return grouped.flatten(1, 2), _under_patches(squares, kernel, window)


def _under_patches(squares: Tensor, kernel: Pair, window: Window) -> Tensor:
    return sums_under(squares.squeeze(2), kernel, window).unsqueeze(2)


def sums_under(x: Tensor, kernel: Pair, window: Window) -> Tensor:
    """(B, G, H, W) -> (B, G, H', W'): the sum under a kernel of this size."""
    if x.shape[1] == 1 or kernel == (1, 1):
        return _sums(x, kernel, *window)
    if x.device.type == "cpu":
        # Exact: other devices' convolutions take such sums in TF32.
        with without_autocast(x):
            return F.conv2d(x, x.new_ones(x.shape[1], 1, *kernel), None, *window, x.shape[1])
    pooled = window.dilation == (1, 1) and all(2 * p <= k for p, k in zip(window.padding, kernel, strict=True))
    return _pools(x, kernel, window.stride, window.padding) if pooled else _sums(x, kernel, *window)


def sums_over(grad: Tensor, kernel: Pair, window: Window, size: torch.Size) -> Tensor:
    """The transpose of `sums_under`: (B, G, H', W') -> (B, G, H, W) of `size`, the sum over the kernels above."""
    reach = [d * (k - 1) - p for k, p, d in zip(kernel, window.padding, window.dilation, strict=True)]
    if window.stride == (1, 1) and min(reach) >= 0:
        return sums_under(grad, kernel, Window((1, 1), (reach[0], reach[1]), window.dilation))
    return input_gradient(size, grad, grad.new_ones(size[1], 1, *kernel), window, size[1])


def input_gradient(size: torch.Size, grad: Tensor, weight: Tensor, window: Window, groups: int = 1) -> Tensor:
    """Of a convolution, at its input of `size` (B, C, H, W), from `grad` (B, K, H', W') at its output."""
    if torch.is_grad_enabled() and (grad.requires_grad or weight.requires_grad) and not _transformed(grad, weight):
        return transposed(size, grad, weight, *window, groups)
    # Of the input only size and layout are read; torch's own `conv2d_input` answers in one layout always.
    x = torch.empty(size, dtype=grad.dtype, device=grad.device, memory_format=layout_of(grad))
    return convolution_gradients(grad, x, weight, window, groups, (True, False))[0]


def convolution_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, window: Window, groups: int, wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """Of a convolution, at its input x and at its weight where `wanted`, from `grad` (B, K, H', W') at its output."""
    settings = (None, *window, False, (0, 0), groups, (*wanted, False))
    of_x, of_weight, _ = torch.ops.aten.convolution_backward(grad, x, weight, *settings)
    return of_x, of_weight


def layout_of(x: Tensor) -> torch.memory_format:
    """Of maps (B, C, H, W): whether channels lie side by side."""
    return torch.channels_last if x.stride(1) == 1 else torch.contiguous_format


def _sums(squares: Tensor, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    """The sum under every window, rows first and then columns: k + k additions and not k * k."""
    squares = F.pad(squares, (padding[1], padding[1], padding[0], padding[0]))
    for k, step, apart in zip(kernel, stride, dilation, strict=True):
        squares = squares.mT
        size = squares.shape[-1] - apart * (k - 1)
        squares = functools.reduce(torch.add, (squares[..., i : i + size : step] for i in range(0, apart * k, apart)))
    return squares


def _pools(squares: Tensor, kernel: Pair, stride: Pair, padding: Pair) -> Tensor:
    """As `_sums`, by pools, which are fast where many channels lie side by side."""
    exporting = torch.compiler.is_exporting()  # ONNX's pools know no divisor of their own
    divisor = None if exporting else 1
    (k, l), (s, t), (p, q) = kernel, stride, padding
    sums = F.avg_pool2d(squares, (1, l), (1, t), (0, q), divisor_override=divisor)
    sums = F.avg_pool2d(sums, (k, 1), (s, 1), (p, 0), divisor_override=divisor)
    return sums * (k * l) if exporting else sums


class SamePadding(DynamicConv2d):
    """Mixin over timm's `Conv2dSame`: TensorFlow's padding, which depends on the picture's size."""

    def pads(self, height: int, width: int) -> tuple[int, int, int, int]:
        (top, bottom), (left, right) = (
            self._same(size, kernel, stride, dilation)
            for size, kernel, stride, dilation in zip(
                (height, width), self.kernel_size, self.stride, self.dilation, strict=True
            )
        )
        return left, right, top, bottom

    @staticmethod
    def _same(size: int, kernel: int, stride: int, dilation: int) -> tuple[int, int]:
        total = max((math.ceil(size / stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
        return total // 2, total - total // 2
