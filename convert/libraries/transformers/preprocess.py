"""How transformers prepares pictures: its image processors as a Preprocess record, and that record as a transform.

A setting that says nothing is not guessed, and one that is not known is not ignored: both are refused by name. What is
read is then compared with the processor itself (see `comparison`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from ....core.errors import SourceError
from ....core.files import read_json
from ..base import Preprocess
from ..comparison import PICTURE_LIMIT, check_extent, check_pictures, odd_pictures, odd_square, picture_difference
from .files import model_size

__all__ = ["SIBLINGS", "TRANSFORMS", "pixels_of", "preprocess_of"]

# Settings that are read below.
READ = {
    "do_resize",
    "size",
    "resample",
    "do_center_crop",
    "crop_size",
    "crop_pct",
    "do_rescale",
    "rescale_factor",
    "rescale_offset",
    "do_normalize",
    "image_mean",
    "image_std",
    "include_top",
    "max_num_patches",
    "patch_size",
}
# Settings that say nothing of one RGB picture: of names, batches, other modes, labels and outputs.
ELSEWHERE = {
    "_valid_processor_keys",
    "data_format",
    "default_to_square",
    "device",
    "disable_grouping",
    "do_convert_annotations",
    "do_convert_rgb",
    "do_reduce_labels",
    "feature_extractor_type",
    "format",
    "image_num_channels",
    "image_processor_type",
    "image_seq_length",
    "input_data_format",
    "mask_size",
    "num_channels",
    "processor_class",
    "reduce_labels",
    "return_tensors",
    "transformers_version",
    "use_fast",
}
# Each does something only where `do_...` beside it is on.
SWITCHES = {
    "ensure_multiple_of": "keep_aspect_ratio",
    "mask_pad_size": "do_pad",
    "max_patches": "crop_to_patches",
    "min_patches": "crop_to_patches",
    "pad_size": "do_pad",
    "size_divisor": "do_pad",
}
FILES = ("processor_config.json", "preprocessor_config.json")
OTHER = (
    "Followed are resizing to one size, a crop of the centre, rescaling and normalising. Where these suit the model, "
    "save such a processor beside a copy of its files, transformers.ViTImageProcessor(size={'height': H, 'width': W})."
    "save_pretrained(FOLDER), and pass hf:FOLDER."
)


def preprocess_of(folder: Path, config: Any, reference: str = "") -> Preprocess:
    """The record of the folder's image processor; of the model type's own, at the model's size, where there is none.

    Raises:
        SourceError: there is neither; or it prepares pictures in a way that is not followed here.
    """
    reference = reference or f"hf:{folder}"
    size = model_size(config)
    if (own := _own_processor(folder)) is not None:
        return _compared(own, _written(folder), reference)
    processor = _usual_processor(config)
    if processor is None:
        raise SourceError(
            f"{reference}: nothing says how its pictures are prepared: there is no preprocessor_config.json in it, and "
            f"transformers has no image processor for {getattr(config, 'model_type', 'this model')!r}. {OTHER}"
        )
    if size is not None and "crop_pct" in processor.to_dict():
        processor.size = type(processor)(size={"shortest_edge": max(size)}).size  # how it crops depends on its size
    record = _compared(processor, {}, reference)
    return record if size is None else record.at(size)


def _compared(processor: Any, written: Mapping[str, Any], reference: str) -> Preprocess:
    """The record of `processor`, with that arithmetic which makes the same of a picture as it does."""
    name = f"its image processor {type(processor).__name__}"
    record = _record(processor, written, f"{reference}: {name}")
    check_extent(reference, record, name)

    def theirs(picture: Image.Image) -> Tensor:
        return pixels_of(processor(images=picture, return_tensors="pt"))

    # Native resolution keeps the aspect of every picture, and a batch has one size here: a square is the same to both.
    pictures = odd_square() if _is_native(processor.to_dict()) else odd_pictures()
    for library in TRANSFORMS:
        tried = dataclasses.replace(record, library=library)
        with contextlib.suppress(Exception):  # what no arithmetic can do is said below
            if picture_difference(tried.transform(), theirs, pictures) <= PICTURE_LIMIT:
                return tried
    return check_pictures(reference, record, theirs, name, pictures)


def pixels_of(batch: Any) -> Tensor:
    """(3, H, W): the picture in a processor's batch, its patches put together where it cuts them."""
    pixels = batch["pixel_values"][0]
    if "spatial_shapes" not in batch:
        return pixels
    rows, columns = batch["spatial_shapes"][0].tolist()
    side = math.isqrt(pixels.shape[-1] // 3)
    patches = pixels[: rows * columns].unflatten(0, (rows, columns)).unflatten(-1, (side, side, 3))
    return patches.permute(4, 0, 2, 1, 3).reshape(3, rows * side, columns * side)


def _record(processor: Any, written: Mapping[str, Any], where: str) -> Preprocess:
    """What the settings of `processor` say, the file's own `written` ones among them; raises SourceError."""
    values = _settings(processor, written, where)

    def needed(key: str) -> Any:
        if values.get(key) is None:
            raise SourceError(f"{where} does not say {key!r}, which it needs. {OTHER}")
        return values[key]

    # v = ((pixel * factor - offset) - mean) / std with pixels in 0..255, written for pixels in 0..1.
    rescaled = values.get("do_rescale")
    factor = 255 * (needed("rescale_factor") if rescaled else 1)
    if not factor:
        raise SourceError(f"{where} rescales by 0. {OTHER}")
    offset = 1.0 if rescaled and values.get("rescale_offset") else 0.0
    normalised = values.get("do_normalize")
    mean = _three(needed("image_mean")) if normalised else (0.0,) * 3
    std = _three(needed("image_std")) if normalised else (1.0,) * 3
    if values.get("include_top"):  # divides by the deviations, once more
        std = tuple(value * again for value, again in zip(std, _three(needed("image_std")), strict=True))
    size, crop_pct, mode = _resizing(values, type(processor).__name__, where)
    resample = values.get("resample")
    return Preprocess(
        size=size,
        mean=tuple(_rounded((value + offset) / factor) for value in mean),  # type: ignore[arg-type]
        std=tuple(_rounded(value / factor) for value in std),  # type: ignore[arg-type]
        # Where nothing is said, transformers' own `resize` takes this one.
        interpolation=INTERPOLATIONS[2 if resample is None else int(resample)],
        crop_pct=crop_pct,
        crop_mode=mode,
        library="transformers",
    )


def _settings(processor: Any, written: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The settings of `processor` that are on; raises SourceError for one that is not known here."""
    values = {**written, **processor.to_dict()}
    off = {key for key, switch in SWITCHES.items() if not values.get(switch)}
    unknown = sorted(
        key for key, value in values.items() if value not in (None, False) and key not in READ | ELSEWHERE | off
    )
    if unknown:
        listed = ", ".join(f"{key}={values[key]!r:.40}" for key in unknown[:5])
        raise SourceError(f"{where} has settings that are not followed here: {listed}. {OTHER}")
    return values


# Numbers of PIL's filters, as image processors write them.
INTERPOLATIONS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}


def _three(values: float | list[float]) -> tuple[float, ...]:
    return (float(values),) * 3 if isinstance(values, int | float) else tuple(values)


def _rounded(value: float) -> float:
    """255 * (1 / 255) is not 1 in floats; the record should say 0.5 where the library does."""
    return float(f"{value:.12g}")


def _is_native(values: Mapping[str, Any]) -> bool:
    return "max_num_patches" in values


def _resizing(values: Mapping[str, Any], kind: str, where: str) -> tuple[tuple[int, int], float, str]:
    """(size, crop_pct, crop_mode) of an image processor's settings; raises SourceError for pictures of many sizes."""
    size, crop = values.get("size") or {}, values.get("crop_size") or {}
    if _is_native(values):
        # By default the square that fills the longest sequence.
        side = values["patch_size"] * math.isqrt(values["max_num_patches"])
        return (side, side), 1.0, "squash"
    if not values.get("do_resize"):
        raise SourceError(f"{where} does not resize, so pictures keep sizes of their own. {OTHER}")
    cropped = (
        (crop["height"], crop["width"]) if values.get("do_center_crop") and set(crop) == {"height", "width"} else ()
    )
    if set(size) == {"shortest_edge"}:
        edge = size["shortest_edge"]
        target = cropped or (edge, edge)
        if "crop_pct" in values and not cropped and edge >= 384:  # ConvNeXt's, which crops smaller ones alone
            return target, 1.0, "squash"
        if "crop_pct" in values:
            return target, target[0] / int(edge / values["crop_pct"]), "center"
        if kind.startswith("Levit"):
            edge = int(256 / 224 * edge)
        share, mode = max(target) / edge, "center"
    elif set(size) == {"height", "width"}:
        full = (size["height"], size["width"])
        target = cropped or full
        share, mode = target[0] / full[0], "squash"
    else:
        raise SourceError(f"{where} resizes to {dict(size)}, which is not one size for all pictures. {OTHER}")
    if share > 1:
        raise SourceError(
            f"{where} crops {target} of {dict(size)}, so it adds a border, which is not followed. {OTHER}"
        )
    return target, share, mode


def _written(folder: Path) -> dict[str, Any]:
    """The settings as the folder's file has them: the library leaves out what it does not know."""
    found = [read_json(folder / name, SourceError) for name in FILES if (folder / name).is_file()]
    parts = [values.get("image_processor", values) for values in found if isinstance(values, dict)]
    # A processor of pictures and texts has settings of both; those of pictures lie below a key of their own.
    return next((part for part in parts if "image_processor_type" in part or "size" in part), {})


def _own_processor(folder: Path) -> Any:
    from transformers import AutoImageProcessor

    if not any((folder / name).is_file() for name in FILES):
        return None
    return AutoImageProcessor.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)


# Model types whose image processor another type of their family has.
SIBLINGS = {"dinov2_with_registers": "dinov2", "dinov3_convnext": "dinov3_vit"}


def _usual_processor(config: Any) -> Any:
    """What transformers would make for this model type; None where it has no opinion."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

    # A tower of a pair has no entry of its own.
    kind = str(getattr(config, "model_type", "")).removesuffix("_vision_model")
    with contextlib.suppress(KeyError):
        backends: Any = IMAGE_PROCESSOR_MAPPING[CONFIG_MAPPING[SIBLINGS.get(kind, kind)]]
        return (backends.get("torchvision") or backends["pil"])()
    return None


def _resized_size(record: Preprocess) -> list[int]:
    """What the picture is resized to: both sides, or the shorter one."""
    resized = [math.floor(side / record.crop_pct + 1e-6) for side in record.size]
    return resized if record.crop_mode == "squash" else [max(resized)]


def _cropped(picture: Tensor, size: tuple[int, int]) -> Tensor:
    """The lower of the two middles of pictures (..., H, W)."""
    from torchvision.transforms import v2

    height, width = size
    top, left = (picture.shape[-2] - height) // 2, (picture.shape[-1] - width) // 2
    return v2.functional.crop(picture, top, left, height, width)


def _transform(record: Preprocess, as_floats: bool = False, by_pillow: bool = False) -> Callable[[Image.Image], Tensor]:
    """What transformers' processors do: resize the bytes, crop the centre, normalise.

    Args:
        as_floats: resize floats, which are not rounded to grey levels then (DINOv3's).
        by_pillow: resize with Pillow, as processors without torchvision do.
    """
    from torchvision.transforms import v2

    # Pillow's nearest is torch's exact one.
    exact = "nearest-exact" if record.interpolation == "nearest" and not by_pillow else record.interpolation
    resize = v2.Resize(_resized_size(record), v2.InterpolationMode(exact), antialias=True)
    return v2.Compose(
        [
            resize if by_pillow else v2.Identity(),
            v2.PILToTensor(),
            v2.Lambda(lambda picture: picture.float() if as_floats else picture),
            v2.Identity() if by_pillow else resize,
            v2.Lambda(lambda picture: _cropped(picture, record.size)),
            v2.Lambda(lambda picture: picture.float() / 255),
            v2.Normalize(record.mean, record.std),
        ]
    )


TRANSFORMS: dict[str, Callable[[Preprocess], Callable[[Image.Image], Tensor]]] = {
    "transformers": _transform,
    "transformers-float": partial(_transform, as_floats=True),
    "transformers-pil": partial(_transform, by_pillow=True),
}
