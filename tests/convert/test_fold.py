"""Folding: fewer steps, the same function, the same contributions, and a student that stays as it was."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from bcosify.convert import BcosConfig, CodaConfig, convert, fold, set_strength
from bcosify.convert.layers import BcosConv2d, UncentredBatchNorm, convert_in_place
from bcosify.explain import explain
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, UncentredBatchNorm) for module in model.modules())


def lively(model: nn.Module, shift: float = 0.0) -> nn.Module:
    """Norms with gains of both signs, of which one is zero."""
    generator = torch.Generator().manual_seed(0)
    for norm in model.modules():
        if isinstance(norm, _BatchNorm):
            nn.init.normal_(norm._parameters["weight"], generator=generator)
            norm._parameters["weight"].data[0] = 0
            norm._buffers["running_var"].uniform_(0.5, 2, generator=generator)
            norm._buffers["running_mean"].normal_(0, shift, generator=generator) if shift else None
    return model


def assert_same(student, folded: nn.Module, pictures: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(folded(pictures), student.model(pictures), rtol=1e-4, atol=1e-5)
    ours, theirs = explain(folded, pictures, 0), explain(student.model, pictures, 0)
    scale = float(theirs.contributions.abs().max())
    torch.testing.assert_close(ours.contributions, theirs.contributions, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize(("name", "size", "left"), [("efficientnet_lite0", 96, 0), ("dinov2_small", 98, 0)])
def test_a_real_student_folds(real_student, photographs, name, size, left):
    student = real_student(name)
    set_strength(student.model, b=2, beta=0)
    before = copy.deepcopy(student.model.state_dict())
    folded = fold(student)
    assert norms(folded) == left and not folded.training
    assert all(torch.equal(value, before[key]) for key, value in student.model.state_dict().items())
    pictures = photographs(student.preprocess.at(size), 2).double()
    student.model.double(), folded.double()
    assert_same(student, folded, pictures)


@pytest.mark.parametrize(
    "config", [BcosConfig(), BcosConfig(scale="unbounded"), CodaConfig()], ids=lambda c: str(c)[:30]
)
@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_byobnet"])
@pytest.mark.parametrize("b", [1.0, 1.6, 2.0])
def test_gains_of_both_signs_go_into_the_layers(tiny, name, config, b):
    teacher = tiny(name)
    lively(teacher.model)
    student = convert(teacher, config)
    set_strength(student.model, b=b, beta=0)
    folded = fold(student)
    assert norms(student.model) and not norms(folded)
    assert_same(student, folded, torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)))


def test_norms_that_shift_stay(tiny):
    teacher = tiny("test_resnet")
    lively(teacher.model, shift=1.0)
    student = convert(teacher)
    set_strength(student.model, b=2, beta=0.5)
    folded = fold(student)
    assert norms(folded) == norms(student.model) > 0
    assert_same(student, folded, torch.randn(2, 3, 64, 64))


class ReadTwice(nn.Module):
    """The first norm's input is read by something else too, the second layer runs twice, the third pair is plain."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, bias=False)
        self.read = nn.BatchNorm2d(8)
        self.shared = nn.Conv2d(8, 8, 1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(8), nn.BatchNorm2d(8)])
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = (self.read(x) + self.skip * x).relu()
        for norm in self.norms:
            x = norm(self.shared(x)).relu()
        return self.head(x.mean((2, 3)))

    skip = 1.0


@pytest.mark.parametrize(("skip", "left"), [(1.0, 3), (0.0, 2)])
def test_a_norm_stays_where_its_gain_has_no_layer_of_its_own(teach, monkeypatch, skip, left):
    monkeypatch.setattr(ReadTwice, "skip", skip)
    torch.manual_seed(0)
    student = convert(teach(lively(ReadTwice()).eval()))
    set_strength(student.model, b=2, beta=0)
    folded = fold(student)
    assert norms(folded) == left
    assert_same(student, folded, torch.randn(2, 3, 16, 16))


@given(st.floats(1, 3), st.booleans(), st.integers(0, 5))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_a_layer_that_takes_its_norms_or_a_gain_responds_as_the_formula_says(b, bounded, seed):
    torch.manual_seed(seed)
    layer, x = convert_in_place(nn.Conv2d(4, 6, 3, bias=False).double(), BcosConv2d), torch.randn(2, 4, 5, 5).double()
    layer.bounded = bounded
    layer.weight.data[0] = 0
    set_strength(layer, b=round(b, 2))
    patches, filters = F.unfold(x, 3), layer.weight.detach().flatten(1)
    response = filters @ patches
    size = patches.norm(dim=1, keepdim=True) * (filters.norm(dim=1)[:, None] if bounded else 1)
    wanted = (response * (response.abs() / size.clamp_min(1e-30)) ** (layer._b - 1)).view(2, 6, 3, 3)
    gain = torch.randn(6).double()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), wanted)
        layer.rescale(gain)
        torch.testing.assert_close(layer(x), wanted * gain.view(-1, 1, 1))
        layer.take_norms()
        torch.testing.assert_close(layer(x), wanted * gain.view(-1, 1, 1))
    assert not layer.bounded
