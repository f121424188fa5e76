"""What a dynamic-linear layer costs beside its source's: time and memory, forward and backward, paired in one run.

    python benchmarks/layers.py [--device cuda --dtype bfloat16] [--only linear] [--rounds 15] [--sides torch bcosify]

Sides: `torch` is the plain layer; `bcosify` ours at B = 2 without bias, in eager mode; `compiled` the same by
torch.compile; `bcos` the published library (`pip install --no-deps bcos`; left out where it is missing); `two products`
what a layer costs that takes w.x and cos(w, x) by a matrix product each. `forward` is inference; `both` is forward and
backward with the gradients of input and weights. Writes benchmarks/results/layers.json and a section of
docs/performance.md.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import measure
import torch
import torch.nn.functional as F
from bcosify.convert.layers import (
    BcosConv2d,
    BcosLinear,
    Scheduled,
    SixChannelBcosConv2d,
    UncentredBatchNorm,
    convert_in_place,
    set_strength,
)
from bcosify.convert.methods.coda.layers import CodaConv2d, CodaLinear
from torch import Tensor, nn

try:
    import bcos.modules as published
except ImportError:
    published = None

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class TwoProducts(nn.Module):
    """|cos(x, w)| * w.x from w.x and x.w/|w|, each by a product of its own, in plain torch."""

    def __init__(self, source: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self.source, self.weight = source, source.weight

    def forward(self, x: Tensor) -> Tensor:
        source, unit = self.source, F.normalize(self.weight.flatten(1)).view_as(self.weight)
        if isinstance(source, nn.Linear):
            norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
            return (F.linear(x, unit) / norm).abs() * F.linear(x, self.weight)
        geometry = (source.stride, source.padding, source.dilation, source.groups)
        squares = x.square().unflatten(1, (source.groups, -1)).sum(2)
        area = math.prod(source.kernel_size)
        norm = (F.avg_pool2d(squares, source.kernel_size, source.stride, source.padding) * area).sqrt()  # type: ignore[arg-type]
        norm = norm.repeat_interleave(source.out_channels // source.groups, 1)
        cosine = F.conv2d(x, unit, None, *geometry) / norm
        return cosine.abs() * F.conv2d(x, self.weight, None, *geometry)


def bcos_layer(source: nn.Module) -> nn.Module:
    layer = convert_in_place(copy.deepcopy(source), BcosLinear if isinstance(source, nn.Linear) else BcosConv2d)
    set_strength(layer, b=2.0, beta=0.0)
    return layer


def coda_layer(source: nn.Module) -> nn.Module:
    layer = convert_in_place(copy.deepcopy(source), CodaLinear if isinstance(source, nn.Linear) else CodaConv2d)
    layer.start_alignment(rank=4, basis=4, squash="l2")
    return layer


def stem_layer(source: nn.Module) -> nn.Module:
    layer = convert_in_place(copy.deepcopy(source), SixChannelBcosConv2d)
    layer.encode_with(MEAN, STD)
    set_strength(layer, b=2.0, beta=0.0)
    return layer


def batch_norm_layer(source: nn.Module) -> nn.Module:
    layer: Scheduled = convert_in_place(copy.deepcopy(source), UncentredBatchNorm)
    set_strength(layer, beta=0.0)
    return layer.train()


def published_layer(source: nn.Module) -> nn.Module:
    assert published is not None
    if isinstance(source, nn.Linear):
        return published.BcosLinear(source.in_features, source.out_features)
    assert isinstance(source, nn.Conv2d)
    # It takes no pair for a dilation.
    pairs = (source.kernel_size, source.stride, source.padding, source.dilation)
    geometry = (*(pair[0] for pair in pairs), source.groups)  # type: ignore[index]
    return published.BcosConv2d(source.in_channels, source.out_channels, *geometry)


@dataclasses.dataclass(frozen=True)
class Row:
    """A layer of the source, what it reads, and what is made of it."""

    source: Callable[[], nn.Module]
    shape: tuple[int, ...]
    ours: Callable[[nn.Module], nn.Module] = bcos_layer
    peers: bool = True
    channels_last: bool = False


def conv(*arguments: int, **options: int) -> Callable[[], nn.Module]:
    return lambda: nn.Conv2d(*arguments, bias=False, **options)


ROWS: Mapping[str, Row] = {
    "linear 384→1536, 16×197 tokens": Row(lambda: nn.Linear(384, 1536, bias=False), (16, 197, 384)),
    "linear 1536→384, 16×197 tokens": Row(lambda: nn.Linear(1536, 384, bias=False), (16, 197, 1536)),
    "linear 384→384, 16×197 tokens": Row(lambda: nn.Linear(384, 384, bias=False), (16, 197, 384)),
    "conv 1×1 256→256 @28": Row(conv(256, 256, 1), (16, 256, 28, 28)),
    "conv 1×1 256→1024 @14": Row(conv(256, 1024, 1), (16, 256, 14, 14)),
    "conv 3×3 256→256 @28": Row(conv(256, 256, 3, padding=1), (16, 256, 28, 28)),
    "conv 3×3 64→64 @56": Row(conv(64, 64, 3, padding=1), (16, 64, 56, 56)),
    "depthwise 7×7 192 @28": Row(conv(192, 192, 7, padding=3, groups=192), (16, 192, 28, 28)),
    "stem 7×7/2 6→64 @224": Row(conv(6, 64, 7, stride=2, padding=3), (16, 6, 224, 224)),
    "exact stem 7×7/2 3→64 @224": Row(conv(3, 64, 7, stride=2, padding=3), (16, 3, 224, 224), stem_layer, False),
    "batch norm 256 @28, training": Row(lambda: nn.BatchNorm2d(256), (16, 256, 28, 28), batch_norm_layer, False),
    "CoDA linear 384→1536, 16×197 tokens": Row(
        lambda: nn.Linear(384, 1536, bias=False), (16, 197, 384), coda_layer, False
    ),
    "CoDA conv 3×3 64→64 @56": Row(conv(64, 64, 3, padding=1), (16, 64, 56, 56), coda_layer, False),
}
# The layouts that convolutions are measured in.
LAYOUTS = ("", ", channels last")
SIDES = ("torch", "bcosify", "compiled", "bcos", "two products")


def layers(row: Row, sides: list[str], device: str, dtype: torch.dtype) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    source = row.source()
    makers: dict[str, Callable[[nn.Module], nn.Module]] = {"torch": copy.deepcopy, "bcosify": row.ours}
    makers["compiled"] = lambda source: torch.compile(row.ours(source), dynamic=False)
    if row.peers:
        makers |= {"bcos": published_layer} if published else {}
        makers["two products"] = TwoProducts
    made = {name: make(source).to(device, dtype) for name, make in makers.items() if name in sides}
    format_ = torch.channels_last if row.channels_last else torch.contiguous_format
    return {name: layer.to(memory_format=format_) for name, layer in made.items()}


def measured(name: str, row: Row, sides: list[str], options: Any) -> dict[str, Any]:
    """One row of results."""
    dtype = measure.DTYPES[options.dtype]
    made = layers(row, sides, options.device, dtype)
    x = torch.randn(row.shape, device=options.device, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last) if row.channels_last else x
    x.requires_grad_()
    gradient = torch.randn_like(made["torch"](x))

    def forward(layer: nn.Module) -> None:
        with torch.no_grad():
            layer(x)

    def both(layer: nn.Module) -> None:
        # Not all are used: where biases have faded they are not read.
        torch.autograd.grad(layer(x), [x, *layer.parameters()], gradient, allow_unused=True)

    found: dict[str, Any] = {"row": name, "rounds": options.rounds, **measure.machine(options.device)}
    found |= {"dtype": options.dtype, "sides": {}}
    timed = {}
    for kind, run in (("forward", forward), ("both", both)):
        runs = {side: functools.partial(run, layer) for side, layer in made.items()}
        timed[kind] = measure.against(measure.paired(runs, options.rounds, options.device), "torch")
    for side, layer in made.items():
        there = [x, *layer.parameters(), *layer.buffers()]
        found["sides"][side] = {
            **{kind: timed[kind][side] for kind in timed},
            "kept": measure.kept_bytes(lambda layer=layer: layer(x)),
            "beyond": measure.kept_bytes(lambda layer=layer: layer(x), there, output=False),
            "peak": measure.peak_bytes(lambda layer=layer: both(layer), options.device),
        }
    return found


def table(rows: list[dict[str, Any]]) -> str:
    heads = ["layer", "side", "forward ms", "ratio", "fwd+bwd ms", "ratio", "kept MiB", "ratio", "besides", "peak MiB"]
    cells = []
    for row in rows:
        base = row["sides"]["torch"]
        for side, found in row["sides"].items():
            line = [row["row"] if side == "torch" else "", side]
            for kind in ("forward", "both"):
                line += [f"{found[kind]['ms']['median']:.1f}", measure.bold(found[kind]["ratio"])]
            line += [f"{found['kept'] / measure.MIB:.1f}", f"{found['kept'] / base['kept']:.2f}"]
            line += [f"{found['beyond'] / measure.MIB:.1f}", f"{found['peak'] / measure.MIB:.0f}"]
            cells.append(line)
    return measure.markdown(heads, cells)


def main() -> None:
    parser = measure.options(__doc__, "layers", rounds=15)
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    options = parser.parse_args()
    measure.prepare(options.device)
    rows: list[dict[str, Any]] = []
    for name, row in ROWS.items():
        for layout in LAYOUTS if len(row.shape) == 4 else LAYOUTS[:1]:
            if options.only in name + layout:
                row = dataclasses.replace(row, channels_last=bool(layout))
                rows.append(measured(name + layout, row, ["torch", *options.sides], options))
                print(table(rows[-1:]), flush=True)
                measure.finish(options, "layers.py", rows, table)


if __name__ == "__main__":
    main()
