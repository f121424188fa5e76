"""Layers with a backward pass of their own: derivatives of every mode and order, `torch.func`, compile, autocast."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from bcosify.convert.layers import (
    BcosConv2d,
    BcosLinear,
    SixChannelBcosConv2d,
    UncentredBatchNorm,
    convert_in_place,
    set_strength,
)
from bcosify.convert.methods.coda.layers import CodaConv2d, CodaLinear
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

Run = Callable[..., Tensor]


def bcos(source: nn.Module, b: float) -> nn.Module:
    layer = convert_in_place(source, BcosLinear if isinstance(source, nn.Linear) else BcosConv2d)
    set_strength(layer, b=b, beta=0.5)
    return layer


def stem() -> nn.Module:
    layer = convert_in_place(nn.Conv2d(3, 2, 3, 2, 1), SixChannelBcosConv2d)
    layer.encode_with((0.5, 0.4, 0.3), (0.2, 0.3, 0.25))
    set_strength(layer, b=1.5)
    return layer


def coda(source: nn.Module, basis: int, squash: str) -> nn.Module:
    layer = convert_in_place(source, CodaLinear if isinstance(source, nn.Linear) else CodaConv2d)
    layer.start_alignment(2, basis, squash)
    nn.init.normal_(layer.directions if layer.mixing is None else layer.mixing, std=0.3)
    return layer


def norm() -> nn.Module:
    layer = convert_in_place(nn.BatchNorm2d(2), UncentredBatchNorm)
    set_strength(layer, beta=0.3)
    return layer


LAYERS = {
    "linear": (lambda: bcos(nn.Linear(3, 4), 2.0), (2, 3)),
    "linear, B=1.5": (lambda: bcos(nn.Linear(3, 4), 1.5), (2, 3)),
    "convolution": (lambda: bcos(nn.Conv2d(2, 3, 3, 2, 1), 2.0), (2, 2, 4, 4)),
    "grouped": (lambda: bcos(nn.Conv2d(4, 4, 3, 2, 1, groups=2), 1.5), (1, 4, 4, 4)),
    "depthwise": (lambda: bcos(nn.Conv2d(3, 3, 3, padding=1, groups=3), 2.0), (1, 3, 3, 3)),
    "dilated": (lambda: bcos(nn.Conv2d(2, 2, 2, dilation=2, padding=1), 1.5), (1, 2, 4, 4)),
    "stem": (stem, (1, 3, 4, 4)),
    "norm": (norm, (3, 2, 2, 2)),
    "alignment units": (lambda: coda(nn.Linear(4, 5), 2, "sq"), (2, 4)),
    "alignment convolution": (lambda: coda(nn.Conv2d(3, 4, 2), 2, "l2"), (1, 3, 3, 3)),
    "alignment depthwise": (lambda: coda(nn.Conv2d(2, 2, 3, padding=1, groups=2), 0, "sq"), (1, 2, 3, 3)),
}
layers = pytest.mark.parametrize("kind", LAYERS)
pictures_apart = pytest.mark.parametrize("kind", [kind for kind in LAYERS if kind != "norm"])


def made(kind: str) -> tuple[Run, tuple[Tensor, ...]]:
    """The layer as a function (x, *parameters), and such arguments, in float64.

    The buffers are copies: transforms do not let a BatchNorm move statistics that they do not know, torch's either.
    """
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    layer = make().double().train()
    names, parameters = zip(*((name, p.detach().clone()) for name, p in layer.named_parameters()), strict=True)

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        buffers = {name: buffer.clone() for name, buffer in layer.named_buffers()}
        return functional_call(layer, dict(zip(names, parameters, strict=True)) | buffers, (x,))

    return run, (torch.randn(shape).double(), *parameters)


def positions(arguments: tuple[Tensor, ...]) -> tuple[int, ...]:
    return tuple(range(len(arguments)))


def leaves(arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(argument.clone().requires_grad_() for argument in arguments)


def close(found, wanted) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)


@layers
def test_both_modes_are_finite_differences(kind):
    run, arguments = made(kind)
    modes = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True}
    assert torch.autograd.gradcheck(run, leaves(arguments), **modes)


@layers
def test_forward_over_reverse_is_finite_differences(kind):
    run, arguments = made(kind)
    assert torch.autograd.gradgradcheck(run, leaves(arguments), check_fwd_over_rev=True, fast_mode=True)


@layers
@pytest.mark.parametrize("graph", [True, False])
def test_jacobians_of_both_modes_are_one(kind, graph):
    run, arguments = made(kind)
    every = positions(arguments)
    with torch.set_grad_enabled(graph):
        forward = jacfwd(run, argnums=every)(*arguments)
    close(forward, jacrev(run, argnums=every)(*arguments))


@layers
def test_second_derivatives_of_any_two_modes_are_a_double_backwards(kind):
    run, arguments = made(kind)
    every, along = positions(arguments), tuple(torch.randn_like(argument) for argument in arguments)

    def score(*arguments: Tensor) -> Tensor:
        return run(*arguments).square().sum()

    _, wanted = torch.autograd.functional.vhp(score, arguments, along)
    close(jvp(grad(score, argnums=every), arguments, along)[1], wanted)
    close(grad(lambda *at: jvp(score, at, along)[1], argnums=every)(*arguments), wanted)
    primals = leaves(arguments)
    with forward_ad.dual_level():
        duals = (forward_ad.make_dual(p, t) for p, t in zip(primals, along, strict=True))
        slope = forward_ad.unpack_dual(score(*duals)).tangent
    close(torch.autograd.grad(slope, primals), wanted)
    matrix = torch.autograd.functional.hessian(lambda x: score(x, *arguments[1:]), arguments[0])
    close(hessian(score)(*arguments), matrix)
    close(jacfwd(jacfwd(score))(*arguments), matrix)


@layers
def test_a_graph_made_before_carries_tangents_back(kind):
    run, arguments = made(kind)
    primals = leaves(arguments)
    y = run(*primals)
    pull, along = torch.randn_like(y), torch.randn_like(y)
    wanted = torch.autograd.grad(y, primals, along, retain_graph=True)
    with forward_ad.dual_level():
        found = torch.autograd.grad(y, primals, forward_ad.make_dual(pull, along))
        close(tuple(forward_ad.unpack_dual(gradient).tangent for gradient in found), wanted)


@pictures_apart
def test_gradients_of_every_picture_and_every_model_at_once(kind):
    run, arguments = made(kind)
    x, parameters = torch.stack([arguments[0], torch.randn_like(arguments[0])]), arguments[1:]
    every = positions(arguments)

    def score(*arguments: Tensor) -> Tensor:
        return run(*arguments).square().sum()

    def one(*arguments: Tensor) -> tuple[Tensor, ...]:
        primals = leaves(arguments)
        return torch.autograd.grad(score(*primals), primals)

    of_pictures = vmap(grad(score, argnums=every), in_dims=(0, *[None] * len(parameters)))(x, *parameters)
    for k, picture in enumerate(x):
        close(tuple(each[k] for each in of_pictures), one(picture, *parameters))
    models = tuple(torch.stack([p, p + 0.1 * torch.randn_like(p)]) for p in parameters)
    of_models = vmap(grad(score, argnums=every), in_dims=(None, *[0] * len(parameters)))(x[0], *models)
    for k in range(2):
        close(tuple(each[k] for each in of_models), one(x[0], *(p[k] for p in models)))


@layers
def test_zero_patches_and_dead_filters_have_both_modes(kind):
    run, (x, weight, *others) = made(kind)
    x[0], weight[0] = 0, 0
    forward = jacfwd(run, argnums=(0, 1))(x, weight, *others)
    close(forward, jacrev(run, argnums=(0, 1))(x, weight, *others))
    with torch.no_grad():
        close(jacfwd(run, argnums=(0, 1))(x, weight, *others), forward)
    second = hessian(lambda *at: run(*at, *others).square().sum(), argnums=(0, 1))(x, weight)
    assert all(found.isfinite().all() for found in (*forward, *second[0], *second[1]))


def trained(net: Run, layer: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """Output of `net`, which runs `layer`, and the gradients of x and of all parameters, in float32."""
    leaf = x.clone().requires_grad_()
    y = net(leaf)
    pull = torch.linspace(0.5, 1.5, y.numel()).view(y.shape).to(y.dtype)
    layer.zero_grad()
    y.backward(pull)  # and not `grad`, which one of the checkpoints does not know
    return tuple(found.float() for found in (y.detach(), leaf.grad, *(p.grad for p in layer.parameters())))


# Of B-cos layers beside their plain formula: test_lean_layers.py.
@pytest.mark.parametrize("kind", ["stem", "norm", "alignment units", "alignment depthwise"])
def test_a_layer_trains_compiled_checkpointed_and_under_autocast(kind):
    torch.compiler.reset()
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    layer, x = make().train(), torch.randn(shape)
    wanted = trained(layer, layer, x)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(trained(compiled, layer, x), wanted, rtol=1e-5, atol=1e-5)
    for reentrant in (False, True):
        again = trained(lambda x, how=reentrant: checkpoint(layer, x, use_reentrant=how), layer, x)
        torch.testing.assert_close(again, wanted)
    for dtype in (torch.bfloat16, torch.float16):
        found = trained(torch.autocast("cpu", dtype)(layer.forward), layer, x)
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.03 * float(theirs.abs().max()))


@pytest.mark.parametrize("kind", ["grouped", "alignment units"])
def test_forward_mode_compiles_in_one_piece(kind):
    torch.compiler.reset()
    run, arguments = made(kind)
    along = tuple(torch.randn_like(argument) for argument in arguments)

    def push(*arguments: Tensor) -> tuple[Tensor, Tensor]:
        return jvp(run, arguments, along)

    compiled = torch.compile(push, backend="aot_eager", fullgraph=True, dynamic=False)
    close(compiled(*arguments), push(*arguments))
