"""How timm prepares pictures: its data configuration as a Preprocess record, and that record as its transform."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor, nn

from ..base import Preprocess
from ..comparison import check_pictures

__all__ = ["TRANSFORMS", "preprocess_of"]


def preprocess_of(model: nn.Module, reference: str = "timm") -> Preprocess:
    """timm's own data configuration of `model`; raises SourceError where pictures come out otherwise than by timm."""
    from timm.data.config import resolve_model_data_config
    from timm.data.transforms_factory import create_transform

    config = resolve_model_data_config(model)
    record = Preprocess(
        size=tuple(config["input_size"][-2:]),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=config["interpolation"],
        crop_pct=config["crop_pct"],
        crop_mode=config["crop_mode"],
    )
    with torch.device("cpu"):  # pictures are real, also where models are built on the meta device
        theirs: Any = create_transform(**config, is_training=False)
        return check_pictures(reference, record, theirs, "timm's transform of it")


def _transform(record: Preprocess) -> Callable[[Image.Image], Tensor]:
    from timm.data.transforms_factory import create_transform

    transform: Any = create_transform(
        (3, *record.size),
        interpolation=record.interpolation,
        mean=record.mean,
        std=record.std,
        crop_pct=record.crop_pct,
        crop_mode=record.crop_mode,
    )
    return cast(Callable[[Image.Image], Tensor], transform)


TRANSFORMS = {"timm": _transform}
