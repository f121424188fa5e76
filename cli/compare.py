"""bcosify compare"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .console import console, show_table


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
    from ..core.errors import DataError
    from ..core.files import check_free, new_file
    from ..evaluate.record import read_evaluation
    from ..evaluate.report import render_page
    from ..evaluate.report.tables import comparison

    if len(evaluations) < 2:
        raise DataError("There is nothing to compare one evaluation with. Pass two or more.")
    if out is not None:
        check_free(out, overwrite)
    read = [read_evaluation(path) for path in evaluations]
    # A file in a folder is named by its folder; of equal names the whole path tells them apart.
    names = [path.parent.name if path.is_file() else path.name for path in evaluations]
    names = names if len(set(names)) == len(names) else [str(path) for path in evaluations]
    warnings = [
        f"{names[0]} and {name} were not measured with the same {what}, so differences may come from that."
        for name, other in zip(names[1:], read[1:], strict=True)
        for what, differs in (
            ("pictures", other.data != read[0].data),
            ("settings", other.settings != read[0].settings),
        )
        if differs
    ]
    table = comparison(list(zip(names, read, strict=True)))
    columns = [name for name, _ in table.columns]
    rows = [[f"{cell.text} ({cell.interval})" if cell.interval else cell.text for cell in row] for row in table.rows]
    show_table("side by side", columns, rows)
    for warning in warnings:
        console.print(warning)
    if out is not None:
        with new_file(out) as scratch:
            scratch.write_text(render_page("compare.html", names=names, warnings=warnings, table=table), "utf-8")
        console.print(f"wrote {out}")
    return [
        {column: cell.order if cell.interval else cell.text for column, cell in zip(columns, row, strict=True)}
        for row in table.rows
    ]
