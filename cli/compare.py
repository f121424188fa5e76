"""bcosify compare"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .console import console, show_cells


def compare(
    evaluations: list[Path], out: Path | None = None, overwrite: bool = False, json: bool = False
) -> list[dict[str, Any]]:
    """Puts several evaluations side by side, and says where they were not made on the same pictures.

    Example: bcosify compare reports/published reports/ours --out compare.html

    Args:
        evaluations: folders that `bcosify evaluate` wrote, or their evaluation.json.
        out: also write the table as a page that sorts.
        overwrite: replace the page if it exists.
        json: print the rows as JSON on stdout.
    """
    from ..evaluate import compare as compare_evaluations

    found = compare_evaluations(evaluations, out, overwrite=overwrite)
    show_cells("side by side", [name for name, _ in found.table.columns], found.table)
    for warning in found.warnings:
        console.print(warning)
    if out is not None:
        console.print(f"wrote {out}")
    return found.rows
