"""Measuring for all benchmarks: paired times, bytes kept for a backward pass, peak bytes, and where results go.

What is compared takes turns in one process, in an order that changes from round to round, so that whatever else the
machine does falls on all sides alike; what counts is the ratio within a round. On a CPU the time is CPU time of the
process and of the children that it has waited for, which other jobs disturb less than the clock; on CUDA it is the
clock around work that was waited for.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MIB = 2**20

Run = Callable[[], Any]


# --------------------------------------------------------------------------------------------------------------- time


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in used)


def keep_memory() -> None:
    """Lets the process keep what it frees, as allocators for GPUs do (glibc only; elsewhere nothing happens).

    Otherwise the system takes large blocks back and hands them out again page by page, more often for one side than for
    another, by rules that depend on what ran before.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block is mapped by itself
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: nothing is given back


def seconds(run: Run, device: str = "cpu") -> float:
    """One call of `run`: CPU seconds on a CPU, seconds by the clock on CUDA."""
    if device == "cpu":
        begin = cpu_seconds()
        run()
        return cpu_seconds() - begin
    torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def turns(sides: Sequence[str], rounds: int) -> Iterator[list[str]]:
    """The order of `sides` in each round."""
    for number in range(rounds):
        first = number % len(sides)
        yield [*sides[first:], *sides[:first]]


def paired(
    sides: Mapping[str, Run], rounds: int, device: str = "cpu", warm_up: int = 2, least: float = 0.0
) -> dict[str, list[float]]:
    """Seconds of one call of every side in every round.

    `least` is how many seconds each side works in a round, at least one call: what is short is called several times.
    """
    calls = {}
    for name, run in sides.items():
        once = min(seconds(run, device) for _ in range(max(warm_up, 1)))
        calls[name] = max(1, round(least / max(once, 1e-6)))

    def several(name: str) -> float:
        return seconds(lambda: [sides[name]() for _ in range(calls[name])] and None, device) / calls[name]

    found: dict[str, list[float]] = {name: [] for name in sides}
    for turn in turns(list(sides), rounds):
        for name in turn:
            found[name].append(several(name))
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    ordered = sorted(values)
    return {
        "median": statistics.median(ordered),
        "low": ordered[len(ordered) // 4],
        "high": ordered[-1 - len(ordered) // 4],
    }


def extent(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest: of few rounds, of which quartiles say little."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def against(found: Mapping[str, Sequence[float]], base: str) -> dict[str, dict[str, Any]]:
    """For every side the spread of its milliseconds, and of its ratio to `base` within a round."""
    return {
        name: {
            "ms": spread([1e3 * value for value in values]),
            "ratio": spread([value / of for value, of in zip(values, found[base], strict=True)]),
        }
        for name, values in found.items()
    }


# ------------------------------------------------------------------------------------------------------------- memory


def kept_bytes(run: Callable[[], Tensor], besides: Sequence[Tensor] = (), output: bool = True) -> int:
    """Bytes that the graph of what `run` returns keeps for its backward pass, every storage once.

    Storages of `besides` (parameters, inputs: what is there in any case) do not count, nor, where `output` is False,
    that of what is returned.
    """
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # an output that is kept would be kept by itself

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()  # held, so that no storage is used twice while it counts
    for tensor in [*besides, *([] if output else [result])]:
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(kept.values())


def peak_bytes(run: Run, device: str = "cpu") -> int:
    """The most bytes that are allocated at once during `run`, beyond those before it."""
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    gc.collect()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        run()
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    now = highest = 0
    for _, change in changes:
        now += change
        highest = max(highest, now)
    return highest


# ------------------------------------------------------------------------------------------------------------ results


def machine(device: str = "cpu") -> dict[str, Any]:
    """What a reader must know of where figures were measured; nothing that names a host."""
    found = {"torch": torch.__version__.partition("+")[0], "python": platform.python_version(), "device": device}
    found |= {"architecture": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if device != "cpu":
        found["gpu"] = torch.cuda.get_device_name()
    return found


def outputs(description: str | None, name: str, rounds: int) -> argparse.ArgumentParser:
    """The arguments that all benchmarks of speed take."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--json", type=Path, default=RESULTS / f"{name}.json")
    parser.add_argument("--page", type=Path, default=PAGE, help="the document whose section is written again")
    return parser


def options(description: str | None, name: str, rounds: int) -> argparse.ArgumentParser:
    """The arguments that all benchmarks of models and layers take."""
    parser = outputs(description, name, rounds)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of parameters and pictures")
    parser.add_argument("--only", default="", help="a part of a row's name")
    return parser


def prepare(device: str) -> None:
    """One thread and steady memory, where the CPU is what is measured."""
    if device == "cpu":
        torch.set_num_threads(1)
        keep_memory()


def finish(options: argparse.Namespace, name: str, rows: list[dict[str, Any]], table: Callable[[Any], str]) -> None:
    """Adds `rows` to the results, and writes the section `name` of the page from those of this device and precision."""
    every = merged(options.json, rows, ("row", "device", "dtype"))
    same = (options.device, options.dtype)
    write_section(options.page, name, table([row for row in every if (row["device"], row["dtype"]) == same]))


def merged(path: Path, rows: list[dict[str, Any]], key: Sequence[str]) -> list[dict[str, Any]]:
    """Writes `rows` into the JSON at `path`, in the place of those with the same values of `key`; returns all."""
    old = json.loads(path.read_text()) if path.is_file() else []
    fresh = {tuple(row[k] for k in key): row for row in rows}
    every = {tuple(row[k] for k in key): row for row in old} | fresh
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(list(every.values()), indent=1) + "\n")
    return list(every.values())


def bold(ratio: Mapping[str, float]) -> str:
    """A spread, as tables show it."""
    return f"**{ratio['median']:.2f}** ({ratio['low']:.2f}–{ratio['high']:.2f})"


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_section(page: Path, name: str, text: str) -> None:
    """Puts `text` between the marks of benchmark `name` in `page`; at its end where it has none."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    old = page.read_text() if page.is_file() else "# Performance\n"
    if begin not in old:
        old += f"\n{begin}\n{end}\n"
    before, _, rest = old.partition(begin)
    page.write_text(f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}")
