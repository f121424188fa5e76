"""The tables of docs/results.md, from the folders that `bcosify evaluate` wrote, as Markdown on stdout.

python benchmarks/results_page.py REPORT [REPORT ...]
"""

from __future__ import annotations

import collections
import sys
from pathlib import Path

from bcosify.evaluate import Evaluation, read_evaluation
from bcosify.evaluate.report.tables import Table, fidelity_table, method_tables, student_first, turned
from bcosify.evaluate.verdict import verdict
from bcosify.publish.card import markdown

# How many methods stand in one table.
ACROSS = 6


def tables(evaluation: Evaluation) -> list[Table]:
    """Fidelity, then localisation and faithfulness, a few methods at a time."""
    found = [fidelity_table(evaluation)]
    for table in method_tables(evaluation).values():
        rows = student_first(table).rows
        found += [turned(Table(table.columns, rows[start : start + ACROSS])) for start in range(0, len(rows), ACROSS)]
    return [table for table in found if table.rows]


def seconds(evaluation: Evaluation) -> str:
    """CPU and wall seconds by kind of step."""
    cpu: dict[str, float] = collections.Counter()
    wall: dict[str, float] = collections.Counter()
    for one in evaluation.seconds:
        kind = one.step.partition(":")[0]
        cpu[kind] += one.cpu
        wall[kind] += one.wall
    rows = [f"| {kind} | {cpu[kind]:.0f} | {wall[kind]:.0f} |" for kind in cpu]
    total = f"| **all** | **{sum(cpu.values()):.0f}** | {sum(wall.values()):.0f} |"
    return "\n".join(["| step | CPU seconds | wall |", "| --- | --- | --- |", *rows, total])


def main() -> None:
    for folder in map(Path, sys.argv[1:]):
        evaluation = read_evaluation(folder)
        print(f"> {verdict(evaluation)}\n")
        for table in tables(evaluation):
            print(f"{markdown(table)}\n")
        print(f"{seconds(evaluation)}\n")


if __name__ == "__main__":
    main()
