"""In which precision numbers are taken: norms in float32 at least, and never rounded by autocast."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

__all__ = ["autocast_dtype", "wide", "without_autocast"]


def wide(x: Tensor) -> torch.dtype:
    """The dtype of x, float32 at least: 300 squared is already infinite in float16."""
    return torch.promote_types(x.dtype, torch.float32)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast rounds to on x's device; None where it is off, or the device (meta) has none."""
    device = x.device.type
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else None


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Inside, autocast rounds nothing on x's device."""
    device = x.device.type
    return (
        torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else contextlib.nullcontext()
    )
