"""What happens to an alignment run when things go wrong: writes docs/reliability.md.

    python benchmarks/reliability.py [--kills 20]

A tiny model is aligned on photographs from scikit-image by the real command, undisturbed once, and then once for every
fault. After a fault the run is resumed where that is the way out; its metrics and weights must then be those of the
undisturbed run, bit for bit.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from bcosify.align import state
from bcosify.align.log import METRICS
from bcosify.convert import convert, load_teacher, save
from bcosify.data.pack import write_shards
from PIL import Image
from safetensors.torch import load_file
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 240  # seconds until a run counts as hanging
RECIPE = """
pressure: B is 2 and all biases are gone.
image_size: 64
batch_size: 4
phases:
  - {objective: block-local, pictures: 80, learning_rate: 5.0e-3, relative: true, calibrate: 8}
  - {objective: end-to-end, pictures: 80, learning_rate: 2.0e-3, relative: true}
held_out: 8
evaluate_every: 40
checkpoint_every: 12
log_every: 1
workers: 0
max_bad: 0.2
"""


@dataclasses.dataclass(frozen=True)
class Row:
    """One fault: what the run did, and whether what came out in the end is what should."""

    fault: str
    happened: str
    kept: str
    good: bool


class Bench:
    """A converted model, shards, and the undisturbed run that all others are compared with."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run, self.shards = folder, folder / "run", folder / "shards"
        torch.manual_seed(0)
        save(convert(load_teacher("timm:test_vit", pretrained=False, image_size=64)), self.run)
        _photographs(folder / "pictures")
        write_shards(folder / "pictures", self.shards, size=None, per_shard=16, progress=False)
        (folder / "recipe.yaml").write_text(RECIPE)
        assert self.align("whole").returncode == 0

    def command(self, name: str, *more: str, shards: Path | None = None, processes: int = 1) -> list[str]:
        launch = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "recipes/accelerate/cpu.yaml")]
        words = ["-m", "bcosify.cli", "align", str(self.run), "--data", str(shards or self.shards)]
        words += ["--recipe", str(self.folder / "recipe.yaml"), "--out", str(self.folder / name), *more]
        return [sys.executable, *(launch if processes > 1 else []), *words]

    def align(self, name: str, *more: str, **options) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(name, *more, **options), env=_environment(), capture_output=True, text=True, timeout=LIMIT
        )

    def same(self, name: str) -> bool:
        """Whether run `name` ended as the undisturbed one did: every metric but the speed, every weight."""
        ours, theirs = (self.folder / n for n in (name, "whole"))
        if not (ours / "model.safetensors").is_file() or self.metrics(name) != self.metrics("whole"):
            return False
        a, b = (load_file(folder / "model.safetensors") for folder in (ours, theirs))
        return all(torch.equal(a[key], b[key]) for key in b)

    def metrics(self, name: str) -> list[str]:
        lines = (self.folder / f"{name}.run" / METRICS).read_text().splitlines()
        return [line.partition(', "pictures_per_second"')[0] for line in lines]

    def refused(self, fault: str, ended: subprocess.CompletedProcess[str], name: str, said: str) -> Row:
        """The row of a fault that a run must refuse, in words."""
        good = ended.returncode == 1 and said in ended.stderr and not (self.folder / name).exists()
        return Row(fault, f"exit {ended.returncode}: {_last(ended.stderr)}", "nothing half-written", good)


# -------------------------------------------------------------------------------------------------------------- faults


def killed(bench: Bench, number: int, rows: int, after: float) -> Row:
    name = f"kill-{number}"
    _killed_at(bench, name, rows, after)
    found = sorted(path.name for path in (bench.folder / f"{name}.run" / state.CHECKPOINTS).glob("step-*"))
    happened = f"newest checkpoint {found[-1]}" if found else "before the first checkpoint"
    return _resumed_or_started(bench, f"kill -9, {1000 * after:.0f} ms after row {rows} of the log", happened, name)


def terminated(bench: Bench) -> Row:
    name = "term"
    process = subprocess.Popen(bench.command(name), env=_environment(), stderr=subprocess.PIPE, text=True)
    _wait_for_step(bench, name, 5)
    asked = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=LIMIT)
    happened = f"checkpoint written, exit {process.returncode} after {time.monotonic() - asked:.1f} s"
    row = _resumed_or_started(bench, "SIGTERM", happened, name)
    return dataclasses.replace(row, good=row.good and process.returncode == 0)


def one_of_two_dies(bench: Bench) -> Row:
    name = "two"
    process = subprocess.Popen(
        bench.command(name, processes=2), env=_environment(), stderr=subprocess.DEVNULL, start_new_session=True
    )
    _wait_for_step(bench, name, 5)
    workers = _children(process.pid)
    os.kill(workers[-1], signal.SIGKILL)
    code = process.wait(timeout=LIMIT)
    ended = bench.align(name, "--resume", processes=2)
    good = code != 0 and ended.returncode == 0 and (bench.folder / name / "model.safetensors").is_file()
    return Row("one of two processes is killed", f"the launcher ends both, exit {code}", "resumed with two", good)


def full_disk(bench: Bench) -> Row:
    """A limit on file sizes stands in for a full disk: writing a checkpoint's weights fails."""
    name = "disk"
    size = (bench.run / "model.safetensors").stat().st_size // 2
    limit: Callable[[], None] = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))  # noqa: E731
    ended = subprocess.run(
        bench.command(name), env=_environment(), capture_output=True, text=True, timeout=LIMIT, preexec_fn=limit
    )
    return _resumed_or_started(
        bench, "disk full at a checkpoint", f"exit {ended.returncode}: {_last(ended.stderr)}", name
    )


def truncated_shard(bench: Bench) -> Row:
    shards = _copy(bench, "truncated")
    first = sorted(shards.glob("*.tar"))[0]
    first.write_bytes(first.read_bytes()[:10000])
    return bench.refused("truncated shard", bench.align("truncated", shards=shards), "truncated", "is truncated")


def missing_shard(bench: Bench) -> Row:
    missing = bench.shards / "{00000..00009}.tar"
    return bench.refused("missing shard", bench.align("missing", shards=missing), "missing", "do not exist")


def corrupt_picture(bench: Bench) -> Row:
    shards = _copy(bench, "corrupt")
    first = sorted(shards.glob("*.tar"))[0]
    with tarfile.open(first) as tar:
        place = tar.getmembers()[2]
    data = bytearray(first.read_bytes())
    data[place.offset_data : place.offset_data + 64] = bytes(64)
    first.write_bytes(data)
    ended = bench.align("corrupt", shards=shards)
    listed = bench.folder / "corrupt.run" / "bad_samples.jsonl"
    good = ended.returncode == 0 and listed.is_file() and place.name.partition(".")[0] in listed.read_text()
    return Row(
        "corrupt JPEG",
        f"exit {ended.returncode}: another picture stands in for it",
        "listed in bad_samples.jsonl",
        good,
    )


def not_a_number(bench: Bench) -> Row:
    ended = bench.align("nan", "--set", "phases.0.learning_rate=1e30", "phases.0.clip=1e30")
    return bench.refused("loss is no number", ended, "nan", "largest gradient")


def changed_recipe(bench: Bench) -> Row:
    _killed_at(bench, "recipe", 20)
    ended = bench.align("recipe", "--resume", "--set", "seed=1")
    return bench.refused("resumed with another recipe", ended, "recipe", "+seed: 1")


def changed_shards(bench: Bench) -> Row:
    _killed_at(bench, "data", 20)
    shards = _copy(bench, "fewer")
    sorted(shards.glob("*.tar"))[-1].unlink()
    return bench.refused(
        "resumed on other shards", bench.align("data", "--resume", shards=shards), "data", "not the data"
    )


FAULTS: tuple[Callable[[Bench], Row], ...] = (
    terminated,
    one_of_two_dies,
    full_disk,
    truncated_shard,
    missing_shard,
    corrupt_picture,
    not_a_number,
    changed_recipe,
    changed_shards,
)


# ------------------------------------------------------------------------------------------------------------- helpers


def _resumed_or_started(bench: Bench, fault: str, happened: str, name: str) -> Row:
    """--resume where there is a run, else the same command again; what comes out must be the undisturbed run."""
    absent = not (bench.folder / name).exists()
    started = (bench.folder / f"{name}.run" / "recipe.yaml").is_file()
    ended = bench.align(name, *(["--resume"] if started else []))
    good = absent and ended.returncode == 0 and bench.same(name)
    kept = "resumed" if started else "started again"
    return Row(fault, happened, f"{kept}: bit for bit the undisturbed run" if good else _last(ended.stderr), good)


def _killed_at(bench: Bench, name: str, rows: int, after: float = 0.0) -> None:
    process = subprocess.Popen(bench.command(name), env=_environment(), stderr=subprocess.DEVNULL)
    _wait_for_step(bench, name, rows)
    time.sleep(after)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=LIMIT)


def _wait_for_step(bench: Bench, name: str, rows: int) -> None:
    path, end = bench.folder / f"{name}.run" / METRICS, time.monotonic() + LIMIT
    while time.monotonic() < end:
        if path.is_file() and len(path.read_text().splitlines()) >= rows:
            return
        time.sleep(0.05)
    raise TimeoutError(f"{name} wrote no metrics")


def _children(parent: int) -> list[int]:
    """Processes that `parent` started, oldest first."""
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def _copy(bench: Bench, name: str) -> Path:
    return Path(shutil.copytree(bench.shards, bench.folder / f"{name}-shards"))


def _photographs(folder: Path) -> None:
    from skimage import data

    folder.mkdir()
    for name, array in {"cat": data.chelsea(), "coffee": data.coffee(), "rocket": data.rocket()}.items():
        picture = Image.fromarray(array)
        for i in range(16):
            left, top = 12 * i, 6 * i
            picture.crop((left, top, left + 160, top + 160)).resize((96, 96)).save(folder / f"{name}-{i}.jpg")


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def _last(text: str) -> str:
    """The line that says what failed, short enough for a table."""
    lines = [line for line in text.splitlines() if line.startswith("bcosify ")] or text.splitlines() or [""]
    return re.sub(r"\S*/(?=[\w.-]+)", "", lines[-1].replace("|", "/"))[:160]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "reliability.md")
    options = parser.parse_args()
    moments = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        rows = [fault(bench) for fault in tqdm(FAULTS, desc="faults")]
        for number in tqdm(range(options.kills), desc="kills"):
            rows.append(killed(bench, number, moments.randint(1, 42), moments.uniform(0, 0.1)))
    table = io.StringIO()
    table.write("# Reliability\n\nWritten by `python benchmarks/reliability.py`; do not edit. ")
    table.write("A tiny model, the real command, one fault each. A run that hangs would be an error here.\n\n")
    table.write("| fault | what happened | what was left | as it should |\n| --- | --- | --- | --- |\n")
    for row in rows:
        table.write(f"| {row.fault} | {row.happened} | {row.kept} | {'yes' if row.good else '**no**'} |\n")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(table.getvalue())
    print(f"{sum(row.good for row in rows)} of {len(rows)} as they should be; wrote {options.out}")


if __name__ == "__main__":
    main()
