"""Runs that end hard, and what a resumed run makes of what is left. Kills are in test_trainer, and in benchmarks."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from bcosify.align import log, state
from bcosify.align.checks import check_data
from bcosify.align.phases import _memory_said
from bcosify.align.prepare import _cut_metrics
from bcosify.align.run import AlignConfig, signals_noted
from bcosify.align.trainer import align
from bcosify.convert import load
from bcosify.core.errors import BcosifyError, CheckpointError, DataError, RecipeError
from bcosify.data import workers

from runs import PHASES, RECIPE, aligned, rows

ONE = dataclasses.replace(RECIPE, phases=(dataclasses.replace(PHASES[1], pictures=24),), checkpoint_every=8)


@pytest.fixture
def checkpoints(tmp_path) -> Iterator[Path]:
    """Three steps of a tiny model, of which two checkpoints are kept."""
    model = torch.nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 64)).sum().backward()
    optimizer.step()
    for step in (1, 2, 3):
        state.write(tmp_path, model, optimizer, state.Progress(step, 0, "d"))
    yield tmp_path


def overwritten(folder: Path) -> None:
    data = bytearray((folder / state.STUDENT).read_bytes())
    data[len(data) // 2 : len(data) // 2 + 4000] = b"\x7f" * 4000
    (folder / state.STUDENT).write_bytes(data)


def later(folder: Path) -> None:
    mark = json.loads((folder / state.MARK).read_text())
    (folder / state.MARK).write_text(json.dumps({**mark, "format": state.FORMAT + 1}))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "student.safetensors has 100 bytes, and had": lambda folder: os.truncate(folder / state.STUDENT, 100),
    "the bytes of student.safetensors are not those that were written": overwritten,
    "lacks state.json": lambda folder: (folder / state.PROGRESS).unlink(),
    "state.json has 0 bytes, and had": lambda folder: (folder / state.PROGRESS).write_text(""),
    "lacks COMPLETE": lambda folder: (folder / state.MARK).unlink(),
    "lacks optimizer.safetensors": lambda folder: (folder / state.OPTIMIZER).unlink(),
    "is of a later version of bcosify": later,
    "is damaged: COMPLETE: ": lambda folder: (folder / state.MARK).write_text("{"),
}


@pytest.mark.parametrize("words", DAMAGES)
def test_the_next_older_checkpoint_takes_the_place_of_a_damaged_one(checkpoints, words):
    DAMAGES[words](checkpoints / "step-00000003")
    with pytest.warns(UserWarning, match=f"going on from step-00000002: step-00000003 .*{words}"):
        found = state.latest(checkpoints)
    assert found is not None and (found[0].name, found[1].step) == ("step-00000002", 2)
    DAMAGES[words](checkpoints / "step-00000002")
    with pytest.raises(CheckpointError, match=f"no checkpoint in .* is whole: .*{words}.*--overwrite"):
        state.latest(checkpoints)


def test_checkpoints_of_before_have_no_hashes_and_are_read(checkpoints):
    """Theirs was an empty COMPLETE; that a file is cut shows in its own header."""
    for folder in checkpoints.iterdir():
        (folder / state.MARK).write_text("")
    assert state.latest(checkpoints)[1].step == 3
    os.truncate(checkpoints / "step-00000003" / state.OPTIMIZER, 300)
    with pytest.warns(UserWarning, match="step-00000003 is damaged: optimizer.safetensors: "):
        assert state.latest(checkpoints)[1].step == 2


def test_a_checkpoint_that_was_passed_over_goes_when_the_next_is_written(checkpoints):
    later(checkpoints / "step-00000003")
    model = torch.nn.Linear(2, 2)
    (checkpoints / "step-00000003").rename(checkpoints / "step-00000009")
    state.write(checkpoints, model, torch.optim.SGD(model.parameters()), state.Progress(4, 0, "d"))
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000002", "step-00000004"]


@pytest.mark.parametrize(
    "torn",
    [b'{"step": 3, "pictures": 12', b'{"held_out": {"pictures": 4}', b"12", b"[]", b'{"pictures": "x"}',
     b"\xff\x00", b'{"pictures": null}', b"", b'{"held_out": 3}', b"[" * 3000],
)  # fmt: skip
def test_a_torn_line_of_the_log_is_dropped_whatever_is_left_of_it(tmp_path, torn):
    whole = [{"run": {}}, {"held_out": {"pictures": 4}}, {"step": 2, "pictures": 8}]
    lines = [json.dumps(row).encode() for row in whole]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([*lines, torn, json.dumps({"pictures": 12}).encode(), torn]))
    alone = types.SimpleNamespace(wait_for_everyone=lambda: None, is_main_process=True)
    _cut_metrics(tmp_path / "metrics.jsonl", 2, 4, alone)
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == whole


def test_a_finished_run_says_so_and_others_go_on(run, shards, tmp_path):
    out = tmp_path / "out"
    done = aligned(run, shards, out, ONE)
    config = AlignConfig(run, str(shards), out, ONE, quiet=True, resume=True)
    before = (out / "bcosify.json").stat().st_mtime_ns
    found = align(config)
    assert found["finished"] and found["pictures"] == 24 and found["final"]["pictures"] == 24
    assert (out / "bcosify.json").stat().st_mtime_ns == before and rows(out) == done
    # One that ended before results were written is known by its last checkpoint.
    (tmp_path / "out.run/result.json").unlink()
    again = align(config)
    assert again["finished"] and again["curve"] == found["curve"]
    with pytest.warns(UserWarning, match="resumed with another accumulate, so no longer bit for bit"):
        assert align(dataclasses.replace(config, recipe=dataclasses.replace(ONE, accumulate=2, workers=1)))["finished"]
    with pytest.raises(RecipeError, match=r"this one differs:[\s\S]*\+seed: 1"):
        align(dataclasses.replace(config, recipe=dataclasses.replace(ONE, seed=1)))
    with pytest.raises(CheckpointError, match="exists already"):
        align(dataclasses.replace(config, resume=False))


def test_stop_signals_are_noted_and_a_second_interrupt_ends(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        noted: list[int] = []
        with signals_noted(noted):
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT):
                os.kill(os.getpid(), number)
            assert noted == [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_interrupted_run_writes_a_checkpoint_and_says_how_to_go_on(run, shards, tmp_path, monkeypatch):
    whole = aligned(run, shards, tmp_path / "whole", ONE)
    step = log.PhaseLog.step

    def interrupted(self, progress, *losses):
        step(self, progress, *losses)
        if progress.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(log.PhaseLog, "step", interrupted)
    with pytest.raises(KeyboardInterrupt, match="interrupted at 12 pictures; go on with the same command and --resume"):
        aligned(run, shards, tmp_path / "out", ONE)
    monkeypatch.undo()
    assert state.latest(tmp_path / "out.run/checkpoints")[1].step == 3
    assert aligned(run, shards, tmp_path / "out", ONE, resume=True) == whole


def test_memory_that_is_not_enough_is_one_line():
    run = types.SimpleNamespace(recipe=RECIPE)
    for error in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ):
        with (
            pytest.raises(BcosifyError, match=r"a step of 4 pictures of 64 pixels .*--set accumulate=2"),
            _memory_said(run),
        ):
            raise error
    for kind in (RuntimeError, NotImplementedError, RecursionError):
        with pytest.raises(kind, match="^shapes$"), _memory_said(run):
            raise kind("shapes")


def test_one_picture_measures_nothing(run):
    with pytest.raises(DataError, match="--val: 1 picture"):
        check_data(RECIPE, load(run), [0] * 8, [0], 1)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------- workers


def test_a_small_shared_memory_is_refused_before_anything_is_written(run, shards, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "SHARED", tmp_path)
    monkeypatch.setattr(workers.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=65536))
    workers.check_shared_memory(0, 10**12)
    workers.check_shared_memory(2, 65536 // 5)
    with pytest.raises(DataError, match=r"2 workers .* 0\.1 MB free, and need 0\.2 MB. .*--set workers=0"):
        align(AlignConfig(run, str(shards), tmp_path / "out", dataclasses.replace(ONE, workers=2), quiet=True))
    assert not list(tmp_path.iterdir())


ORPHANS = """
import sys, time
from bcosify.data import workers

def work():
    workers.start_worker(0)
    print("ready", flush=True)
    time.sleep(600)

if __name__ == "__main__":
    process = workers.fork_server().Process(target=work, daemon=True)
    process.start()
    print(process.pid, flush=True)
    time.sleep(600)
"""


def test_workers_ignore_stop_signals_and_end_with_a_killed_main_process(tmp_path):
    """All that a main process started holds its stdout open: that is closed when the last of them has ended."""
    (tmp_path / "main.py").write_text(ORPHANS)
    main = subprocess.Popen(
        [sys.executable, tmp_path / "main.py"], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert main.stdout is not None
        worker = int({main.stdout.readline().strip(), main.stdout.readline().strip()}.difference({"ready"}).pop())
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1):
            os.kill(worker, number)
        time.sleep(0.2)
        os.kill(worker, 0)  # it is there
        main.kill()
        assert main.stdout.read() == ""
    finally:
        os.killpg(main.pid, signal.SIGKILL) if main.poll() is None else None
