"""What a step of `align` costs beyond its models: writes the section "Overhead of a step" of docs/performance.md.

    python benchmarks/align_step.py --data FOLDER [--steps 12]

The real loop runs, on the shards FOLDER/train-*.tar, by the shipped recipes at their sizes. After each of its steps the
same process runs the bare step on the same tensors: teacher forward, student forward, loss, backward, nothing else. So
the two are paired, and share whatever else the machine does. What is compared is CPU time of this process on one
thread; pictures are decoded in two other processes.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from bcosify.align.log import PhaseLog
from bcosify.align.objectives import observe
from bcosify.align.pictures import Pictures
from bcosify.align.recipe import load_recipe
from bcosify.align.stepper import Stepper
from bcosify.align.trainer import AlignConfig, align
from bcosify.convert import convert, save
from bcosify.convert.layers import batch_statistics

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- align_step.py -->", "<!-- /align_step.py -->"
WARM_UP = 2  # steps of a phase that are not counted
MODELS = (("bundled:dinov2_small", "bcos/vit"), ("bundled:efficientnet_lite0", "bcos/cnn"))


class Stopwatch:
    """CPU seconds of each step of the loop, of the bare step after it, and of the loop's parts."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forgets what was timed: another run begins."""
        self.phases: dict[int, list[tuple[float, float]]] = defaultdict(list)
        self.parts: dict[int, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        self.pending: dict[str, float] = defaultdict(float)
        self.begin = 0.0
        self.number = 0
        self.last: tuple[Any, ...] = ()

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            begin = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.pending[name] += time.process_time() - begin

        return call

    def install(self) -> None:
        """Puts the stopwatch around the loop's parts, and the bare step after each step."""
        backward, batches, step = Stepper._backward, Pictures.batches, PhaseLog.step

        def noted(this: Any, pictures: Any) -> Any:
            statistics = batch_statistics if this.phase.batch_statistics else contextlib.nullcontext
            self.last = (this.run.teacher, this.objective.taps, this.prepared, pictures, statistics)
            return backward(this, pictures)

        def fetched(this: Any, *args: Any) -> Any:
            iterator = batches(this, *args)
            following = self.timed("next batch from the workers", lambda: next(iterator, None))
            self.begin = time.process_time()
            while (batch := following()) is not None:
                yield batch
                self.bare(self.number)

        def logged(this: Any, progress: Any, losses: Any, norm: Any) -> None:
            step(this, progress, losses, norm)
            self.number = this.number

        Stepper._backward = self.timed("teacher, student, loss, backward", noted)
        Stepper._move = self.timed("B and beta", Stepper._move)
        Pictures.batches = fetched
        Pictures.normalised = self.timed("pictures to floats", Pictures.normalised)
        PhaseLog.step = self.timed("logging", logged)
        Accelerator.clip_grad_norm_ = self.timed("clipping", Accelerator.clip_grad_norm_)
        AcceleratedOptimizer.step = self.timed("optimizer", AcceleratedOptimizer.step)
        AcceleratedOptimizer.zero_grad = self.timed("zero_grad", AcceleratedOptimizer.zero_grad)

    def bare(self, phase: int) -> None:
        """Ends the loop's step; runs and times the bare one."""
        whole = time.process_time() - self.begin
        teacher, taps, prepared, pictures, statistics = self.last
        prepared.optimizer.optimizer.zero_grad()
        begin = time.process_time()
        with statistics(prepared.model):
            calls, output = observe(teacher, pictures, taps)
            prepared.module(pictures, calls, output)["total"].backward()
        self.phases[phase].append((whole, time.process_time() - begin))
        prepared.optimizer.optimizer.zero_grad()
        if len(self.phases[phase]) > WARM_UP:
            for name, seconds in self.pending.items():
                self.parts[phase][name] += seconds
        self.pending.clear()
        self.begin = time.process_time()


def measured(watch: Stopwatch, reference: str, name: str, data: Path, steps: int, folder: Path) -> list[dict[str, Any]]:
    """One row a phase of the recipe `name`, by a stopwatch that is installed."""
    watch.clear()
    recipe = load_recipe(name)
    never = 10**9
    phases = tuple(dataclasses.replace(p, pictures=(steps + WARM_UP) * recipe.batch_size) for p in recipe.phases)
    recipe = dataclasses.replace(
        recipe, phases=phases, held_out=16, evaluate_every=never, checkpoint_every=never, precision="no"
    )
    run = save(convert(reference), folder / "run")
    align(AlignConfig(run, str(data / "train-*.tar"), folder / "out", recipe, quiet=True))
    rows = []
    for number, phase in enumerate(phases):
        pairs = watch.phases[number][WARM_UP:]
        # The last step also measures, saves and checks: it is not a step like the others.
        pairs = pairs[:-1] if len(pairs) > 1 else pairs
        ratios = sorted(whole / bare - 1 for whole, bare in pairs)
        bare = sum(b for _, b in pairs) / len(pairs)
        rows.append(
            {
                "model": reference.partition(":")[2],
                "objective": phase.objective,
                "image_size": recipe.image_size,
                "batch_size": recipe.batch_size,
                "steps": len(pairs),
                "bare_ms": 1000 * bare,
                "overhead": statistics.median(ratios),
                "low": ratios[len(ratios) // 4],
                "high": ratios[-1 - len(ratios) // 4],
                "parts_ms": {part: 1000 * seconds / (len(pairs) + 1) for part, seconds in watch.parts[number].items()},
            }
        )
    return rows


def report(rows: list[dict[str, Any]]) -> str:
    lines = [
        "## Overhead of a step", "",
        "What a step of `align` costs beyond teacher forward, student forward, loss and backward: fetching the batch, "
        "normalising, schedule, clipping, optimizer, logging. Paired in one process (`benchmarks/align_step.py`): "
        f"CPU time on one thread, torch {torch.__version__.partition('+')[0]}, median over steps with quartiles.", "",
        "| model | objective | pictures | bare step | overhead | quartiles |", "| --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for row in rows:
        lines.append(
            f"| {row['model']} | {row['objective']} | {row['batch_size']} of {row['image_size']} px | "
            f"{row['bare_ms']:.0f} ms | **{100 * row['overhead']:.1f} %** | "
            f"{100 * row['low']:.1f} to {100 * row['high']:.1f} % |"
        )
    names = list(dict.fromkeys(name for row in rows for name in row["parts_ms"]))
    heads = [f"{row['model']}, {row['objective']}" for row in rows]
    lines += ["", "Where the time of a whole step goes, in ms:", "", f"| part | {' | '.join(heads)} |"]
    lines += ["| --- |" + " --- |" * len(rows)]
    lines += [
        f"| {name} | " + " | ".join(f"{row['parts_ms'].get(name, 0.0):.1f}" for row in rows) + " |" for name in names
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--only", default="", help="a part of a model's name")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "align_step.json")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "performance.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = json.loads(options.json.read_text()) if options.json.is_file() else []
    watch = Stopwatch()
    watch.install()
    for reference, recipe in MODELS:
        if options.only in reference:
            with tempfile.TemporaryDirectory() as folder:
                fresh = measured(watch, reference, recipe, options.data, options.steps, Path(folder))
            rows = [row for row in rows if row["model"] != fresh[0]["model"]] + fresh
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(rows, indent=1) + "\n")
    text = options.out.read_text() if options.out.is_file() else f"# Performance\n\n{BEGIN}\n{END}\n"
    if BEGIN not in text:
        text += f"\n{BEGIN}\n{END}\n"
    before, _, rest = text.partition(BEGIN)
    options.out.write_text(f"{before}{BEGIN}\n{report(rows)}\n{END}{rest.partition(END)[2]}")
    print(report(rows))


if __name__ == "__main__":
    main()
