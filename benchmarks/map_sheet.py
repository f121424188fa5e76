"""A sheet of contribution maps: are they about the class that is asked for?

    python benchmarks/map_sheet.py --student FOLDER --data objects.tar [--pictures 8] [--size 112] --out sheet.png

Columns are pictures. Rows: the photograph; the teacher's exact map of its own decision, and of a random other class;
the student's maps of the same two. Red speaks for, blue against. FOLDER is a converted model, aligned or not.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from bcosify.convert import Student, load, reload_teacher
from bcosify.convert.output import output_kind
from bcosify.evaluate.contrast import other_decisions
from bcosify.evaluate.decisions import decide
from bcosify.evaluate.subject import Subject, outputs_of
from bcosify.explain import explain, overlay
from bcosify.explain.targets import SideBySide
from columns import BATCH, whole_objects
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

PERCENTILE, SMOOTH = 99, 5
MARGIN, HEAD = 200, 26


def sheet(student: Student, teacher: nn.Module, images: Tensor, count: int) -> Image.Image:
    """The sheet of `count` of the normalised `images` (N, 3, H, W), as far apart as they lie.

    Decisions are the teacher's; the other ones are drawn over all pictures, so that they are those of the study.
    """
    preprocess = student.preprocess
    subject = Subject("teacher", teacher, None, preprocess.mean, preprocess.std, output_kind(student).chooses)
    answers = outputs_of(subject, images.split(BATCH))
    decided = decide(answers, subject.classifier)
    shown = torch.linspace(0, len(images) - 1, min(count, len(images))).long()
    other = other_decisions(decided, answers.shape[1]).rows(shown)
    decided, images = decided.rows(shown), images[shown]
    both = SideBySide((decided.target(), other.target()))
    maps = [explain(m, images, both, batch_size=BATCH, check=False).contributions for m in (teacher, student.model)]
    photographs = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in (subject.colours(images) * 255 + 0.5).byte()]
    named = "another class" if subject.classifier else "another direction"
    rows = {"photograph": photographs}
    for owner, of_both in zip(("teacher", "student"), maps, strict=True):
        for k, asked in enumerate(("its decision" if owner == "teacher" else "teacher's decision", named)):
            rows[f"{owner}: {asked}"] = [
                overlay(photograph, of_both[i, k], percentile=PERCENTILE, smooth=SMOOTH)
                for i, photograph in enumerate(photographs)
            ]
    return _laid_out(rows)


def _laid_out(rows: dict[str, list[Image.Image]]) -> Image.Image:
    """Rows of tiles, each with its name at the left, and the caption below."""
    tiles = next(iter(rows.values()))
    width, height = tiles[0].size
    canvas = Image.new("RGB", (MARGIN + len(tiles) * width, len(rows) * height + HEAD), "white")
    write, font = ImageDraw.Draw(canvas), ImageFont.load_default(14)
    for y, (name, row) in enumerate(rows.items()):
        write.text((8, (y + 0.5) * height), name, "black", font, anchor="lm")
        for x, tile in enumerate(row):
            canvas.paste(tile, (MARGIN + x * width, y * height))
    caption = (
        f"Red speaks for, blue against. Each map has its own scale, symmetric around 0 and full at the {PERCENTILE}th "
        f"percentile of its sizes; averaged over {SMOOTH} x {SMOOTH} pixels."
    )
    write.text((8, canvas.height - HEAD / 2), caption, "black", font, anchor="lm")
    return canvas


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", type=Path, required=True)
    parser.add_argument("--data", required=True, help="shards of objects with their masks")
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--size", type=int, help="side in pixels, where it is not the model's own")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    student = load(options.student)
    teacher = reload_teacher(student.source).model.eval().requires_grad_(False)
    objects = whole_objects(options.data, options.size or student.preprocess.size[0], student.preprocess)
    sheet(student, teacher, objects.images, options.pictures).save(options.out)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
