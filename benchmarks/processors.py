"""Which image processors of transformers are followed, slow and fast: a table of docs/coverage.md, one row each.

    python benchmarks/processors.py

Every type that a model of transformers names is made with its own settings, saved, and read as any folder of a user's.
Two odd-sized pictures are prepared by it and by what was read. Nothing is fetched.
"""

from __future__ import annotations

import dataclasses
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from bcosify.convert import Preprocess
from bcosify.convert.libraries.comparison import odd_pictures, odd_square, picture_difference
from bcosify.convert.libraries.transformers.preprocess import pixels_of, preprocess_of
from bcosify.core.errors import SourceError

__all__ = ["Processor", "processors", "table"]


@dataclasses.dataclass
class Processor:
    """One type; `fast` and `slow` are how far the pictures of torchvision's and of Pillow's processor are from ours."""

    name: str
    models: list[str]
    fast: float | None = None
    slow: float | None = None
    refused: str = ""


def processors() -> list[Processor]:
    """A row for every image processor that a model type of transformers names."""
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

    types: dict[tuple[str | None, str | None], list[str]] = {}
    for model, backends in IMAGE_PROCESSOR_MAPPING_NAMES.items():
        types.setdefault((backends.get("torchvision"), backends.get("pil")), []).append(model)
    return sorted((_measured(*names, models) for names, models in types.items()), key=lambda row: row.name)


def _measured(fast: str | None, slow: str | None, models: list[str]) -> Processor:
    import transformers

    row = Processor((fast or slow or "").removesuffix("Pil"), models)
    try:
        made: dict[str, Any] = {name: getattr(transformers, name)() for name in (fast, slow) if name}
        with tempfile.TemporaryDirectory() as folder:
            next(iter(made.values())).save_pretrained(folder)
            record = preprocess_of(Path(folder), SimpleNamespace(image_size=None), "hf:FOLDER")
    except SourceError as error:
        row.refused = _why(str(error))
    except TypeError:
        row.refused = "it needs a model of timm"
    else:
        row.fast = _difference(record, made[fast]) if fast else None
        pillows = dataclasses.replace(record, library="transformers-pil")
        row.slow = _difference(pillows, made[slow]) if slow else None
    return row


def _difference(record: Preprocess, processor: Any) -> float:
    def theirs(picture: Any) -> torch.Tensor:
        return pixels_of(processor(images=picture, return_tensors="pt"))

    native = "max_num_patches" in processor.to_dict()
    return picture_difference(record.transform(), theirs, odd_square() if native else odd_pictures())


def _why(message: str) -> str:
    """The reason in a refusal, without where and what to do."""
    why = re.sub(r"^.*?its image processor \S+ ", "", message).partition(" Followed are")[0].rstrip(".")
    return why.removeprefix("has settings that are not followed here: ")[:120]


def table(rows: Sequence[Processor]) -> list[str]:
    """Lines of Markdown."""
    followed = sum(not row.refused for row in rows)
    lines = [
        "## Image processors of transformers",
        "",
        f"All {len(rows)} types that a model of transformers names, with their own settings: {followed} are followed, "
        "the others are refused by name before anything is converted. Fast: torchvision's, which transformers opens "
        "where it has one, and its record here. Slow: Pillow's, and the same record with Pillow's arithmetic. "
        "Differences as in `processor` above; SigLIP2's, which keeps the aspect of a picture, on a square.",
        "",
        "| processor | models | fast | slow | refused for |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        models = ", ".join(row.models[:4]) + (f" and {len(row.models) - 4} more" if len(row.models) > 4 else "")
        numbers = " | ".join("" if value is None else f"{value:.0e}" for value in (row.fast, row.slow))
        lines.append(f"| {row.name} | {models} | {numbers} | {row.refused.replace('|', ' ')} |")
    return lines


def main() -> None:
    torch.set_num_threads(1)
    print("\n".join(table(processors())))


if __name__ == "__main__":
    main()
