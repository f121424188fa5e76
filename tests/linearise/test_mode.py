"""Explanation mode: closed forms, every spelling of an operation, aliases, names, and nothing left behind."""

from __future__ import annotations

import copy
import inspect
import textwrap
import threading

import pytest
import torch
import torch.nn.functional as F
from bcosify.core.errors import LedgerError
from bcosify.explain import Linearised, dynamic_linear, explain, gated, input_encoding
from bcosify.linearise.mode import _modes, input_colours
from bcosify.linearise.rules import OPERATIONS, Operation, linear
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn


def linearised(function, x: Tensor, model: nn.Module | None = None):
    """The output, and for a random direction of it: gradient, constants, and what is missing from the sum (B,)."""
    expected = function(x.clone()).detach()
    with Linearised(model) as mode:
        out = function(mode.follow(x))
    torch.testing.assert_close(out.detach(), expected, rtol=1e-6, atol=1e-7)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=out.dtype)
    (gradient,), constants = mode.pull((out * direction).sum())
    total = (expected * direction).flatten(1).sum(1)
    missing = total - (x * gradient).flatten(1).sum(1) - sum(constants.values(), torch.zeros_like(total))
    return direction, gradient, constants, missing / total.abs().clamp_min(1), mode


def assert_balanced(function, x: Tensor, model: nn.Module | None = None) -> dict[str, Tensor]:
    _, _, constants, missing, mode = linearised(function, x, model)
    assert not mode.unknown
    assert missing.abs().max() <= (1e-5 if x.dtype == torch.float32 else 1e-10), missing
    return constants


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --------------------------------------------------------------------------------------------------------- closed forms


def test_linear_layer_is_its_weight_and_its_bias():
    layer, x = nn.Linear(5, 3).double(), noise(4, 5)
    with Linearised(layer) as mode:
        out = layer(mode.follow(x))
    (gradient,), constants = mode.pull(out[:, 1].sum())
    assert torch.equal(gradient, layer.weight[1].expand(4, 5))
    assert constants.keys() == {"bias"}
    torch.testing.assert_close(constants["bias"], layer.bias[1].expand(4))


def test_two_layers_with_relu_by_hand():
    first, second, x = nn.Linear(5, 7).double(), nn.Linear(7, 2).double(), noise(4, 5)
    model = nn.Sequential(first, nn.ReLU(), second)
    with Linearised(model) as mode:
        out = model(mode.follow(x))
    (gradient,), constants = mode.pull(out[:, 0].sum())
    on = (first(x) > 0).double()
    weights = on * second.weight[0]
    torch.testing.assert_close(gradient, weights @ first.weight)
    torch.testing.assert_close(constants["0.bias"], weights @ first.bias)
    torch.testing.assert_close(constants["2.bias"], second.bias[0].expand(4))


def test_gelu_is_its_input_times_a_gate():
    x = noise(2, 9)
    direction, gradient, constants, missing, _ = linearised(F.gelu, x)
    torch.testing.assert_close(gradient, direction * 0.5 * (1 + torch.erf(x / 2**0.5)))
    assert not constants and missing.abs().max() < 1e-12


def test_activation_at_zero_has_no_gradient_and_no_nan():
    x = torch.zeros(2, 3)
    for function in (F.relu, F.gelu, F.silu, torch.tanh, torch.square):
        _, gradient, _, _, _ = linearised(function, x)
        assert torch.equal(gradient, torch.zeros(2, 3))


def test_layer_norm_keeps_the_mean_and_freezes_the_spread():
    norm, x = nn.LayerNorm(6).double(), noise(3, 6)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    direction, gradient, constants, _, _ = linearised(norm, x, norm)
    sigma = (x.var(1, correction=0, keepdim=True) + norm.eps).sqrt()
    scaled = direction * norm.weight / sigma
    torch.testing.assert_close(gradient, (scaled - scaled.mean(1, keepdim=True)).detach())
    torch.testing.assert_close(constants["bias"], (direction * norm.bias).sum(1).detach())


def test_batch_norm_is_affine_with_two_constants():
    norm, x = nn.BatchNorm2d(4).double().eval(), noise(2, 4, 3, 3)
    for tensor in (norm.weight, norm.bias, norm.running_mean):
        nn.init.normal_(tensor)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    direction, gradient, constants, missing, _ = linearised(norm, x, norm)
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    torch.testing.assert_close(gradient, (direction * scale.view(-1, 1, 1)).detach())
    by_channel = direction.sum((2, 3))
    torch.testing.assert_close(constants["bias"], (by_channel * norm.bias).sum(1).detach())
    torch.testing.assert_close(constants["running_mean"], -(by_channel * scale * norm.running_mean).sum(1).detach())


def test_product_of_two_moving_operands_is_halved():
    x = noise(2, 6)
    direction, gradient, constants, _, _ = linearised(lambda x: x[:, :3] * x[:, 3:], x)
    torch.testing.assert_close(gradient, torch.cat([direction * x[:, 3:], direction * x[:, :3]], 1) / 2)
    assert not constants


def test_power_is_a_product_with_itself():
    x = noise(2, 4)
    for power in (lambda x: x * x, lambda x: x**2, lambda x: x.pow(2.0), torch.square):
        direction, gradient, _, missing, _ = linearised(power, x)
        torch.testing.assert_close(gradient, direction * x)
        assert missing.abs().max() < 1e-12


def test_quotient_freezes_the_divisor():
    x = noise(2, 6)
    direction, gradient, _, _, _ = linearised(lambda x: x[:, :3] / x[:, 3:], x)
    torch.testing.assert_close(gradient, torch.cat([direction / x[:, 3:], torch.zeros(2, 3)], 1))


def test_attention_moves_only_what_is_seen():
    x = noise(2, 3, 4, 15)

    def attend(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*x.chunk(3, -1))

    def eager(x: Tensor) -> Tensor:
        q, k, v = x.chunk(3, -1)
        return (q * 5**-0.5 @ k.transpose(-2, -1)).softmax(-1) @ v

    q, k, v = x.chunk(3, -1)
    weights = (q @ k.transpose(-2, -1) * 5**-0.5).softmax(-1)
    for function in (attend, eager):
        direction, gradient, constants, missing, _ = linearised(function, x)
        torch.testing.assert_close(gradient[..., 10:], weights.transpose(-2, -1) @ direction)
        assert not gradient[..., :10].any() and not constants and missing.abs().max() < 1e-10


def test_tanh_is_an_activation_alone_and_a_gate_in_a_product():
    x = noise(2, 5)
    direction, gradient, _, _, _ = linearised(torch.tanh, x)
    torch.testing.assert_close(gradient, direction * x.tanh() / x)

    for gelu in (
        lambda x: 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.044715 * x**3))),
        lambda x: x * (0.5 * (1.0 + (0.8 * (x + 0.044715 * x**3)).tanh())),
    ):
        direction, gradient, constants, _, _ = linearised(gelu, x)
        torch.testing.assert_close(gradient, direction * gelu(x) / x)
        assert not constants


def test_what_is_frozen_in_place_is_a_gate_until_it_is_written_to():
    x = noise(2, 5)
    gates = (
        lambda x: x * (x * 1).sigmoid_(),
        lambda x: x * (x * 1).sigmoid_().view(2, 5, 1).squeeze(-1),
        lambda x: x * ((x + 3).clamp_(0.1, 6).div_(6)),
        lambda x: x * x.tanh().view(5, 2).reshape(2, 5),
    )
    for function in gates:
        direction, gradient, constants, missing, _ = linearised(function, x)
        torch.testing.assert_close(gradient, direction * function(x) / x)
        assert not constants and missing.abs().max() < 1e-12
    _, gradient, constants, _, _ = linearised(lambda x: (x * 1).sigmoid_() + x, x)
    assert constants.keys() == {"sigmoid output"}
    direction, gradient, _, _, _ = linearised(lambda x: x * (x * 1).sigmoid_().add_(x), x)
    torch.testing.assert_close(gradient, direction * (x.sigmoid() + x + x) / 2)


def test_max_pool_and_maxima_are_routed():
    x = noise(2, 3, 4, 4)
    for function in (lambda x: F.max_pool2d(x, 2), lambda x: x.amax((2, 3)), lambda x: x.max(1).values):
        leaf = x.clone().requires_grad_()
        out = function(leaf)
        direction, gradient, _, missing, _ = linearised(function, x)
        torch.testing.assert_close(gradient, torch.autograd.grad((out * direction).sum(), leaf)[0])
        assert missing.abs().max() < 1e-12


# ----------------------------------------------------------------------------------------- every rule, in all spellings

A, B = noise(6, seed=5), noise(2, 6, seed=6)
SQUARE = noise(6, 6, seed=7)
MASK = torch.tensor([True, False, True, True, False, False])

POINTWISE = {
    name: getattr(F, name)
    for name in (
        "relu relu6 elu selu celu gelu silu mish hardswish hardtanh softsign tanhshrink hardshrink softshrink".split()
    )
} | {
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "prelu": lambda x: F.prelu(x, A.abs()),
    "clamp": lambda x: x.clamp(-0.5, 0.7),
    "clamp away from 0": lambda x: x.clamp(0.1, 0.7) * A + x,
    "clamp_min_": lambda x: (x * 1).clamp_min_(0),
    "relu_": lambda x: (x + 1).relu_(),
    "torch.relu_": lambda x: torch.relu_(x + 1),
    "F.relu inplace": lambda x: F.relu(x + 1, inplace=True),
    "F.silu inplace": lambda x: F.silu(x + 1, inplace=True),
    "glu": lambda x: F.glu(x, -1),
    "tanh_": lambda x: (x * 1).tanh_(),
}

SUMS = {
    "x + c": lambda x: x + A,
    "c + x": lambda x: A + x,
    "x + 1": lambda x: x + 1,
    "1 - x": lambda x: 1 - x,
    "x - c": lambda x: x - A,
    "c - x": lambda x: A - x,
    "torch.add": lambda x: torch.add(x, A, alpha=0.3),
    "torch.sub": lambda x: torch.sub(x, other=A, alpha=0.3),
    "torch.rsub": lambda x: torch.rsub(x, A, alpha=0.3),
    "sub_": lambda x: (x * 2).sub_(A),
    "+=": lambda x: _augmented(x * 2, A),
    "-x": lambda x: -x,
    "sum": lambda x: sum([x, A, x]),
    "lerp": lambda x: torch.lerp(x, A.expand(2, 6), 0.3),
    "lerp by weight": lambda x: torch.lerp(x, B, x.sigmoid()),
    "mean": lambda x: x - x.mean(-1, keepdim=True) + x.cumsum(-1),
    "broadcast": lambda x: x[:, :1] + A,
}

PRODUCTS = {
    "x * c": lambda x: x * A,
    "2 * x": lambda x: 2 * x,
    "x / c": lambda x: x / A,
    "c / x": lambda x: A / x + x,
    "x // 1": lambda x: x // 0.1 + x,
    "mul_": lambda x: (x + 1).mul_(x),
    "matmul": lambda x: x @ SQUARE,
    "rmatmul": lambda x: (SQUARE @ x.T).T,
    "moving matmul": lambda x: x[:, :, None] @ x[:, None, :],
    "bmm": lambda x: torch.bmm(x[:, None], x[:, :, None]),
    "einsum": lambda x: torch.einsum("bi,ij->bj", x, SQUARE),
    "three factors": lambda x: torch.einsum("bi,bj,bi->bij", x, x + 1, x),
    "addmm": lambda x: torch.addmm(A, x, SQUARE, beta=0.3, alpha=2),
    "addmm moving": lambda x: torch.addmm(x, x, SQUARE),
    "baddbmm": lambda x: torch.baddbmm(B[:, :1, None], x[:, None], x[:, :, None], beta=2, alpha=0.5),
    "addcmul": lambda x: torch.addcmul(B, x, x + 1, value=0.5),
    "addcmul constant": lambda x: x.addcmul(A, B, value=0.5),
    "addcdiv": lambda x: torch.addcdiv(x, x, A, value=0.5),
    "linear": lambda x: F.linear(x, SQUARE, A),
    "conv1d": lambda x: F.conv1d(x[:, None], A.view(2, 1, 3), A[:2], padding=1),
    "conv2d groups": lambda x: F.conv2d(x.view(2, 2, 1, 3), A.view(2, 1, 1, 3), A[:2], padding="same", groups=2),
    "conv_transpose1d": lambda x: F.conv_transpose1d(x[:, None], A.view(1, 2, 3), A[:2], stride=2),
    "pow": lambda x: x**3 + x * x.abs() ** 0.5,
}

NORMS = {
    "layer_norm": lambda x: F.layer_norm(x, (6,), A, A + 1),
    "layer_norm bare": lambda x: F.layer_norm(x, (6,)),
    "torch.layer_norm": lambda x: torch.layer_norm(x, (6,), A, A),
    "layer_norm of two axes": lambda x: F.layer_norm(x.view(2, 2, 3), (2, 3), A.view(2, 3), A.view(2, 3)),
    "rms_norm": lambda x: F.rms_norm(x, (6,), A, 1e-3),
    "rms_norm bare": lambda x: torch.rms_norm(x, (6,)),
    "group_norm": lambda x: F.group_norm(x, 2, A, A + 1),
    "group_norm 2d": lambda x: F.group_norm(x.view(2, 2, 1, 3), 2, A[:2], A[:2]),
    "batch_norm": lambda x: F.batch_norm(x, A, A**2, A, A),
    "batch_norm bare": lambda x: F.batch_norm(x, A, A**2),
    "batch_norm of the batch": lambda x: F.batch_norm(x, A.clone(), A.clone(), A, A, training=True),
    "instance_norm": lambda x: F.instance_norm(x.view(2, 2, 3), weight=A[:2], bias=A[:2]),
    "instance_norm running": lambda x: F.instance_norm(x.view(2, 2, 3), A[:2], A[:2] ** 2, use_input_stats=False),
    "normalize": lambda x: F.normalize(x, dim=-1),
    "cosine_similarity": lambda x: F.cosine_similarity(x, A[None], dim=-1)[:, None],
    "cosine of two that move": lambda x: F.cosine_similarity(x[:, :3], x[:, 3:], dim=-1)[:, None],
    "local_response_norm": lambda x: F.local_response_norm(x.view(2, 3, 2), 2),
    "written out": lambda x: (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-3).sqrt() * A + A,
    "var_mean": lambda x: _by_moments(x),
    "moments": lambda x: torch.cat([*torch.var_mean(x, -1, keepdim=True), *torch.std_mean(x, -1, keepdim=True)], 1),
    "by rsqrt": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3),
    "by norm": lambda x: x / x.norm(dim=-1, keepdim=True).clamp(min=1e-3),
}

JOINS = {
    "cat": lambda x: torch.cat([A.expand(2, 6), x], 1),
    "stack": lambda x: torch.stack([x, B], 1),
    "hstack": lambda x: torch.hstack((B, x)),
    "where": lambda x: torch.where(MASK, x, B),
    "Tensor.where": lambda x: x.where(MASK, 0.3),
    "where number": lambda x: torch.where(MASK, 0.3, x),
    "masked_fill": lambda x: x.masked_fill(MASK, 2.0),
    "masked_fill_": lambda x: (x * 2).masked_fill_(MASK, 2.0),
    "pad": lambda x: F.pad(x, (1, 2), value=3.0),
    "pad zeros": lambda x: F.pad(x, (1, 2)),
    "pad circular": lambda x: F.pad(x[:, None], (1, 2), mode="circular"),
    "index_copy": lambda x: x.index_copy(1, torch.tensor([0, 2]), B[:, :2]),
    "scatter": lambda x: x.scatter(1, torch.tensor([[0], [3]]), 5.0),
    "scatter_add": lambda x: x.scatter_add(1, torch.tensor([[0], [3]]), B[:, :1]),
    "index_add_": lambda x: (x * 1).index_add_(1, torch.tensor([0, 2]), B[:, :2], alpha=0.5),
    "maximum": lambda x: torch.maximum(x, A),
    "minimum of two that move": lambda x: torch.minimum(x, -x),
    "max": lambda x: torch.max(x, A),
    "topk": lambda x: x.topk(2).values,
    "sort": lambda x: x.sort(-1, descending=True).values * A,
    "views": lambda x: (
        x.view(2, 2, 3).transpose(1, 2).flip(1).roll(1, 2).flatten(1)[:, ::2].unsqueeze_(1).expand(2, 4, 3)
    ),
    "split": lambda x: torch.cat([*x.split(2, 1), *x.unbind(1)[0].unsqueeze(1).chunk(1)], 1),
    "iteration": lambda x: torch.stack([row * 2 for row in x]),
    "properties": lambda x: x.T.mT.clone().double().to(x),
    "pools": lambda x: F.avg_pool1d(F.adaptive_avg_pool1d(x[:, None], 4), 2),
    "interpolate": lambda x: F.interpolate(x[:, None], scale_factor=2.0, mode="linear"),
    "fourier": lambda x: torch.fft.irfft(torch.fft.rfft(x) * A[:4], n=6),
    "frozen": lambda x: x.sigmoid() + x.detach() + x.data + torch.zeros_like(x) + x.softmax(-1) + x,
}

TABLES = {"pointwise": POINTWISE, "sums": SUMS, "products": PRODUCTS, "norms": NORMS, "joins": JOINS}


def _augmented(x: Tensor, c: Tensor) -> Tensor:
    x += c
    x *= 2
    x -= 1
    x /= 3
    return x


def _by_moments(x: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, -1, keepdim=True)
    return (x - mean) / (variance + 1e-3).sqrt()


@pytest.mark.parametrize(("table", "name"), [(table, name) for table, entries in TABLES.items() for name in entries])
def test_operation_keeps_its_value_and_balances(table, name):
    assert_balanced(TABLES[table][name], noise(2, 6, seed=9))


def test_a_true_derivative_would_not_balance(monkeypatch):
    """The checks above can fail: without its rule, an operation leaves a residual."""
    for name, functions in {"pointwise": (F.gelu, F.mish), "norms": (F.layer_norm, F.normalize)}.items():
        for function in functions:
            label = function.__name__
            monkeypatch.setitem(OPERATIONS, function, Operation(label, linear, False))
            _, _, _, missing, _ = linearised(TABLES[name][label], noise(2, 6, seed=9))
            assert missing.abs().max() > 1e-3


def test_weights_that_move_make_a_product():
    assert_balanced(lambda x: F.linear(x, x * SQUARE, A), noise(1, 6))
    assert_balanced(lambda x: F.conv1d(x[:, None], x.view(2, 1, 3), x[0, :2], padding=1), noise(1, 6))


def test_pictures_that_are_not_in_front_cannot_seem_to_balance():
    assert linearised(lambda x: torch.stack([row[None] + A for row in x]), noise(2, 6))[3].isnan().all()


# ---------------------------------------------------------------------------------------------------- aliases, in place


def _relu_through_a_view(x: Tensor) -> Tensor:
    y = x * 2
    y[:, 1].relu_()
    return y


def _constant_through_a_view(x: Tensor) -> Tensor:
    y = x * 2
    y[:, 1:3].copy_(A[:2])
    return y


def _number_through_an_index(x: Tensor) -> Tensor:
    y = x * 2
    y[:, 0] = 1.5
    y[:, MASK] += 2
    return y


def _into_a_constant(x: Tensor) -> Tensor:
    y = torch.ones(2, 8, dtype=x.dtype)
    y[:, 1:7] = x
    return y


def _into_a_view_of_a_constant(x: Tensor) -> Tensor:
    y = B.clone()
    y[:, :3].copy_(x[:, :3])
    y[:, 3:4] += x[:, 3:4]
    return y


def _into_empty_memory(x: Tensor) -> Tensor:
    y = torch.full((2, 6), torch.inf, dtype=x.dtype)
    y[:, :3] = x[:, 3:]
    y[:, 3:] = x[:, :3]
    return y


def _older_views_see_it(x: Tensor) -> Tensor:
    y = torch.zeros(2, 6, dtype=x.dtype)
    older = y[:, :3]
    y.add_(x).mul_(3)
    return older


def _zeroed(x: Tensor) -> Tensor:
    y = x * 2
    y[:, :2].zero_()
    y[:, 2:4].fill_(0.5)
    return y + 1


def _out(x: Tensor) -> Tensor:
    y = torch.empty(2, 6, dtype=x.dtype)
    torch.add(x, 1, out=y)
    return y


def _into_the_input(x: Tensor) -> Tensor:
    x.sub_(0.5).div_(2)
    x[:, 0] = 0
    return x


def _activated_in_place(x: Tensor) -> Tensor:
    y = x + 1
    F.relu(y, inplace=True)
    nn.SiLU(inplace=True)(y[:, :2])
    return y


def _frozen_in_place(x: Tensor) -> Tensor:
    y = x * 2
    y[:, :3].sigmoid_()
    return y.add_(x).exp_().sub_(1)


def _reshaped_in_place(x: Tensor) -> Tensor:
    return (x * 2).unsqueeze_(1).squeeze_(1).t_().t_()


@pytest.mark.parametrize(
    "function",
    [
        _relu_through_a_view,
        _constant_through_a_view,
        _number_through_an_index,
        _into_a_constant,
        _into_a_view_of_a_constant,
        _into_empty_memory,
        _older_views_see_it,
        _zeroed,
        _out,
        _into_the_input,
        _activated_in_place,
        _frozen_in_place,
        _reshaped_in_place,
    ],
)
def test_writing_in_place_is_seen_by_aliases(function):
    assert_balanced(function, noise(2, 6, seed=9))


# ------------------------------------------------------------------------------------------------- heads, layers, names


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False},
        {"add_bias_kv": True},
        {"add_zero_attn": True, "add_bias_kv": True},
        {"kdim": 5, "vdim": 7},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "call", [{}, {"need_weights": False}, {"average_attn_weights": False}, {"masks": True}], ids=str
)
def test_multi_head_attention(batch_first, options, call, randomise):
    heads = randomise(nn.MultiheadAttention(12, 3, batch_first=batch_first, **options).double(), None)
    masks = {
        "attn_mask": torch.ones(4, 4).triu(1).bool(),
        "key_padding_mask": torch.tensor([[False] * 4, [False, False, True, False]]),
    }
    arguments = masks if "masks" in call else call
    widths = (12, options.get("kdim", 12), options.get("vdim", 12))

    def attend(x: Tensor) -> Tensor:
        x = x if batch_first else x.transpose(0, 1)
        out, weights = heads(*(x[..., :width] for width in widths), **arguments)
        assert (weights is None) == (call == {"need_weights": False})
        assert weights is None or weights.dim() == (4 if call == {"average_attn_weights": False} else 3)
        return out if batch_first else out.transpose(0, 1)

    constants = assert_balanced(attend, noise(2, 4, 12), heads)
    expected = {"in_proj_bias", "out_proj.bias"} if options.get("bias", True) else set()
    assert constants.keys() == expected | ({"bias_v"} if options.get("add_bias_kv") else set())


def test_multi_head_attention_without_batch(randomise):
    heads = randomise(nn.MultiheadAttention(12, 3).double(), None)
    x = noise(4, 12)
    with Linearised(heads) as mode:
        out, _ = heads(*[mode.follow(x[None])[0]] * 3)
    torch.testing.assert_close(out, heads(x, x, x)[0])
    (gradient,), constants = mode.pull(out.sum())
    torch.testing.assert_close((x * gradient).sum() + sum(constants.values()).sum(), out.sum())


@pytest.mark.parametrize("norm_first", [True, False])
def test_transformer_encoder_avoids_the_fast_path(norm_first, randomise):
    layer = nn.TransformerEncoderLayer(12, 3, 20, batch_first=True, norm_first=norm_first, activation="gelu")
    encoder = randomise(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double(), None)
    constants = assert_balanced(encoder, noise(2, 4, 12), encoder)
    assert "layers.1.self_attn.out_proj.bias" in constants


def test_names_of_constants():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(6, 6)
            self.token = nn.Parameter(torch.ones(1, 6))
            self.register_buffer("table", torch.ones(6))
            self.hidden = torch.ones(6)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x) + self.table + 2 * self.hidden + 3
            x = x + (self.token * self.table).expand(2, -1) + x.sigmoid()
            return F.pad(x, (1, 1), value=4.0)

    net = Net().double()
    net.hidden = net.hidden.double()
    names = assert_balanced(net, noise(2, 6), net).keys()
    assert names == {"stem.bias", "table", "unnamed", "literal", "token+table", "sigmoid output"}


def test_shared_parameters_have_the_first_name():
    first = nn.Linear(4, 4).double()
    model = nn.ModuleDict({"a": first, "b": first})
    constants = assert_balanced(lambda x: model["b"](model["a"](x)), noise(2, 4), model)
    assert constants.keys() == {"a.bias"}


def test_parametrised_weights_are_constants():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(6, 4).double())
    assert assert_balanced(layer, noise(2, 6), layer).keys() == {"bias"}


def test_unknown_operation_is_counted_and_stays_out_of_the_ledger():
    x = noise(2, 6)
    for function in (lambda x: torch.special.i0(x) + x, lambda x: (x * 1).digamma_() + x):
        _, _, constants, missing, mode = linearised(function, x)
        assert len(mode.unknown) == 1 and not constants and missing.abs().min() > 1e-3
    with pytest.raises(LedgerError, match="does not move"):
        mode.pull(x.sum())
    with Linearised() as mode:
        mode.follow(x).shape, mode.follow(x).argmax(), mode.follow(x) > 0
    assert not mode.unknown


# --------------------------------------------------------------------------------------------- declared layer functions


@gated
def scaled(x: Tensor, norm: Tensor, power: float = 1.0) -> Tensor:
    return x * (x.abs() / (norm + 1)).pow(power)


@input_encoding
def encode(x: Tensor, mean: Tensor, std: Tensor, padding: tuple[int, int, int, int] = (0, 0, 0, 0)) -> Tensor:
    r = F.pad(x, padding) * std.view(-1, 1, 1) + mean.view(-1, 1, 1)
    return torch.cat([r, 1 - r], 1)


class SixChannels(nn.Module):
    """A converted model in small: encoding, a padded B-cos convolution, a linear head."""

    def __init__(self, padding: tuple[int, int, int, int] = (1, 2, 0, 1)) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 8, 3, bias=False)
        self.head = nn.Linear(8, 5)
        self.padding = padding
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]))
        self.register_buffer("std", torch.tensor([0.2, 0.25, 0.3]))

    def forward(self, x: Tensor) -> Tensor:
        x = encode(x, self.mean, self.std, self.padding)
        norm = F.avg_pool2d(x.square().sum(1, keepdim=True), 3, 1) * 9
        return self.head(scaled(self.conv(x), norm).mean((2, 3)))


def test_declared_functions_run_as_they_are_outside():
    x, norm = noise(2, 4), noise(2, 1).abs()
    torch.testing.assert_close(scaled(x, norm), x * x.abs() / (norm + 1))
    assert scaled.__name__ == "scaled" and encode(noise(1, 3, 4, 4), *noise(2, 3)).shape == (1, 6, 4, 4)


def test_gated_freezes_all_but_its_first_argument():
    x = noise(2, 6)
    direction, gradient, constants, _, _ = linearised(lambda x: scaled(x, x.square().sum(1, keepdim=True)), x)
    torch.testing.assert_close(gradient, direction * x.abs() / (x.square().sum(1, keepdim=True) + 1))
    assert not constants


@pytest.mark.parametrize("padding", [(0, 0, 0, 0), (1, 2, 0, 1)])
def test_encoded_channels_are_explained_and_their_border_is_a_constant(padding):
    model, x = SixChannels(padding).double(), noise(2, 3, 7, 5)
    with Linearised(model) as mode:
        images = mode.follow(x)
        out = model(images)
    assert torch.equal(out, model(x))
    (leaf,) = mode.inputs
    torch.testing.assert_close(leaf, encode(x, model.mean, model.std))
    (gradient,), constants = mode.pull(out[:, 2].sum(), retain_graph=True)
    torch.testing.assert_close((leaf * gradient).flatten(1).sum(1) + sum(constants.values()), out[:, 2])
    assert constants.keys() == ({"head.bias", "padding"} if any(padding) else {"head.bias"})
    # The normalised picture does not move.
    assert images.grad_fn is not None and torch.autograd.grad(out.sum(), images, allow_unused=True) == (None,)


def test_padding_alone_is_all_that_a_black_middle_leaves():
    """The border's constant is what the model makes of a picture of which only the border is left."""
    model, x = SixChannels().double(), noise(2, 3, 7, 5)
    weights = noise(6, 10, 8)

    def score(x: Tensor) -> Tensor:
        return (encode(x, model.mean, model.std, (1, 2, 2, 1)) * weights).flatten(1).sum(1)

    with Linearised(model) as mode:
        out = score(mode.follow(x))
    _, constants = mode.pull(out.sum())
    border = encode(x, model.mean, model.std, (1, 2, 2, 1))
    border[:, :, 2:-1, 1:-2] = 0
    torch.testing.assert_close(constants["padding"], (border * weights).flatten(1).sum(1))


def test_each_encoding_is_a_leaf():
    x = noise(2, 3, 4, 4)
    mean, std = noise(2, 3).abs()
    with Linearised() as mode:
        moving = mode.follow(x)
        out = encode(moving, mean, std).sum((1, 2, 3)) + 2 * encode(moving, mean, std).square().sum((1, 2, 3))
    gradients, constants = mode.pull(out.sum())
    assert len(gradients) == 2 and not constants
    parts = [(leaf * gradient).flatten(1).sum(1) for leaf, gradient in zip(mode.inputs, gradients, strict=True)]
    torch.testing.assert_close(parts[0] + parts[1], out)


# ------------------------------------------------------------------------------------------------------ nothing is left


class Everything(nn.Module):
    """Convolution, BatchNorm, dropout, in-place ReLU: what has state, or writes to it in train mode."""

    def __init__(self, fail: bool = False) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Dropout(0.5))
        self.norm = nn.InstanceNorm2d(6, track_running_stats=True)
        self.head = nn.Linear(6, 4)
        self.head.weight.requires_grad_(False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("seen", torch.zeros(2))
        self.fail = fail

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        self.seen[0] += 1
        x = self.norm(self.stem(x)).relu().mean((2, 3))
        if self.fail:
            raise RuntimeError("on purpose")
        return self.head(x)


def state_of(model: nn.Module) -> list[object]:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [
        [(name, p.requires_grad, p.grad, p._version, p._backward_hooks) for name, p in model.named_parameters()],
        [(name, buffer.tolist(), buffer.requires_grad) for name, buffer in model.named_buffers()],
        [(module.training, [len(getattr(module, hook)) for hook in hooks]) for module in model.modules()],
        torch.get_rng_state().tolist(),
        torch.is_grad_enabled(),
        torch.overrides._get_current_function_mode_stack(),
        list(_modes.active),
    ]


@pytest.mark.parametrize("fail", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_nothing_is_left_behind(training, fail):
    model = Everything(fail).train(training)
    buffers = dict(model.named_buffers())
    before, x = state_of(model), noise(4, 3, 8, 8, dtype=torch.float32)
    original = x.clone()
    with Linearised(model) as mode:
        if fail:
            with pytest.raises(RuntimeError, match="on purpose"):
                model(mode.follow(x))
        else:
            out = model(mode.follow(x))
            mode.pull(out[:, 0].sum(), retain_graph=True)
    if not fail:
        mode.pull(out[:, 1].sum())
    assert state_of(model) == before
    assert all(buffers[name] is buffer for name, buffer in model.named_buffers())
    assert torch.equal(x, original) and not x.requires_grad and x.grad is None
    model(x) if not fail else None


def test_an_exception_ends_the_mode():
    model = Everything(fail=True)
    before = state_of(model)
    with pytest.raises(RuntimeError, match="on purpose"), Linearised(model) as mode:
        model(mode.follow(noise(2, 3, 8, 8, dtype=torch.float32)))
    assert state_of(model) == before
    x = noise(3).requires_grad_()
    torch.testing.assert_close(
        torch.autograd.grad(F.gelu(x).sum(), x)[0], torch.func.grad(lambda x: F.gelu(x).sum())(x)
    )


def test_training_mode_balances_and_draws_what_the_model_would_have_drawn():
    model, x = Everything().train(), noise(4, 3, 8, 8, dtype=torch.float32)
    expected = copy.deepcopy(model)
    random = torch.get_rng_state()
    with Linearised(model) as mode:
        out = model(mode.follow(x))
    torch.set_rng_state(random)
    torch.testing.assert_close(out, expected(x), rtol=1e-6, atol=1e-7)
    (gradient,), constants = mode.pull(out[:, 0].sum())
    torch.testing.assert_close((x * gradient).sum() + sum(constants.values()).sum(), out[:, 0].sum())
    assert "batch mean" in constants


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_what_the_caller_set_does_not_matter(context):
    model = Everything().eval()
    with context():
        enabled = torch.is_grad_enabled()
        x = noise(2, 3, 8, 8, dtype=torch.float32)
        with Linearised(model) as mode:
            out = model(mode.follow(x))[:, 0]
            score = out.sum()
        (gradient,), constants = mode.pull(score)
        assert torch.is_grad_enabled() == enabled
        torch.testing.assert_close((x * gradient).flatten(1).sum(1) + sum(constants.values()), out)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_models_that_turn_gradients_off_inside_are_explained(context):
    @context()
    def backbone(x: Tensor) -> Tensor:
        return F.gelu(x @ SQUARE)

    assert not assert_balanced(lambda x: backbone(x) * A, noise(2, 6))


def test_modes_nest():
    layer, x = nn.Linear(6, 3).double(), noise(2, 6)
    with Linearised(layer) as outer:
        moving = outer.follow(x)
        with Linearised(layer) as inner, Linearised(layer) as innermost:
            within = layer(innermost.follow(x)).relu()
        (gradient,), constants = innermost.pull(within.sum())
        out = layer(moving).relu()
    torch.testing.assert_close((x * gradient).sum(1) + constants["bias"], within.sum(1))
    (gradient,), constants = outer.pull(out.sum())
    torch.testing.assert_close((x * gradient).sum(1) + constants["bias"], out.sum(1))
    assert not inner.inputs and not _modes.active


def test_one_mode_may_be_entered_again():
    layer, x = nn.Linear(6, 3).double(), noise(2, 6)
    mode = Linearised(layer)
    with mode:
        moving = mode.follow(x)
        with mode:
            out = layer(moving)
        out = out.relu()
    (gradient,), constants = mode.pull(out.sum())
    torch.testing.assert_close((x * gradient).sum(1) + constants["bias"], out.sum(1))


def test_other_threads_are_not_affected():
    seen = []

    def elsewhere() -> None:
        x = noise(4).requires_grad_()
        seen.append(torch.autograd.grad(F.gelu(x).sum(), x)[0])

    with Linearised():
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    torch.testing.assert_close(seen[0], torch.func.grad(lambda x: F.gelu(x).sum())(noise(4)))


# ------------------------------------------------------------------------------------------------------ random programs

STEPS = {
    "linear": lambda x, c: F.conv2d(x, c[2:, :, None, None], c[0]),
    "depthwise": lambda x, c: F.conv2d(
        x, c[2:, :1, None, None].expand(-1, 1, 3, 3), c[1], padding=1, groups=x.shape[1]
    ),
    "gelu": lambda x, c: F.gelu(x),
    "relu_": lambda x, c: x.clone().relu_(),
    "swish": lambda x, c: x * x.sigmoid(),
    "squeeze": lambda x, c: x * x.mean((2, 3), keepdim=True).sigmoid(),
    "gated": lambda x, c: x * (x * c[0].view(-1, 1, 1) + 1),
    "layer_norm": lambda x, c: F.layer_norm(x.permute(0, 2, 3, 1), c[0].shape, c[0], c[1]).permute(0, 3, 1, 2),
    "group_norm": lambda x, c: F.group_norm(x, 1, c[0], c[1]),
    "batch_norm": lambda x, c: F.batch_norm(x, c[0], c[1] ** 2 + 0.1, c[0], c[1]),
    "max_pool": lambda x, c: F.max_pool2d(x, 3, 1, 1),
    "residual": lambda x, c: x + F.silu(x) * 0.5,
    "table": lambda x, c: x + c[0].view(-1, 1, 1),
    "attention": lambda x, c: F.scaled_dot_product_attention(x, x.flip(-1), x),
    "write": lambda x, c: _written(x, c),
    "flip": lambda x, c: torch.cat([x[..., 1:], x[..., :1]], -1).flip(-2),
    "shift": lambda x, c: 1 - x,
}


def _written(x: Tensor, c: Tensor) -> Tensor:
    x = x * 1
    x[:, :, 0] = c[0, 0]
    x[:, 0].mul_(0.5).relu_()
    return x


@settings(max_examples=60, deadline=None)
@given(
    program=st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=6),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.integers(2, 5)),
    seed=st.integers(0, 99),
)
def test_random_programs_balance(program, shape, seed):
    # For each step: two vectors of a number for each channel, and a square matrix.
    weights = [noise(2 + shape[1], shape[1], seed=seed + step) for step in range(len(program))]

    def run(x: Tensor) -> Tensor:
        for name, c in zip(program, weights, strict=True):
            x = STEPS[name](x, c)
        return x

    assert_balanced(run, noise(*shape, seed=seed + 50))


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    groups=st.integers(1, 2),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    size=st.integers(5, 9),
)
def test_convolutions_are_exact(batch, groups, kernel, stride, padding, dilation, size):
    conv = nn.Conv2d(2 * groups, 3 * groups, kernel, stride, padding, dilation, groups).double()
    x = noise(batch, 2 * groups, size, size + 1)
    direction, gradient, constants, missing, _ = linearised(conv, x, conv)
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(gradient, torch.autograd.grad((conv(leaf) * direction).sum(), leaf)[0])
    torch.testing.assert_close(constants["bias"], (direction.sum((2, 3)) * conv.bias).sum(1).detach())
    assert missing.abs().max() < 1e-10


@input_colours
def as_it_is(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return x


def test_colours_are_explained_where_the_model_goes_on_seeing_the_normalised_picture():
    mean, std = torch.tensor([0.4, 0.5, 0.6], dtype=torch.float64), torch.tensor([0.2, 0.3, 0.25], dtype=torch.float64)
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    with Linearised() as mode:
        z = as_it_is(mode.follow(x), mean, std)
        score = (z * torch.arange(3.0).view(3, 1, 1)).relu().sum()
    assert torch.equal(z.detach(), x)
    (leaf,), ((gradient,), constants) = mode.inputs, mode.pull(score)
    r = x * std.view(3, 1, 1) + mean.view(3, 1, 1)
    torch.testing.assert_close(leaf.detach(), torch.cat([r, 1 - r], 1))
    torch.testing.assert_close((leaf * gradient).sum(), score)
    assert not constants
    assert as_it_is(x, mean, std) is x


def documented(decorator) -> dict[str, object]:
    """What the example in a decorator's docstring defines."""
    lines = inspect.getdoc(decorator).splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("    @"))
    space = {"F": F, "nn": nn, "torch": torch, **{one.__name__: one for one in (gated, dynamic_linear, input_encoding)}}
    exec(textwrap.dedent("\n".join(lines[first:])), space)
    return space


@pytest.mark.parametrize("tokens", [1, 7])
def test_the_examples_of_one_s_own_layers_add_up(tokens):
    """As the docstrings of the three public decorators have them; the values are those without the decorator."""
    torch.manual_seed(0)
    swish, mixer, stem = (
        documented(decorator)[name]()
        for decorator, name in ((gated, "Swish"), (dynamic_linear, "Mixer"), (input_encoding, "Stem"))
    )
    mixer.key = nn.Linear(6, 4)
    stem.conv = nn.Conv2d(2, 6, 3, padding=1)
    stem.mean, stem.std = torch.full((3, 1, 1), 0.4), torch.full((3, 1, 1), 0.3)
    model = nn.Sequential(stem, swish, nn.AdaptiveAvgPool2d((tokens, 1)), nn.Flatten(2), Turned(), mixer, Pooled())
    pictures = torch.randn(2, 3, 14, 14)
    explanation = explain(model, pictures, targets=[0, 3])  # raises where it does not add up
    assert explanation.encoded_inputs is not None and explanation.encoded_inputs.shape == (2, 2, 14, 14)
    x = torch.randn(4)
    torch.testing.assert_close(swish(x), x * (1.5 * x).sigmoid())
    assert explanation.contributions.abs().sum() > 0


class Turned(nn.Module):
    def forward(self, x):
        return x.mT


class Pooled(nn.Module):
    def forward(self, x):
        return x.mean(1)
