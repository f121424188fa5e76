"""Gains: closer to the teacher, positive, exact where there is nothing to correct, and nothing left behind."""

from __future__ import annotations

import copy

import pytest
import torch
from bcosify.convert import calibrate, convert, set_strength
from bcosify.convert.layers import scheduled_layers
from torch import nn
from torch.nn.functional import cosine_similarity

GAINS = pytest.mark.parametrize("gain", ["least-squares", "rms"])


def similarity(student: nn.Module, teacher: nn.Module, pictures: torch.Tensor) -> float:
    with torch.no_grad():
        return float(cosine_similarity(student(pictures), teacher(pictures)).mean())


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize(("name", "size"), [("efficientnet_lite0", 112), ("dinov2_small", 98)])
def test_calibration_brings_a_real_student_closer(real_teachers, real_student, photographs, name, size):
    teacher, student = real_teachers[name].model, real_student(name)
    pictures = photographs(student.preprocess.at(size))
    set_strength(student.model, 2.0, 0.0)
    before = similarity(student.model, teacher, pictures)
    gains = calibrate(student.model, teacher, pictures)
    assert similarity(student.model, teacher, pictures) > before + 0.1
    assert len(gains) >= 37 and min(gains.values()) > 0 and hooks(student.model) == hooks(teacher) == 0


@GAINS
@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext", "test_byobnet"])
def test_gains_are_1_where_there_is_nothing_to_correct(tiny, name, gain):
    teacher = tiny(name)
    student = convert(teacher)
    before, pictures = weights(student.model), torch.randn(4, 3, 64, 64)
    gains = calibrate(student.model, teacher.model, pictures, gain)
    assert gains and all(value == pytest.approx(1, abs=1e-3) for value in gains.values())
    for key, value in weights(student.model).items():
        torch.testing.assert_close(value, before[key], rtol=1e-3, atol=1e-4)


@GAINS
def test_gains_are_positive_and_scale_whole_channels_by_themselves(tiny, gain):
    teacher = tiny("test_resnet")
    student = convert(teacher)
    set_strength(student.model, 2.0, 0.3)
    before, untouched = weights(student.model), weights(teacher.model)
    gains = calibrate(student.model, teacher.model, torch.randn(4, 3, 64, 64), gain)
    layers = dict(scheduled_layers(student.model))
    assert set(gains) == set(layers)
    for name in gains:
        old, new = (w.detach().view(len(w), -1) for w in (before[f"{name}.weight"], layers[name]._parameters["weight"]))
        ratio = (new * old).sum(1) / old.square().sum(1)
        assert (ratio > 0).all()
        torch.testing.assert_close(new, old * ratio[:, None], rtol=1e-4, atol=1e-6)
    assert all(torch.equal(value, untouched[key]) for key, value in weights(teacher.model).items())
    assert [layer.strengths().get("b", 2.0) for layer in layers.values()] == [2.0] * len(layers)


def test_dead_channels_keep_their_weight(teach):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    with torch.no_grad():
        model[0].weight[2] = 0
        model[0].bias[2] = -1
        model[2].weight[1] = 0
        model[2].weight[3, [0, 1, 3, 4, 5]] = 0
    teacher = teach(model)
    student = convert(teacher).model
    set_strength(student, 2.0, 0.0)
    before = weights(student)
    calibrate(student, teacher.model, torch.randn(4, 3, 16, 16))
    after = weights(student)
    # Filter 1 is zero; filter 3 sees only a channel that never fires. Filter 0 is alive.
    assert all(torch.equal(after["2.weight"][i], before["2.weight"][i]) for i in (1, 3))
    assert not torch.equal(after["2.weight"][0], before["2.weight"][0])
    assert all(value.isfinite().all() for value in after.values())


@pytest.mark.parametrize("broken", ["teacher", "student"])
def test_hooks_go_after_an_exception(tiny, broken):
    teacher = tiny("test_vit")
    models = {"teacher": teacher.model, "student": convert(teacher).model}

    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    handle = models[broken].norm.register_forward_hook(stop)
    with pytest.raises(Stop):
        calibrate(models["student"], models["teacher"], torch.randn(1, 3, 64, 64))
    handle.remove()
    assert hooks(models["teacher"]) == hooks(models["student"]) == 0


class Pyramid(nn.Module):
    """One layer that runs on two sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.shared, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 3)

    def forward(self, x):
        x = self.stem(x)
        sizes = [x, nn.functional.avg_pool2d(x, 2)]
        return self.head(sum(self.shared(size).mean((2, 3)) for size in self.order(sizes)))

    def order(self, sizes):
        return sizes


class Upwards(Pyramid):
    def order(self, sizes):
        return sizes[::-1]


@pytest.mark.parametrize("kind", [Pyramid, Upwards])
def test_a_layer_that_runs_twice_is_calibrated_once(teach, kind):
    torch.manual_seed(0)
    teacher = teach(kind())
    student = convert(teacher).model
    gains = calibrate(student, teacher.model, torch.randn(2, 3, 16, 16))
    assert gains == pytest.approx(dict.fromkeys(["stem", "shared", "head"], 1), abs=1e-3)


def test_the_same_pictures_give_the_same_gains_whatever_the_global_seed(tiny):
    teacher, pictures = tiny("test_convnext"), torch.randn(4, 3, 64, 64)
    student = convert(teacher)
    set_strength(student.model, 2.0, 0.0)
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(calibrate(copy.deepcopy(student.model), teacher.model, pictures))
    assert found[0] == found[1]
