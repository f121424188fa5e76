"""What a step of `align` costs, and its share of the limit: teacher forward + 3 x forward of the plain model.

    python benchmarks/align.py --data FOLDER [--only dinov2] [--steps 12] [--device cuda --dtype bfloat16]

The real `align` runs, on the shards FOLDER/train-*.tar, by the shipped recipes at their sizes. Between two of its steps
the same process runs, on a batch of the same size, the bare step (teacher, student, loss, backward) part by part, and
the plain model's forward pass without a graph. So all are paired, and share whatever else the machine does. A student's
step is a forward pass and twice that for its backward pass, which is where the limit comes from. On a CPU the time is
CPU time of this process on one thread; pictures are decoded in other processes.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import os
import tempfile
from pathlib import Path
from typing import Any

import measure
import torch
from bcosify.align.objectives import OBJECTIVES, observe
from bcosify.align.recipe import Phase, Recipe, load_recipe
from bcosify.align.schedule import strengths_at
from bcosify.align.trainer import AlignConfig, align
from bcosify.convert import convert, load_teacher, save, set_strength
from bcosify.convert.layers import batch_statistics, recording, reference_gains
from torch.optim.optimizer import register_optimizer_step_post_hook

WARM_UP = 2  # steps of a phase that are not counted
NEVER = 10**9
PLAIN, PLAIN_STEP = "plain forward, no graph", "plain forward and backward"
MODELS = (("bundled:dinov2_small", "bcos/vit"), ("bundled:efficientnet_lite0", "bcos/cnn"))


class Bare:
    """The bare step of one phase, on pictures of its own, and the plain model."""

    def __init__(self, reference: str, recipe: Recipe, phase: Phase, device: str, dtype: torch.dtype) -> None:
        self.teacher = load_teacher(reference).model.to(device).requires_grad_(False)
        self.plain = copy.deepcopy(self.teacher).train(phase.batch_statistics).requires_grad_(True)
        student = convert(reference).model.to(device)
        # As a run has it: the student, before it moves.
        self.theirs = copy.deepcopy(student).requires_grad_(False)
        set_strength(student, **strengths_at(phase, 1, 1))
        self.student, self.phase, self.device, self.dtype = student, phase, device, dtype
        self.objective = OBJECTIVES[phase.objective](student, recipe)
        self.pictures = torch.randn(recipe.batch_size, 3, recipe.image_size, recipe.image_size, device=device)
        self.objective.centre_on(*observe(self.theirs, self.pictures, self.objective.taps))
        self.objective.begin()

    def seconds(self) -> dict[str, float]:
        """Of each part of one step, and of the plain model's forward pass."""
        statistics, watched = contextlib.ExitStack(), contextlib.nullcontext
        if self.phase.batch_statistics:
            statistics.enter_context(batch_statistics(self.student))
        if self.phase.reference_gains:
            statistics.enter_context(reference_gains(self.student, self.theirs))
            watched = functools.partial(recording, self.theirs)
        seen: list[Any] = []
        losses: list[Any] = []

        def forward() -> None:
            with torch.inference_mode():
                self.teacher(self.pictures)

        def observed() -> None:
            with watched():
                seen.extend(observe(self.theirs, self.pictures, self.objective.taps))

        def both() -> None:
            self.plain(self.pictures).square().mean().backward()

        with statistics, torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32):
            found = {PLAIN: measure.seconds(forward, self.device), PLAIN_STEP: measure.seconds(both, self.device)}
            parts = {
                "teacher": observed,
                "student and loss": lambda: losses.append(self.objective(self.pictures, *seen)["total"]),
                "backward": lambda: losses[0].backward(),
            }
            found |= {name: measure.seconds(part, self.device) for name, part in parts.items()}
        self.student.zero_grad()
        self.plain.zero_grad()
        return found


def measured(reference: str, name: str, options: Any, folder: Path) -> list[dict[str, Any]]:
    """One row a phase of the recipe `name`."""
    recipe, length = load_recipe(name), options.steps + WARM_UP
    phases = tuple(dataclasses.replace(phase, pictures=length * recipe.batch_size) for phase in recipe.phases)
    dtype = measure.DTYPES[options.dtype]
    recipe = dataclasses.replace(
        recipe, phases=phases, held_out=16, evaluate_every=NEVER, checkpoint_every=NEVER, probe_pictures=0,
        precision="no" if dtype == torch.float32 else "bf16",
    )  # fmt: skip
    bare = [Bare(reference, recipe, phase, options.device, dtype) for phase in phases]
    steps: list[dict[str, float]] = []
    clock = [0.0]

    def after_step(*_: Any) -> None:
        whole = _now(options.device) - clock[0]
        steps.append({"whole": whole, **bare[len(steps) // length].seconds()})
        clock[0] = _now(options.device)

    hook = register_optimizer_step_post_hook(after_step)
    try:
        run = save(convert(reference), folder / "run")
        align(AlignConfig(run, str(options.data / "train-*.tar"), folder / "out", recipe, quiet=True))
    finally:
        hook.remove()
    return [
        _row(reference, recipe, phase, steps[number * length + WARM_UP : (number + 1) * length], options)
        for number, phase in enumerate(phases)
    ]


def _now(device: str) -> float:
    """A clock whose differences are what `measure.seconds` counts."""
    if device == "cpu":
        return measure.cpu_seconds()
    torch.cuda.synchronize()
    return measure.time.perf_counter()


def _row(reference: str, recipe: Recipe, phase: Phase, steps: list[dict[str, float]], options: Any) -> dict[str, Any]:
    parts = [name for name in steps[0] if name not in ("whole", PLAIN, PLAIN_STEP)]
    for step in steps:
        step["bare"] = sum(step[part] for part in parts)
        step["limit"] = 4 * step[PLAIN]
        step["plain step"] = step[PLAIN] + step[PLAIN_STEP]
        step["rest"] = step["whole"] - step["bare"]
    row = {"row": f"{reference.partition(':')[2]}, {phase.objective}", "dtype": options.dtype, "rounds": len(steps)}
    row |= {"image_size": recipe.image_size, "batch_size": recipe.batch_size, **measure.machine(options.device)}
    row["ms"] = {name: measure.spread([1e3 * step[name] for step in steps]) for name in steps[0]}
    row["overhead"] = measure.spread([step["rest"] / step["bare"] for step in steps])
    row["share"] = measure.spread([step["limit"] / step["whole"] for step in steps])
    row["plain_share"] = measure.spread([step["plain step"] / step["whole"] for step in steps])
    row["pictures_per_second"] = measure.spread([recipe.batch_size / step["whole"] for step in steps])
    return row


def table(rows: list[dict[str, Any]]) -> str:
    heads = ["model, objective", "pictures", "step ms", "pictures/s", "limit ms", "share of it"]
    heads += ["plain training ms", "share of it", "beyond the bare step"]
    cells = [
        [
            row["row"], f"{row['batch_size']} of {row['image_size']} px", f"{row['ms']['whole']['median']:.0f}",
            f"{row['pictures_per_second']['median']:.1f}", f"{row['ms']['limit']['median']:.0f}",
            measure.bold(row["share"]), f"{row['ms']['plain step']['median']:.0f}", measure.bold(row["plain_share"]),
            _percent(row["overhead"]),
        ]
        for row in rows
    ]  # fmt: skip
    names = [PLAIN, PLAIN_STEP, "teacher", "student and loss", "backward", "rest"]
    parts = [[name, *(f"{row['ms'][name]['median']:.0f}" for row in rows)] for name in names]
    machine = rows[0]
    return "\n".join([
        "## Alignment step", "",
        "A step of `align`, against the limit: the teacher's forward pass and three times the plain model's, at the "
        "plain model's own speed. \"Plain training\" is the teacher's forward pass and the plain model's own forward "
        "and backward pass, measured (with batch statistics where the phase has them). \"Beyond the bare "
        "step\" is what is not teacher, student, loss and backward: "
        "fetching, normalising, clipping, optimizer, schedule, logging. Medians and quartiles over steps that were "
        f"paired in one process; {machine['device']}, {machine['threads']} thread, {machine['dtype']}, "
        f"torch {machine['torch']} (`benchmarks/align.py`).",
        "", measure.markdown(heads, cells), "", "Where the time goes, in ms:", "",
        measure.markdown(["part", *(row["row"] for row in rows)], parts),
    ])  # fmt: skip


def _percent(ratio: dict[str, float]) -> str:
    return f"{100 * ratio['median']:.1f} % ({100 * ratio['low']:.1f}–{100 * ratio['high']:.1f})"


def main() -> None:
    parser = measure.options(__doc__, "align", rounds=0)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args()
    measure.prepare(options.device)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for reference, recipe in MODELS:
        if options.only in reference:
            with tempfile.TemporaryDirectory() as folder:
                rows = measured(reference, recipe, options, Path(folder))
            measure.finish(options, "align.py", rows, table)
            print(table(rows), flush=True)


if __name__ == "__main__":
    main()
