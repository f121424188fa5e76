"""Peak memory of converting and saving a 300 M parameter model, beyond the model itself, over its size on disk.

    python benchmarks/conversion_memory.py [--model vit_large_patch14_clip_224] [--json FILE]

Each step runs in its own process, because a process never gives all of its memory back. Linux only: it reads
/proc/self/status.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bcosify.convert import convert, load, load_teacher, save

STEPS = ("convert", "save", "load")


def resident() -> int:
    """Bytes of this process that are in memory and its own; pages of mapped files can be dropped at any time."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon: this benchmark needs Linux")


def peak_of(function: Callable[[], Any]) -> tuple[Any, int]:
    """What `function` returns, and the highest memory of the process while it ran, in bytes, sampled every 5 ms."""
    highest, done = resident(), threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.005):
            highest = max(highest, resident())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        result = function()
    finally:
        done.set()
        thread.join()
    return result, max(highest, resident())


def measure(step: str, model: str, folder: Path) -> float:
    """Bytes at the peak of one step, beyond what lay in memory before it: the model that it starts from.

    `load` starts from nothing, so the model that it returns is taken off.
    """
    torch.set_num_threads(1)
    if step == "load":
        before = resident()
        student, highest = peak_of(lambda: load(folder))
        return highest - before - _size(student.model)
    teacher = load_teacher(f"timm:{model}", pretrained=False)
    before = resident()
    student, highest = peak_of(lambda: convert(teacher))
    if step == "save":
        before = resident()
        _, highest = peak_of(lambda: save(student, folder))
    return highest - before


def _size(model: torch.nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


def _in_process(connection: Any, *arguments: Any) -> None:
    connection.send(measure(*arguments))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_large_patch14_clip_224")
    parser.add_argument("--json", type=Path, default=Path("runs/conversion_memory.json"))
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    found: dict[str, Any] = {"model": options.model}
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "student"
        for step in ("save", "convert", "load"):
            ours, theirs = context.Pipe()
            process = context.Process(target=_in_process, args=(theirs, step, options.model, folder))
            process.start()
            theirs.close()
            found[step] = ours.recv()
            process.join()
        found["disk"] = (folder / "model.safetensors").stat().st_size
    print(f"{options.model}: {found['disk'] / 2**20:.0f} MiB on disk; peak beyond the model itself:")
    for step in STEPS:
        print(f"  {step:8} {found[step] / 2**20:6.0f} MiB = {found[step] / found['disk']:.2f} x")
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
