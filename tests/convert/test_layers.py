"""Layers: the source's function at B = 1, the formula of B-cos elsewhere, and nothing but numbers at the edges."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from bcosify.convert.kernels.bcos import bcos, bcos_scale
from bcosify.convert.layers import (
    BcosConv2d,
    BcosConv2dSame,
    BcosLinear,
    BiasScheduled,
    UncentredBatchNorm,
    batch_statistics,
    convert_in_place,
    estimate_statistics,
    scheduled_layers,
    set_strength,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import BatchNormAct2d, Conv2dSame, GroupNorm1, LayerNorm2d
from torch import Tensor, nn

from convolutions import convolutions, source_pads

HALVES = (torch.float32, torch.bfloat16, torch.float16)
often = settings(max_examples=50, deadline=None, derandomize=True)


def slow_bcos(patches: Tensor, weight: Tensor, b: float) -> Tensor:
    """(..., K) patches, (C, K) weight -> (..., C): the plain formula of patches that are written out."""
    return bcos(patches @ weight.T, patches.square().sum(-1, keepdim=True), weight.square().sum(-1), b)


def test_the_plain_formula_is_the_papers():
    """y = |x| |cos|^B sgn(cos) for a filter of norm one (eq. 3), and 0 where a norm is 0."""
    torch.manual_seed(0)
    x, w = torch.randn(4, 1, 6).double(), F.normalize(torch.randn(3, 6).double(), dim=-1)
    x[0] = 0
    for b in (1.0, 1.5, 2.0, 3.0):
        cosine = F.cosine_similarity(x, w, dim=-1)
        wanted = x.norm(dim=-1) * cosine.abs() ** b * cosine.sign()
        torch.testing.assert_close(slow_bcos(x.squeeze(1), w, b), wanted, rtol=1e-9, atol=1e-9)
        # w may have any norm, of which y is a multiple.
        torch.testing.assert_close(slow_bcos(x.squeeze(1), 5 * w, b), 5 * wanted, rtol=1e-9, atol=1e-9)
    assert not slow_bcos(x.squeeze(1), 0 * w, 2.0).any() and not slow_bcos(x.squeeze(1), w, 2.0)[0].any()


def slow_conv(layer: nn.Conv2d, x: Tensor, b: float, beta: float) -> Tensor:
    """B-cos convolution with every patch written out."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, source_pads(layer), mode=mode)
    out = []
    for part, weight in zip(x.chunk(layer.groups, 1), layer.weight.chunk(layer.groups, 0), strict=True):
        patches = F.unfold(part, layer.kernel_size, layer.dilation, 0, layer.stride).transpose(1, 2)
        out.append(slow_bcos(patches, weight.flatten(1), b).transpose(1, 2))
    sides = zip(x.shape[2:], layer.dilation, layer.kernel_size, layer.stride, strict=True)
    size = [(n - d * (k - 1) - 1) // s + 1 for n, d, k, s in sides]
    y = torch.cat(out, 1).unflatten(2, size)
    return y if layer.bias is None else y + beta * layer.bias.view(-1, 1, 1)


def adopted(layer: nn.Module, mixin: type = BcosLinear, b: float | None = None, beta: float | None = None) -> nn.Module:
    """A converted copy."""
    layer = convert_in_place(copy.deepcopy(layer), mixin)
    set_strength(layer, b, beta)
    return layer


every_mode = pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])


@every_mode
@given(data=st.data())
@often
def test_convolution_at_b_1_is_its_source(mode, data):
    source, x = data.draw(convolutions(mode))
    assert torch.equal(adopted(source, BcosConv2d)(x), source(x))


@every_mode
@pytest.mark.parametrize("strength", [(2.0, 1.0), (1.5, 0.25), (2.0, 0.0), (1.0, 0.5)], ids=str)
@given(data=st.data())
@often
def test_convolution_is_the_formula(mode, strength, data):
    source, x = data.draw(convolutions(mode))
    wanted = slow_conv(source, x, *strength)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        found = adopted(source, BcosConv2d, *strength).to(dtype)(x.to(dtype))
        torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)


@every_mode
@given(data=st.data())
@often
def test_cosine_is_at_most_1_for_every_padding(mode, data):
    source, x = data.draw(convolutions(mode))
    source.bias = None
    # Aligned on purpose: a filter that equals one of the patches has |cos| = 1 there.
    patch = F.unfold(x[:1, : source.weight.shape[1]], source.kernel_size, source.dilation)[0, :, 0]
    with torch.no_grad():
        source.weight[0] = patch.view_as(source.weight[0])
    y, o = adopted(source, BcosConv2d, 2.0)(x), source(x)
    assert (y.abs() <= o.abs() * (1 + 1e-9) + 1e-12).all()
    assert (y * o >= 0).all()


@given(st.lists(st.integers(1, 4), max_size=2), st.booleans(), st.integers(0, 9))
@often
def test_linear_is_its_source_at_b_1_and_the_formula_elsewhere(leading, bias, seed):
    torch.manual_seed(seed)
    source, x = nn.Linear(5, 3, bias=bias).double(), torch.randn(*leading, 5, dtype=torch.float64)
    assert torch.equal(adopted(source)(x), source(x))
    for b, beta in ((2.0, 1.0), (1.5, 0.25), (3.0, 0.0)):
        wanted = slow_bcos(x, source.weight, b) + (beta * source.bias if bias else 0)
        torch.testing.assert_close(adopted(source, b=b, beta=beta)(x), wanted, rtol=1e-9, atol=1e-9)


def test_unbounded_scale_leaves_the_filters_norm_in():
    torch.manual_seed(0)
    source, x = nn.Linear(5, 3, bias=False), torch.randn(4, 5)
    layer = adopted(source, b=2.0)
    bounded = layer(x)
    layer.bounded = False
    torch.testing.assert_close(layer(x), bounded * source.weight.norm(dim=1))


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 2), st.tuples(st.integers(5, 9), st.integers(5, 9)))
@often
def test_tensorflow_padding_is_its_source_at_b_1_and_the_formula_elsewhere(kernel, stride, dilation, size):
    torch.manual_seed(0)
    source = Conv2dSame(2, 4, kernel, stride, dilation=dilation, groups=2).double()
    x = torch.randn(1, 2, *size, dtype=torch.float64)
    assert torch.equal(adopted(source, BcosConv2dSame)(x), source(x))
    layer = adopted(source, BcosConv2dSame, 2.0)
    explicit = nn.Conv2d(2, 4, kernel, stride, dilation=dilation, groups=2).double()
    explicit.load_state_dict(source.state_dict())
    padded = F.pad(x, layer.pads(*size))
    torch.testing.assert_close(layer(x), slow_conv(explicit, padded, 2.0, 1.0), rtol=1e-9, atol=1e-9)


LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), BcosLinear, (3, 6)),
    "convolution": (lambda: nn.Conv2d(6, 4, 3, padding=1, groups=2), BcosConv2d, (2, 6, 5, 5)),
    "dilated": (lambda: nn.Conv2d(6, 4, 3, padding=2, dilation=2), BcosConv2d, (2, 6, 6, 6)),
    "pointwise": (lambda: nn.Conv2d(6, 4, 1), BcosConv2d, (2, 6, 5, 5)),
    "same": (lambda: Conv2dSame(6, 4, 3, 2), BcosConv2dSame, (2, 6, 5, 5)),
}
kinds = pytest.mark.parametrize("kind", LAYERS)


@kinds
@pytest.mark.parametrize("b", [1.0, 1.25, 2.0])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_zero_patches_and_dead_filters_give_zero_and_finite_gradients(kind, b, dtype):
    make, mixin, shape = LAYERS[kind]
    torch.manual_seed(0)
    layer = adopted(make(), mixin, b, 0.0).to(dtype)
    with torch.no_grad():
        layer.weight[1] = 0
    x = torch.randn(shape, dtype=dtype)
    x[0] = 0
    x.requires_grad_()
    y = layer(x)
    y.float().square().sum().backward()
    dead = y.movedim(-1, 1) if kind == "linear" else y
    assert not y[0].any() and not dead[:, 1].any() and y[1:].any()
    assert x.grad is not None and x.grad.isfinite().all() and layer.weight.grad.isfinite().all()


@kinds
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["cast", "autocast"])
def test_large_inputs_in_half_precision_are_right(kind, dtype, autocast):
    """300 squared is infinite in float16; an infinite norm would make the output 0."""
    make, mixin, shape = LAYERS[kind]
    torch.manual_seed(0)
    layer, x = adopted(make(), mixin, 2.0, 0.0), 300 * torch.sign(torch.randn(shape))
    wanted = layer(x).detach()
    if autocast:
        with torch.autocast("cpu", dtype):
            found = layer(x)
    else:
        found = copy.deepcopy(layer).to(dtype)(x.to(dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), wanted, rtol=0.05, atol=0.03 * float(wanted.abs().max()))


@kinds
def test_gradients_in_float16_are_finite_and_right_for_large_inputs(kind):
    make, mixin, shape = LAYERS[kind]
    torch.manual_seed(0)
    layer, x = adopted(make(), mixin, 2.0, 0.0), 300 * torch.sign(torch.randn(shape))

    def gradients(dtype: torch.dtype) -> list[Tensor]:
        model, leaf = copy.deepcopy(layer).to(dtype), x.to(dtype).requires_grad_()
        return [g.float() for g in torch.autograd.grad(model(leaf).sum(), [leaf, model.weight])]

    for found, wanted in zip(gradients(torch.float16), gradients(torch.float32), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.03 * float(wanted.abs().max()))


SHAPES = {"flat": ((3, 4), (3, 1), (4,)), "grouped": ((2, 3, 2, 2, 2), (2, 3, 1, 2, 2), (3, 2, 1, 1))}


@pytest.mark.parametrize("b", [1.0, 1.5, 2.0, 2.7])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
def test_scale_has_the_right_derivatives(b, shapes, check):
    torch.manual_seed(0)
    o, q, w2 = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    o = o + 0.2 * o.sign()
    inputs = [t.requires_grad_() for t in (o, q.square() + 0.5, w2.square() + 0.5)]
    assert check(lambda o, q, w2: bcos_scale(o, q, w2, b), inputs)


@kinds
def test_a_whole_layer_has_the_right_derivatives(kind):
    make, mixin, shape = LAYERS[kind]
    torch.manual_seed(0)
    layer, x = adopted(make(), mixin, 1.7, 0.5).double(), torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight}, (x,))

    assert torch.autograd.gradcheck(run, (x, layer.weight))


@pytest.mark.parametrize("b", [1.3, 2.0])
def test_scale_works_under_vmap(b):
    torch.manual_seed(0)
    o, q, w2 = torch.randn(5, 3, 4), torch.rand(5, 3, 1) + 1, torch.rand(4) + 1
    batched = torch.func.vmap(lambda o, q: bcos_scale(o, q, w2, b))(o, q)
    torch.testing.assert_close(batched, bcos_scale(o, q, w2, b))


def batch_norm(kind: type = nn.BatchNorm2d, **options) -> nn.Module:
    torch.manual_seed(0)
    norm = kind(5, **options).double().eval()
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            tensor.normal_()
        norm.running_var.uniform_(0.5, 2)
    return norm


@pytest.mark.parametrize("beta", [1.0, 0.3, 0.0])
@pytest.mark.parametrize(
    ("kind", "after"), [(nn.BatchNorm2d, lambda y: y), (BatchNormAct2d, F.relu)], ids=["plain", "act"]
)
def test_batch_norm_is_uncentred_and_keeps_its_activation(kind, after, beta):
    source, x = batch_norm(kind), torch.randn(2, 5, 3, 3, dtype=torch.float64)
    sigma = (source.running_var + source.eps).sqrt()
    gain, shift = source.weight / sigma, source.bias - source.weight * source.running_mean / sigma
    wanted = after(x * gain.view(-1, 1, 1) + beta * shift.view(-1, 1, 1))
    torch.testing.assert_close(adopted(source, UncentredBatchNorm, beta=beta)(x), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("beta", [1.0, 0.3, 0.0])
@pytest.mark.parametrize(
    ("kind", "after"), [(nn.BatchNorm2d, lambda y: y), (BatchNormAct2d, F.relu)], ids=["plain", "act"]
)
def test_batch_norm_in_training_is_uncentred_over_the_batch(kind, after, beta):
    layer, x = adopted(batch_norm(kind, momentum=0.2), UncentredBatchNorm, beta=beta), torch.randn(4, 5, 3, 3).double()
    x.requires_grad_()
    before = {name: layer._buffers[name].clone() for name in ("running_mean", "running_var")}
    mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    gain = layer.weight / (variance + layer.eps).sqrt()
    shift = beta * (layer._parameters["bias"] - gain * mean)
    wanted = after(x * gain.view(-1, 1, 1) + shift.view(-1, 1, 1))
    ours = layer.train()(x)
    torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-10)
    pull = torch.randn_like(ours)
    inputs = (x, layer._parameters["weight"])
    for got, expected in zip(*(torch.autograd.grad((y * pull).sum(), inputs) for y in (ours, wanted)), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    assert layer.training and layer.weight is layer._parameters["weight"]
    for name, value in (("running_mean", mean), ("running_var", variance)):
        torch.testing.assert_close(layer._buffers[name], 0.8 * before[name] + 0.2 * value.detach())


def test_statistics_are_the_mean_over_batches_and_nothing_else_changes_mode():
    torch.manual_seed(0)
    norm = adopted(nn.BatchNorm2d(3), UncentredBatchNorm, beta=0.0)
    model = nn.Sequential(norm, nn.Dropout(0.5)).eval()
    batches = [torch.randn(4, 3, 5, 5) * scale for scale in (1.0, 2.0, 3.0)]
    estimate_statistics(model, batches)
    wanted = torch.stack([batch.var((0, 2, 3), unbiased=False) for batch in batches]).mean(0)
    torch.testing.assert_close(norm._buffers["running_var"], wanted)
    assert norm.momentum == 0.1 and not any(module.training for module in model.modules())
    with pytest.raises(ZeroDivisionError), batch_statistics(model):
        assert norm.training and not model[1].training
        1 / 0  # noqa: B018
    assert not norm.training


BIASED = {
    "LayerNorm": (lambda: nn.LayerNorm(6), (2, 3, 6)),
    "LayerNorm2d": (lambda: LayerNorm2d(6), (2, 6, 3, 3)),
    "GroupNorm": (lambda: nn.GroupNorm(2, 6), (2, 6, 3, 3)),
    "GroupNorm1": (lambda: GroupNorm1(6), (2, 6, 3, 3)),
    "Linear": (lambda: nn.Linear(6, 4), (2, 6)),
}


@pytest.mark.parametrize("beta", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("kind", BIASED)
def test_beta_scales_the_bias_of_any_layer(kind, beta):
    make, shape = BIASED[kind]
    torch.manual_seed(0)
    source, x = make(), torch.randn(shape)
    with torch.no_grad():
        source.bias.normal_()
        wanted = copy.deepcopy(source)
        wanted.bias.mul_(beta)
    torch.testing.assert_close(adopted(source, BiasScheduled, beta=beta)(x), wanted(x), rtol=1e-6, atol=1e-6)


def test_strengths_are_validated_and_left_alone_where_not_given():
    model = nn.Sequential(
        convert_in_place(nn.Linear(3, 3), BcosLinear), convert_in_place(nn.LayerNorm(3), BiasScheduled)
    )
    shares = [{name: wrong} for name in ("beta", "carry", "spread") for wrong in (-0.1, 1.1, math.nan)]
    for wrong in ({"b": 0.9}, {"b": math.nan}, {"b": math.inf}, {"window": -1}, {"window": math.inf}, *shares):
        (name,) = wrong
        words = {"b": "at least 1", "window": r"0 \(the whole map\), .*"}.get(name, "between 0 and 1")
        with pytest.raises(ValueError, match=f"^{name} is {words}; got"):
            set_strength(model, **wrong)
    with pytest.raises(TypeError, match="no strength 'cary'. Did you mean 'carry'"):
        set_strength(model, cary=1.0)
    for wrong in (2, 4, 1.5, 7.5):
        with pytest.raises(ValueError, match=f"^window is 0 .*, or an odd number of places; got {wrong}$"):
            set_strength(model, beta=0.5, window=wrong)
    start = {"beta": 1, "carry": 0}
    assert [layer.strengths() for _, layer in scheduled_layers(model)] == [{"b": 1, **start}, start]
    set_strength(model, b=1.7)
    set_strength(model, beta=0.2)
    set_strength(model, carry=0.3, window=3)  # a window is a BatchNorm's alone
    moved = {"beta": 0.2, "carry": 0.3}
    assert [layer.strengths() for _, layer in scheduled_layers(model)] == [{"b": 1.7, **moved}, moved]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_strengths_travel_in_the_state_dict_and_survive_a_change_of_precision(dtype):
    layer = adopted(nn.Linear(3, 3), b=1.7, beta=0.3).to(dtype)
    other = adopted(nn.Linear(3, 3)).to(dtype)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(2, 3, dtype=dtype)
    assert layer.strengths() == other.strengths() == {"b": 1.7, "beta": 0.3, "carry": 0}
    assert torch.equal(layer(x), other(x))
    set_strength(other, b=1.9)
    assert other.strengths()["b"] == 1.9


@kinds
def test_a_swap_keeps_names_precision_and_what_is_trained(kind):
    make, mixin, _ = LAYERS[kind]
    source = make().to(torch.bfloat16)
    source.weight.requires_grad_(False)
    weight, keys = source.weight, set(source.state_dict())
    layer = convert_in_place(source, mixin)
    assert layer is source and layer.weight is weight and isinstance(layer, mixin)
    assert (layer.weight.dtype, layer.weight.requires_grad) == (torch.bfloat16, False)
    assert set(layer.state_dict()) == keys | {"b", "beta", "carry"}
    assert "b=1, beta=1, carry=0" in repr(layer)


@kinds
def test_a_swap_works_without_memory(kind):
    make, mixin, shape = LAYERS[kind]
    with torch.device("meta"):
        layer = convert_in_place(make(), mixin)
        layer._b = 2.0
        assert layer(torch.empty(shape)).device.type == "meta"
    real = adopted(make(), mixin, 2.0, 0.5)
    layer.load_state_dict(real.state_dict(), assign=True)
    x = torch.randn(shape)
    assert layer.strengths() == {"b": 2.0, "beta": 0.5, "carry": 0} and torch.equal(layer(x), real(x))
