"""`bcosify.compare`: several evaluations side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..core.errors import DataError
from ..core.files import check_free, new_file, paths_in
from .record import read_evaluation
from .report import render_page
from .report.tables import Table, comparison

__all__ = ["Comparison", "compare"]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Evaluations side by side.

    Attributes:
        names: one for each evaluation; columns of `table`.
        warnings: which of them were not made on the same pictures, or not in the same way.
        table: every measurement that one of them has, marked as `comparison` says.
    """

    names: tuple[str, ...]
    warnings: tuple[str, ...]
    table: Table

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Column -> a word, or the number of a measurement."""
        columns = [name for name, _ in self.table.columns]
        return [
            {column: cell.order if cell.interval else cell.text for column, cell in zip(columns, row, strict=True)}
            for row in self.table.rows
        ]


def _written(page: Path) -> set[str] | None:
    """Nothing further of a page that `compare` wrote, by its title and heading; None of other files."""
    if not page.is_file():
        return None
    with page.open("rb") as file:
        head = file.read(2**16)
    return set() if b"<title>bcosify: " in head and b", side by side</h1>" in head else None


def compare(evaluations: Sequence[str | Path], out: str | Path | None = None, *, overwrite: bool = False) -> Comparison:
    """Puts several evaluations side by side, and says where they were not made on the same pictures.

    Args:
        evaluations: folders that `evaluate` wrote, or their evaluation.json.
        out: also write the table to this file, as a page that sorts.
        overwrite: replace the page if it exists.

    Raises:
        DataError: fewer than two, or what is no evaluation. CheckpointError: `out` exists.
    """
    if isinstance(evaluations, str | Path) or len(evaluations) < 2:
        raise DataError("There is nothing to compare one evaluation with. Pass two or more.")
    if out is not None:
        check_free(Path(out), overwrite, _written, paths_in(*evaluations))
    paths = [Path(path) for path in evaluations]
    read = [read_evaluation(path) for path in paths]
    # A file in a folder is named by its folder; of equal names the whole path tells them apart.
    names = [path.parent.name if path.is_file() else path.name for path in paths]
    names = names if len(set(names)) == len(names) else [str(path) for path in paths]
    warnings = [
        f"{names[0]} and {name} were not measured with the same {what}, so differences may come from that."
        for name, other in zip(names[1:], read[1:], strict=True)
        for what, differs in (
            ("pictures", other.data != read[0].data),
            ("settings", other.settings != read[0].settings),
        )
        if differs
    ]
    found = Comparison(tuple(names), tuple(warnings), comparison(list(zip(names, read, strict=True))))
    if out is not None:
        with new_file(Path(out)) as scratch:
            scratch.write_text(render_page("compare.html", names=names, warnings=warnings, table=found.table), "utf-8")
    return found
