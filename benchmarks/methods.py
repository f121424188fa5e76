"""All methods on the real EfficientNet-Lite0, before alignment and after a short one: docs/methods/README.md.

    python benchmarks/methods.py --data FOLDER [--only coda fa-cnn] [--pictures 400] [--size 112]

FOLDER is that of recipe_study.py, whose runner aligns. Every row has a process of its own, so that peak memory is
its own. `start` is the student fresh from `convert`, which is its teacher; `end` has its strengths where the recipe
takes them and nothing learned; `aligned` was trained on that many pictures by the method's recipe. Their gain is what
they have inside the mask beyond the start, picture by picture, with the bootstrap's interval. `--pictures 0` aligns
nothing. A row that is in the results already is not measured again. Writes benchmarks/results/methods.json.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from bcosify.align.recipe import load_recipe
from bcosify.align.schedule import strengths_at
from bcosify.convert import convert, load, load_teacher, set_strength
from bcosify.convert.layers import scheduled_layers
from bcosify.convert.methods import METHODS, find_method
from bcosify.evaluate.estimates import bootstrap
from bcosify.evaluate.metrics.localisation import positive_shares
from bcosify.explain import explain
from columns import BATCH, Reference, agreement, ledger
from recipe_study import Bench, Experiment
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "methods.json", ROOT / "docs" / "methods" / "README.md"
BEGIN, END = "<!-- methods.py -->", "<!-- /methods.py -->"
TEACHER = "efficientnet_lite0"
RECIPES = {
    "bcos": "bcos/cnn",
    "coda": "coda/cnn",
    "fa-cnn": "fa-cnn/cnn",
    "ca-stream": "ca-stream/cnn",
    "kmeans": "kmeans/fit",
}


def measured(method: str, state: str, pictures: int, size: int, data: Path, out: Path) -> dict[str, Any]:
    """One row."""
    torch.set_num_threads(1)
    bench = Bench(data, out)
    row = {"method": method, "state": state, "pictures": pictures, "size": size}
    found = aligned(bench, method, pictures, size) if state == "aligned" else unaligned(bench, method, state, size)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # KiB on Linux
    return {**row, **found, "peak_mib": round(peak), "torch": torch.__version__, "machine": platform.machine()}


def started(method: str, size: int) -> nn.Module:
    """Fresh from `convert`."""
    return convert(load_teacher(f"bundled:{TEACHER}", image_size=size), find_method(method).config_class()).model


def explained(model: nn.Module, reference: Reference) -> dict[str, float]:
    """Share of the positive contribution inside the mask, and the ledger, of the teacher's decision alone."""
    objects, target = reference.objects, reference.decided.target()
    assert objects.masks is not None
    explanation = explain(model, objects.images, target, batch_size=BATCH, check=False)
    inside = positive_shares(explanation.contributions[:, 0], objects.masks)
    return {"in_mask": float(inside.mean()), **ledger(explanation)}


def gain(bench: Bench, method: str, model: nn.Module, size: int) -> tuple[float | None, ...]:
    """Mean over pictures of the share inside the mask beyond what the start has there, and its 95 % interval."""
    reference = bench.reference(TEACHER, size)
    objects, target = reference.objects, reference.decided.target()
    assert objects.masks is not None
    found = (explain(m, objects.images, target, batch_size=BATCH, check=False) for m in (started(method, size), model))
    before, after = (positive_shares(one.contributions[:, 0], objects.masks) for one in found)
    return tuple(bootstrap(after - before)[:3])


def unaligned(bench: Bench, method: str, state: str, size: int) -> dict[str, Any]:
    """A student that has learned nothing."""
    reference = bench.reference(TEACHER, size)
    assert reference.objects.masks is not None
    begin = time.process_time()
    model = started(method, size)
    conversion = time.process_time() - begin
    if state == "end":
        last = load_recipe(RECIPES[method]).phases[-1]
        moved = {name for _, layer in scheduled_layers(model) for name in layer.strengths()}
        ends = strengths_at(last, 1, 1)
        set_strength(model, **{name: ends[name] for name in moved})
    kept = agreement(reference.subject(model), reference)["top1_agreement"]
    begin = time.process_time()
    answer = explained(model, reference)
    each = (time.process_time() - begin) / len(reference.objects)
    return {
        "top1_agreement": kept,
        **answer,
        **({"gain": gain(bench, method, model, size)} if state == "end" else {}),
        "mask_area": float(reference.objects.masks.mean()),
        "seconds_to_convert": round(conversion, 2),
        "seconds_to_explain": round(each, 4),
    }


def aligned(bench: Bench, method: str, pictures: int, size: int) -> dict[str, Any]:
    """A student after the method's recipe."""
    settings = {"image_size": size, "held_out": 16, "workers": 1}
    experiment = Experiment(f"methods/{method}", "", TEACHER, RECIPES[method], (pictures,), keep_student=True)
    run = bench.run(experiment, settings, 0, pictures)
    kept = ("top1_agreement", "in_mask", "constant_share", "residual", "mask_area")
    model = load(bench.out / experiment.name / f"{pictures}" / "seed-0" / "aligned").model
    found = {**{name: run[name] for name in kept}, "gain": gain(bench, method, model, size)}
    return {**found, "cpu_minutes_to_align": run["cpu_minutes"]}


def read_results() -> list[dict[str, Any]]:
    """All rows so far."""
    return json.loads(RESULTS.read_text()) if RESULTS.is_file() else []


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in markdown, methods in the order of the converter's."""
    order, states = list(METHODS), ["start", "end", "aligned"]
    lines = [
        "| method | student | pictures seen | top-1 agreement | inside the mask | over its own start "
        "| constants' share | worst residual | CPU seconds to explain a picture | CPU minutes to align "
        "| peak memory (MiB) |",
        "| --- " * 11 + "|",
    ]
    for row in sorted(rows, key=lambda row: (order.index(row["method"]), states.index(row["state"]))):
        cells = [
            f"`{row['method']}`",
            row["state"],
            f"{row['pictures']:,}",
            f"{row['top1_agreement']:.3f}",
            f"{row['in_mask']:.3f}",
            "{:+.4f} ({:+.4f} to {:+.4f})".format(*row["gain"]) if "gain" in row else "",
            f"{row['constant_share']:.1%}",
            f"{row['residual']:.0e}",
            f"{row['seconds_to_explain']:.3f}" if "seconds_to_explain" in row else "",
            f"{row['cpu_minutes_to_align']:.1f}" if "cpu_minutes_to_align" in row else "",
            str(row["peak_mib"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write_page(rows: list[dict[str, Any]]) -> None:
    """Puts the table between its marks in the page."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{table(rows)}\n{END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="without it, only the page is written anew")
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--pictures", type=int, default=400)
    parser.add_argument("--size", type=int, default=112)
    parser.add_argument("--out", type=Path, default=Path("runs/methods"))
    options = parser.parse_args()
    wanted = []
    if options.data is not None:
        wanted += [(method, "start", 0) for method in options.only]
        # Where a method has no strengths its end is its start.
        wanted += [(m, "end", 0) for m in options.only if METHODS[m].ends(METHODS[m].config_class())]
        wanted += [(method, "aligned", options.pictures) for method in options.only if options.pictures]
    known = {(row["method"], row["state"], row["pictures"], row["size"]) for row in read_results()}
    for method, state, pictures in wanted:
        if (method, state, pictures, options.size) in known:
            continue
        # multiprocessing's own pool has daemons, which may not start the loader's workers.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            row = pool.submit(measured, method, state, pictures, options.size, options.data, options.out).result()
        RESULTS.write_text(json.dumps([*read_results(), row], indent=1) + "\n")
        print(row, flush=True)
    write_page(read_results())
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
