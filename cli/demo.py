"""bcosify demo"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from .console import console, show_table


def demo(
    out: Path = Path("demo-out"),
    recipe: str = "demo",
    photo: list[Path] | None = None,
    overwrite: bool = False,
    json: bool = False,
) -> dict[str, Any]:
    """Shows on photographs what a finished student decides and why, aligns it for half a minute, and writes a page.

    The student comes with this package; its teacher is EfficientNet-Lite0 with its ImageNet weights. The photographs
    are those inside scikit-image, none of which was trained on.
    Example: bcosify demo --photo cat.jpg

    Args:
        out: folder for everything: report.html, shards, the student that was aligned further.
        recipe: another recipe for the alignment.
        photo: photographs of your own, which are shown first.
        overwrite: replace the folder if it exists.
        json: print what was found as JSON on stdout.
    """
    from ..demo import demo as demonstrate

    done = demonstrate(out, recipe, photo=photo or (), overwrite=overwrite, say=console.print)
    show_table(
        f"{done.student} (B={done.b:g}) and its teacher",
        ["picture", "teacher", "student", "score", "pixels for", "against", "constants"],
        [
            (
                one.name,
                f"{one.teacher.label} ({one.teacher.probability:.0%})",
                f"{one.student.label} ({one.student.probability:.0%})",
                *dataclasses.astuple(one.ledgers[0])[1:5],
            )
            for one in done.shown
        ],
    )
    console.print(f"wrote {done.report} in {done.seconds} s")
    return {name: value for name, value in dataclasses.asdict(done).items() if name != "report"}
