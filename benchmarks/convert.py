"""What it costs to convert a model of 428 M parameters: seconds, and memory beyond the model, step by step.

    python benchmarks/convert.py [--model vit_so400m_patch14_siglip_224]

A file with random weights of the architecture is written first. Then each step runs in a process of its own, because a
process never gives all of its memory back: opening the teacher from that file, planning, converting (and checking that
the student is the teacher), saving, and loading. Memory is what is the process's own: pages of mapped files can be
dropped at any time. The floor of each step is the time of the forward passes that it makes, one picture each, because a
conversion is checked by running the models. Linux only: it reads /proc/self/status.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import timm
import torch
from bcosify.convert import BcosConfig, convert, load, load_teacher, plan_for, save
from safetensors.torch import save_file

# What each step runs of pictures: the plan looks twice, the conversion compares two, saving and loading probe one.
FORWARDS = {"open": 0, "plan": 2, "convert": 4, "save": 1, "load": 3}


def resident() -> int:
    """Bytes of this process that are in memory and its own."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon: this benchmark needs Linux")


def watched(function: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What `function` returns; its seconds; the most memory beyond that before it, in bytes, sampled every 5 ms."""
    before, done = resident(), threading.Event()
    highest = before

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.005):
            highest = max(highest, resident())

    thread = threading.Thread(target=watch)
    thread.start()
    clock, cpu = time.perf_counter(), measure.cpu_seconds()
    try:
        result = function()
    finally:
        cpu, clock = measure.cpu_seconds() - cpu, time.perf_counter() - clock
        done.set()
        thread.join()
    return result, {"cpu": cpu, "clock": clock, "peak": max(highest, resident()) - before}


def step(name: str, model: str, file: Path, folder: Path) -> dict[str, Any]:
    """The figures of one step, in this process."""
    torch.set_num_threads(1)
    if name == "write":
        source = timm.create_model(model, pretrained=False)
        save_file(source.state_dict(), file)
        return {"parameters": sum(parameter.numel() for parameter in source.parameters())}
    if name == "load":
        return watched(lambda: load(folder))[1]
    teacher, found = watched(lambda: load_teacher(f"timm:{model}", weights=file))
    if name == "open":
        with torch.inference_mode():
            picture = torch.randn(1, 3, *teacher.preprocess.size)
            forward = min(measure.seconds(lambda: teacher.model(picture)) for _ in range(3))
        return found | {"forward": forward}
    plan, found = watched(lambda: plan_for(teacher, BcosConfig()))
    if name != "plan":
        student, found = watched(lambda: convert(teacher, plan=plan))
    if name == "save":
        _, found = watched(lambda: save(student, folder))
    return found


def in_process(*arguments: Any) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_send, args=(theirs, *arguments))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    finally:
        process.join()


def _send(connection: Any, *arguments: Any) -> None:
    connection.send(step(*arguments))


def measured(model: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as parent:
        file, folder = Path(parent) / "weights.safetensors", Path(parent) / "student"
        row = {"row": model, "dtype": "float32", **measure.machine(), **in_process("write", model, file, folder)}
        row["disk"] = file.stat().st_size
        row["steps"] = {
            name: in_process(name, model, file, folder) for name in ("open", "plan", "convert", "save", "load")
        }
    return row


def table(rows: list[dict[str, Any]]) -> str:
    row = rows[-1]
    forward = row["steps"]["open"]["forward"]
    heads = ["step", "CPU s", "of which forward passes", "peak memory beyond what was there, of the model"]
    says = {
        "open": "open the teacher (file to memory, sha256)", "plan": "plan", "convert": "convert and compare",
        "save": "save (write, sha256, probe)", "load": "load (sha256, plan, probe)",
    }  # fmt: skip
    cells = [
        [
            says[name], f"{found['cpu']:.1f}", f"{FORWARDS[name]} = {FORWARDS[name] * forward:.1f}",
            f"{found['peak'] / row['disk']:.2f} x",
        ]
        for name, found in row["steps"].items()
    ]  # fmt: skip
    total = sum(found["cpu"] for name, found in row["steps"].items() if name != "load")
    floor = sum(FORWARDS[name] for name in ("open", "plan", "convert", "save")) * forward
    cells.append(["reference to folder", f"**{total:.1f}**", f"{floor:.1f}", ""])
    return "\n".join([
        "## Conversion", "",
        f"timm's `{row['row']}`, {row['parameters'] / 1e6:.0f} M parameters, {row['disk'] / 2**30:.2f} GiB of float32 "
        "from a safetensors file, on one thread of a CPU. Opening and loading put one copy into memory, converting a "
        "second one (the student beside its teacher). One picture's forward pass takes "
        f"{forward:.1f} s here; most of the time is spent on checking that the student is the teacher "
        f"(torch {row['torch']}, `benchmarks/convert.py`).",
        "", measure.markdown(heads, cells),
    ])  # fmt: skip


def main() -> None:
    parser = measure.options(__doc__, "convert", rounds=1)
    parser.add_argument("--model", default="vit_so400m_patch14_siglip_224")
    options = parser.parse_args()
    rows = [measured(options.model)]
    measure.finish(options, "convert.py", rows, table)
    print(table(rows))


if __name__ == "__main__":
    main()
