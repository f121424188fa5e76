"""B-cos layers and BatchNorm keep little and write to their own memory; what they compute is the plain formula's."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from bcosify.convert.kernels import depthwise, memory, moments
from bcosify.convert.kernels.bcos import bcos, bcos_scale
from bcosify.convert.layers import BcosConv2d, BcosLinear, UncentredBatchNorm, convert_in_place, set_strength, watching
from bcosify.explain import Linearised
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from pairs import pairs


class Plain(nn.Module):
    """The kernel's plain formula, of products and norms by torch's own functions."""

    def __init__(self, source: nn.Module, b: float) -> None:
        super().__init__()
        self.source, self.weight, self.b = source, source.weight, b

    def forward(self, x: Tensor) -> Tensor:
        source, w2 = self.source, self.weight.flatten(1).square().sum(1)
        if isinstance(source, nn.Linear):
            return bcos(F.linear(x, self.weight), x.square().sum(-1, keepdim=True), w2, self.b)
        geometry = (source.stride, source.padding, source.dilation, source.groups)
        q = F.conv2d(x.square(), torch.ones_like(self.weight), None, *geometry)
        return bcos(F.conv2d(x, self.weight, None, *geometry), q, w2.view(-1, 1, 1), self.b)


SOURCES = {
    "linear": (lambda: nn.Linear(12, 20, bias=False), (6, 7, 12)),
    "conv": (lambda: nn.Conv2d(8, 12, 3, padding=1, bias=False), (6, 8, 9, 9)),
    "pointwise": (lambda: nn.Conv2d(8, 12, 1, bias=False), (6, 8, 9, 9)),
    "strided": (lambda: nn.Conv2d(6, 12, 7, 2, 3, bias=False), (6, 6, 13, 13)),
    "grouped": (lambda: nn.Conv2d(8, 12, 3, padding=1, groups=4, bias=False), (6, 8, 9, 9)),
    "depthwise": (lambda: nn.Conv2d(8, 8, 7, padding=3, groups=8, bias=False), (6, 8, 9, 9)),
    "depthwise, strided": (lambda: nn.Conv2d(8, 8, 5, 2, padding=1, groups=8, bias=False), (6, 8, 9, 9)),
    "depthwise, dilated": (lambda: nn.Conv2d(8, 8, 3, padding=4, dilation=2, groups=8, bias=False), (6, 8, 9, 9)),
    "dilated": (lambda: nn.Conv2d(8, 12, 3, padding=2, dilation=2, bias=False), (6, 8, 9, 9)),
}


def in_turn(values: list) -> list[tuple]:
    """Every kind with one of `values`, which take turns."""
    return list(zip(SOURCES, values * len(SOURCES), strict=False))


kinds = pytest.mark.parametrize("kind", SOURCES)
kinds_and_strengths = pytest.mark.parametrize(("kind", "b"), in_turn([1.5, 2.0]))
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
# Pictures, and the share of a block that each fills: one block, several with a smaller one behind, a picture each.
SIZES = {"one block": (6, 0.02), "some a block": (5, 0.4), "one a block": (2, 1.1)}


def both(kind: str, b: float, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Plain, Tensor]:
    """Our layer, the plain one, and an input of nowhere zero."""
    torch.manual_seed(0)
    make, shape = SOURCES[kind]
    source = make().to(dtype)
    layer = convert_in_place(copy.deepcopy(source), BcosLinear if isinstance(source, nn.Linear) else BcosConv2d)
    set_strength(layer, b=b, beta=0.0)
    return layer, Plain(source, b), torch.randn(shape, dtype=dtype)


def sized(kind: str, size: str) -> tuple[int, ...]:
    """The shape of an input that fills blocks so."""
    source, (_, channels, *_) = SOURCES[kind][0](), SOURCES[kind][1]
    count, share = SIZES[size]
    elements = share * (depthwise.BLOCK if "depthwise" in kind else memory.BLOCK)
    if isinstance(source, nn.Linear):
        return count, math.ceil(elements / source.out_features), source.in_features
    side = math.ceil((elements / source.out_channels) ** 0.5 * (1 if "depthwise" in kind else source.stride[0])) + 1
    return count, channels, side, side


def gradients(layer: nn.Module, x: Tensor, pull: Tensor) -> tuple[Tensor, ...]:
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = layer(leaf)
    return (y.detach(), *torch.autograd.grad(y, [leaf, layer.weight], pull))


@pytest.mark.parametrize(("kind", "b", "layout", "size"), pairs(k=SOURCES, b=[1.5, 2.0], layout=LAYOUTS, size=SIZES))
def test_values_and_gradients_are_the_plain_formulas_for_any_layout_and_size(kind, b, layout, size):
    # A CPU takes ten times as long for depthwise convolutions in float64.
    dtype, tolerance = (torch.float32, 1e-5) if "depthwise" in kind else (torch.float64, 1e-10)
    layer, plain, _ = both(kind, b, dtype)
    x = torch.randn(sized(kind, size), dtype=dtype)
    if x.dim() == 4:
        layer, plain, x = (each.to(memory_format=LAYOUTS[layout]) for each in (layer, plain, x))
    before, pull = x.clone(), torch.randn_like(plain(x))
    ours = gradients(layer, x, pull)
    for found, wanted in zip(ours, gradients(plain, x, pull), strict=True):
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max()))
    with torch.no_grad():
        inferred = layer(x)
    with torch.inference_mode():
        also = layer(x)
    assert torch.equal(x, before) and torch.equal(inferred, also)
    torch.testing.assert_close(inferred, ours[0], rtol=tolerance, atol=tolerance)


@kinds
def test_a_frozen_layer_passes_the_same_gradient_on(kind):
    layer, _, x = both(kind, 2.0)
    pull = torch.randn_like(layer(x))
    _, wanted, _ = gradients(layer, x, pull)
    x.requires_grad_()
    layer.requires_grad_(False)
    assert torch.equal(torch.autograd.grad(layer(x), x, pull)[0], wanted)


@kinds_and_strengths
def test_a_layer_has_first_and_second_derivatives(kind, b):
    layer, _, x = both(kind, b, torch.float64)
    x = x[:2, ..., :5, :5].contiguous() if x.dim() == 4 else x[:1, :2].contiguous()

    def run(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight}, (x,))

    inputs = (x.requires_grad_(), layer.weight)
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@kinds_and_strengths
def test_a_double_backward_over_zero_patches_and_dead_filters_is_finite(kind, b):
    layer, _, x = both(kind, b)
    with torch.no_grad():
        layer.weight[0] = 0
        x[0] = 0
    x.requires_grad_()
    (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    second = torch.autograd.grad(first.square().sum(), [x, layer.weight])
    assert first.isfinite().all() and all(gradient.isfinite().all() for gradient in second)


@pytest.mark.parametrize(("kind", "dtype"), in_turn([torch.bfloat16, torch.float16]))
def test_gradients_under_autocast_are_those_of_float32_to_rounding(kind, dtype):
    layer, _, x = both(kind, 2.0)
    pull = torch.randn_like(layer(x))
    wanted = gradients(layer, x, pull)
    with torch.autocast("cpu", dtype):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
    assert y.dtype == dtype
    found = (y.detach(), *torch.autograd.grad(y, [leaf, layer.weight], pull.to(dtype)))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.float(), theirs, rtol=0.05, atol=0.03 * float(theirs.abs().max()))


BIASED = [nn.Linear(5, 4), nn.Conv2d(5, 4, 3), nn.Conv2d(5, 5, 3, groups=5)]


@pytest.mark.parametrize(
    ("source", "beta", "dtype"), pairs(source=BIASED, beta=[0.5, 1.0], dtype=[torch.bfloat16, torch.float16]), ids=str
)
def test_a_layer_with_a_bias_returns_what_its_source_does_under_autocast(source, beta, dtype):
    mixin = BcosLinear if isinstance(source, nn.Linear) else BcosConv2d
    layer = convert_in_place(copy.deepcopy(source), mixin)
    set_strength(layer, b=2.0, beta=beta)
    x = torch.randn(2, 5) if isinstance(source, nn.Linear) else torch.randn(2, 5, 6, 6)
    with torch.autocast("cpu", dtype):
        found = layer(x)
        assert found.dtype == source(x).dtype == dtype
    torch.testing.assert_close(found.float(), layer(x), rtol=0.05, atol=0.05)


@kinds_and_strengths
def test_a_compiled_layer_is_the_same(kind, b):
    torch.compiler.reset()  # each case is a program of the same code
    layer, _, x = both(kind, b)
    pull = torch.randn_like(layer(x))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=False)
    leaf = x.clone().requires_grad_()
    y = compiled(leaf)
    found = (y.detach(), *torch.autograd.grad(y, [leaf, layer.weight], pull))
    for ours, theirs in zip(found, gradients(layer, x, pull), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize(("kind", "reentrant"), in_turn([False, True]))
def test_a_checkpointed_layer_is_the_same(kind, reentrant):
    layer, _, x = both(kind, 2.0)
    pull = torch.randn_like(layer(x))
    wanted = gradients(layer, x, pull)[1:]
    leaf = x.clone().requires_grad_()
    checkpoint(layer, leaf, use_reentrant=reentrant).backward(pull)
    for ours, theirs in zip((leaf.grad, layer.weight.grad), wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


@kinds_and_strengths
def test_transforms_of_functions_see_the_layer(kind, b):
    layer, _, x = both(kind, b)

    def score(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight}, (x.unsqueeze(0),)).square().sum()

    weight = layer.weight.detach()
    each = torch.func.vmap(torch.func.grad(score, argnums=(0, 1)), in_dims=(0, None))(x, weight)
    for k, (of_x, of_weight) in enumerate(zip(*each, strict=True)):
        leaves = x[k].clone().requires_grad_(), weight.clone().requires_grad_()
        wanted = torch.autograd.grad(score(*leaves), leaves)
        torch.testing.assert_close(of_x, wanted[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(of_weight, wanted[1], rtol=1e-4, atol=1e-5)
    several = torch.func.vmap(layer, in_dims=0)(x.unsqueeze(1))
    torch.testing.assert_close(several.squeeze(1), layer(x), rtol=1e-5, atol=1e-6)


@kinds
def test_many_gradients_at_once_are_each_of_them(kind):
    layer, _, x = both(kind, 2.0)
    x.requires_grad_()
    y = layer(x)
    pulls = torch.randn(3, *y.shape)
    found = torch.autograd.grad(y, [x, layer.weight], pulls, is_grads_batched=True, retain_graph=True)
    for k, pull in enumerate(pulls):
        wanted = torch.autograd.grad(y, [x, layer.weight], pull, retain_graph=True)
        for several, one in zip(found, wanted, strict=True):
            torch.testing.assert_close(several[k], one, rtol=1e-5, atol=1e-5)


def kept(run, *besides: Tensor) -> int:
    """Bytes kept for the backward pass of what `run` returns, beyond it and `besides`."""
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    for tensor in (*besides, result):
        found.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(found.values())


@kinds_and_strengths
def test_a_layer_keeps_input_weight_output_and_norms(kind, b):
    layer, _, x = both(kind, b)
    x.requires_grad_()
    y = layer(x)
    maps = y[:, :1].numel() if x.dim() == 4 else y[..., :1].numel()
    norms = maps * getattr(layer, "groups", 1) + len(layer.weight)
    # A pool of its own needs what it pooled: the squares of every pixel, and those of its rows.
    pooled = 0 if x.dim() < 4 or kind == "pointwise" or "depthwise" in kind else 2 * x[:, :1].numel() * layer.groups
    # Of a depthwise layer the filters that hold their norms, and how the norms got there.
    filters = layer.weight.numel() + 2 * len(layer.weight) if "depthwise" in kind else 0
    assert kept(lambda: layer(x), x, layer.weight) <= 4 * (norms + pooled + filters)


def test_a_training_batch_norm_keeps_its_input_and_numbers_for_every_channel():
    torch.manual_seed(0)
    norm = convert_in_place(nn.BatchNorm2d(8), UncentredBatchNorm)
    set_strength(norm, beta=0.0)
    x = torch.randn(4, 8, 9, 9, requires_grad=True)
    norm.train()
    assert kept(lambda: norm(x), x, *norm.parameters()) <= 4 * 16 * 8


@pytest.mark.parametrize(("beta", "layout", "size"), pairs(beta=[0.0, 0.4, 1.0], layout=LAYOUTS, size=SIZES))
def test_a_training_batch_norm_has_the_plain_formulas_gradients(beta, layout, size):
    torch.manual_seed(0)
    norm = convert_in_place(nn.BatchNorm2d(5), UncentredBatchNorm).double()
    set_strength(norm, beta=beta)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_()
    weight, bias = norm._parameters["weight"], norm._parameters["bias"]
    x = (maps(size, torch.float64) + 0.5).contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    gain = weight / (x.var((0, 2, 3), correction=0) + norm.eps).sqrt()
    plain = x * gain.view(-1, 1, 1) + beta * (bias - gain * x.mean((0, 2, 3))).view(-1, 1, 1)
    ours = norm.train()(x)
    pull = torch.randn_like(plain)
    torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-9)
    for found, wanted in zip(*(torch.autograd.grad(y, [x, weight], pull) for y in (ours, plain)), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8)


def maps(size: str, dtype: torch.dtype) -> Tensor:
    """Five channels that fill blocks so."""
    count, share = SIZES[size]
    side = math.ceil((share * memory.BLOCK / 5) ** 0.5)
    return torch.randn(count, 5, side, side, dtype=dtype)


@pytest.mark.parametrize(("layout", "size"), [("nhwc", "one block"), *(("nchw", size) for size in SIZES)])
def test_a_spread_that_is_small_beside_its_mean_keeps_its_digits(layout, size):
    torch.manual_seed(0)
    x = (maps(size, torch.float32) * 0.01 + 100).contiguous(memory_format=LAYOUTS[layout])
    norm = convert_in_place(nn.BatchNorm2d(5, momentum=1.0), UncentredBatchNorm).train()
    norm(x)
    torch.testing.assert_close(norm._buffers["running_mean"], x.double().mean((0, 2, 3)).float())
    wanted = x.double().var((0, 2, 3), correction=0).float()
    torch.testing.assert_close(norm._buffers["running_var"], wanted, rtol=1e-4, atol=0)


def test_processes_tell_each_other_statistics_without_losing_digits(monkeypatch):
    """Two processes with the same batch: what is summed is twice what one has."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(moments, "all_reduce", lambda sums: 2 * sums)
    mean, variance = torch.tensor([100.0, -3.0]), torch.tensor([1e-4, 2.0])
    found = moments.over_processes(mean, variance, mean + torch.tensor([0.002, 0.5]))
    torch.testing.assert_close(found, (mean, variance), rtol=1e-4, atol=0)


def test_a_training_batch_norm_has_second_derivatives():
    torch.manual_seed(0)
    norm = convert_in_place(nn.BatchNorm2d(2), UncentredBatchNorm).double().train()
    set_strength(norm, beta=0.3)
    x = torch.randn(3, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(norm, (x,), fast_mode=True)


class Written(nn.Module):
    """Writes by a method, through a view, and lets go of what it wrote to before the next module runs."""

    def __init__(self, write) -> None:
        super().__init__()
        self.write = write

    def forward(self, x):
        self.write(x)
        return x * 1


WRITERS = {
    "module": lambda: nn.ReLU(inplace=True),
    "method": lambda: Written(lambda x: x.relu_()),
    "view": lambda: Written(lambda x: x[:].flatten().relu_()),
    "nothing": lambda: nn.ReLU(),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_outputs_that_are_written_to_are_found_and_train_as_others(writer):
    layer, _, x = both("conv", 2.0)
    model = nn.Sequential(layer, WRITERS[writer]())
    with watching(model), torch.no_grad():
        model(x)
    assert layer.overwritten == (writer != "nothing")
    wanted = nn.Sequential(copy.deepcopy(layer), nn.ReLU())
    found = [torch.autograd.grad(net(x).square().sum(), net[0].weight)[0] for net in (model, wanted)]
    torch.testing.assert_close(*found)


@kinds_and_strengths
def test_an_explanation_holds_the_scale_and_keeps_the_output(kind, b):
    layer, plain, x = both(kind, b, torch.float64)
    with Linearised(layer) as mode:
        y = layer(mode.follow(x))
    (gradient,), constants = mode.pull(y.sum())
    torch.testing.assert_close(y, layer(x), rtol=0, atol=0)
    assert not constants
    # Euler: with the scale held, a layer is linear, so the gradient times the input is the output itself.
    torch.testing.assert_close((gradient * x).sum(), plain(x).sum(), rtol=1e-9, atol=1e-9)


def test_the_scale_leaves_its_response_alone_where_gradients_are_on():
    o, q, w2 = torch.randn(4, 3, requires_grad=True), torch.rand(4, 1) + 1, torch.rand(3) + 1
    before = o.detach().clone()
    bcos_scale(o, q, w2, 2.0)
    assert torch.equal(o, before)
