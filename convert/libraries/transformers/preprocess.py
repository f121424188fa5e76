"""How transformers prepares pictures: its image processors as a Preprocess record, and that record as a transform."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from ..base import Preprocess

__all__ = ["TRANSFORMS", "preprocess_of"]

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def preprocess_of(folder: Path, config: Any) -> Preprocess:
    """The record of the folder's image processor; of the model type's own, at the model's size, where there is none."""
    processor = _own_processor(folder) or _usual_processor(config)
    if processor is None:
        return Preprocess(_model_size(config), *IMAGENET, library="transformers")
    record = _record(processor, config)
    return record if _own_processor(folder) else record.at(_model_size(config))


def _record(processor: Any, config: Any) -> Preprocess:
    values = processor.to_dict()
    # v = (pixel * factor - mean) / std with pixels in 0..255, written for pixels in 0..1.
    factor = 255 * values.get("rescale_factor", 1 / 255) if values.get("do_rescale", True) else 255.0
    normalised = values.get("do_normalize", True)
    mean = [value / factor for value in (values["image_mean"] if normalised else (0, 0, 0))]
    std = [value / factor for value in (values["image_std"] if normalised else (1, 1, 1))]
    size, crop_pct, mode = _resizing(values, config)
    return Preprocess(
        size=size,
        mean=tuple(_rounded(value) for value in mean),  # type: ignore[arg-type]
        std=tuple(_rounded(value) for value in std),  # type: ignore[arg-type]
        interpolation=INTERPOLATIONS[int(values.get("resample") or 2)],
        crop_pct=crop_pct,
        crop_mode=mode,
        library="transformers-float" if type(processor).__name__ in RESIZE_FLOATS else "transformers",
    )


# Image processors that rescale before they resize.
RESIZE_FLOATS = ("DINOv3ViTImageProcessor",)
# Numbers of PIL's filters, as image processors write them.
INTERPOLATIONS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}


def _rounded(value: float) -> float:
    """255 * (1 / 255) is not 1 in floats; the record should say 0.5 where the library does."""
    return float(f"{value:.12g}")


def _resizing(values: Mapping[str, Any], config: Any) -> tuple[tuple[int, int], float, str]:
    """(size, crop_pct, crop_mode) of an image processor's settings."""
    size, crop = values.get("size") or {}, values.get("crop_size") or {}
    if "max_num_patches" in values:
        # Native resolution: a batch has one size here, by default the square that fills the longest sequence.
        side = values["patch_size"] * math.isqrt(values["max_num_patches"])
        return (side, side), 1.0, "squash"
    if "crop_pct" in values and "shortest_edge" in size:
        side = size["shortest_edge"]
        return (side, side), (1.0 if side >= 384 else values["crop_pct"]), ("squash" if side >= 384 else "center")
    cropped = (crop["height"], crop["width"]) if values.get("do_center_crop") and crop else None
    if not values.get("do_resize", True):
        return cropped or _model_size(config), 1.0, "center"
    if "shortest_edge" in size:
        edge = size["shortest_edge"]
        target = cropped or (edge, edge)
        return target, max(target) / edge, "center"
    if "height" not in size:
        return cropped or _model_size(config), 1.0, "squash"
    full = (size["height"], size["width"])
    target = cropped or full
    return target, target[0] / full[0], "squash"


def _model_size(config: Any) -> tuple[int, int]:
    size = getattr(config, "image_size", None) or 224
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _own_processor(folder: Path) -> Any:
    from transformers import AutoImageProcessor

    if not any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        return None
    return AutoImageProcessor.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)


def _usual_processor(config: Any) -> Any:
    """What transformers would make for this model type; None where it has no opinion."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

    # A tower of a pair has no entry of its own.
    with contextlib.suppress(KeyError):
        backends: Any = IMAGE_PROCESSOR_MAPPING[CONFIG_MAPPING[config.model_type.removesuffix("_vision_model")]]
        return backends["torchvision"]()
    return None


def _transform(record: Preprocess, as_floats: bool = False) -> Callable[[Image.Image], Tensor]:
    """What transformers' torchvision processors do: resize the bytes, crop at the lower of two middles, normalise.

    DINOv3's resizes floats, which are not rounded to grey levels then.
    """
    from torchvision.transforms import v2

    resized = [math.floor(side / record.crop_pct + 1e-6) for side in record.size]
    size = resized if record.crop_mode == "squash" else [max(resized)]

    def crop(picture: Tensor) -> Tensor:
        height, width = record.size
        top, left = (picture.shape[-2] - height) // 2, (picture.shape[-1] - width) // 2
        return v2.functional.crop(picture, top, left, height, width)

    return v2.Compose(
        [
            v2.PILToTensor(),
            v2.Lambda(lambda picture: picture.float() if as_floats else picture),
            v2.Resize(size, v2.InterpolationMode(record.interpolation), antialias=True),
            crop,
            v2.Lambda(lambda picture: picture.float() / 255),
            v2.Normalize(record.mean, record.std),
        ]
    )


TRANSFORMS: dict[str, Callable[[Preprocess], Callable[[Image.Image], Tensor]]] = {
    "transformers": _transform,
    "transformers-float": partial(_transform, as_floats=True),
}
