"""How time and memory grow: with resolution, depth, width, targets, shards and processes. A plot each, and the JSON.

    python benchmarks/growth.py [--only depth] [--rounds 5]

Vision transformers with random weights, converted, at B = 2 without biases. Expected lines go through the first point:
time in proportion to floating-point operations (counted by torch), memory of an explanation in proportion to what it
keeps (activations: tokens x width x depth), k targets as one forward pass and k backward passes of the measured cost of
one, an index in proportion to its shards, and no more CPU time a picture on two processes than on one.
"""

from __future__ import annotations

import functools
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch
from bcosify.convert import convert, save, set_strength
from bcosify.convert.libraries.timm.models import load as load_timm
from bcosify.data.index import ShardIndex, index_shards
from bcosify.data.names import expand
from bcosify.data.pack import write_shards
from bcosify.explain import ClassTarget, explain
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

PLOTS = measure.ROOT / "docs" / "performance"
PATCH, HEAD = 16, 64
BASE = {"size": 224, "depth": 6, "width": 192, "targets": 1}
SWEEPS: dict[str, tuple[str, Sequence[int]]] = {
    "resolution": ("size", (96, 160, 224, 320, 448)),
    "depth": ("depth", (2, 4, 8, 16, 32)),
    "width": ("width", (64, 128, 256, 512)),
    "targets": ("targets", (1, 2, 5, 10, 20)),
}
AXES = {
    "resolution": "side of the picture, px", "depth": "blocks", "width": "features of a token",
    "targets": "targets", "shards": "shards", "processes": "processes",
}  # fmt: skip
SHARDS = (10, 100, 1000, 10000)
PROCESSES = (1, 2)
STEPS, BATCH = (2, 14), 16  # BATCH pictures a process


# ------------------------------------------------------------------------------------------------------ of one model


@functools.cache
def student(size: int, depth: int, width: int) -> nn.Module:
    model = convert(
        load_timm(
            "vit_tiny_patch16_224", pretrained=False, img_size=size, depth=depth, embed_dim=width,
            num_heads=width // HEAD, num_classes=100,
        )
    ).model.requires_grad_(False)  # fmt: skip
    set_strength(model, b=2, beta=0)
    return model


def of_a_model(sweep: str, options: Any) -> list[dict[str, Any]]:
    """Time of a forward pass and of an explanation, and the most memory of both, over one setting."""
    setting, values = SWEEPS[sweep]
    runs: dict[str, Callable[[], object]] = {}
    points: dict[int, dict[str, Any]] = {}
    for value in values:
        at = {**BASE, setting: value}
        model = student(at["size"], at["depth"], at["width"]).to(options.device)
        picture = torch.randn(1, 3, at["size"], at["size"], device=options.device)
        target = ClassTarget(list(range(at["targets"])))

        def forward(model: nn.Module = model, picture: torch.Tensor = picture) -> None:
            with torch.inference_mode():
                model(picture)

        def explained(model: nn.Module = model, picture: torch.Tensor = picture, target: Any = target) -> None:
            explain(model, picture, target)

        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(picture)
        runs |= {f"forward {value}": forward, f"explain {value}": explained}
        points[value] = {
            "value": value,
            "flops": counter.get_total_flops(),
            "activations": ((at["size"] // PATCH) ** 2 + 1) * at["width"] * at["depth"],
            "forward_peak": measure.peak_bytes(forward, options.device),
            "explain_peak": measure.peak_bytes(explained, options.device),
        }
    seconds = measure.paired(runs, options.rounds, options.device, warm_up=1, least=0.05)
    for value, point in points.items():
        point |= {kind: measure.spread(seconds[f"{kind} {value}"]) for kind in ("forward", "explain")}
    return list(points.values())


# ----------------------------------------------------------------------------------------------------------- of data


def of_shards(options: Any) -> list[dict[str, Any]]:
    """Indexing shards of four small pictures, the first time and again from the cache, and reading a picture."""
    points = []
    with tempfile.TemporaryDirectory() as parent:
        os.environ["BCOSIFY_CACHE"] = f"{parent}/cache"
        folder = Path(parent) / "shards"
        one = _one_shard(Path(parent) / "pictures", folder)
        for count in SHARDS:
            for number in range(1, count):
                copy = folder / f"{number:05d}.tar"
                if not copy.exists():
                    copy.write_bytes(one)
            if count == SHARDS[0]:
                index_shards(expand(str(folder / "00000.tar")), progress=False)  # imports, threads
            points.append({"value": count, **_indexed(folder, options.rounds)})
    return points


def _one_shard(pictures: Path, folder: Path) -> bytes:
    pictures.mkdir()
    rng = np.random.default_rng(0)
    for number in range(4):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(pictures / f"{number}.jpg")
    write_shards(pictures, folder, progress=False)
    return (folder / "00000.tar").read_bytes()


def _indexed(folder: Path, rounds: int) -> dict[str, Any]:
    made: list[ShardIndex] = []

    def index() -> None:
        made[:] = [index_shards(expand(str(folder)), progress=False)]

    fresh = measure.seconds(index)
    again = measure.spread([measure.seconds(index) for _ in range(rounds)])
    places = np.random.default_rng(0).integers(len(made[0]), size=200)
    read = measure.seconds(lambda: [made[0].read(int(place)) for place in places]) / len(places)
    return {"fresh": fresh, "again": again, "read": read, "bytes": len(pickle.dumps(made[0]))}


def of_processes(options: Any) -> list[dict[str, Any]]:
    """CPU time of a picture, of all processes together: long runs less short ones; and the largest process."""
    points = []
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent)
        save(convert("bundled:efficientnet_lite0"), folder / "run")
        rng = np.random.default_rng(0)
        (folder / "pictures").mkdir()
        for number in range(64):
            pixels = rng.integers(0, 255, (96, 96, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "pictures" / f"{number}.jpg")
        write_shards(folder / "pictures", folder / "shards", progress=False)
        for count in PROCESSES:
            (short, _), (long, peak) = (_runs(folder, count, steps) for steps in STEPS)
            pictures = (STEPS[1] - STEPS[0]) * BATCH * max(PROCESSES)
            points.append({"value": count, "cpu": (long - short) / pictures, "start": short, "peak": peak})
    return points


def _runs(folder: Path, processes: int, steps: int) -> tuple[float, int]:
    """CPU seconds, and the most memory of one process, of as many alignments at once as keep all processes busy.

    One process alone would have caches and memory to itself, which two that work together never have.
    """
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(measure.ROOT / "recipes/accelerate/cpu.yaml")]
    launch += ["--num_processes", str(processes), "--main_process_port", "0"]
    batch = BATCH * processes
    changes = {"image_size": 64, "batch_size": batch, "workers": 0, "held_out": 8, "probe_pictures": 0}
    changes |= {"phases.0.pictures": steps * batch, "evaluate_every": 10**9, "checkpoint_every": 10**9}
    command = [sys.executable, *(launch if processes > 1 else []), "-m", "bcosify.cli", "align", str(folder / "run")]
    command += ["--data", str(folder / "shards"), "--recipe", "bcos/cnn"]
    command += [word for name, value in changes.items() for word in ("--set", f"{name}={value}")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen([*command, "--out", str(folder / f"out-{processes}-{steps}-{number}")], env=environment)
        for number in range(max(PROCESSES) // processes)
    ]
    ends = [os.wait4(process.pid, 0) for process in started]
    if any(status for _, status, _ in ends):
        raise SystemExit(f"an alignment on {processes} process(es) failed: {' '.join(command)}")
    return sum(use.ru_utime + use.ru_stime for *_, use in ends), max(use.ru_maxrss for *_, use in ends) * 1024


# ------------------------------------------------------------------------------------------------------------- plots

Line = tuple[str, list[float], list[float] | None]  # a name, what was measured, what was expected


def proportional(measured: Sequence[float], to: Sequence[float], anchor: int = 0) -> list[float]:
    """What grows as `to`, through one measured point."""
    return [measured[anchor] * value / to[anchor] for value in to]


def lines(sweep: str, points: list[dict[str, Any]]) -> tuple[list[Line], list[Line]]:
    """What is drawn of one sweep: (milliseconds, MiB)."""

    def column(name: str, scale: float = 1.0) -> list[float]:
        values = [point[name]["median"] if isinstance(point[name], dict) else point[name] for point in points]
        return [scale * value for value in values]

    ones = [1.0] * len(points)
    values = column("value")
    if sweep == "shards":
        time = [(name, column(key, 1e3)) for name, key in (("first index", "fresh"), ("index again", "again"))]
        return (
            [(name, found, proportional(found, values, -1)) for name, found in time]
            + [("read one picture", read := column("read", 1e3), proportional(read, ones))],
            [("index, pickled", held := column("bytes", 1 / measure.MIB), proportional(held, values, -1))],
        )
    if sweep == "processes":
        cpu, peak = column("cpu", 1e3), column("peak", 1 / measure.MIB)
        return [("CPU time a picture", cpu, proportional(cpu, ones))], [
            ("largest process", peak, proportional(peak, ones))
        ]
    forward, explained = column("forward", 1e3), column("explain", 1e3)
    peaks = [column(name, 1 / measure.MIB) for name in ("forward_peak", "explain_peak")]
    if sweep == "targets":
        further = explained[1] - explained[0]
        time = [explained[0] + (count - 1) * further for count in values]
        # What is returned of a target: a gradient in six channels and a map, in float32.
        memory = [peaks[1][0] + (count - 1) * 7 * 4 * BASE["size"] ** 2 / measure.MIB for count in values]
        return (
            [("forward", forward, proportional(forward, ones)), ("explain", explained, time)],
            [("explain", peaks[1], memory)],
        )
    middle = len(points) // 2
    flops, activations = column("flops"), column("activations")
    return (
        [(n, v, proportional(v, flops, middle)) for n, v in (("forward", forward), ("explain one target", explained))],
        [("forward", peaks[0], None), ("explain one target", peaks[1], proportional(peaks[1], activations, middle))],
    )


def plot(sweep: str, points: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, NullFormatter

    values = [point["value"] for point in points]
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for panel, drawn, unit in zip(panels, lines(sweep, points), ("ms", "MiB"), strict=True):
        for number, (name, found, expected) in enumerate(drawn):
            colour = "C1" if name.startswith("explain") else f"C{number}"
            panel.plot(values, found, "o-", color=colour, label=name)
            if expected is not None:
                panel.plot(values, expected, "--", color=colour, alpha=0.6, label="" if number else "expected")
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_xticks(values, [f"{value:,}" for value in values])
        panel.xaxis.set_minor_formatter(NullFormatter())
        bottom, top = panel.get_ylim()
        if top < 3 * bottom:
            bottom, top = panel.set_ylim(bottom / 2, top * 2)
        digits = "125" if top < 1e3 * bottom else "1"
        for formatter in (panel.yaxis.set_major_formatter, panel.yaxis.set_minor_formatter):
            formatter(FuncFormatter(functools.partial(_tick, digits)))
        panel.set_xlabel(AXES[sweep])
        panel.set_ylabel(unit)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    panels[0].set_title("time" if sweep != "processes" else "CPU time, all processes")
    panels[1].set_title("memory")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def _tick(digits: str, value: float, _: int) -> str:
    """A number, where it begins with one of `digits`."""
    return f"{value:,g}" if f"{value:e}"[0] in digits else ""


def slope(measured: Sequence[float], values: Sequence[float]) -> float:
    """The power with which it grows between the last two points."""
    return float(np.log(measured[-1] / measured[-2]) / np.log(values[-1] / values[-2]))


def section(rows: list[dict[str, Any]]) -> str:
    heads = ["against", "what", "first", "last", "last over expected", "power at the end"]
    cells, pictures = [], []
    for row in rows:
        values = [point["value"] for point in row["points"]]
        for drawn, unit in zip(lines(row["row"], row["points"]), ("ms", "MiB"), strict=True):
            for name, found, expected in drawn:
                over = "" if expected is None else f"{found[-1] / expected[-1]:.2f}"
                ends = [f"{found[end]:.3g} {unit} at {values[end]:,}" for end in (0, -1)]
                cells.append([row["row"], name, *ends, over, f"{slope(found, values):.2f}"])
        pictures.append(f"![{row['row']}: time and memory](performance/{row['row']}.png)")
    machine = rows[0]
    return "\n".join([
        "## Growth", "",
        f"A converted vision transformer (patch {PATCH}, {BASE['depth']} blocks of width {BASE['width']}, one picture "
        f"of {BASE['size']} px), of which one setting grows; tar shards of four pictures; EfficientNet-Lite0 aligned "
        f"by two processes at once, each for itself and then together ({BATCH} pictures of 64 px a process and step). "
        "Dashed: what is expected. Time in proportion to floating-point operations and memory to tokens x width x "
        "depth, both through the middle point; k targets at the price of a second, and of what they return; an index "
        "in proportion to its shards, through the last point; reading a picture, CPU time and memory of a process "
        f"constant. {machine['device']}, {machine['threads']} thread, float32, torch {machine['torch']} "
        "(`benchmarks/growth.py`).", "",
        measure.markdown(heads, cells), "", *pictures,
    ])  # fmt: skip


def main() -> None:
    options = measure.options(__doc__, "growth", rounds=5).parse_args()
    measure.prepare(options.device)
    makers: dict[str, Callable[[Any], list[dict[str, Any]]]] = {
        **{sweep: functools.partial(of_a_model, sweep) for sweep in SWEEPS},
        "shards": of_shards,
        "processes": of_processes,
    }
    rows: list[dict[str, Any]] = []
    for sweep, make in makers.items():
        if options.only in sweep:
            points = make(options)
            rows.append({"row": sweep, "dtype": "float32", **measure.machine(options.device), "points": points})
            plot(sweep, points, PLOTS / f"{sweep}.png")
            measure.finish(options, "growth.py", rows, section)
    print(section(rows))


if __name__ == "__main__":
    main()
