"""Which architectures convert exactly, explain exactly, and come back from disk: docs/coverage.md, one row each.

    python benchmarks/coverage.py [--method coda] [--only swin vit] [--first] [--jobs 2] [--timeout 240]

Every architecture gets random weights, biases and statistics, is converted, and compared with itself: where a method
starts (B = 1, beta = 1) the student must be its teacher. The ledger is checked on the original and on the student,
also half way to where alignment takes it (B = 1.5, beta = 0.5), and with none, half and all of the biases carried; the
end (B = 2 without biases) must be finite. What goes into the original and comes out of it is compared with the
library's own. Models are measured in worker processes, so that a crash or a hang costs one row.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import multiprocessing
import os
import platform
import re
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from bcosify.convert import Student, Teacher, convert, identity_error, load, save, set_strength
from bcosify.convert.layers import described
from bcosify.convert.methods import METHODS, find_method
from bcosify.convert.plan import Method
from bcosify.convert.student import carrying
from bcosify.core.errors import BcosifyError, PlanError
from bcosify.core.pictures import noise_pictures
from bcosify.explain import explain
from processors import Processor, processors, table
from tqdm import tqdm
from zoo import Entry, compare_entry, entries, first_of_families, load_entry

LIMIT = 1e-4
ROOT = Path(__file__).resolve().parents[1]


@dataclasses.dataclass
class Row:
    """What was found for one architecture; None where it was not reached."""

    library: str
    family: str
    architecture: str
    size: int | None = None
    parameters: int | None = None
    processor: float | None = None
    teacher: float | None = None
    swaps: dict[str, int] = dataclasses.field(default_factory=dict)
    identity: float | None = None
    ledger_teacher: float | None = None
    ledger_student: float | None = None
    ledger_carried: float | None = None
    input_share: float | None = None
    finite: bool | None = None
    saved: bool | None = None
    resize: str | None = None
    seconds: float | None = None
    refusal: str | None = None
    failure: str | None = None

    @property
    def converts(self) -> bool:
        """Whether the student is its teacher, and both ledgers of the student balance."""
        ledgers = within(self.ledger_student) and (self.ledger_carried is None or within(self.ledger_carried))
        return within(self.identity) and ledgers and bool(self.finite) and bool(self.saved)


def within(value: float | None) -> bool:
    return value is not None and value <= LIMIT


# ------------------------------------------------------------------------------------------------ measuring one model


def measure(entry: Entry, method: Method) -> Row:
    """Everything about one architecture; what fails is in the row."""
    row = Row(entry.library, entry.family, entry.architecture, entry.size)
    config = method.config_class()
    try:
        if method.name == "bcos":  # what goes in and comes out of the original is the same to all methods
            row.processor, row.teacher = compare_entry(entry)
        teacher = load_entry(entry)
        row.size = teacher.preprocess.size[0]
        row.parameters = sum(parameter.numel() for parameter in teacher.model.parameters())
        pictures = noise_pictures(2, teacher.preprocess.size)
        row.ledger_teacher, _ = ledger(teacher.model, pictures)
        started = time.monotonic()
        try:
            student = convert(teacher, config)
        except PlanError as error:
            row.refusal = reason(str(error))
            return row
        row.seconds = round(time.monotonic() - started, 2)
        row.swaps = student.plan.counts()
        row.identity = identity_error(student.model, teacher.model, pictures)
        row.ledger_student, row.input_share = ledger(student.model, pictures)
        row.resize = resized(student, teacher, entry.step)
        row.saved = comes_back(student, pictures)
        set_strength(student.model, **half_way(method, config))
        row.ledger_student = max(row.ledger_student, ledger(student.model, pictures)[0])
        row.ledger_carried = carried_ledgers(student, pictures, method.start(config))
        if row.ledger_carried is not None and not within(row.ledger_carried):
            precise = carried_ledgers(in_float64(student), pictures.double(), method.start(config))
            row.failure = f"ledger, carried: {row.ledger_carried:.0e} in float32, {precise:.0e} in float64"
        set_strength(student.model, **method.ends(config))
        with torch.no_grad():
            row.finite = bool(student.model(pictures).isfinite().all())
    except Exception as error:  # noqa: BLE001 - one row of the table, not the end of it
        known = isinstance(error, BcosifyError)
        row.failure = f"{type(error).__name__}: {error}" if known else traceback.format_exc(limit=-4)
    return row


def half_way(method: Method, config: Any) -> dict[str, float]:
    """Strengths between the start and where alignment takes them."""
    start = method.start(config)
    return {name: (start[name] + end) / 2 for name, end in method.ends(config).items()}


def ledger(model: torch.nn.Module, pictures: torch.Tensor) -> tuple[float, float]:
    """Of two outputs of every picture: the largest |score - input part - constants| over max(1, |score|), and the mean
    share of |input part| in |input part| + |constants|, which says that both sides of the ledger are there."""
    explanation = explain(model, pictures, targets=[0, 1], check=False)
    residual = explanation.residual.abs() / explanation.scores.abs().clamp_min(1)
    inputs, constants = explanation.input_part.abs(), explanation.constant_part.abs()
    return float(residual.nan_to_num(torch.inf).max()), float((inputs / (inputs + constants)).mean())


# How many places of a map biases are carried from: few, and those of `convert`'s cost table.
WINDOWS = (3.0, 7.0)


def carried_ledgers(student: Student, pictures: torch.Tensor, start: dict[str, float]) -> float | None:
    """The worst residual of both sums of three parts (direct, carried, constants) with none, half and all carried.

    With each of the windows where the student has windows. None where no layer carries any.
    """
    if not (carried := carrying(student.model)):
        return None
    windows: list[dict[str, float]] = [{"window": window} for window in WINDOWS] if "window" in carried else [{}]
    moved = [{"beta": 1 - share, "carry": share, **window} for share in (0.5, 1.0) for window in windows]
    worst = 0.0
    for strengths in [{"beta": 1.0, "carry": 0.0}, *moved]:
        set_strength(student.model, **{**start, **strengths})
        explanation = explain(student.model, pictures, targets=[0, 1], check=False)
        for residual in filter(lambda found: found is not None, (explanation.residual, explanation.direct_residual)):
            relative = residual.abs() / explanation.scores.abs().clamp_min(1)
            worst = max(worst, float(relative.nan_to_num(torch.inf).max()))
    set_strength(student.model, **{**dict.fromkeys(carried, 0.0), **start})
    return worst


def in_float64(student: Student) -> Student:
    return dataclasses.replace(student, model=copy.deepcopy(student.model).double())


@torch.no_grad()
def comes_back(student: Student, pictures: torch.Tensor) -> bool:
    """Whether what was saved loads strictly and is the same function."""
    with tempfile.TemporaryDirectory() as folder:
        loaded = load(save(student, Path(folder) / "student"))
    return torch.allclose(loaded.model(pictures), student.model(pictures), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def resized(student: Student, teacher: Teacher, step: int) -> str:
    """`yes`, `no`, or `teacher also not`: a size that the conversion never saw."""
    other = noise_pictures(2, (student.preprocess.size[0] + step, student.preprocess.size[1] + step))
    try:
        teacher.model(other)
    except Exception:  # noqa: BLE001 - every library refuses a size in its own way
        return "teacher also not"
    try:
        return "yes" if identity_error(student.model, teacher.model, other) <= 10 * LIMIT else "no"
    except Exception:  # noqa: BLE001
        return "no"


def reason(message: str) -> str:
    """The distinct reasons in a refusal: `Class: why; Class: why`."""
    found = re.findall(r"^  (\S+) \((\S+)\): (.*)$", message, re.MULTILINE)
    short = {f"{path.rpartition('.')[2]}: {why.partition(';')[0]}" for _, path, why in found}
    return "; ".join(sorted(short)) or message.splitlines()[0]


# --------------------------------------------------------------------------------------------------- worker processes


def serve(connection: Connection, method: str) -> None:
    """A worker: measures what it is sent, until it is sent None."""
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    transformers.utils.logging.disable_progress_bar()
    while (entry := connection.recv()) is not None:
        connection.send(measure(entry, find_method(method)))


class Worker:
    """One process that measures one model at a time and can be killed."""

    def __init__(self, method: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, method), daemon=True)
        self.process.start()
        theirs.close()
        self.entry: Entry | None = None
        self.started = 0.0

    def give(self, entry: Entry) -> None:
        self.entry, self.started = entry, time.monotonic()
        self.connection.send(entry)

    def stop(self) -> None:
        self.process.kill()
        self.process.join()


def sweep(wanted: list[Entry], jobs: int, timeout: float, method: str) -> list[Row]:
    """A row for every entry, in their order."""
    waiting, rows = list(reversed(wanted)), {}
    workers = [Worker(method) for _ in range(min(jobs, len(wanted)))]
    with tqdm(total=len(wanted), unit="model") as bar:

        def done(worker: Worker, row: Row) -> None:
            rows[id(worker.entry)] = row
            worker.entry = None
            bar.set_postfix_str(row.architecture)
            bar.update()

        def lost(index: int, why: str) -> None:
            worker = workers[index]
            worker.stop()
            assert worker.entry is not None
            done(worker, Row(*dataclasses.astuple(worker.entry)[:4], failure=why))
            workers[index] = Worker(method)

        while len(rows) < len(wanted):
            for worker in workers:
                if worker.entry is None and waiting:
                    worker.give(waiting.pop())
            ready = wait([worker.connection for worker in workers if worker.entry], timeout=1.0)
            for index, worker in enumerate(workers):
                if worker.connection in ready:
                    try:
                        done(worker, worker.connection.recv())
                    except EOFError:
                        lost(index, "the process died")
                elif worker.entry is not None and time.monotonic() - worker.started > timeout:
                    lost(index, f"took longer than {timeout:g} s")
    for worker in workers:
        worker.stop()
    return [rows[id(entry)] for entry in wanted]


# ------------------------------------------------------------------------------------------------------------ the table


def summary(rows: list[Row]) -> dict[str, dict[str, Any]]:
    """By library: families, those with a member that converts, and those of which every swept member does."""
    found: dict[str, dict[str, Any]] = {}
    for library in dict.fromkeys(row.library for row in rows):
        families: dict[str, list[Row]] = {}
        for row in rows:
            if row.library == library:
                families.setdefault(row.family, []).append(row)
        whole = [name for name, members in families.items() if all(row.converts for row in members)]
        found[library] = {
            "families": len(families),
            "convert": len(whole),
            "rest": sorted(set(families) - set(whole)),
        }
    return found


COLUMNS: dict[str, Callable[[Row], str]] = {
    "family": lambda row: row.family,
    "architecture": lambda row: f"`{row.architecture}`",
    "size": lambda row: str(row.size or ""),
    "swapped layers": lambda row: ", ".join(f"{count} {name}" for name, count in sorted(row.swaps.items())),
    "processor": lambda row: number(row.processor),
    "teacher": lambda row: number(row.teacher),
    "identity error": lambda row: number(row.identity),
    "ledger, student": lambda row: number(row.ledger_student),
    "ledger, carried": lambda row: number(row.ledger_carried),
    "ledger, original": lambda row: number(row.ledger_teacher),
    "input's share": lambda row: "" if row.input_share is None else f"{row.input_share:.0%}",
    "save/load": lambda row: {None: "", True: "yes", False: "no"}[row.saved],
    "another size": lambda row: row.resize or "",
    "seconds": lambda row: "" if row.seconds is None else f"{row.seconds:.1f}",
    "refused because": lambda row: (
        row.refusal or (row.failure or "").strip().splitlines()[-1:][0] if row.refusal or row.failure else ""
    ),
}


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.0e}"


COMPARED = (
    "- processor: two odd-sized pictures, wide and upright, as they are prepared here and by the library's own "
    "processor or transform: largest difference, over the largest number where that is above 1 (limit 1e-4)",
    "- teacher: largest difference of the original as it is loaded here and the library's own forward pass, at the "
    "model's own size, over the largest output (limit 1e-5)",
)


def markdown(
    rows: list[Row], machine: dict[str, Any], method: Method, subset: str = "", processors: Sequence[Processor] = ()
) -> str:
    config = method.config_class()
    start, half = described(method.start(config)), described(half_way(method, config))
    versions = ", ".join(f"{name} {version}" for name, version in machine.items())
    lines = [
        "# Coverage",
        "",
        f"Written by `python benchmarks/coverage.py --method {method.name}`; do not edit. Random weights, biases and "
        f"BatchNorm statistics; float32; {versions}.{subset}",
        "",
        *(COMPARED if method.name == "bcos" else ()),
        f"- identity error: largest difference of student ({start}) and original, over the largest output",
        "- ledger: largest |score - input part - constants| over max(1, |score|); of the student the worse of "
        f"{start} and {half}; of the original as it is",
        "- ledger, carried: the worst of the same of direct part + carried part + constants, and of the carried biases "
        "one by one, with none, half and all of the biases carried (`set_strength` moves `carry`); of BatchNorms from "
        f"windows of {' and of '.join(f'{window:g}' for window in WINDOWS)} places. Empty where nothing is carried",
        f"- input's share: |input part| in |input part| + |constants|, at {start}",
        "- save/load: the folder loads strictly and computes the same",
        "- another size: the student equals its original at a size that the conversion did not see",
        "",
        "| library | families | of which all swept members convert | rest |",
        "| --- | --- | --- | --- |",
    ]
    for library, found in summary(rows).items():
        share = f"{found['convert']} ({found['convert'] / found['families']:.0%})"
        lines.append(f"| {library} | {found['families']} | {share} | {', '.join(found['rest']) or '-'} |")
    for library in dict.fromkeys(row.library for row in rows):
        lines += ["", f"## {library}", "", f"| {' | '.join(COLUMNS)} |", "| --- " * len(COLUMNS) + "|"]
        for row in rows:
            if row.library == library:
                lines.append(f"| {' | '.join(cell(row).replace('|', ' ') for cell in COLUMNS.values())} |")
    if processors:
        lines += ["", *table(processors)]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=METHODS, default="bcos", help="the target family")
    parser.add_argument("--only", nargs="+", default=[], help="entries whose library, family or name holds a word")
    parser.add_argument("--first", action="store_true", help="one entry of every family: the first that zoo.py names")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one model")
    parser.add_argument("--out", type=Path, help="default: docs/coverage.md, of another method docs/coverage-METHOD.md")
    parser.add_argument("--json", type=Path, help="default: runs/coverage.json, or runs/coverage-METHOD.json")
    options = parser.parse_args()
    stem = "coverage" if options.method == "bcos" else f"coverage-{options.method}"
    options.out = options.out or ROOT / "docs" / f"{stem}.md"
    options.json = options.json or ROOT / "runs" / f"{stem}.json"
    wanted = [
        entry
        for entry in (first_of_families() if options.first else entries())
        if not options.only
        or any(word in f"{entry.library}/{entry.family}/{entry.architecture}" for word in options.only)
    ]
    started = time.monotonic()
    rows = sweep(wanted, options.jobs, options.timeout, options.method)
    machine = {"Python": platform.python_version(), "torch": torch.__version__}
    for library in ("timm", "open_clip", "transformers"):
        machine[library] = __import__(library).__version__
    options.json.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "method": options.method,
        "machine": machine,
        "summary": summary(rows),
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    options.json.write_text(json.dumps(result, indent=1))
    if not options.only:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        subset = " One architecture of every family: the first that `benchmarks/zoo.py` names." if options.first else ""
        prepared = processors() if options.method == "bcos" else []
        options.out.write_text(markdown(rows, machine, find_method(options.method), subset, prepared))
    for row in rows:
        if not row.converts:
            why = row.refusal or row.failure or "not exact"
            print(f"{row.library}/{row.family}/{row.architecture}: {why.strip()}")
            print(f"    identity {row.identity} ledger {row.ledger_student} of the original {row.ledger_teacher}")
    for library, found in summary(rows).items():
        print(f"{library}: {found['convert']} of {found['families']} families convert; rest: {found['rest']}")
    print(f"{len(rows)} models in {(time.monotonic() - started) / 60:.1f} minutes; wrote {options.json}")


if __name__ == "__main__":
    main()
