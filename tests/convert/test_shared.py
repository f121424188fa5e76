"""Layers that read the same input take its sums of squares once."""

from __future__ import annotations

import copy

import pytest
import torch
from bcosify.convert import BcosConfig, convert, load, load_teacher, save, set_strength
from bcosify.convert.layers import BcosConv2d, BcosLinear, adopt, convolution, watching
from bcosify.explain import Linearised, explain
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Branches(nn.Module):
    """Some layers that read the same input, and `between` which is run behind the first."""

    def __init__(self, *layers: nn.Module, between=lambda x: None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        x, first = x * 1, None
        for layer in self.layers:
            y = layer(x).flatten(1)
            if first is None:
                self.between(x)
            first = y if first is None else torch.cat([first, y], 1)
        return first


def convolutions(**options) -> Branches:
    torch.manual_seed(0)
    made = (nn.Conv2d(4, 3, 1), nn.Conv2d(4, 2, 3, 2, 1), nn.Conv2d(4, 5, (1, 3)))
    return Branches(*(adopt(layer, BcosConv2d) for layer in made), **options)


def projections(**options) -> Branches:
    torch.manual_seed(0)
    return Branches(*(adopt(nn.Linear(4, 3), BcosLinear) for _ in "qkv"), **options)


KINDS = {"convolutions": (convolutions, (2, 4, 6, 5)), "projections": (projections, (2, 7, 4))}
kinds = pytest.mark.parametrize("kind", KINDS)


def made(kind: str, **options) -> tuple[Branches, Branches, Tensor]:
    """A model that shares, the same that does not, and an input."""
    make, shape = KINDS[kind]
    model, x = make(**options), torch.randn(shape)
    alone = copy.deepcopy(model)
    with watching(model), torch.no_grad():
        model(x)
    for each in (model, alone):
        set_strength(each, b=2, beta=0.5)
    return model, alone, x


@pytest.fixture
def taken(monkeypatch) -> list[tuple[int, ...]]:
    """The shapes of inputs, not of filters, of which sums of squares were taken."""
    shapes, real = [], convolution.sum_of_squares

    def noted(x: Tensor, dim) -> Tensor:
        if isinstance(dim, int):
            shapes.append(tuple(x.shape))
        return real(x, dim)

    monkeypatch.setattr(convolution, "sum_of_squares", noted)
    return shapes


def held(model: nn.Module) -> list[object]:
    return [layer.share.squares.taken for layer in model.layers if layer.share is not None]


@kinds
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_they_are_taken_once_and_let_go_of(kind, mode, taken):
    model, alone, x = made(kind)
    taken.clear()
    with mode():
        y = model(x)
        assert len(taken) == 1
        assert torch.equal(y, alone(x))
    assert held(model) == [None] * 3


@kinds
def test_gradients_are_those_of_layers_by_themselves(kind, taken):
    model, alone, x = made(kind)
    leaf = x.requires_grad_()
    found = [torch.autograd.grad(each(leaf).square().sum(), [leaf, *each.parameters()]) for each in (model, alone)]
    torch.testing.assert_close(*found)
    double = [model.double(), alone.double()]
    leaf = x.detach().double().requires_grad_()
    assert torch.autograd.gradcheck(double[0], leaf) and torch.autograd.gradgradcheck(double[0], leaf)
    through = checkpoint(double[0], leaf, use_reentrant=False).square().sum()
    torch.testing.assert_close(
        torch.autograd.grad(through, leaf), torch.autograd.grad(double[1](leaf).square().sum(), leaf)
    )


@kinds
def test_an_explanation_takes_them_once(kind, taken):
    model, alone, x = made(kind)
    taken.clear()
    gradients = []
    for each, count in ((model, 1), (alone, 3)):
        with Linearised(each) as mode:
            score = each(mode.follow(x)).sum()
        assert len(taken) == count
        taken.clear()
        gradients.append(mode.pull(score))
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


@kinds
def test_a_picture_that_is_written_to_from_outside_torch_is_another_one(kind):
    model, alone, _ = made(kind)
    _, shape = KINDS[kind]
    memory = torch.randn(shape).numpy()
    x = torch.from_numpy(memory)
    model.forward = lambda x: torch.cat([layer(x).flatten(1) for layer in model.layers], 1)  # no copy of it
    with torch.no_grad():
        model(x)
        memory *= 3
        assert torch.equal(model(x), alone(x))


@kinds
def test_an_input_that_is_written_to_between_two_readers_is_not_shared(kind, taken):
    model, alone, x = made(kind, between=lambda x: x.mul_(2))
    shares = [layer.share is not None for layer in model.layers]
    assert shares == [False, True, True]
    with torch.inference_mode():
        assert torch.equal(model(x), alone(x))
    later, _, _ = made(kind)
    later.between = lambda x: x.mul_(2)  # not so when it was watched
    taken.clear()
    with torch.no_grad():
        assert torch.equal(later(x), alone(x))
    assert len(taken) == 3 + 3


@kinds
def test_a_layer_that_runs_twice_and_a_layer_alone_share_nothing(kind):
    make, shape = KINDS[kind]
    model = make()
    model.layers = nn.ModuleList([model.layers[0], model.layers[0], model.layers[1]])
    with watching(model), torch.no_grad():
        model(torch.randn(shape))
    assert [layer.share for layer in model.layers] == [None] * 3


@kinds
def test_copies_share_among_themselves(kind, taken):
    model, _, x = made(kind)
    model.layers[0].share.keep(x, x)
    twin = copy.deepcopy(model)
    assert len({id(layer.share.squares) for each in (model, twin) for layer in each.layers}) == 2
    assert held(twin) == [None] * 3
    taken.clear()
    with torch.no_grad():
        twin(x)
    assert len(taken) == 1


@kinds
def test_compilers_and_transforms_see_layers_by_themselves(kind):
    model, alone, x = made(kind)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), alone(x))
    exported = torch.export.export(model, (x,), strict=False).module()
    torch.testing.assert_close(exported(2 * x), alone(2 * x))
    batched = torch.func.vmap(lambda each: model(each[None])[0])(x)
    torch.testing.assert_close(batched, alone(x))
    tangents = [torch.func.jvp(each, (x,), (torch.ones_like(x),))[1] for each in (model, alone)]
    torch.testing.assert_close(*tangents)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model(x), alone(x))
    assert held(model) == [None] * 3


@pytest.mark.parametrize("name", ["resnet18", "repvgg_a0"])
def test_models_share_after_conversion_and_after_loading(name, tmp_path, taken):
    torch.manual_seed(0)
    student = convert(load_teacher(f"timm:{name}", pretrained=False, image_size=64), BcosConfig())
    save(student, tmp_path / "out")
    x = torch.randn(1, 3, 64, 64)
    for found in (student, load(tmp_path / "out")):
        model = found.model
        set_strength(model, b=2, beta=0)
        readers = [layer for layer in model.modules() if getattr(layer, "share", None) is not None]
        assert readers
        alone = copy.deepcopy(model)
        for layer in alone.modules():
            if hasattr(layer, "share"):
                layer.share = None
        taken.clear()
        with torch.inference_mode():
            y, before = model(x), len(taken)
            assert torch.equal(y, alone(x))
        spared = sum(not layer.share.first for layer in readers)
        assert len(taken) - before == before + spared
        ours, theirs = (explain(each, x, 0).contributions for each in (model, alone))
        torch.testing.assert_close(ours, theirs)
