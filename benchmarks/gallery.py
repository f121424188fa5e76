"""docs/gallery.md: 24 pictures, good and bad, what the student that comes with the package decides on them and why.

    python benchmarks/gallery.py [--student bundled:bcos-efficientnet-lite0]

The rule: of twelve photographs that scikit-image and scikit-learn carry, the largest square in the middle, and a square
of half that side at a place that a seed draws. Nothing is left out, and none of them was trained on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import skimage
import sklearn.datasets
import torch
from bcosify.convert import load, load_teacher
from bcosify.convert.output import output_kind
from bcosify.data.pictures import read_picture
from bcosify.demo.photographs import SQUARES
from bcosify.explain import ClassTarget, explain_scores, overlay, smoothed, smoothing
from bcosify.explain.lettering import GOOD, INK, WARNING, beside, padded, paragraph, stacked
from PIL import Image

NAMES = (
    "astronaut.png camera.png chelsea.png coffee.png coins.png horse.png motorcycle_left.png retina.jpg rocket.jpg "
    "moon.png"
).split()
SIDE, GAP, SIZE, ACROSS = 150, 8, 12, 4
DOCS = Path(__file__).resolve().parents[1] / "docs"

PAGE = """# Gallery

Written by `python benchmarks/gallery.py`; do not edit. Of twelve photographs that scikit-image and scikit-learn carry,
the largest square in the middle, and a square of half that side at a random place. Nothing is chosen by its result,
and none was trained on.

`{student}` decides like its teacher on {same} of {count} (green). Each pair is the picture as both
models see it, and what each of its pixels adds to the student's decision: red for, blue against. Some crops show
nothing that is a class of ImageNet; both models are asked all the same.

![24 pictures, their maps, and both decisions](gallery.jpg)
"""


def squares() -> list[Image.Image]:
    """The 24 pictures."""
    given = [read_picture(Path(skimage.__file__).parent / "data" / name) for name in NAMES]
    given += [
        read_picture(Path(sklearn.datasets.__file__).parent / "images" / f"{name}.jpg") for name in ("china", "flower")
    ]
    random, cut = np.random.default_rng(0), []
    for picture in given:
        side = min(picture.size)
        left, top = ((length - side) // 2 for length in picture.size)
        cut.append(picture.crop((left, top, left + side, top + side)))
        left, top = (int(random.integers(0, length - side // 2 + 1)) for length in picture.size)
        cut.append(picture.crop((left, top, left + side // 2, top + side // 2)))
    return cut


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="bundled:bcos-efficientnet-lite0")
    args = parser.parse_args()
    torch.set_num_threads(1)
    student = load(args.student)
    teacher, names = load_teacher(student.source.reference), output_kind(student)
    images = torch.stack([student.preprocess.transform()(picture) for picture in squares()])
    with torch.no_grad():
        theirs = teacher.model(images).softmax(1)
        ours = student.model(images).softmax(1)
    explanation = explain_scores(student.model, images, ClassTarget(ours.argmax(1, keepdim=True)), batch_size=4)
    cells, rows = [], []
    for i, image in enumerate(images):
        seen = student.preprocess.seen(image)
        contributions = explanation.contributions[i, 0]
        tile = overlay(seen, smoothed(contributions, smoothing(contributions.shape[-1], SQUARES)), smooth=1)
        decided, found = int(theirs[i].argmax()), int(ours[i].argmax())
        words = [
            paragraph(f"teacher: {names.name(decided)}, {float(theirs[i, decided]):.0%}", 2 * SIDE, SIZE, INK),
            paragraph(
                f"student: {names.name(found)}, {float(ours[i, found]):.0%}",
                2 * SIDE,
                SIZE,
                GOOD if found == decided else WARNING,
            ),
        ]
        pair = beside([one.resize((SIDE, SIDE), Image.Resampling.LANCZOS) for one in (seen, tile)])
        cells.append(stacked([pair, *words], 2))
    for start in range(0, len(cells), ACROSS):
        height = max(cell.height for cell in cells[start : start + ACROSS])
        rows.append(beside([padded(cell, height) for cell in cells[start : start + ACROSS]], GAP))
    sheet = stacked(rows, GAP)
    sheet.save(DOCS / "gallery.jpg", quality=85)
    same = int((ours.argmax(1) == theirs.argmax(1)).sum())
    text = PAGE.format(student=args.student, same=same, count=len(images))
    (DOCS / "gallery.md").write_text(text)
    print(f"{same} of {len(images)}; wrote {DOCS / 'gallery.md'}")


if __name__ == "__main__":
    main()
