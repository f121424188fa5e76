"""Twelve minutes on a GPU: EfficientNet-Lite0 aligned at 112 px, measured by the columns of the study, with step times.

    python benchmarks/gpu_align.py --data FOLDER [--minutes 12] [--recipe bcos/cnn] [--set KEY=VALUE ...] [--out FOLDER]
    python benchmarks/gpu_align.py --data FOLDER --device cpu --minutes 0.5     # a smoke test: two steps, few pictures

FOLDER holds train-*.tar, val-*.tar and objects-*.tar (see recipe_study.py); with `--train` other shards are trained on.
Pictures are decoded once into the device's memory, and views are cut there; all else is what `bcosify align` does. The
budget holds everything: what is left after the teacher's columns, step times and a trial is trained, as many steps as
fit. Writes OUT/aligned, OUT/result.json, and prints the latter.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bcosify.align import state
from bcosify.align.callbacks import default_callbacks
from bcosify.align.checks import check_recipe
from bcosify.align.distributed import make_accelerator
from bcosify.align.objectives import OBJECTIVES, observe
from bcosify.align.phases import descend
from bcosify.align.pictures import Pictures
from bcosify.align.recipe import Recipe, load_recipe, scaled
from bcosify.align.run import AlignConfig, Learner, Run
from bcosify.align.schedule import strengths_at
from bcosify.convert import convert, load, load_teacher, save, set_strength, teacher_of
from bcosify.convert.history import Alignment
from bcosify.convert.layers import batch_statistics
from bcosify.convert.methods import find_method
from bcosify.data.bad import BadSamples
from bcosify.data.index import ShardIndex, index_shards
from bcosify.data.loader import Batch
from bcosify.data.names import expand
from bcosify.data.order import batch_indices
from bcosify.data.pictures import decode
from bcosify.data.views import Augment, CentreCrop, size_at
from columns import columns, map_columns, refer
from measure import DTYPES, seconds
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

TEACHER = "efficientnet_lite0"
STORED = 256  # side of a decoded picture
TRIES = 10  # crops are drawn so often until one fits, as torchvision draws them
RESERVE = 1.5  # the student's columns take this many times as long as those of the teacher's maps
# Device -> batch of the run, batches that are timed and how often, steps of the trial, most pictures of each kind.
DEFAULTS: dict[str, dict[str, Any]] = {
    "cuda": {"batch_size": 64, "timed": (64, 256), "turns": 10, "trial": 30, "limit": None},
    "cpu": {"batch_size": 16, "timed": (4, 8), "turns": 1, "trial": 2, "limit": 32},
}


# -------------------------------------------------------------------------------------------------------------- views


def crops(augment: Augment, count: int, side: int, generator: torch.Generator) -> Tensor:
    """(4, count): top, left, height, width in pixels of squares of `side`, drawn as torchvision's RandomResizedCrop."""
    area = torch.empty(TRIES, count).uniform_(*augment.scale, generator=generator) * side**2
    ratio = torch.empty(TRIES, count).uniform_(*map(math.log, augment.ratio), generator=generator).exp()
    height, width = (area / ratio).sqrt().round(), (area * ratio).sqrt().round()
    first = ((height <= side) & (width <= side)).float().argmax(0, keepdim=True)
    height, width = (length.gather(0, first)[0].clamp(1, side) for length in (height, width))
    top, left = ((torch.rand(count, generator=generator) * (side - size + 1)).floor() for size in (height, width))
    return torch.stack([top, left, height, width])


def resampling(start: Tensor, length: Tensor, side: int, size: int) -> Tensor:
    """(B, size, side): rows that take a line of `side` pixels to `size`, of the part that begins at `start` (B,) and is
    `length` (B,) long; bicubic with antialiasing, as Pillow and torchvision resize."""
    scale = (length / size)[:, None, None]
    pixel = torch.arange(side, device=start.device) + 0.5
    centre = start[:, None, None] + (torch.arange(size, device=start.device)[:, None] + 0.5) * scale
    x = ((pixel - centre) / scale.clamp_min(1)).abs()
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    kernel = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    first = start[:, None, None]
    kernel = kernel * ((pixel > first) & (pixel < first + length[:, None, None]))
    return kernel / kernel.sum(-1, keepdim=True)


def cut(pictures: Tensor, boxes: Tensor, flipped: Tensor, size: int) -> Tensor:
    """uint8 views (B, 3, size, size) of uint8 pictures (B, 3, S, S): crops (4, B) of them, `flipped` (B,) or not."""
    top, left, height, width = boxes
    rows = resampling(top, height, pictures.shape[-2], size)
    columns = resampling(left, width, pictures.shape[-1], size)
    columns = torch.where(flipped[:, None, None], columns.flip(1), columns)
    views = rows[:, None] @ pictures.float() @ columns[:, None].mT
    return views.round().clamp(0, 255).byte()


@dataclasses.dataclass(frozen=True, eq=False)
class InMemory(Pictures):
    """A run's pictures, decoded once: (N, 3, S, S) uint8 on the device to train on, normalised ones to measure on.

    Batches are a function of the seed and the step, as those of shards are; crops are drawn otherwise.
    """

    decoded: Tensor
    measured: Tensor

    def _views(self, ids: Tensor, seed: int, step: int, size: int) -> Tensor:
        generator = torch.Generator().manual_seed(int(np.random.SeedSequence([seed, step]).generate_state(1)[0]))
        boxes = crops(self.augment, len(ids), self.decoded.shape[-1], generator)
        flipped = torch.rand(len(ids), generator=generator) < self.augment.flip
        device = self.decoded.device
        return cut(self.decoded[ids.to(device)], boxes.to(device), flipped.to(device), size)

    def batches(self, first: int, end: int) -> Iterator[Batch]:
        seed, sizes = self.recipe.seed, self.recipe.image_sizes or (self.recipe.image_size,)
        for step in range(first, end):
            ids = torch.tensor(batch_indices(len(self.decoded), seed, self.recipe.batch_size, step)[2])
            yield Batch(self._views(ids, seed, step, size_at(sizes, seed, step)), ids, ())

    def calibration(self, count: int) -> Tensor:
        ids = torch.arange(count) % len(self.decoded)
        return self.normalised(self._views(ids, self.recipe.seed + 1, 0, self.recipe.image_size))

    def held_out(self) -> Iterator[Tensor]:
        for part in self.measured.split(64):
            yield part.to(self.accelerator.device)


def decoded(index: ShardIndex, device: str, limit: int | None) -> Tensor:
    """(N, 3, 256, 256) uint8 on the device: the first N = `limit` pictures, or all."""
    view = CentreCrop().view(STORED)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        pictures = pool.map(lambda i: view(decode(index.read(i))), range(min(limit or len(index), len(index))))
        return torch.stack(list(pictures)).to(device)


# ----------------------------------------------------------------------------------------------------------- the run


@dataclasses.dataclass(frozen=True, eq=False)
class Decoded:
    """Indices of shards, and what was decoded of them (see `InMemory`)."""

    train: ShardIndex
    val: ShardIndex
    pictures: Tensor
    held_out: Tensor


def aligned(folder: Path, out: Path, recipe: Recipe, data: Decoded) -> tuple[Run, float]:
    """Aligns the student in `folder` and saves it to `out`: `align`, with pictures from memory. Also says how many
    seconds a step took, after the first quarter of them."""
    config = AlignConfig(folder, "", out, recipe, quiet=True)
    for earlier in (out, config.work):
        shutil.rmtree(earlier, ignore_errors=True)
    config.work.mkdir(parents=True)
    student, accelerator = load(folder), make_accelerator(recipe.precision)
    teacher = teacher_of(student, None)
    check_recipe(recipe, student, teacher)
    bad = BadSamples(data.train, config.work / "bad_samples.jsonl", recipe.max_bad)
    preprocess, device = student.preprocess, accelerator.device
    shown = InMemory(recipe, accelerator, preprocess, data.train, data.val, bad, data.pictures, data.held_out)
    learner = Learner(student, recipe.average, device)
    progress = state.Progress(0, 0, data.train.digest)
    run = Run(config, accelerator, student, teacher.to(device), shown, learner, progress, default_callbacks())
    run.evaluate()
    ends: list[float] = []
    hook = register_optimizer_step_post_hook(lambda *_: ends.append(time.monotonic()))
    try:
        for number in range(len(recipe.phases)):
            descend(run, number)
    finally:
        hook.remove()
    first = len(ends) // 4
    each = (ends[-1] - ends[first]) / (len(ends) - 1 - first)
    curve = progress.curve
    alignment = Alignment(progress.step * recipe.batch_size, curve[-1], tuple(curve))
    save(dataclasses.replace(student, model=learner.result.cpu()).with_history(alignment=alignment), out)
    return run, each


def step_times(folder: Path, recipe: Recipe, device: str, batches: tuple[int, ...], turns: int) -> list[dict[str, Any]]:
    """Milliseconds of the teacher's forward pass, and of the student's forward and backward pass at the strengths that
    the last phase ends with; the least of some turns, after one that does not count."""
    student, phase = load(folder), recipe.phases[-1]
    teacher = teacher_of(student, None).to(device)
    model = student.model.to(device)
    set_strength(model, **strengths_at(phase, recipe.steps[-1], recipe.steps[-1]))
    objective = OBJECTIVES[phase.objective](model, recipe)
    rows = []
    for batch, name in itertools.product(batches, ("float32", "bfloat16") if device == "cuda" else ("float32",)):
        pictures = torch.randn(batch, 3, recipe.image_size, recipe.image_size, device=device)
        statistics = batch_statistics(model) if phase.batch_statistics else contextlib.nullcontext()
        with statistics, torch.autocast(device, DTYPES[name], enabled=name != "float32"):
            seen = observe(teacher, pictures, objective.taps)
            objective.centre_on(*seen)
            objective.begin()
            parts = {
                "teacher_forward_ms": lambda pictures=pictures: observe(teacher, pictures, objective.taps),
                "student_step_ms": lambda pictures=pictures, seen=seen: objective(pictures, *seen)["total"].backward(),
            }
            least = {part: min([seconds(run, device) for _ in range(turns + 1)][1:]) for part, run in parts.items()}
        model.zero_grad()
        rows.append({"batch": batch, "dtype": name, **{part: round(1e3 * time, 2) for part, time in least.items()}})
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--train", help="other shards to train on, as `bcosify align --data` takes them")
    parser.add_argument("--minutes", type=float, default=12.0, help="for everything")
    parser.add_argument("--device", choices=tuple(DEFAULTS), default="cuda")
    parser.add_argument("--recipe", default="bcos/cnn")
    parser.add_argument(
        "--set", nargs="*", default=[], help="changes to the recipe, such as phases.0.learning_rate=0.01"
    )
    parser.add_argument("--size", type=int, default=112)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    options = parser.parse_args()
    begin = time.monotonic()
    device, chosen = options.device, DEFAULTS[options.device]
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # accelerate takes a GPU where it sees one
        torch.set_num_threads(1)
    elif not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here. Pass --device cpu --minutes 0.5 for a smoke test.")

    def note(what: str) -> None:
        print(f"{time.monotonic() - begin:6.0f} s  {what}", flush=True)

    batch = options.batch_size or chosen["batch_size"]
    settings = [f"image_size={options.size}", f"batch_size={batch}", "evaluate_every=0", "checkpoint_every=0"]
    recipe = load_recipe(options.recipe, [*settings, "probe_pictures=0", *options.set])
    shards = (options.train or str(options.data / "train-*.tar"), str(options.data / "val-*.tar"))
    train, val = (index_shards(expand(paths)) for paths in shards)
    pictures = decoded(train, device, chosen["limit"])
    reference = refer(TEACHER, options.size, options.data, device, chosen["limit"])
    data = Decoded(train, val, pictures, reference.held_out)
    note(f"{len(pictures)} pictures to train on are decoded")
    before = time.monotonic()
    answer = map_columns(reference.teacher, reference)
    reserve = RESERVE * (time.monotonic() - before)
    note(f"the teacher is measured: {json.dumps(answer)}")
    method = find_method("bcos" if recipe.method == "any" else recipe.method)
    converted = convert(load_teacher(f"bundled:{TEACHER}", image_size=options.size), method.config_class())
    save(converted, options.out / "converted", overwrite=True)
    times = step_times(options.out / "converted", recipe, device, chosen["timed"], chosen["turns"])
    note("steps are timed")
    trial = scaled(recipe, chosen["trial"] * batch)
    _, each = aligned(options.out / "converted", options.out / "trial", trial, data)
    left = 60 * options.minutes - (time.monotonic() - begin) - reserve
    steps = max(2, int(0.9 * left / each))
    if left < 0:
        note(f"{options.minutes} minutes are over, or kept for what is measured at the end: two steps are taken")
    note(f"a step takes {1e3 * each:.1f} ms: {steps} steps of {batch}")
    final = dataclasses.replace(scaled(recipe, steps * batch), evaluate_every=max(batch, steps * batch // 6))
    run, _ = aligned(options.out / "converted", options.out / "aligned", final, data)
    note("it is aligned")
    student = load(options.out / "aligned").model.to(device).requires_grad_(False)
    row = {
        "experiment": "gpu",
        "teacher": TEACHER,
        "recipe": options.recipe,
        "settings": options.set,
        "image_size": options.size,
        "batch_size": batch,
        "pictures": run.progress.step * batch,
        **columns(student, reference),
        **{f"teacher_{name}": value for name, value in answer.items()},
        "curve": list(run.progress.curve),
        "step_ms": round(1e3 * each, 2),
        "step_times": times,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
    }
    (options.out / "result.json").write_text(json.dumps(row, indent=1) + "\n")
    note("it is measured")
    print(json.dumps(row))


if __name__ == "__main__":
    main()
