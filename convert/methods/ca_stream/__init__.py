"""CA-Stream conversion: a stream of cross-attention pools in the place of the average (`layers.ca_stream`).

CA-Stream (arXiv 2404.14996) trains the stream with labels, from scratch, on CNNs. The start that is the teacher, the
alignment without labels, contributions of places to each class, and ViTs are ours.

For timm models, which show their feature stages and take head and backbone apart. What the head does with its features
is tried, not guessed: it must either average over places first, or read the class token alone.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal, get_args

import torch
from torch import nn

from ....core.errors import PlanError, near_miss
from ....core.pictures import fitted, noise_pictures
from ....core.ranges import COUNT
from ....core.settings import check
from ...layers import convert_in_place, join
from ...libraries import Preprocess
from ...plan import Decision, Method, Paper
from ...swaps import Swap, swap
from ...trace import Trace
from ..timm_stages import check_timm, head_reads, last_stages, seen_stages
from .layers import CaStream, CaStreamForToken

__all__ = ["METHOD", "CaStreamConfig"]

Value = Literal["identity", "linear"]
VALUES: tuple[Value, ...] = get_args(Value)


@dataclasses.dataclass(frozen=True)
class CaStreamConfig:
    """Settings of a CA-Stream conversion.

    Attributes:
        stages: how many stages the stream runs through, counted from the last: the paper's S0-S4 are 5, its S4-S4 is 1.
            The stages of a ViT, whose blocks are all alike, are the quarters of its depth (ours).
        value: `identity` pools the features themselves; `linear` learns the paper's last projection, d x d, as well.
            A class token's head always has it, as patches do not say what the token says.
        keep: no layer of the backbone is changed, so this must be empty.
    """

    stages: Annotated[int, COUNT] = 2
    value: Value = "identity"
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.value not in VALUES:
            raise PlanError(f"no value {self.value!r}.{near_miss(self.value, VALUES)} There are: {', '.join(VALUES)}.")
        check(self)
        if self.keep:
            raise PlanError(
                f"--keep {self.keep[0]}: --method ca-stream changes no layer of the backbone. Leave it out."
            )


@dataclasses.dataclass(frozen=True)
class StreamArguments:
    """Attributes: stages, widths: numbers and channels of the stages that the stream reads. value: it learns V."""

    stages: tuple[int, ...]
    widths: tuple[int, ...]
    value: bool


@swap("ca-stream.average", CaStream, arguments=StreamArguments)
def average_stream(module: nn.Module, preprocess: Preprocess, given: StreamArguments) -> None:
    join(module, CaStream).open_stream(given.stages, given.widths, given.value)


@swap("ca-stream.token", CaStreamForToken, arguments=StreamArguments)
def token_stream(module: nn.Module, preprocess: Preprocess, given: StreamArguments) -> None:
    convert_in_place(module, CaStreamForToken).open_stream(given.stages, given.widths, given.value)


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a stream fits: the stages that it reads, their widths, and the head that it feeds."""

    stages: tuple[int, ...]
    widths: tuple[int, ...]
    grid: tuple[int, int]
    swap: Swap


@torch.no_grad()
def _look(model: Any, size: tuple[int, int], config: CaStreamConfig) -> _Place:
    """Tries out on one picture of `size` where the stream fits; raises PlanError where it does not."""
    check_timm(model)
    stages = last_stages(model, config.stages)
    picture = fitted(noise_pictures(1, size), model)
    final, maps = seen_stages(model, picture, stages)
    if maps[-1].shape[-2:].numel() == 1:
        raise PlanError(
            f"its last map is 1x1 at {size[0]}x{size[1]}, where attention has nothing to choose from; "
            "pass a larger --image-size"
        )
    widths = tuple(stage.shape[1] for stage in maps)
    height, width = maps[-1].shape[-2:]
    return _Place(stages, widths, (height, width), READERS[head_reads(model, picture, final, maps[-1])])


DISTILLED = ("decisions", "pairwise", "end-to-end")
READERS = {"average": average_stream, "token": token_stream}


def _decide(name: str, module: nn.Module, model: nn.Module, trace: Trace, config: CaStreamConfig) -> Decision | None:
    if name:
        return None
    place = _look(model, trace.size, config)
    token = place.swap is token_stream
    what = "the class token, whose share then fades" if token else "the average"
    widths = " -> ".join(map(str, place.widths))
    return Decision(
        place.swap,
        f"attention in the place of {what}; stages of {widths} channels, {place.grid} places",
        StreamArguments(place.stages, place.widths, token or config.value == "linear"),
    )


METHOD = Method(
    name="ca-stream",
    config_class=CaStreamConfig,
    decide=_decide,
    ends=lambda config: {},
    whole=True,
    trains="stream",
    # Of an average, the pooled vector is matched best by uniform attention: there is nothing to learn from it.
    objectives={average_stream: ("decisions", "pairwise"), token_stream: DISTILLED},
    title="CA-Stream",
    what="A stream of attention beside the frozen backbone takes the place of the pooling.",
    papers=(Paper("CA-Stream", "Torres et al.", "2024", "https://arxiv.org/abs/2404.14996"),),
    hint="attention beside a frozen backbone",
    recipes=("ca-stream/cnn", "ca-stream/vit"),
)
