"""The strip at the top of README: three photographs, what two models decide on them, and why.

    python benchmarks/readme_strip.py [--student bundled:bcos-efficientnet-lite0] [--out docs/strip.jpg]

A row has the photograph, Grad-CAM of the teacher, the student's exact map, and the ledger of its score. All is made by
the functions of `bcosify demo`; none of the photographs was trained on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bcosify.convert import load
from bcosify.demo.photographs import Decision, Models, Shown, show
from bcosify.demo.verb import EXPLAINED, STUDENT, photographs
from bcosify.explain.lettering import FAINT, GOOD, INK, WARNING, beside, padded, paragraph, stacked
from bcosify.explain.render import AGAINST, CONSTANT, FOR, Part, ledger_bar
from PIL import Image

SIDE, GAP, SIZE = 250, 14, 14


def row(facts: Shown, tiles: dict[str, Image.Image]) -> Image.Image:
    """One photograph."""
    ledger, colour = facts.ledgers[0], GOOD if facts.agrees else WARNING
    parts = [
        Part("pixels for", ledger.pixels_for, FOR),
        Part("pixels against", ledger.pixels_against, AGAINST),
        Part("constants", ledger.constants + ledger.residual, CONSTANT),
    ]
    words = [
        paragraph(f"teacher: {_said(facts.teacher)}", SIDE, SIZE, INK),
        paragraph(f"student: {_said(facts.student)}", SIDE, SIZE, colour),
        paragraph("", SIDE, SIZE),
        ledger_bar(parts, ledger.score, width=SIDE, size=SIZE),
    ]
    pictures = [tiles[name].resize((SIDE, SIDE), Image.Resampling.LANCZOS) for name in ("seen", "grad_cam", "decision")]
    text = stacked(words)
    return beside([*pictures, padded(text, SIDE)], GAP)


def _said(decision: Decision) -> str:
    return f"{decision.label}, {decision.probability:.0%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default=STUDENT)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "docs" / "strip.jpg")
    args = parser.parse_args()
    student = load(args.student)
    models, given = Models.of(student), photographs()
    titles = [
        "photograph",
        "teacher: Grad-CAM",
        "student: what every pixel adds",
        "what they decide, and the score as a sum",
    ]
    head = beside([paragraph(title, SIDE, SIZE, FAINT) for title in titles], GAP)
    sheet = stacked([head, *(row(*show(name, given[name], models)) for name in EXPLAINED)], GAP)
    framed = Image.new("RGB", (sheet.width + 2 * GAP, sheet.height + 2 * GAP), "white")
    framed.paste(sheet, (GAP, GAP))
    framed.save(args.out, quality=88)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
