"""Text for people: rich tables and lines on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..core.words import printable

if TYPE_CHECKING:
    from ..convert import Agreement
    from ..evaluate.report.tables import Table as Cells

__all__ = ["console", "show_agreement", "show_cells", "show_table"]


class _Console(Console):
    """Prints texts of others so that no terminal obeys them."""

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*(printable(one) if isinstance(one, str) else one for one in objects), **options)


# Piped output has no width of its own; rich would fold every table to 80 columns.
console = _Console(stderr=True, highlight=False, markup=False, width=None if sys.stderr.isatty() else 160)


def show_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Prints one table; numbers are right-aligned."""
    table = Table(title=printable(title), title_justify="left", header_style="bold")
    rows = [[_text(cell) for cell in row] for row in rows]
    for i, column in enumerate(columns):
        numeric = bool(rows) and all(
            row[i].replace(".", "").replace("-", "").replace("e", "").isdigit() for row in rows
        )
        table.add_column(printable(column), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)


def show_cells(title: str, columns: Sequence[str], table: Cells) -> None:
    """Prints a table of measurements, with their intervals."""
    rows = [[f"{cell.text} ({cell.interval})" if cell.interval else cell.text for cell in row] for row in table.rows]
    show_table(title, columns, rows)


def show_agreement(agreement: Agreement) -> None:
    """Says how far a student stands for its teacher, in red where that is little."""
    console.print(agreement.words, style="bold red" if agreement.low else "")


def _text(cell: Any) -> str:
    return f"{cell:.4g}" if isinstance(cell, float) else printable(cell)
