"""Class maps of a student after FA-CNN: agreement with its teacher, constants, localisation, and how maps morph.

    python benchmarks/fa_cnn.py STUDENT [STUDENT ...] --data FOLDER [--dampening 3] [--out FOLDER]

FOLDER holds val-*.tar, and objects-*.tar with masks (keys jpg and mask.png). Localisation is the share of positive
contribution that lies inside the mask, for the student's own first class; a uniform map has the mask's area.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from bcosify.convert import Student, load, reload_teacher, set_strength
from bcosify.convert.methods.fa_cnn.dampening import DampenedSkip
from bcosify.convert.output import output_kind
from bcosify.data.index import index_shards
from bcosify.data.loader import held_out_batches
from bcosify.data.names import expand
from bcosify.data.views import to_model_input
from bcosify.explain import TopTarget, explain, overlay
from columns import whole_objects
from PIL import Image, ImageDraw
from torch import Tensor


def measure(student: Student, data: Path) -> dict[str, Any]:
    """One row of the table."""
    teacher = reload_teacher(student.source).model
    size, start = student.preprocess.size[0], time.monotonic()
    ours, theirs, largest = [], [], {}
    hooks = [
        block.register_forward_hook(lambda block, args, output, name=name: _note(largest, name, args[0], output))
        for name, block in student.model.named_modules()
        if isinstance(block, DampenedSkip)
    ]
    with torch.no_grad():
        for batch in held_out_batches(index_shards(expand(str(data / "val-*.tar"))), size=size, workers=0):
            pictures = to_model_input(batch.pictures, student.preprocess.mean, student.preprocess.std)
            ours.append(student.model(pictures))
            theirs.append(teacher(pictures))
    for hook in hooks:
        hook.remove()
    inside, area, constants, residual = [], [], [], []
    objects = whole_objects(str(data / "objects-*.tar"), size, student.preprocess)
    for picture, mask in zip(objects.images, objects.masks, strict=True):
        found = explain(student.model, picture[None], TopTarget(1))
        positive = found.contributions[0, 0].clamp_min(0)
        inside.append(float((positive * mask).sum() / positive.sum().clamp_min(1e-12)))
        area.append(float(mask.mean()))
        of_input, of_constants = float(found.input_part.abs()), float(found.constant_part.abs())
        constants.append(of_constants / (of_input + of_constants))
        residual.append(float(found.residual.abs() / found.scores.abs().clamp_min(1)))
    agreement = (torch.cat(ours).argmax(1) == torch.cat(theirs).argmax(1)).float().mean()
    return {
        "top1_agreement": round(float(agreement), 3),
        "constants_share": round(mean(constants), 4),
        "inside_mask": round(mean(inside), 3),
        "mask_area": round(mean(area), 3),
        "residual": max(residual),
        "largest_change": round(max(largest.values(), default=0.0), 3),
        "seconds": round(time.monotonic() - start, 1),
    }


def _note(largest: dict[str, float], name: str, given: Tensor, returned: Tensor) -> None:
    ratio = (returned - given).flatten(1).norm(dim=1) / given.flatten(1).norm(dim=1)
    largest[name] = max(largest.get(name, 0.0), float(ratio.max()))


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def morphing(student: Student, data: Path, count: int = 4) -> Image.Image:
    """A row for each of the first `count` objects: the picture, and the first class's map at every depth."""
    mean_, std = (torch.tensor(values).view(-1, 1, 1) for values in (student.preprocess.mean, student.preprocess.std))
    side, rows = 168, []
    size = student.preprocess.size[0]
    for picture in whole_objects(str(data / "objects-*.tar"), size, student.preprocess).images[:count]:
        depths = student.model.maps_by_depth(picture[None])
        index = int(list(depths.values())[-1].mean((2, 3)).argmax())
        shown = Image.fromarray(((picture * std + mean_).clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy())
        tiles = [(output_kind(student).name(index).split(",")[0], shown)]
        for name, maps in depths.items():
            map_ = torch.nn.functional.interpolate(maps[:, [index]], shown.size[::-1], mode="bilinear")[0, 0]
            tiles.append((f"{name or 'no blocks'} {float(maps[0, index].mean()):.1f}", overlay(shown, map_)))
        rows.append(tiles)
    sheet = Image.new("RGB", (len(rows[0]) * side, len(rows) * (side + 16)), "white")
    draw = ImageDraw.Draw(sheet)
    for y, tiles in enumerate(rows):
        for x, (name, tile) in enumerate(tiles):
            sheet.paste(tile.resize((side - 4, side - 4)), (x * side, y * (side + 16)))
            draw.text((x * side, y * (side + 16) + side - 2), name, "black")
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("students", nargs="+", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--dampening", type=float, help="another one than the student has, to see what it costs")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    for folder in arguments.students:
        student = load(folder)
        set_strength(student.model, dampening=arguments.dampening)
        print(json.dumps({"student": folder.name, **measure(student, arguments.data)}), flush=True)
        if arguments.out:
            arguments.out.mkdir(parents=True, exist_ok=True)
            morphing(student, arguments.data).save(arguments.out / f"{folder.name}.png")


if __name__ == "__main__":
    main()
