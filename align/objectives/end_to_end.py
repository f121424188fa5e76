"""end-to-end: mean token (1 - cos) at some depths, and (1 - cos) of the output (ALOE, CVPR 2026)."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import torch
from torch import Tensor, nn

from ...convert.layers import scheduled_layers
from ...convert.taps import Call, depth_taps, find_blocks
from ...core.ranges import AMOUNT, PART, Length
from ..losses import magnitude_error
from ..maps import Aim, map_error
from .base import FeatureConfig, Objective, objective

__all__ = ["EndToEnd", "EndToEndConfig", "WeightNorms"]


@dataclasses.dataclass(frozen=True)
class EndToEndConfig(FeatureConfig):
    """Settings of `end-to-end`.

    Attributes:
        taps, depths: modules compared end to end; empty means the blocks after which `depths` (shares of all
            blocks) are done.
        output_weight: weight of the output's loss beside one for every tap.
        magnitude_weight: weight of the squared logarithm of the ratio of norms, at every tap (cosines leave it
            free).
        weight_norm: weight of the squared relative change of each converted layer's weight norm since the phase
            began.
        map_weight: weight of the cosine distance between the student's exact map of the teacher's decision
            minus a random other class (for embeddings: of the teacher's own direction) and the teacher's at its
            last features (see `maps`); 0 leaves it out.
        map_share: share of each batch, in (0, 1], whose maps are compared.
    """

    taps: tuple[str, ...] = ()
    depths: Annotated[tuple[Annotated[float, PART], ...], Length(1, 1000, "depths")] = (1 / 3, 2 / 3, 1.0)
    output_weight: Annotated[float, AMOUNT] = 1.0
    magnitude_weight: Annotated[float, AMOUNT] = 0.0
    weight_norm: Annotated[float, AMOUNT] = 0.0
    map_weight: Annotated[float, AMOUNT] = 0.0
    map_share: Annotated[float, PART] = 0.25


@objective("end-to-end", EndToEndConfig)
class EndToEnd(Objective):
    """The student runs on its own from the picture."""

    whole = True

    def __init__(self, student: nn.Module, config: EndToEndConfig) -> None:
        super().__init__(student, config, config.taps or depth_taps(find_blocks(student), config.depths))
        self.output_weight, self.magnitude_weight = config.output_weight, config.magnitude_weight
        self.norms = WeightNorms(config.weight_norm)
        self.map_weight, self.map_share = config.map_weight, config.map_share
        self.mean_output: Tensor | None = None

    @property
    def asks_teacher(self) -> bool:
        return super().asks_teacher or bool(self.map_weight)

    def centre_on(self, calls: dict[str, Call], output: Tensor) -> None:
        super().centre_on(calls, output)
        self.mean_output = output.mean(0)

    def begin(self) -> dict[str, float]:
        return self.norms.begin(self.student)

    def go_on(self, begun: dict[str, float]) -> None:
        self.norms.first = begun

    def forward(
        self, pictures: Tensor, calls: dict[str, Call], output: Tensor, aim: Aim | None = None
    ) -> dict[str, Tensor]:
        pairs, ours_output = self._compared(pictures, calls)
        losses = {name: self._distance(name, *pair) for name, pair in pairs.items()}
        losses["output"] = self.output_weight * self._distance("output", ours_output, output)
        if self.magnitude_weight:
            errors = [magnitude_error(*pair) for pair in pairs.values()]
            losses["magnitude"] = self.magnitude_weight * torch.stack(errors).sum()
        if self.norms.weight:
            losses["weight norm"] = self.norms.penalty(self.student)
        if aim is not None:
            losses["map"] = self.map_weight * map_error(self.student, pictures[: len(aim.maps)], aim)
        return {**losses, "total": torch.stack(list(losses.values())).sum()}


class WeightNorms:
    """Keeps converted layers near the weight norms that they had at first: cosines in loss and layers see no norm."""

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.first: dict[str, float] = {}

    def begin(self, student: nn.Module) -> dict[str, float]:
        """Takes the norms of now as the first ones; returns them."""
        self.first = {name: float(norm.detach()) for name, norm in self._norms(student).items()} if self.weight else {}
        return self.first

    @staticmethod
    def _norms(student: nn.Module) -> dict[str, Tensor]:
        """Frobenius norm of every converted matrix or kernel."""
        layers = {name: getattr(layer, "weight", None) for name, layer in scheduled_layers(student)}
        return {name: weight.norm() for name, weight in layers.items() if weight is not None and weight.dim() > 1}

    def penalty(self, student: nn.Module) -> Tensor:
        """`weight` times the mean squared relative change."""
        changes = [norm / self.first[name] - 1 for name, norm in self._norms(student).items()]
        return self.weight * torch.stack(changes).square().mean()
