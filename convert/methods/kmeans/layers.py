"""A classifier that decides by the nearest prototype (after Boubekki & Clemmensen, arXiv 2603.28466; KMEx, arXiv
2312.07822), and what an average in front of it makes of that.

With prototypes mu_ch (C, H, d), a temperature tau, offsets o_ch and the pooled feature f (d,),

    s_ch = tau (|f|^2 - |f - mu_ch|^2) / 2 + o_ch - f.z       logit_c = max_h s_ch

|f|^2 and z (d,) are common to all classes, so neither a decision nor a probability sees them: the largest logit belongs
to the prototype that is nearest but for its offset. At mu_c = w_c, o_c = b_c + |w_c|^2 / 2, tau = 1, z = 0 this is the
linear classifier w.f + b. (Ours; so is z, tau times the mean feature: prototypes lie among the data, and without it
every map would show what all pictures share.)

Where f is the average of features F_p over P places, distances add up: mean_p |F_p - mu|^2 = |f - mu|^2 + a term that
all prototypes share. So a logit is the sum of what its places add, and the map of a margin (own class against rival)

    m_p = tau (|F_p - mu_rival|^2 - |F_p - mu_own|^2) / 2 + o_own - o_rival

needs no gradient and has exactly the margin for its mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...layers.stages import features_of, places, weighed

__all__ = ["Concepts", "PrototypeLinear", "PrototypeMaps", "joined_stages"]


class PrototypeLinear(nn.Module):
    """Mixin over `nn.Linear`: (..., d) -> (..., C) by nearest prototypes. The linear classifier stays beside them.

    Attributes:
        prototypes: (C, H, d). offsets: (C, H), -inf where a class has fewer prototypes. temperature: (). shift: (d,) z.
        from_data: (C,) bool, whether a class has prototypes from data; others have the linear classifier's own.
    """

    weight: Tensor
    bias: Tensor | None
    from_data: Tensor

    def start_prototypes(self, count: int) -> None:
        """One prototype a class, which is the linear classifier's; room for `count`."""
        weight = self.weight.detach()
        classes, width = weight.shape
        prototypes = weight.new_zeros(classes, count, width)
        prototypes[:, 0] = weight
        offsets = weight.new_full((classes, count), -math.inf)
        offsets[:, 0] = weight.square().sum(1) / 2 + (0 if self.bias is None else self.bias.detach())
        self.prototypes, self.offsets = nn.Parameter(prototypes), nn.Parameter(offsets)
        self.temperature = nn.Parameter(weight.new_ones(()))
        self.shift = nn.Parameter(weight.new_zeros(width))
        self.register_buffer("from_data", torch.zeros(classes, dtype=torch.bool, device=weight.device))

    def scores(self, features: Tensor) -> Tensor:
        """s (..., C, H) of features (..., d)."""
        # Without |f|^2, which cancels: the difference of two large distances would round it away.
        products = features @ (self.temperature * self.prototypes - self.shift).flatten(0, 1).T
        return products.unflatten(-1, self.offsets.shape) + self.constants()

    def constants(self) -> Tensor:
        """(C, H): what a score has whatever the features, o - tau |mu|^2 / 2."""
        return self.offsets - self.temperature * self.prototypes.square().sum(-1) / 2

    def forward(self, features: Tensor) -> Tensor:
        scores = self.scores(features)
        # By index, as explanation mode freezes which prototype is the nearest, not what it says.
        return scores.gather(-1, self.nearest(scores)).squeeze(-1)

    @staticmethod
    def nearest(scores: Tensor) -> Tensor:
        """(..., C, 1): index of each class's nearest prototype; ties go to the lowest."""
        return scores.detach().argmax(-1, keepdim=True)

    def linear_logits(self, features: Tensor) -> Tensor:
        """(..., C): what the classifier that this one was made of says."""
        return nn.functional.linear(features, self.weight, self.bias)

    def extra_repr(self) -> str:
        classes, count, width = self.prototypes.shape
        return f"classes={classes}, prototypes={count} each, features={width}, from data={int(self.from_data.sum())}"


class Concepts(nn.Module):
    """Centres of features of places, in the last stage (B4) and in the last three joined (B234); 0 until fitted.

    Attributes:
        b4: (Q, d). b234: (Q, d_2 + d_3 + d_4), zeros where the stages' grids do not divide. scales: (3,) root mean
            square of each stage, which it is divided by before stages are joined.
    """

    def __init__(self, count: int, widths: tuple[int, ...]) -> None:
        """Args: widths: channels of the last stages, at most three."""
        super().__init__()
        self.b4 = nn.Parameter(torch.zeros(count, widths[-1]))
        self.b234 = nn.Parameter(torch.zeros(count, sum(widths)))
        self.scales = nn.Parameter(torch.ones(len(widths)))

    @staticmethod
    def assigned(features: Tensor, centres: Tensor) -> Tensor:
        """(B, h, w) index of the nearest of centres (Q, d) at every place of features (B, d, h, w)."""
        scores = torch.einsum("bdhw,qd->bqhw", features, centres) - centres.square().sum(1)[:, None, None] / 2
        return scores.argmax(1)


def joined_stages(stages: list[Tensor], scales: Tensor) -> Tensor | None:
    """(B, sum of d_l, h, w) on the grid of the largest of stages (B, d_l, h_l, w_l), each over its scale.

    Each cell is repeated a whole number of times, which keeps means over places exact; None where that cannot be.
    """
    height, width = stages[0].shape[-2:]
    grown = []
    for stage, scale in zip(stages, scales, strict=True):
        rows, columns = stage.shape[-2:]
        if height % rows or width % columns:
            return None
        grown.append((stage / scale).repeat_interleave(height // rows, -2).repeat_interleave(width // columns, -1))
    return torch.cat(grown, 1)


class PrototypeMaps(nn.Module):
    """Mixin over a whole timm model that does nothing but average over places in front of its PrototypeLinear."""

    concepts: Concepts
    get_classifier: Any  # timm's own
    concept_stages: tuple[int, ...]

    def open_concepts(self, stages: tuple[int, ...], widths: tuple[int, ...], count: int) -> None:
        """Room for `count` concepts of these feature stages, the last of which is what the head averages."""
        self.concept_stages = stages
        self.concepts = Concepts(count, widths).to(next(self.parameters())).train(self.training)

    def output_maps(
        self, images: Tensor, weights: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """See `explain.SelfExplaining`."""
        stage = self._last_stage(images)
        head, pooled = self.get_classifier(), stage.mean((2, 3))
        scores = head.scores(pooled)
        nearest = head.nearest(scores)
        rows = (head.temperature * head.prototypes - head.shift)[torch.arange(len(head.prototypes)), nearest[..., 0]]
        maps = torch.einsum("bdhw,bcd->bchw", stage, rows) / stage.shape[-2:].numel()
        constants = head.constants().expand_as(scores).gather(-1, nearest).squeeze(-1)
        outputs = scores.gather(-1, nearest).squeeze(-1)
        return weighed(outputs, maps, {"offsets and norms of prototypes": constants}, weights)

    @torch.no_grad()
    def margin_maps(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Why the first class and not the second: classes (B, 2), margins (B,), and maps m (B, h, w) with that mean."""
        outputs, maps, constants = self.output_maps(images)
        classes = outputs.topk(2, 1).indices
        places_ = maps.shape[-2:].numel()
        own, rival = (maps[torch.arange(len(maps)), classes[:, k]] * places_ for k in (0, 1))
        constant = sum(constants.values(), torch.zeros_like(outputs)).gather(1, classes)
        margins = outputs.gather(1, classes)
        difference = own - rival + (constant[:, 0] - constant[:, 1])[:, None, None]
        return classes, margins[:, 0] - margins[:, 1], difference

    @torch.no_grad()
    def extra_maps(self, images: Tensor) -> dict[str, Tensor]:
        """name -> (B, h, w): the margin's map, and the concepts of places where they are fitted."""
        stages = features_of(self, images, self.concept_stages)[1]
        found = {"margin": self.margin_maps(images)[2]}
        if self.concepts.b4.any():
            found["concepts_b4"] = self.concepts.assigned(stages[-1], self.concepts.b4)
        joined = joined_stages(stages, self.concepts.scales) if self.concepts.b234.any() else None
        if joined is not None:
            found["concepts_b234"] = self.concepts.assigned(joined, self.concepts.b234)
        return found

    def pooled_and_stages(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """What the head classifies (B, d), and the stages that concepts are of."""
        stages = features_of(self, images, self.concept_stages)[1]
        return places(stages[-1]).mean(1), stages

    def _last_stage(self, images: Tensor) -> Tensor:
        return features_of(self, images, self.concept_stages[-1:])[1][-1]
