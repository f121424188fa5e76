"""A cross-attention stream beside a frozen backbone (CA-Stream, arXiv 2404.14996, eq. 5 to 9).

With F_l the map of stage l as places times channels (P_l, d_l), and a learned query q_0,

    a_l = softmax(F_l q_l / sqrt(d_l))    (P_l,) attention over places
    c_l = F_l^T a_l                       (d_l,) what is attended to
    q_(l+1) = W_l c_l                     (d_(l+1),) the next stage's query

and v = V c_L goes into the frozen head in the place of the average over places. Features are used as they are: no keys,
no values, one head, no norm, no bias. As v = sum_i a_i V F_i, every place's share in it, and in whatever the head makes
of it, can be read off.

Ours: the start. All queries are zero and V = 1, so every attention is uniform, v is the average, and the model is its
teacher (the paper starts from random weights). Zero queries learn from the last stage backwards: a step away from zero
in one gives the one before it its gradient. A head that reads a class token instead of an average gets beta times that
token plus (1 - beta) v: its teacher at beta = 1, and a pure stream at beta = 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ....linearise import Linearised
from ...kernels.precision import without_autocast
from ...layers.scheduled import BiasScheduled
from ...layers.stages import at_one_place, features_of, places

__all__ = ["CaStream", "CaStreamForToken", "Stream"]


class Stream(nn.Module):
    """Pools the last of several maps by an attention that all of them direct.

    Attributes:
        stages: numbers of the model's feature stages that the maps are of.
        query: (d_0,) q_0. projections: W_0 ... W_(L-1), (d_(l+1), d_l) each, times sqrt(d_l), so that one learning rate
            fits them and V.
        value: (d_L, d_L) what V differs from one by, so that weight decay draws it there; None is V = 1.
    """

    def __init__(self, stages: Sequence[int], widths: Sequence[int], value: bool) -> None:
        """Args: widths: d_0 ... d_L. value: whether V is learned."""
        super().__init__()
        self.stages = tuple(stages)
        self.query = nn.Parameter(torch.zeros(widths[0]))
        self.projections = nn.ParameterList(
            torch.zeros(after, before) for before, after in zip(widths[:-1], widths[1:], strict=True)
        )
        self.value = nn.Parameter(torch.zeros(widths[-1], widths[-1])) if value else None

    def attention(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """a_l (B, P_l) for maps F_l (B, P_l, d_l); each is not negative and sums to one."""
        attentions: list[Tensor] = []
        query = self.query.expand(len(maps[0]), -1)
        for stage, features in enumerate(maps):
            if stage:
                query = _pooled(attentions[-1], maps[stage - 1]) @ self.projections[stage - 1].T
                query = query / math.sqrt(maps[stage - 1].shape[-1])
            # At least float32: a product of large features overflows in half precision, and softmax of inf is nan.
            wide = torch.promote_types(features.dtype, torch.float32)
            with without_autocast(features):
                scores = features.to(wide) @ query.to(wide).unsqueeze(-1) / math.sqrt(features.shape[-1])
                attentions.append(scores.squeeze(-1).softmax(-1).to(features.dtype))
        return attentions

    def shares(self, maps: Sequence[Tensor]) -> Tensor:
        """(B, P_L, d_L): a_i V F_i, what every place of the last map adds to the pooled vector."""
        return self._valued(maps[-1] * self.attention(maps)[-1].unsqueeze(-1))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """(B, d_L): the pooled vector v."""
        return self._valued(_pooled(self.attention(maps)[-1], maps[-1]))

    def _valued(self, features: Tensor) -> Tensor:
        return features if self.value is None else features + features @ self.value.T

    def extra_repr(self) -> str:
        return f"stages={self.stages}, value={'linear' if self.value is not None else 'identity'}"


def _pooled(attention: Tensor, features: Tensor) -> Tensor:
    """(B, d): features (B, P, d) weighed by attention (B, P)."""
    return (attention.unsqueeze(1) @ features).squeeze(1)


class CaStream(nn.Module):
    """Mixin over a whole timm model whose head averages over places: its backbone and head, with a stream between."""

    stream: Stream
    forward_intermediates: Any  # timm's own
    forward_head: Any
    _stream_share: float = 1.0

    def open_stream(self, stages: Sequence[int], widths: Sequence[int], value: bool) -> None:
        """Adds the stream over the feature stages of these numbers, the last of which is what the head reads."""
        like = next(self.parameters())
        self.stream = Stream(stages, widths, value).to(like).train(self.training)

    def train(self, mode: bool = True) -> CaStream:
        """Only the stream ever trains: the backbone's statistics and dropout stay as they are in eval mode."""
        super().train(False)
        self.stream.train(mode)
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.streamed(x))

    def streamed(self, x: Tensor) -> Tensor:
        """What the head is given of pictures (B, 3, H, W): features in whose place the stream's pooled vector is."""
        final, stages = features_of(self, x, self.stream.stages)
        return self._head_input(self._pooled(final, [places(stage) for stage in stages]), final)

    def attention_maps(self, images: Tensor) -> list[Tensor]:
        """(B, h_l, w_l) for every stage: where each query looks, whatever the class, in pictures (B, 3, H, W)."""
        _, stages = features_of(self, images, self.stream.stages)
        attentions = self.stream.attention([places(stage) for stage in stages])
        return [a.unflatten(1, stage.shape[-2:]) for a, stage in zip(attentions, stages, strict=True)]

    @torch.no_grad()
    def extra_maps(self, images: Tensor) -> dict[str, Tensor]:
        """name -> (B, h, w): the attention of every stage that the stream runs through."""
        maps = self.attention_maps(images)
        return {f"attention_{stage}": found for stage, found in zip(self.stream.stages, maps, strict=True)}

    def output_maps(
        self, images: Tensor, weights: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """See `explain.SelfExplaining`: a place of the last map adds a_i g^T V F_i, g the head's frozen-gate gradient.

        No backward pass runs through the backbone; through the head, one for each score that `weights` ask for.
        """
        final, stages = features_of(self, images, self.stream.stages)
        maps = [places(stage) for stage in stages]
        shares, pooled = self._stream_share * self.stream.shares(maps), self._pooled(final, maps)
        with torch.enable_grad():
            with Linearised(self) as mode:
                scores = outputs = self.forward_head(self._head_input(mode.follow(pooled), final))
                if weights is not None:
                    scores = torch.einsum("bkd,bd->bk", weights(outputs.detach()).detach(), outputs)
            pulled = [mode.pull(scores[:, k].sum(), retain_graph=True) for k in range(scores.shape[1])]
        gradients = torch.stack([gradient for (gradient,), _ in pulled], 1).detach()
        names = dict.fromkeys(name for _, constants in pulled for name in constants)
        nothing = outputs.new_zeros(len(outputs))
        held = {name: [c[name] if name in c else nothing for _, c in pulled] for name in names}
        constants = {name: torch.stack(values, 1).detach() for name, values in held.items()}
        constants |= {name: torch.einsum("bkd,bd->bk", gradients, value) for name, value in self._added(final).items()}
        contributions = torch.einsum("bkd,bpd->bkp", gradients, shares.detach())
        return outputs.detach(), contributions.unflatten(-1, stages[-1].shape[-2:]), constants

    def _pooled(self, final: Tensor, maps: Sequence[Tensor]) -> Tensor:
        return self.stream(maps)

    def _added(self, final: Tensor) -> dict[str, Tensor]:
        """name -> (B, d): what goes into the pooled vector beside the shares of places."""
        return {}

    def _head_input(self, pooled: Tensor, final: Tensor) -> Tensor:
        return at_one_place(self, pooled, final)


class CaStreamForToken(BiasScheduled, CaStream):
    """Mixin over a whole timm model whose head reads the class token: beta times that token, the rest the stream's."""

    strength_names: ClassVar[tuple[str, ...]] = ("beta",)  # no bias of it is carried

    @property
    def _stream_share(self) -> float:
        return 1 - self._beta

    def _pooled(self, final: Tensor, maps: Sequence[Tensor]) -> Tensor:
        return self._beta * final[:, 0] + self._stream_share * self.stream(maps)

    def _added(self, final: Tensor) -> dict[str, Tensor]:
        return {"class token": self._beta * final[:, 0]} if self._beta else {}

    def _head_input(self, pooled: Tensor, final: Tensor) -> Tensor:
        return pooled.unsqueeze(1)
