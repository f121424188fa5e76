"""bcosify demo"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .console import console, show_table


def demo(
    out: Path = Path("demo-out"), recipe: str = "demo", overwrite: bool = False, json: bool = False
) -> dict[str, Any]:
    """Converts, aligns and explains a real model in a few minutes on a CPU, and writes one report.html.

    The model is EfficientNet-Lite0 with its ImageNet weights; the pictures are the photographs inside scikit-image. The
    three that are explained are not trained on.

    Args:
        out: folder for everything: shards, student, aligned student, report.html.
        recipe: another recipe for the alignment.
        overwrite: replace the folder if it exists.
        json: print the table as JSON on stdout.
    """
    from ..align import demo as demonstrate

    done = demonstrate(out, recipe, overwrite=overwrite, say=console.print)
    shown = "picture model label second ahead score input constants".split()
    show_table(
        f"{done.reference}: teacher, start (B={done.b[0]:g}) and end (B={done.b[1]:g}, biases x {done.beta[1]:g})",
        ["picture", "model", "decides", "ahead of", "by", "score", "input", "constants", "residual"],
        [(*(row[key] for key in shown), f"{row['residual']:.0e}") for row in done.rows],
    )
    console.print(f"wrote {done.report} in {done.seconds} s")
    return {name: value for name, value in vars(done).items() if name != "report"}
