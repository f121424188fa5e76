"""What happens to an alignment run when things go wrong: writes docs/reliability.md.

    python benchmarks/reliability.py [--kills 20]

A tiny model is aligned on photographs from scikit-image by the real command, undisturbed once, and then once for every
fault. After a fault the run is resumed where that is the way out; its metrics and weights must then be those of the
undisturbed run, bit for bit.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import io
import json
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
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from bcosify.align import state
from bcosify.align.log import METRICS
from bcosify.cli.main import main as main_of_command
from bcosify.convert import convert, load_teacher, save
from bcosify.core.files import new_file
from bcosify.data.pack import write_shards
from PIL import Image
from safetensors.torch import load_file
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 900  # seconds until a run counts as hanging
LAST_ROW = 20  # of the log, at which a run may be killed
GONE = 10  # seconds in which all that a killed run had started must have ended
WORKERS = ("--set", "workers=2")
RECIPE = """
pressure: B is 2 and all biases are gone.
image_size: 64
batch_size: 4
phases:
  - {objective: block-local, pictures: 40, learning_rate: 5.0e-3, relative: true, calibrate: 8}
  - {objective: end-to-end, pictures: 40, learning_rate: 2.0e-3, relative: true}
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

    def start(self, name: str, *more: str) -> subprocess.Popen[str]:
        """The command in a session of its own, so that a signal can go to all that it starts."""
        return subprocess.Popen(
            self.command(name, *more),
            env=_environment(), stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    def command(self, name: str, *more: str, shards: Path | None = None, processes: int = 1) -> list[str]:
        launch = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "recipes/accelerate/cpu.yaml")]
        words = ["-m", "bcosify.cli", "align", str(self.run), "--data", str(shards or self.shards)]
        words += ["--recipe", str(self.folder / "recipe.yaml"), "--out", str(self.folder / name), *more]
        return [sys.executable, *(launch if processes > 1 else []), *words]

    def align(
        self, name: str, *more: str, shards: Path | None = None, processes: int = 1
    ) -> subprocess.CompletedProcess[str]:
        """The command to its end: one process by the command's own function, as libraries take long to be imported."""
        words, told = self.command(name, *more, shards=shards, processes=processes), io.StringIO()
        if processes > 1:
            return subprocess.run(words, env=_environment(), capture_output=True, text=True, timeout=LIMIT)
        with contextlib.redirect_stderr(told), warnings.catch_warnings():
            warnings.simplefilter("default")
            try:
                code = main_of_command(words[words.index("align") :])
            except BaseException:  # noqa: BLE001 - what the interpreter would do
                traceback.print_exc()
                code = 1
        return subprocess.CompletedProcess(words, code, "", told.getvalue())

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
    """The main process alone is killed: its workers and their fork server have to notice."""
    name = f"kill-{number}"
    process = bench.start(name, *WORKERS)
    _wait_for_step(bench, name, rows)
    time.sleep(after)
    process.kill()
    process.communicate(timeout=LIMIT)
    gone = _seconds_until_gone(process.pid)
    found = sorted(path.name for path in (bench.folder / f"{name}.run" / state.CHECKPOINTS).glob("step-*"))
    newest = f"newest checkpoint {found[-1]}" if found else "before the first checkpoint"
    happened = f"{newest}; workers and fork server gone after {gone:.1f} s"
    fault = f"kill -9 with 2 workers, {1000 * after:.0f} ms after row {rows} of the log"
    row = _resumed_or_started(bench, fault, happened, name, *WORKERS)
    return dataclasses.replace(row, good=row.good and gone < GONE)


def group_signal(bench: Bench, *, signal_name: str, code: int) -> Row:
    """What Slurm, systemd, `timeout` and a terminal do: every process of the run is sent the signal."""
    name = f"group-{signal_name}"
    process = bench.start(name, *WORKERS)
    _wait_for_step(bench, name, 5)
    asked = time.monotonic()
    os.killpg(process.pid, getattr(signal, signal_name))
    _, said = process.communicate(timeout=LIMIT)
    gone = _seconds_until_gone(process.pid)
    seconds = time.monotonic() - asked
    happened = f"checkpoint written, exit {process.returncode} after {seconds:.1f} s, all processes gone"
    row = _resumed_or_started(bench, f"{signal_name} to the whole group, 2 workers", happened, name, *WORKERS)
    good = row.good and process.returncode == code and "--resume" in said and "Traceback" not in said and gone < GONE
    return dataclasses.replace(row, good=good)


def worker_killed(bench: Bench) -> Row:
    name = "worker"
    process = bench.start(name, *WORKERS)
    _wait_for_step(bench, name, 5)
    (server,) = [pid for pid in _children(process.pid) if _children(pid)]
    os.kill(_children(server)[0], signal.SIGKILL)
    _, said = process.communicate(timeout=LIMIT)
    row = _resumed_or_started(bench, "a worker is killed", f"exit {process.returncode}: {_last(said)}", name)
    return dataclasses.replace(row, good=row.good and process.returncode == 1 and _one_line(said))


def small_shared_memory(bench: Bench) -> Row:
    ended = subprocess.run(
        [*_with_shared_memory("64k"), *bench.command("shm", *WORKERS)],
        env=_environment(), capture_output=True, text=True, timeout=LIMIT,
    )  # fmt: skip
    row = bench.refused("/dev/shm of 64 kB, 2 workers", ended, "shm", "--set workers=0")
    return dataclasses.replace(row, good=row.good and _one_line(ended.stderr))


def shared_memory_fills(bench: Bench) -> Row:
    """Another program takes all of /dev/shm while the run is under way, and what is freed: here, from step 5 on."""
    name, rows = "shm-full", bench.folder / "shm-full.run" / METRICS
    wait = f"while ! grep -qs '\"step\": 5,' {rows}; do sleep 0.05; done"
    wait += "; for i in $(seq 2000); do head -c 1m /dev/zero > /dev/shm/other$i; sleep 0.01; done"
    ended = subprocess.run(
        [*_with_shared_memory("1m", f"({wait}) 2>/dev/null &"), *bench.command(name, *WORKERS)],
        env=_environment(), capture_output=True, text=True, timeout=LIMIT,
    )  # fmt: skip
    happened = f"exit {ended.returncode}: {_last(ended.stderr)}"
    row = _resumed_or_started(bench, "/dev/shm is full on the way, 2 workers", happened, name, "--set", "workers=0")
    return dataclasses.replace(row, good=row.good and ended.returncode == 1 and "workers=0" in ended.stderr)


def damaged(bench: Bench, *, fault: str, damage: Callable[[Path], object]) -> Row:
    """`damage` is done to the newest checkpoint of a killed run; the one before it takes its place."""
    name = re.sub(r"\W+", "-", fault)
    if not (bench.folder / "cut.run").exists():
        _killed_at(bench, "cut", 14)
    shutil.copytree(bench.folder / "cut.run", bench.folder / f"{name}.run")
    *_, older, newest = sorted((bench.folder / f"{name}.run" / state.CHECKPOINTS).glob("step-*"))
    damage(newest)
    ended = bench.align(name, "--resume")
    told = next((line for line in ended.stderr.splitlines() if older.name in line), "")
    good = ended.returncode == 0 and newest.name in told and bench.same(name)
    happened = told.removeprefix("bcosify: ") or _last(ended.stderr)
    kept = "resumed: bit for bit the undisturbed run" if good else _last(ended.stderr)
    return Row(f"newest checkpoint: {fault}", happened[:200], kept, good)


def torn_metrics(bench: Bench) -> Row:
    shutil.copytree(bench.folder / "cut.run", bench.folder / "torn.run")
    path = bench.folder / "torn.run" / METRICS
    lines = path.read_text().splitlines()
    path.write_bytes("\n".join([*lines[:-1], lines[-1][:-1]]).encode() + b'\n{"held_out": {"pictures": 4}\n\xff\x00')
    happened = "the line is dropped"
    return _resumed_or_started(bench, "the last line of metrics.jsonl is torn", happened, "torn")


def finished(bench: Bench) -> Row:
    ended = bench.align("whole", "--resume")
    good = ended.returncode == 0 and "finished" in ended.stderr
    return Row("--resume of a finished run", f"exit {ended.returncode}: {_last(ended.stderr)}", "as it was", good)


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
    _killed_at(bench, "recipe", 12)
    ended = bench.align("recipe", "--resume", "--set", "seed=1")
    return bench.refused("resumed with another recipe", ended, "recipe", "+seed: 1")


def changed_shards(bench: Bench) -> Row:
    _killed_at(bench, "data", 12)
    shards = _copy(bench, "fewer")
    sorted(shards.glob("*.tar"))[-1].unlink()
    return bench.refused(
        "resumed on other shards", bench.align("data", "--resume", shards=shards), "data", "not the data"
    )


def _overwritten(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 4000] = b"\x7f" * 4000
    path.write_bytes(data)


def _later(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": state.FORMAT + 1}))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "student.safetensors is cut": lambda folder: os.truncate(folder / state.STUDENT, 20000),
    "4,000 bytes are 0x7f": lambda folder: _overwritten(folder / state.STUDENT),
    "state.json is missing": lambda folder: (folder / state.PROGRESS).unlink(),
    "state.json is empty": lambda folder: (folder / state.PROGRESS).write_text(""),
    "half copied": lambda folder: (folder / state.MARK).unlink(),
    "of a later version": lambda folder: _later(folder / state.MARK),
}

FAULTS: dict[str, Callable[[Bench], Row]] = {
    "term": terminated,
    **{
        f"group-{name}": functools.partial(group_signal, signal_name=name, code=code)
        for name, code in (("SIGTERM", 0), ("SIGHUP", 0), ("SIGINT", 130))
    },
    "worker": worker_killed,
    "shm-small": small_shared_memory,
    "shm-full": shared_memory_fills,
    **{
        f"damaged-{number}": functools.partial(damaged, fault=fault, damage=damage)
        for number, (fault, damage) in enumerate(DAMAGES.items())
    },
    "torn": torn_metrics,
    "finished": finished,
    "two": one_of_two_dies,
    "disk": full_disk,
    "truncated": truncated_shard,
    "missing": missing_shard,
    "corrupt": corrupt_picture,
    "nan": not_a_number,
    "recipe": changed_recipe,
    "shards": changed_shards,
}


# ------------------------------------------------------------------------------------------------------------- helpers


def _resumed_or_started(bench: Bench, fault: str, happened: str, name: str, *more: str) -> Row:
    """--resume where there is a run, else the same command again; what comes out must be the undisturbed run."""
    absent = not (bench.folder / name).exists()
    started = (bench.folder / f"{name}.run" / "recipe.yaml").is_file()
    ended = bench.align(name, *(["--resume"] if started else []), *more)
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


def _seconds_until_gone(group: int) -> float:
    """How long processes of a session outlive the one that has just ended; at most LIMIT."""
    begun = time.monotonic()
    while _alive(group) and time.monotonic() - begun < LIMIT:
        time.sleep(0.05)
    return time.monotonic() - begun


def _alive(group: int) -> list[int]:
    """Processes of a group, but for those that ended and are not yet collected."""
    found = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if folder.name.isdigit():
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                found += [int(folder.name)] if int(fields[2]) == group and fields[0] != "Z" else []
    return found


def _with_shared_memory(size: str, first: str = "") -> list[str]:
    """Words before a command that give it a /dev/shm of its own (Linux, as root)."""
    return [
        "unshare",
        "-m",
        "sh",
        "-c",
        f'mount -t tmpfs -o size={size} tmpfs /dev/shm && {{ {first} exec "$@"; }}',
        "sh",
    ]


def _one_line(said: str) -> bool:
    """Whether a run says what failed in a line of its own, without a traceback."""
    return "Traceback" not in said and said.splitlines()[-1].startswith("bcosify align: ")


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


HEAD = """# Reliability

Written by `python benchmarks/reliability.py`; do not edit. A tiny model, the real command, one fault each. A run that
hangs would be an error here; how many seconds something takes depends on what else the machine does. `--only` runs some
faults again and keeps the other rows.

| fault | what happened | what was left | as it should |
| --- | --- | --- | --- |
"""


class Table:
    """The rows of docs/reliability.md, a row a fault; written after each, as a run of all takes long."""

    def __init__(self, path: Path, keep: bool) -> None:
        lines = path.read_text().splitlines() if keep and path.is_file() else []
        cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
        self.path, self.rows = path, {row[0]: row for row in cells if row[0] not in ("fault", "---")}

    def add(self, row: Row) -> None:
        self.rows[row.fault] = [row.fault, row.happened, row.kept, "yes" if row.good else "**no**"]
        with new_file(self.path) as scratch:
            scratch.write_text(HEAD + "".join(f"| {' | '.join(cells)} |\n" for cells in self.rows.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--only", default="", help="faults whose name fits this pattern, and the kills; others stay")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "reliability.md")
    options = parser.parse_args()
    moments, table = random.Random(0), Table(options.out, bool(options.only))
    if options.kills:
        table.rows = {name: row for name, row in table.rows.items() if not name.startswith("kill -9")}
    chosen = {name: fault for name, fault in FAULTS.items() if re.search(options.only, name)}
    good = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        for number in tqdm(range(options.kills), desc="kills"):
            table.add(row := killed(bench, number, moments.randint(1, LAST_ROW), moments.uniform(0, 0.1)))
            good.append(row.good)
        for fault in tqdm(chosen.values(), desc="faults"):
            table.add(row := fault(bench))
            good.append(row.good)
    print(f"{sum(good)} of {len(good)} as they should be; wrote {options.out}")


if __name__ == "__main__":
    main()
