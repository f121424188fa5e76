"""Comparing tensors and state dicts, and writing tied weights once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from .errors import near_miss

__all__ = ["mismatches", "relative_error", "untied_state"]

Shaped = Tensor | Sequence[int]  # a tensor, or its shape alone


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """max |ours - theirs| / max |theirs|, of tensors of one shape."""
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-12))


def mismatches(wanted: Mapping[str, Shaped], found: Mapping[str, Shaped]) -> list[str]:
    """What keeps the tensors `found` from being those `wanted`, a line each: missing, unknown, of another shape."""
    missing = [f"{name} is missing" for name in wanted if name not in found]
    left = wanted.keys() - found.keys()
    unknown = [f"{name} is unknown{near_miss(name, sorted(left), 1)}" for name in found if name not in wanted]
    misshapen = [
        f"{name} has shape {_shape(found[name])}, should be {_shape(value)}"
        for name, value in wanted.items()
        if name in found and _shape(found[name]) != _shape(value)
    ]
    return [*missing, *unknown, *misshapen]


def _shape(value: Shaped) -> tuple[int, ...]:
    return tuple(value.shape if isinstance(value, Tensor) else value)


def untied_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict, each tied tensor under its first name only: safetensors refuses shared memory."""
    first: dict[int, str] = {}
    return {
        name: tensor.detach().contiguous()
        for name, tensor in model.state_dict(keep_vars=True).items()
        if first.setdefault(_memory(tensor), name) == name
    }


def _memory(tensor: Tensor) -> int:
    return tensor.data_ptr() if tensor.numel() and not tensor.is_meta else id(tensor)
