"""What an explanation costs: k targets of a batch against a plain forward pass of the same model, and of many pictures.

    python benchmarks/explain.py [--only dinov2] [--rounds 7] [--device cuda]

A forward pass of the student without a graph, a plain input gradient (forward and backward pass of one output, weights
need no gradient), and `explain` for 1, 2, 5 and 10 targets take turns in one process. Then pictures are explained one
batch after another; what the process holds must not grow.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import measure
import psutil
import torch
from bcosify.convert import convert, load_teacher, set_strength
from bcosify.explain import ClassTarget, explain
from torch import Tensor, nn

BATCH, SIZE = 4, 224
TARGETS = (1, 2, 5, 10)
STREAMED, STREAM_BATCH, STREAM_SIZE = 1000, 8, 112


def student(reference: str, pretrained: bool = True) -> nn.Module:
    """At B = 2, without biases, as at the end of an alignment."""
    model = convert(load_teacher(reference, pretrained=pretrained)).model
    set_strength(model, b=2, beta=0)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "EfficientNet-Lite0, student": lambda: student("bundled:efficientnet_lite0"),
    "DINOv2-S, student": lambda: student("bundled:dinov2_small"),
    "DINOv2-S, not converted": lambda: load_teacher("bundled:dinov2_small").model,
    "ResNet-50, student, random weights": lambda: student("timm:resnet50", pretrained=False),
    "ViT-S/16, student, random weights": lambda: student("timm:vit_small_patch16_224", pretrained=False),
}


def measured(name: str, options: Any) -> dict[str, Any]:
    """One row of results."""
    model = MODELS[name]().to(options.device).requires_grad_(False)
    pictures = torch.randn(BATCH, 3, SIZE, SIZE, device=options.device)

    def forward() -> Tensor:
        with torch.inference_mode():
            return model(pictures)

    def gradient() -> None:
        leaf = pictures.clone().requires_grad_()
        torch.autograd.grad(model(leaf)[:, 0].sum(), leaf)

    def explained(count: int) -> Callable[[], object]:
        return lambda: explain(model, pictures, ClassTarget(list(range(count))))

    sides: dict[str, Callable[[], object]] = {"forward": forward, "input gradient": gradient}
    sides |= {f"{count} targets": explained(count) for count in TARGETS}
    found = measure.against(measure.paired(sides, options.rounds, options.device, warm_up=1), "forward")
    for side, run in sides.items():
        found[side]["peak"] = measure.peak_bytes(run, options.device)
    kept = measure.kept_bytes(forward, [*model.parameters(), *model.buffers()], output=False)
    row = {"row": name, "dtype": "float32", "batch": BATCH, "size": SIZE, "rounds": options.rounds}
    return {**row, **measure.machine(options.device), "sides": found, "kept_by_a_forward": kept}


def streamed(device: str, count: int = STREAMED) -> dict[str, Any]:
    """Tensors alive and memory in use while `count` pictures are explained, a batch at a time."""
    model = student("bundled:efficientnet_lite0").to(device)
    held: list[dict[str, float]] = []
    for number, batch in enumerate(_batches(count, device), start=1):
        explanation = explain(model, batch, ClassTarget(0))
        assert explanation.contributions.shape == (len(batch), 1, STREAM_SIZE, STREAM_SIZE)
        if number * STREAM_BATCH % 100 < STREAM_BATCH:
            del explanation
            gc.collect()
            alive = sum(isinstance(thing, Tensor) for thing in gc.get_objects())
            held.append({"pictures": number * STREAM_BATCH, "tensors": alive, "mib": _held(device) / measure.MIB})
    row = {"row": f"{count} pictures streamed", "dtype": "float32", **measure.machine(device)}
    return {**row, "model": "EfficientNet-Lite0, student", "batch": STREAM_BATCH, "size": STREAM_SIZE, "held": held}


def _batches(count: int, device: str) -> Iterator[Tensor]:
    for start in range(0, count, STREAM_BATCH):
        torch.manual_seed(start)
        yield torch.randn(min(STREAM_BATCH, count - start), 3, STREAM_SIZE, STREAM_SIZE, device=device)


def _held(device: str) -> int:
    return psutil.Process().memory_info().rss if device == "cpu" else torch.cuda.memory_allocated()


def table(rows: list[dict[str, Any]]) -> str:
    timed = [row for row in rows if "sides" in row]
    names = [name for name in timed[0]["sides"] if name != "forward"] if timed else []
    heads = ["model", "forward ms", *names, "each further target", "peak MiB, forward", "1 target", "10 targets"]
    cells = []
    for row in timed:
        sides = row["sides"]
        first, last = (sides[f"{count} targets"]["ratio"]["median"] for count in (TARGETS[0], TARGETS[-1]))
        peaks = [sides[name]["peak"] / measure.MIB for name in ("forward", "1 targets", f"{TARGETS[-1]} targets")]
        cells.append(
            [row["row"], f"{sides['forward']['ms']['median']:.0f}"]
            + [measure.bold(sides[name]["ratio"]) for name in names]
            + [f"{(last - first) / (TARGETS[-1] - TARGETS[0]):.2f}", *(f"{peak:.0f}" for peak in peaks)]
        )
    heads = ["1 target" if head == "1 targets" else head for head in heads]
    machine = rows[0]
    lines = [
        "## Explanation", "",
        f"`explain` of k targets over a plain forward pass of the same model without a graph, {BATCH} pictures of "
        f"{SIZE} px: one forward pass in explanation mode, and k backward passes. \"Input gradient\" is torch's own "
        "forward and backward pass of one output, weights frozen. Medians and quartiles of ratios within a round; "
        f"{machine['device']}, {machine['threads']} thread, float32, torch {machine['torch']} "
        "(`benchmarks/explain.py`).",
        "", measure.markdown(heads, cells),
    ]  # fmt: skip
    kept = {row["kept_by_a_forward"] for row in timed}
    lines += ["", f"A forward pass that nobody explains keeps {max(kept, default=0)} bytes for a backward pass."]
    for row in rows:
        if "held" in row:
            first, last = row["held"][0], row["held"][-1]
            lines += ["", f"{last['pictures']} pictures, {row['batch']} at a time ({row['model']}, {row['size']} px): "
                      f"{first['tensors']} tensors and {first['mib']:.0f} MiB in use after {first['pictures']}, "
                      f"{last['tensors']} and {last['mib']:.0f} after all."]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    options = measure.options(__doc__, "explain", rounds=7).parse_args()
    measure.prepare(options.device)
    rows: list[dict[str, Any]] = []
    for name in MODELS:
        if options.only.lower() in name.lower():
            rows.append(measured(name, options))
            measure.finish(options, "explain.py", rows, table)
    if options.only in "streamed":
        rows.append(streamed(options.device))
        measure.finish(options, "explain.py", rows, table)
    print(table(rows))


if __name__ == "__main__":
    main()
