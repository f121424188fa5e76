"""Attention taken apart: torch's own results in every way that it can be called."""

from __future__ import annotations

import copy

import pytest
import torch
from bcosify.convert import BcosConfig, convert, plan_for, set_strength
from bcosify.convert.layers import BcosLinear, BiasScheduled, SeparateAttention, convert_in_place
from bcosify.convert.randomise import randomise
from bcosify.core.errors import PlanError
from bcosify.core.pictures import noise_pictures
from bcosify.explain import explain
from open_clip.modified_resnet import AttentionPool2d
from torch import Tensor, nn

CONFIG = BcosConfig()


def pair(**options) -> tuple[nn.MultiheadAttention, SeparateAttention]:
    """A source with numbers everywhere, and what it becomes."""
    torch.manual_seed(0)
    source = nn.MultiheadAttention(8, 2, **options).double().eval()
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    constants = ("bias_k", "bias_v") if source.bias_k is not None else ()
    return source, convert_in_place(copy.deepcopy(source), SeparateAttention, constants)


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def same(source: nn.Module, layer: nn.Module, *args: Tensor, **options) -> None:
    (wanted, weights), (found, shown) = source(*args, **options), layer(*args, **options)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    assert (weights is None) == (shown is None)
    if weights is not None:
        torch.testing.assert_close(shown, weights, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"batch_first": True}, {"bias": False}, {"add_bias_kv": True}, {"add_zero_attn": True}],
    ids=lambda options: "-".join(options) or "plain",
)
def test_it_is_its_source(options, need_weights):
    source, layer = pair(**options)
    x, y = tokens(5, 3, 8), tokens(5, 3, 8, seed=2)
    same(source, layer, x, x, x, need_weights=need_weights)
    same(source, layer, x, y, y, need_weights=need_weights)
    same(source, layer, x, y, y, need_weights=need_weights, average_attn_weights=False)
    same(source, layer, x[:, 0], y[:, 0], y[:, 0], need_weights=need_weights)


def test_keys_and_values_of_other_widths():
    source, layer = pair(kdim=6, vdim=10, batch_first=True)
    same(source, layer, tokens(3, 4, 8), tokens(3, 5, 6), tokens(3, 5, 10))
    assert layer.q_proj_weight is None and layer.k_proj.weight.shape == (8, 6)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("extra", [{}, {"add_bias_kv": True}, {"add_zero_attn": True}], ids=str)
def test_masks_mean_what_they_mean_to_torch(extra, need_weights):
    source, layer = pair(batch_first=True, **extra)
    x = tokens(3, 5, 8)
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = True
    for masks in (
        {"attn_mask": causal},
        {"attn_mask": tokens(5, 5, seed=3)},
        {"attn_mask": tokens(6, 5, 5, seed=4)},
        {"key_padding_mask": padding},
        {"attn_mask": causal, "key_padding_mask": padding},
    ):
        same(source, layer, x, x, x, need_weights=need_weights, **masks)


def test_constants_of_keys_and_values_fade():
    source, layer = pair(add_bias_kv=True, batch_first=True)
    layer.set_strength("beta", 0.5)
    with torch.no_grad():
        source.bias_k.mul_(0.5)
        source.bias_v.mul_(0.5)
    x = tokens(2, 3, 8)
    same(source, layer, x, x, x)


class Encoder(nn.Module):
    """A small transformer from torch's own layers, which have a fused kernel for evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 4, 4)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.encoder(self.stem(x).flatten(2).mT).mean(1))


def test_torch_encoders_convert_and_never_take_the_fused_kernel(teach):
    torch.manual_seed(0)
    pictures = noise_pictures(2, (16, 16))
    teacher = teach(randomise(Encoder(), pictures))
    student = convert(teacher)
    assert student.history.conversion.identity_error <= 1e-5
    block = student.model.encoder.layers[0]
    assert isinstance(block.self_attn, SeparateAttention) and isinstance(block.self_attn.out_proj, BcosLinear)
    assert isinstance(block.self_attn.q_proj, BiasScheduled) and isinstance(block.linear1, BcosLinear)
    set_strength(student.model, 2.0, 0.0)
    assert explain(student.model, pictures, targets=[0, 1]).balanced().all()
    with torch.no_grad():
        alone = student.model(pictures)
    torch.testing.assert_close(student.model(pictures).detach(), alone)
    # A fused kernel would have left the B-cos scale out.
    assert not torch.allclose(alone, teacher.model(pictures), rtol=0.1)


class Pool(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 4, 4)
        self.pool = AttentionPool2d(4, 16, 2, 6)

    def forward(self, x):
        return self.pool(self.stem(x))


def test_the_attention_pool_of_clip_resnets(teach):
    torch.manual_seed(0)
    pictures = noise_pictures(2, (16, 16))
    teacher = teach(randomise(Pool(), pictures))
    student = convert(teacher)
    becomes = {step.name: step.becomes for step in student.plan.swaps}
    assert becomes["pool"] == "SeparateAttentionPool2d" and becomes["pool.c_proj"] == "BcosLinear"
    assert becomes["pool.q_proj"] == becomes["pool.v_proj"] == "BiasScheduled"
    assert student.history.conversion.identity_error <= 1e-5
    set_strength(student.model, 1.5, 0.5)
    explanation = explain(student.model, pictures, targets=[0, 1])
    assert explanation.balanced().all() and any("positional_embedding" in name for name in explanation.constants)


class Shared(Encoder):
    """One attention module at two places."""

    def __init__(self) -> None:
        super().__init__()
        first, second = self.encoder.layers
        second.self_attn = first.self_attn


def test_shared_attention_is_converted_once_and_stays_shared(teach):
    torch.manual_seed(0)
    student = convert(teach(randomise(Shared(), noise_pictures(2, (16, 16)))))
    first, second = student.model.encoder.layers
    assert first.self_attn is second.self_attn and student.history.conversion.identity_error <= 1e-5
    assert sum(step.becomes == "SeparateAttention" for step in student.plan.swaps) == 1


def test_packed_weights_that_two_modules_hold_are_refused(teach):
    model = Encoder()
    first, second = model.encoder.layers
    second.self_attn.in_proj_weight = first.self_attn.in_proj_weight
    with pytest.raises(PlanError, match=r"(?s)2 layer\(s\).*self_attn \(torch\S*MultiheadAttention\): another module"):
        plan_for(teach(model), CONFIG)


def test_a_subclass_of_attention_is_refused_by_name(teach):
    class Mine(nn.MultiheadAttention):
        pass

    model = Encoder()
    model.encoder.layers[1].self_attn.__class__ = Mine
    with pytest.raises(PlanError, match=r"(?s)self_attn \(\S*Mine\): not supported"):
        plan_for(teach(model), CONFIG)
