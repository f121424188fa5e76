"""What a whole converted model costs beside its teacher: inference, training step, kept activations, an explanation.

    python benchmarks/models.py [--device cuda --dtype bfloat16] [--only ResNet] [--rounds 7] [--batch 4]

Sides: `torch` is the teacher; `bcosify` its student as it is after alignment (B = 2, no biases); `bcos` the published
library's model of the same architecture (`pip install --no-deps bcos`; left out where it is missing); `bcosify folded`
and `torch folded` the first two with their BatchNorms in the filters, for inference only; `torch compiled` and `bcosify
compiled` block by block with torch.compile. `step` is forward and backward in training mode,
BatchNorm by statistics of the batch; `explain` is one target for every picture, in units of the same model's inference.
Weights are random: they cost what trained ones cost. Writes benchmarks/results/models.json and a section of
docs/performance.md.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping
from typing import Any

import measure
import torch
from bcosify.align.compiling import compile_blocks
from bcosify.convert import (
    CaStreamConfig,
    CodaConfig,
    FaCnnConfig,
    Student,
    convert,
    fold,
    load_teacher,
    set_strength,
)
from bcosify.convert.layers import batch_statistics
from bcosify.convert.methods import find_method
from bcosify.explain import explain
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

try:
    from bcos.models import pretrained as published
except ImportError:
    published = None

Makers = Mapping[str, Callable[[], nn.Module]]


def converted(name: str, config: Any = None) -> Makers:
    """Teacher and finished student of a timm model."""

    def student() -> Student:
        student = convert(load_teacher(f"timm:{name}", pretrained=False), config)
        set_strength(student.model, **find_method(student.method).ends(student.config))
        return student

    def teacher() -> nn.Module:
        return load_teacher(f"timm:{name}", pretrained=False).model

    return {"torch": teacher, "bcosify": lambda: student().model, "bcosify folded": lambda: fold(student())}


def folded_by_torch() -> nn.Module:
    return fuse(load_teacher("timm:resnet50", pretrained=False).model.eval())


ROWS: dict[str, Makers] = {
    "ResNet-50": {**converted("resnet50"), "torch folded": folded_by_torch},
    "ViT-S/16": converted("vit_small_patch16_224"),
    "EfficientNet-Lite0": converted("efficientnet_lite0"),
    "ConvNeXt-T": converted("convnext_tiny"),
    "ResNet-50 of alignment units": converted("resnet50", CodaConfig()),
    "ResNet-50, FA-CNN": converted("resnet50", FaCnnConfig()),
    "ResNet-50, CA-Stream": converted("resnet50", CaStreamConfig()),
}
if published is not None:
    ROWS["ResNet-50"] = {**ROWS["ResNet-50"], "bcos": published.resnet50}
    # The published ViT is another architecture (mean pooling, fixed positions); its plain twin comes with it.
    ROWS["SimpleViT-S/16"] = {
        "torch": published.standard_simple_vit_s_patch16_224,
        "bcos": published.simple_vit_s_patch16_224,
    }
LAYOUTS = ("", ", channels last")
KINDS = ("inference", "step", "explain")


def sides_of(row: str, options: Any, channels_last: bool) -> dict[str, nn.Module]:
    made: dict[str, nn.Module] = {}
    for side, make in ROWS[row].items():
        torch.manual_seed(0)
        model = make().to(options.device, measure.DTYPES[options.dtype])
        made[side] = model.to(memory_format=torch.channels_last) if channels_last else model
        if options.compiled and side in ("torch", "bcosify"):
            made[f"{side} compiled"] = twin = copy.deepcopy(made[side])
            compile_blocks(twin, (), moving=False)
    return made


def pictures_for(model: nn.Module, side: str, options: Any, channels_last: bool) -> Tensor:
    torch.manual_seed(0)
    pictures = torch.randn(options.batch, 3, 224, 224, device=options.device, dtype=measure.DTYPES[options.dtype])
    if side == "bcos":
        pictures = torch.cat([pictures.sigmoid(), 1 - pictures.sigmoid()], 1)
    return pictures.contiguous(memory_format=torch.channels_last) if channels_last else pictures


def in_training(model: nn.Module, side: str) -> contextlib.AbstractContextManager[Any]:
    return batch_statistics(model) if side.startswith("bcosify") else contextlib.nullcontext(model.train())


def forward(model: nn.Module, pictures: Tensor) -> None:
    with torch.no_grad():
        model.eval()(pictures)


def step(model: nn.Module, side: str, pictures: Tensor) -> None:
    # Not all are: where biases have faded they are not read.
    used = [p for p in model.parameters() if p.requires_grad]
    with in_training(model, side):
        torch.autograd.grad(model(pictures).square().mean(), used, allow_unused=True)


def explained(model: nn.Module, side: str, pictures: Tensor) -> None:
    """One target for every picture of the batch."""
    if side.startswith("bcosify"):
        explain(model.eval(), pictures, 0)
        return
    assert side == "bcos"
    with model.eval().explanation_mode():  # type: ignore[operator]
        leaf = pictures.clone().requires_grad_()
        torch.autograd.grad(model(leaf)[:, 0].sum(), leaf)


def measured(name: str, channels_last: bool, options: Any) -> dict[str, Any]:
    """One row of results."""
    models = sides_of(name, options, channels_last)
    trained = [side for side in models if not side.endswith("folded")]
    pictures = {side: pictures_for(model, side, options, channels_last) for side, model in models.items()}
    runs = {
        "inference": {side: lambda s=side: forward(models[s], pictures[s]) for side in models},
        "step": {side: lambda s=side: step(models[s], s, pictures[s]) for side in trained},
    }
    timed = {
        kind: measure.against(measure.paired(r, options.rounds, options.device, 1), "torch") for kind, r in runs.items()
    }
    found: dict[str, Any] = {side: {kind: timed[kind][side] for kind in runs if side in runs[kind]} for side in models}
    for side in trained:
        with in_training(models[side], side):
            kept = measure.kept_bytes(lambda s=side: models[s](pictures[s]), list(models[side].parameters()))
        found[side]["kept"] = kept
    for side in found:
        if side in ("bcosify", "bcosify folded", "bcos"):
            pair = {
                "inference": runs["inference"][side],
                "explain": lambda s=side: explained(models[s], s, pictures[s]),
            }
            seconds = measure.paired(pair, options.rounds, options.device, 1)
            found[side]["explain"] = measure.against(seconds, "inference")["explain"]
    settings = {"batch": options.batch, "rounds": options.rounds, "dtype": options.dtype}
    return {"row": name + LAYOUTS[channels_last], **settings, **measure.machine(options.device), "sides": found}


def table(rows: list[dict[str, Any]]) -> str:
    heads = ["model", "side", "inference ms", "ratio", "step ms", "ratio", "kept MiB", "ratio", "explain / inference"]
    cells = []
    for row in rows:
        base = row["sides"]["torch"]
        for side, found in row["sides"].items():
            line = [row["row"] if side == "torch" else "", side]
            for kind in ("inference", "step"):
                cost = found.get(kind)
                line += [f"{cost['ms']['median']:.0f}", measure.bold(cost["ratio"])] if cost else ["", ""]
            kept = found.get("kept")
            line += [f"{kept / measure.MIB:.0f}", f"{kept / base['kept']:.2f}"] if kept else ["", ""]
            cells.append([*line, measure.bold(found["explain"]["ratio"]) if "explain" in found else ""])
    return measure.markdown(heads, cells)


def main() -> None:
    parser = measure.options(__doc__, "models", rounds=7)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--compiled", action="store_true", help="also the two sides with torch.compile")
    options = parser.parse_args()
    measure.prepare(options.device)
    rows: list[dict[str, Any]] = []
    for name in ROWS:
        for channels_last in (False, True) if name == "ResNet-50" else (False,):
            if options.only in name + LAYOUTS[channels_last]:
                rows.append(measured(name, channels_last, options))
                print(table(rows[-1:]), flush=True)
                measure.finish(options, "models.py", rows, table)


if __name__ == "__main__":
    main()
