"""BatchNorm without centring, and the two ways to come by its statistics.

In eval mode BatchNorm is (x - mean) * weight / sigma + bias. Scaling its running mean and its bias by beta gives

    x * weight / sigma + beta * (bias - weight * mean / sigma)

the uncentred BatchNorm, equal to the source at beta = 1 and linear at beta = 0 (B-cos v2, sec. 3.2). In training mode
mean and sigma are those of the batch, over all processes, and the gradient flows through them: at every B they keep the
features' sizes as they were, which is what lets a CNN follow B to 2 (with the source's old statistics it dies on the
way). The library's own forward runs unchanged either way: it reads weight, bias and statistics, which are properties.

What beta takes away can be carried instead: with b = bias - weight * mean / sigma,

    x * weight / sigma + b * (beta + carry * rho(x)),   rho(x) = rms(x) / E,   E^2 = mean over channels of var + mean^2

the shift counts in proportion to the size of the input. rms is over all channels, and over the sample's whole map or a
window; E is what the statistics let expect, so rho is about 1 on the pictures that the teacher knows. This is of degree
1 in x: no constant is left, and in explanation mode rho is linear, <x, sg(x)> / (sg(rms) * n * E). (Ours; networks
without biases are of degree 1 too: X-DNN, Hesse et al., NeurIPS 2021.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..kernels.dispatch import is_exactly
from ..kernels.moments import carrying, over_processes, proportion, with_moments
from ..kernels.squares import with_moving_squares
from .scheduled import Rescalable, faded

__all__ = ["UncentredBatchNorm", "batch_statistics", "estimate_statistics"]


class UncentredBatchNorm(Rescalable):
    """Mixin for BatchNorm: x * weight / sigma + (beta + carry * rho(x)) * (bias - weight * mean / sigma)."""

    strength_names: ClassVar[tuple[str, ...]] = (*Rescalable.strength_names, "window", "spread")
    window: Tensor
    spread: Tensor
    _window: float
    eps: float
    momentum: float | None
    # (mean, variance) of the batch, each (C,), while it runs in training mode.
    _moments: tuple[Tensor, Tensor] | None = None

    @property
    def weight(self) -> Tensor | None:
        """(C,) or None; in training mode with the batch's 1 / sigma in it."""
        weight = self._parameters.get("weight")
        if self._moments is None:
            return weight
        inverse = torch.rsqrt(self._moments[1] + self.eps)
        return inverse if weight is None else weight * inverse

    @property
    def bias(self) -> Tensor | None:
        """(C,) or None: beta times the source's; in training mode with the batch's mean in it."""
        beta = self._strength("beta")
        bias = faded(self._parameters.get("bias"), beta)
        if self._moments is None or is_exactly(beta, 0):
            return bias
        weight = self.weight
        assert weight is not None  # in training mode it holds the batch's 1 / sigma
        shift = beta * weight * self._moments[0]
        return -shift if bias is None else bias - shift

    @property
    def running_mean(self) -> Tensor | None:
        """(C,): beta times the buffer; zeros, never None, at beta = 0, as `batch_norm` needs one."""
        mean = self._buffers.get("running_mean")
        beta = self._strength("beta")
        if mean is None or (is_exactly(beta, 1) and self._moments is None):
            return mean
        return torch.zeros_like(mean) if self._moments else mean * beta

    @property
    def running_var(self) -> Tensor | None:
        """(C,): the buffer; in training mode what makes sigma one, as `weight` has it already."""
        variance = self._buffers.get("running_var")
        return torch.full_like(variance, 1 - self.eps) if self._moments and variance is not None else variance

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self._respond(x)
        x, mean, variance = with_moments(x)
        centre = self._buffers["running_mean"]
        assert centre is not None
        moments = self._moments = over_processes(mean, variance, centre)
        self.training = False
        try:
            return self._respond(x)
        finally:
            self.training = True
            self._track(*moments)
            self._moments = None

    def _respond(self, x: Tensor) -> Tensor:
        """The formula, by the statistics of now."""
        carry = self._strength("carry")
        if is_exactly(carry, 0):
            return super().forward(x)
        x, squares = with_moving_squares(x, 1)
        # Without the drop-out and the activation that timm builds into some norms.
        y = nn.modules.batchnorm._BatchNorm.forward(self, x)  # type: ignore[arg-type]
        shift, expected = self._shift_and_size()
        parameter = self._parameters.get("bias")
        source = self._buffers["running_mean"] if parameter is None else parameter
        assert source is not None
        rms = proportion(squares / x.shape[1], self._window, self._strength("spread"))
        rho = carrying(rms * (carry / expected), source).to(y.dtype)
        y = y + shift.to(y.dtype).view(-1, *[1] * (y.dim() - 2)) * rho
        for part in ("drop", "act"):
            y = getattr(self, part)(y) if hasattr(self, part) else y
        return y

    def _shift_and_size(self) -> tuple[Tensor, Tensor]:
        """b (C,), all of it, and E () of the formula."""
        mean, variance = self._moments or (self._buffers["running_mean"], self._buffers["running_var"])
        assert mean is not None and variance is not None
        scale = torch.rsqrt(variance + self.eps)
        weight, bias = self._parameters.get("weight"), self._parameters.get("bias")
        shift = -mean * (scale if weight is None else scale * weight)
        expected = (variance + mean.square()).mean().clamp_min(torch.finfo(torch.float32).tiny).sqrt()
        return (shift if bias is None else shift + bias), expected

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        """Moves the buffers by `momentum`, or to the mean over all batches where it is None (as torch does)."""
        count = self._buffers["num_batches_tracked"]
        assert count is not None
        count.add_(1)
        share = 1 / float(count) if self.momentum is None else self.momentum
        for name, value in (("running_mean", mean), ("running_var", variance)):
            buffer = self._buffers[name]
            assert buffer is not None
            buffer.lerp_(value.to(buffer.dtype), share)


@contextlib.contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Inside, every UncentredBatchNorm of `model` is in training mode; dropout and all others stay as they are."""
    norms = [(module, module.training) for module in model.modules() if isinstance(module, UncentredBatchNorm)]
    try:
        for norm, _ in norms:
            norm.training = True
        yield
    finally:
        for norm, training in norms:
            norm.training = training


@torch.no_grad()
def estimate_statistics(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Sets the statistics of every UncentredBatchNorm of `model` to their mean over `batches`, each (B, 3, H, W)."""
    norms = [module for module in model.modules() if isinstance(module, UncentredBatchNorm)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.momentum = None
            norm._buffers["num_batches_tracked"].zero_()  # type: ignore[union-attr]
        with batch_statistics(model):
            for batch in batches:
                model(batch)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
