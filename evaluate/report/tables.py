"""Measurements as tables: one row for each explained model, one column for each metric. Also side by side."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Sequence

from ..record import Evaluation, Measurement
from ..registry import all_metrics
from ..task import OURS

__all__ = [
    "Cell",
    "Table",
    "absences",
    "cell_of",
    "comparison",
    "fidelity_table",
    "method_tables",
    "named",
    "student_first",
    "turned",
]


@dataclasses.dataclass(frozen=True)
class Cell:
    """What a table shows: `order` sorts it, `note` tells more on asking."""

    text: str
    order: float | str
    interval: str = ""
    note: str = ""
    best: bool = False


@dataclasses.dataclass(frozen=True)
class Table:
    """Columns are (name, hint) pairs; every row is as long."""

    columns: tuple[tuple[str, str], ...]
    rows: tuple[tuple[Cell, ...], ...]


def named(metric: str, variant: str = "") -> str:
    known = all_metrics().get(metric)
    name = known.title if known and known.title else metric.replace("_", " ")
    return f"{name}, {variant}" if variant else name


def number(value: float) -> str:
    return f"{value:.1e}" if value and abs(value) < 5e-4 else f"{value:.3f}" if abs(value) < 100 else f"{value:.3g}"


def cell_of(one: Measurement | None, best: bool = False) -> Cell:
    if one is None:
        return Cell("", "")
    if one.value is None:
        return Cell("does not apply", "", note=one.reason)
    interval = "" if one.low is None or one.high is None else f"{number(one.low)} to {number(one.high)}"
    return Cell(number(one.value), one.value, interval, f"{one.n} pictures or grids", best)


def fidelity_table(evaluation: Evaluation) -> Table:
    """Metrics down; value, where in the model, and of which model. `absences` says what does not apply."""
    rows = [
        (_word(named(one.metric)), cell_of(one), _word(one.variant or "output"), _word(one.model))
        for one in evaluation.measurements
        if one.section in ("fidelity", "probes") and one.value is not None
    ]
    return Table((("metric", ""), ("value", "mean and 95 % interval"), ("where", ""), ("of", "")), tuple(rows))


def method_tables(evaluation: Evaluation) -> dict[str, Table]:
    """Section -> methods down, metrics across; marked is what is better than all others of its column by intervals that
    do not overlap (see `comparison`).

    What is measured by a model's own confidence is comparable between methods of that model only, so is marked there.
    """
    tables = {}
    for section in ("localisation", "faithfulness"):
        found = [one for one in evaluation.measurements if one.section == section and one.method]
        applying = [one for one in found if one.metric != "maps" and one.value is not None]
        columns = list(dict.fromkeys((one.metric, one.variant) for one in applying))
        columns.sort(key=lambda column: not column[0].endswith("_contrast"))  # what shows the class comes first
        pairs = list(dict.fromkeys((one.model, one.method) for one in found))
        place = {(one.metric, one.variant, one.model, one.method): one for one in found}
        groups = {pair: pair[0] if section == "faithfulness" else "" for pair in pairs}
        best = set()
        for column in columns:
            for group in set(groups.values()):
                ones = [place.get((*column, *pair)) for pair in pairs if groups[pair] == group]
                if (ahead := _ahead(ones)) is not None:
                    best.add(ones[ahead])
        absent = {(one.model, one.method): one for one in found if one.metric == "maps"}
        rows = []
        for pair in pairs:
            ones = [place.get((*column, *pair), absent.get(pair)) for column in columns]
            cells = (cell_of(one, one is not None and one in best) for one in ones)
            model = "student minus teacher" if pair[0] == "both" else pair[0]
            rows.append((_word(model), _word(pair[1]), *cells))
        heads = [(named(metric), "; ".join(filter(None, (variant, _hint(metric))))) for metric, variant in columns]
        tables[section] = Table((("model", ""), ("method", ""), *heads), tuple(rows))
    return tables


def student_first(table: Table) -> Table:
    """A table of `method_tables` with the student's own explanation first, then its teacher's, then all others."""
    place = {("student", OURS): 0, ("teacher", OURS): 1}
    rows = sorted(table.rows, key=lambda row: place.get((row[0].text, row[1].text), 2))
    return Table(table.columns, tuple(rows))


def turned(table: Table) -> Table:
    """Metrics down and methods across: a page is narrow. Metrics that none of these methods has are left out."""
    models, methods, *metrics = zip(*table.rows, strict=True)
    heads = [(f"{model.text}: {method.text}", "") for model, method in zip(models, methods, strict=True)]
    rows = [
        (Cell(f"{name} ({hint})" if hint else name, name), *cells)
        for (name, hint), cells in zip(table.columns[2:], metrics, strict=True)
        if any(cell.text for cell in cells)
    ]
    return Table((("metric", ""), *heads), tuple(rows))


def absences(evaluation: Evaluation) -> list[str]:
    """What does not apply: one line for every reason, with all that it holds for."""
    what: dict[tuple[str, str], list[str]] = collections.defaultdict(list)
    for one in evaluation.measurements:
        if one.value is None:
            what[named(one.metric, one.variant), one.reason].append(" ".join(filter(None, (one.model, one.method))))
    return [f"{metric} ({', '.join(who)}): {reason}." for (metric, reason), who in what.items()]


def comparison(evaluations: Sequence[tuple[str, Evaluation]]) -> Table:
    """Every measurement that one of them has, side by side; marked where it is better than all others of its row.

    Evaluations keep intervals, not pictures, so a paired difference cannot be had. But whatever the pictures have in
    common, the standard error of a difference is at most the sum of both standard errors: intervals that do not
    overlap show a difference whose interval excludes zero. Others may differ too; they are not marked. (Ours.)
    """
    keys = dict.fromkeys(_key(one) for _, evaluation in evaluations for one in evaluation.measurements)
    found = [{_key(one): one for one in evaluation.measurements} for _, evaluation in evaluations]
    rows = []
    for key in keys:
        section, metric, model, method, variant = key
        ones = [known.get(key) for known in found]
        ahead = _ahead(ones)
        rows.append(
            (
                _word(section),
                _word(named(metric, variant)),
                _word(" ".join(filter(None, (model, method)))),
                *(cell_of(one, i == ahead) for i, one in enumerate(ones)),
            )
        )
    heads = (
        ("section", ""),
        ("metric", ""),
        ("of", ""),
        *((name, "mean and 95 % interval") for name, _ in evaluations),
    )
    return Table(heads, tuple(rows))


def _ahead(ones: Sequence[Measurement | None]) -> int | None:
    """Which of several rows of one metric is the best, by an interval that overlaps with no other one's; or None."""
    best = _best(ones)
    if best is None or best.low is None or best.high is None:
        return None
    place = next(i for i, one in enumerate(ones) if one is best)
    others = [one for i, one in enumerate(ones) if one is not None and one.value is not None and i != place]
    apart = (
        one.low is not None and one.high is not None and (best.low > one.high or best.high < one.low) for one in others
    )
    return place if all(apart) else None


def _best(ones: Iterable[Measurement | None]) -> Measurement | None:
    """The best of several of one metric; none where neither more nor less is better, or there is nothing to beat."""
    known = [one for one in ones if one is not None and one.value is not None]
    sign = _better(known[0].metric) if known else 0
    return max(known, key=lambda one: sign * (one.value or 0)) if sign and len(known) > 1 else None


def _key(one: Measurement) -> tuple[str, str, str, str, str]:
    return one.section, one.metric, one.model, one.method, one.variant


def _hint(metric: str) -> str:
    return {1: "more is better", -1: "less is better", 0: ""}[_better(metric)]


def _better(metric: str) -> int:
    """Whether more (1), less (-1) or neither (0) is better; of a metric that is not known here, more."""
    known = all_metrics().get(metric)
    return 1 if known is None else known.better


def _word(text: str) -> Cell:
    return Cell(text, text)
