"""Map matching: the student's map is `explain`'s, its gradient is right with gates held fixed, and it is learned."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
import torch
import torch.nn.functional as F
from bcosify.align.checks import check_recipe
from bcosify.align.maps import Aim, decided, map_error, own_directions, teacher_maps
from bcosify.align.paths import Draw
from bcosify.align.recipe import Phase
from bcosify.convert import convert, load, load_teacher, set_strength
from bcosify.convert.blocks import blocks_of
from bcosify.convert.layers.bcos import BcosLinear
from bcosify.convert.layers.scheduled import convert_in_place
from bcosify.convert.taps import record
from bcosify.core.errors import RecipeError
from bcosify.explain import explain
from bcosify.explain.weights import trained_maps
from bcosify.linearise.transposed import transposed
from torch import nn

from runs import RECIPE, aligned, asking

torch.set_num_threads(1)

MATCHED = dataclasses.replace(
    RECIPE,
    phases=(Phase("end-to-end", 40, 2e-3, settings={"map_weight": 1.0, "map_share": 0.5}),),
    checkpoint_every=12,
)


def students(name: str, b: float) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    teacher = load_teacher(f"timm:{name}", pretrained=False, image_size=64)
    student = convert(teacher).model.eval()
    set_strength(student, b, 0.3)
    return student, teacher.model.eval().requires_grad_(False)


def pictures(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 0.5


def differences(first: list[int], second: list[int], classes: int) -> torch.Tensor:
    return (F.one_hot(torch.tensor(first), classes) - F.one_hot(torch.tensor(second), classes)).float()


@pytest.mark.parametrize(
    ("name", "b"), [("test_vit", 2.0), ("test_resnet", 1.5), ("test_efficientnet", 2.0), ("test_convnext", 1.5)]
)
def test_the_map_is_the_explanation(name, b):
    student, _ = students(name, b)
    before = {key: value.clone() for key, value in student.state_dict().items()}
    _, maps = trained_maps(student, pictures(), differences([3, 7], [5, 2], 1000), lambda maps: maps.square().sum())
    found = explain(student, pictures(), targets=[3, 5, 7, 2]).contributions
    expected = torch.stack([found[0, 0] - found[0, 1], found[1, 2] - found[1, 3]])
    assert (maps - expected).abs().max() < 1e-4 * expected.abs().max()
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())
    assert all(parameter.grad is None for parameter in student.parameters())


def test_the_gradient_is_that_of_finite_differences():
    """At B = 1 the gates of a ReLU network are masks, which a small step leaves as they are."""
    student, _ = students("test_resnet", 1.0)
    student.double()
    for name, parameter in student.named_parameters():
        if parameter.dim() == 1 and not parameter.any() and name.endswith("weight"):
            nn.init.uniform_(parameter, 0.5, 1.5)  # a residual branch that starts at zero is a kink
    directions, weights = torch.randn(2, 1000).double(), torch.randn(2, 64, 64).double()

    def loss() -> torch.Tensor:
        return trained_maps(student, pictures().double(), directions, lambda maps: (maps * weights).sum())[0]

    loss().backward()
    for name, parameter in student.named_parameters():
        way = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)).double()
        step = 1e-7 * float(parameter.detach().abs().mean().clamp_min(1e-2))
        with torch.no_grad():
            ends = [loss().item() for move in (step, -2 * step, step) if parameter.add_(move * way) is not None][:2]
        expected = (ends[0] - ends[1]) / (2 * step)
        found = 0.0 if parameter.grad is None else (parameter.grad * way).sum().item()
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-5), name
        assert name.endswith("bias") or parameter.grad is not None, name


def test_gates_of_b_cos_layers_are_held_fixed():
    """Two B-cos layers with a GELU between, written out with detached gates."""
    torch.manual_seed(0)
    layers = [convert_in_place(nn.Linear(5, 7), BcosLinear), convert_in_place(nn.Linear(7, 3), BcosLinear)]
    net = nn.Sequential(nn.Flatten(), layers[0], nn.GELU(), layers[1])
    set_strength(net, 2.0, 0.0)
    images, directions, weights = torch.randn(4, 1, 1, 5), torch.randn(4, 3), torch.randn(4, 1, 5)
    loss, maps = trained_maps(net, images, directions, lambda maps: (maps * weights).sum())
    loss.backward()
    x = images.flatten(1)
    first, second = (layer.weight.detach().clone().requires_grad_() for layer in layers)

    def gate(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return ((x @ weight.T).abs() / x.norm(dim=1, keepdim=True) / weight.norm(dim=1)).detach()

    y = gate(x, first) * (x @ first.T)
    z = (F.gelu(y) / y).detach() * y
    scale = directions * gate(z, second)  # what the score's gradient is multiplied by on its way back
    row = ((scale @ second) * (F.gelu(y) / y).detach() * gate(x, first)) @ first
    expected = x * row
    assert torch.allclose(maps[:, 0], expected, atol=1e-5)
    (expected * weights[:, 0]).sum().backward()
    for layer, weight in zip(layers, (first, second), strict=True):
        assert torch.allclose(layer.weight.grad, weight.grad, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 4, 8])
def test_a_transposed_convolution_has_torchs_derivatives(groups):
    torch.manual_seed(0)
    grad, weight = torch.randn(2, 8, 5, 6).double(), torch.randn(8, 8 // groups, 3, 3).double()
    size, window = torch.Size((2, 8, 10, 12)), ((2, 2), (1, 1), (1, 1))
    arguments = [value.requires_grad_() for value in (grad, weight)]
    settings = (None, *window, False, (0, 0), groups, (True, False, False))
    expected = torch.ops.aten.convolution_backward(grad, torch.empty(size).double(), weight, *settings)[0]
    assert torch.allclose(transposed(size, grad, weight, *window, groups), expected)
    assert torch.autograd.gradcheck(lambda g, w: transposed(size, g, w, *window, groups), arguments)


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_the_teachers_map_adds_up_to_its_score_but_for_constants(name):
    _, teacher = students(name, 1.0)
    directions = differences([3, 7], [5, 2], 1000)
    maps = teacher_maps(teacher, pictures(), directions)
    with record(teacher, blocks_of(teacher)[-1:]) as calls:
        score = (teacher(pictures()) * directions).sum(1)
    if name == "test_vit":
        assert maps.shape == (2, 4, 4)
        return
    features = calls[blocks_of(teacher)[-1]].output
    head = (teacher.fc.weight[[3, 7]] - teacher.fc.weight[[5, 2]])[:, :, None, None]
    expected = (features * head).sum(1) / features[0, 0].numel()
    assert torch.allclose(maps, expected, atol=1e-5)
    assert torch.allclose(maps.sum((1, 2)) + teacher.fc.bias[[3, 7]] - teacher.fc.bias[[5, 2]], score, atol=1e-4)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in teacher.modules())


def test_other_classes_are_drawn_by_picture_and_step():
    output = torch.randn(8, 4)
    first = output.argmax(1)
    whole = decided(output, Draw(0, 3, 8, 0))
    assert torch.equal(whole.argmax(1), first) and whole.sum(1).abs().max() == 0 and whole.abs().sum(1).eq(2).all()
    assert torch.equal(whole[4:], decided(output[4:], Draw(0, 3, 8, 4)))
    assert not torch.equal(whole, decided(output, Draw(0, 4, 8, 0)))
    seen = {int(decided(output[:1], Draw(0, step, 1, 0)).argmin(1)) for step in range(60)}
    assert seen == set(range(4)) - {int(first[0])}
    assert own_directions(output, output[0]).norm(dim=1)[1:].tolist() == pytest.approx([1.0] * 7, rel=1e-5)


def test_descending_on_it_brings_the_maps_together():
    student, teacher = students("test_resnet", 1.5)
    directions = decided(teacher(pictures(4)), Draw(0, 0, 4, 0))
    aim = Aim(directions, teacher_maps(teacher, pictures(4), directions))
    optimizer = torch.optim.Adam(student.parameters(), 1e-3)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        losses.append(map_error(student, pictures(4), aim))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1].item() < 0.7 * losses[0].item()


def test_runs_with_it_are_the_same_after_a_resume_and_others_without(run, shards, tmp_path):
    whole = aligned(run, shards, tmp_path / "x", MATCHED)
    plain = aligned(run, shards, tmp_path / "plain", asking(MATCHED, map_weight=0.0))
    assert [row["loss"] for row in plain if "loss" in row][0] < [row["loss"] for row in whole if "loss" in row][0]
    shutil.rmtree(tmp_path / "x")
    shutil.rmtree(sorted((tmp_path / "x.run/checkpoints").iterdir())[-1])
    assert aligned(run, shards, tmp_path / "x", MATCHED, resume=True) == whole


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"map_weight": -1.0}, "map_weight: must be at least 0; got -1"),
        ({"map_share": 0.0}, "map_share: must be above 0 and at most 1; got 0"),
        ({"map_share": 1.5}, "map_share: must be above 0 and at most 1; got 1.5"),
        ({"gradient_checkpointing": True}, "map_weight: with gradient_checkpointing"),
        ({"compile": True}, "map_weight: with compile"),
        ({"phases": (Phase("block-local", 40, 1e-3, settings={"map_weight": 1.0}),)}, "unknown key .*map_weight"),
    ],
)
def test_maps_that_cannot_be_matched_are_refused(run, changed, said):
    student = load(run)
    with pytest.raises(RecipeError, match=said):
        own = {key: value for key, value in changed.items() if key.startswith("map_")}
        others = {key: value for key, value in changed.items() if key not in own}
        check_recipe(asking(dataclasses.replace(MATCHED, **others), **own), student, student.model)
