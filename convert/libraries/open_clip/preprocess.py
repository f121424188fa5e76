"""How open_clip prepares pictures: its settings as a Preprocess record, and back, and as a transform."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from PIL import Image
from torch import Tensor

from ..base import Preprocess
from ..comparison import check_pictures

__all__ = ["TRANSFORMS", "preprocess_of", "settings_of"]

# open_clip's resize modes -> ours, which are timm's crop modes.
MODES = {"shortest": "center", "longest": "border", "squash": "squash"}
RESIZE_MODES = {ours: theirs for theirs, ours in MODES.items()}


def preprocess_of(values: Mapping[str, Any], size: Sequence[int] | int, reference: str = "open_clip") -> Preprocess:
    """open_clip's settings as a record; raises SourceError where pictures come out otherwise than by open_clip."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    height, width = (size, size) if isinstance(size, int) else size
    record = Preprocess(
        size=(height, width),
        mean=_three(values["mean"]),
        std=_three(values["std"]),
        interpolation=values["interpolation"],
        crop_mode=MODES[values["resize_mode"]],
        library="open_clip",
        fill=values["fill_color"],
    )
    theirs: Any = image_transform_v2(PreprocessCfg(**{**values, "size": (height, width)}), is_train=False)
    return check_pictures(reference, record, theirs, "open_clip's transform of it")


def _three(values: float | Sequence[float]) -> tuple[float, float, float]:
    return (values,) * 3 if isinstance(values, int | float) else tuple(values)  # type: ignore[return-value]


def settings_of(record: Preprocess) -> dict[str, Any]:
    """`record` in open_clip's words."""
    return {
        "size": record.size,
        "mean": record.mean,
        "std": record.std,
        "interpolation": record.interpolation,
        "resize_mode": RESIZE_MODES[record.crop_mode],
        "fill_color": record.fill,
    }


def _transform(record: Preprocess) -> Callable[[Image.Image], Tensor]:
    from open_clip import image_transform

    settings: Any = settings_of(record)
    transform: Any = image_transform(settings.pop("size"), is_train=False, **settings)
    return cast(Callable[[Image.Image], Tensor], transform)


TRANSFORMS = {"open_clip": _transform}
