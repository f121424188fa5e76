"""From attention matrices, which fused attention hides from hooks."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from ...convert.taps import find_blocks
from ...core.errors import NotApplicable
from ...core.hooks import hooked
from ...explain.self_explaining import main_output
from ..decisions import Decisions
from ..subject import Subject
from .registry import method
from .shared import enlarged, patch_grid


class AttentionWeights(TorchFunctionMode):
    """Records the attention matrices (B, heads, N, N) of all calls inside, fused or not, from any library.

    With `follow` the model computes with the recorded matrices, so that a score has `gradients` with respect to them;
    without, they are read beside what the model computes.
    """

    def __init__(self, follow: bool = False) -> None:
        super().__init__()
        self.follow = follow
        self.found: list[Tensor] = []
        self.edges: list[GradientEdge] = []
        """Where each matrix stands in the graph, as torch itself hands out a view of one."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            given = inspect.signature(func).bind(*args, **kwargs)
            given.apply_defaults()
            asked = given.arguments
            output, weights = func(**{**asked, "need_weights": True, "average_attn_weights": False})
            # torch multiplies the values by the matrices (B heads, N, N), and returns a view of them.
            self._keep(weights, viewed=True)
            if not self.follow:
                return func(*args, **kwargs)
            shown = weights.mean(-3) if asked["average_attn_weights"] else weights
            return output, shown if asked["need_weights"] else None
        if func is F.scaled_dot_product_attention:
            weights = _attention(*args, **kwargs)
            self._keep(weights)
            return weights @ (args[2] if len(args) > 2 else kwargs["value"]) if self.follow else func(*args, **kwargs)
        output = func(*args, **kwargs)
        if func in SOFTMAX and output.dim() == 4 and output.shape[-1] == output.shape[-2]:
            self._keep(output)
        return output

    def _keep(self, weights: Tensor, viewed: bool = False) -> None:
        if self.follow:
            edge = get_gradient_edge(weights)
            if viewed:
                node, number = edge.node.next_functions[0]
                assert node is not None  # a view has what it views behind it
                edge = GradientEdge(node, number, None)
            self.edges.append(edge)
        self.found.append(weights.detach())

    def gradients(self, score: Tensor) -> list[Tensor]:
        """(B, heads, N, N) of every recorded matrix, of a score () that came of them; 0 where it did not."""
        found = torch.autograd.grad(score, self.edges, retain_graph=True, allow_unused=True)
        pairs = zip(found, self.found, strict=True)
        return [torch.zeros_like(seen) if grad is None else grad.view_as(seen) for grad, seen in pairs]


SOFTMAX = (torch.softmax, F.softmax, Tensor.softmax)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **named: Any,
) -> Tensor:
    if is_causal or named.get("enable_gqa"):
        raise NotApplicable("its attention is causal, or shares keys between heads")
    logits = query @ key.transpose(-1, -2) * (named.get("scale") or query.shape[-1] ** -0.5)
    if attn_mask is not None:
        logits = logits.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else logits + attn_mask
    return logits.softmax(-1)


def _recorded(subject: Subject, images: Tensor) -> list[Tensor]:
    """(B, N, N) of every layer, mean over heads."""
    with torch.no_grad(), AttentionWeights() as mode:
        subject.model(images)
    return [layer.mean(1) for layer in _layers(mode.found, len(images))]


def _layers(found: list[Tensor], pictures: int) -> list[Tensor]:
    """Those of (B, heads, N, N) that are between all tokens; raises NotApplicable where those do not form a stack."""
    layers = [layer for layer in found if layer.shape[-1] == layer.shape[-2]]
    if not layers:
        raise NotApplicable("no attention over all tokens was seen in this model")
    if len({layer.shape[-2:] for layer in layers}) > 1 or any(len(layer) != pictures for layer in layers):
        raise NotApplicable("its attention is within windows, or between tokens of several sizes")
    return layers


def _from_tokens(subject: Subject, images: Tensor, attention: Tensor, class_token: bool = True) -> Tensor:
    """The class token's row of attention (B, N, N) over patches, or the patches' mean row: where there is none, or it
    does not count."""
    rows, columns = patch_grid(subject, images)
    prefix = attention.shape[-1] - rows * columns
    if prefix < 0:
        raise NotApplicable(f"its attention is between {attention.shape[-1]} tokens, not {rows} x {columns} patches")
    row = attention[:, 0] if prefix and class_token else attention[:, prefix:].mean(1)
    return enlarged(row[:, prefix:].unflatten(1, (rows, columns))[:, None], images)


@method("attention", 1, "the last layer's, mean over heads", in_score_units=False, of_decision=False)
def _raw_attention(subject: Subject, images: Tensor, decisions: Decisions, seed: int) -> Tensor:
    return _from_tokens(subject, images, _recorded(subject, images)[-1])


@method("rollout", 1, "Abnar and Zuidema 2020, arXiv 2005.00928", in_score_units=False, of_decision=False)
def _rollout(subject: Subject, images: Tensor, decisions: Decisions, seed: int) -> Tensor:
    return _from_tokens(subject, images, rollout(_recorded(subject, images)))


def rollout(layers: list[Tensor]) -> Tensor:
    """(B, N, N): the product, last layer first, of half attention (B, N, N) and half identity (residual)."""
    identity = torch.eye(layers[0].shape[-1]).to(layers[0])
    return functools.reduce(lambda total, layer: (layer + identity) / 2 @ total, layers, identity)


@method("chefer", 2, "Chefer et al. 2021, arXiv 2103.15679, equations 5 and 6", in_score_units=False)
def _chefer(subject: Subject, images: Tensor, decisions: Decisions, seed: int) -> Tensor:
    """Rollout of what attention and its gradient have in common: R grows by (gradient * attention)+ R in each layer."""
    with torch.enable_grad(), AttentionWeights(follow=True) as mode:
        # The picture asks for a gradient, so that attention has one in frozen models too.
        score = decisions.scores(main_output(subject.model(images.requires_grad_()))).sum()
    layers = _layers(mode.found, len(images))
    gradients = [one for one in mode.gradients(score) if one.shape[-1] == one.shape[-2]]
    relevance = torch.eye(layers[0].shape[-1]).to(layers[0]).expand(len(images), -1, -1)
    for layer, gradient in zip(layers, gradients, strict=True):
        relevance = relevance + (gradient * layer).relu().mean(1) @ relevance
    return _from_tokens(subject, images, relevance, class_token=bool(gradients[-1][:, :, 0].any()))


@method("legrad", 2, "Bousselham et al. 2024, arXiv 2404.03214, equations 3 to 8", in_score_units=False)
def _legrad(subject: Subject, images: Tensor, decisions: Decisions, seed: int) -> Tensor:
    """Mean over layers of the positive part of the gradient with respect to a layer's attention, in [0, 1].

    Each layer's gradient is of its own score: what the model's end makes of the tokens after that layer.
    """
    model, names = subject.model, find_blocks(subject.model)
    blocks = [model.get_submodule(name) for name in names]
    tokens: list[Tensor] = []
    ends: list[int] = []
    ending: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        ends.append(len(mode.found))
        tokens.append(output[0] if isinstance(output, tuple) else output)
        if module is not blocks[-1] or len(tokens) != len(blocks) or len({one.shape for one in tokens}) > 1:
            return None
        # The model's end sees the tokens of all layers at once, as if they were so many pictures.
        ending.append(torch.cat(tokens).detach().requires_grad_())
        return (ending[0].clone(), *output[1:]) if isinstance(output, tuple) else ending[0].clone()

    with torch.enable_grad(), AttentionWeights(follow=True) as mode, hooked([(block, keep) for block in blocks]):
        outputs = main_output(model(images.requires_grad_()))
    layers = _layers(mode.found[: ends[-1]], len(images)) if ends else _layers([], len(images))
    if ends != list(range(1, len(blocks) + 1)) or len(outputs) != len(blocks) * len(images):
        raise NotApplicable(f"{len(layers)} attentions over all tokens and {len(blocks)} blocks: not one in each")
    rows = torch.arange(len(images), device=images.device).repeat(len(blocks))
    (asked,) = torch.autograd.grad(decisions.rows(rows).scores(outputs).sum(), ending)
    total = torch.zeros_like(layers[0][:, 0])
    for layer, edge, output, grad in zip(layers, mode.edges, tokens, asked.split(len(images)), strict=False):
        (gradient,) = torch.autograd.grad(output, edge, grad, retain_graph=True)
        total += gradient.view_as(layer).relu().mean(1) / len(blocks)
    # A token's share is what all others see of it, not the class token alone.
    seen = _from_tokens(subject, images, total.mean(1, keepdim=True).expand_as(total))
    low, high = (seen.flatten(1).aminmax(dim=1)[i][:, None, None] for i in range(2))
    return (seen - low) / (high - low).clamp_min(torch.finfo(seen.dtype).tiny)
