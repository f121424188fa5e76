"""Comparing tensors and state dicts, and writing tied weights once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from .errors import near_miss

__all__ = ["mismatches", "relative_error", "untied_state"]

HINTED = 5  # unknown names for which the closest missing one is looked for: for all of a large model, it takes long

Shaped = Tensor | Sequence[int]  # a tensor, or its shape alone


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """max |ours - theirs| / max |theirs|, of tensors of one shape."""
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-12))


def mismatches(wanted: Mapping[str, Shaped], found: Mapping[str, Shaped]) -> list[str]:
    """What keeps the tensors `found` from being those `wanted`, a line each: missing, unknown, of another shape."""
    absent = [name for name in wanted if name not in found]
    extra = [name for name in found if name not in wanted]
    faults = [f"missing {name}" for name in absent]
    faults += [f"unknown {name}.{near_miss(name, absent, 1)}".removesuffix(".") for name in extra[:HINTED]]
    faults += [f"unknown {name}" for name in extra[HINTED:]]
    faults += [
        f"{name} is {_shape(found[name])}, should be {_shape(value)}"
        for name, value in wanted.items()
        if name in found and _shape(found[name]) != _shape(value)
    ]
    return faults


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
