"""Identity first: at B = 1 and beta = 1 a student is its teacher, on real weights and on tiny models."""

from __future__ import annotations

import copy

import pytest
import torch
from bcosify.convert import BcosConfig, convert, identity_error, lossy_steps, set_strength
from bcosify.convert.layers import BcosConv2d, BcosLinear, scheduled_layers
from bcosify.core.errors import LedgerError
from bcosify.explain import SelfTarget, TopTarget, explain
from torch import nn

REAL = pytest.mark.parametrize("name", ["efficientnet_lite0", "dinov2_small"])
TINY = (
    "byobnet coatnet convnext convnext2 convnext3 efficientnet efficientnet_evos "
    "efficientnet_gn efficientnet_ln mambaout "
    "maxvit nfnet resnet vit vit2 vit3 vit4 vit_relpos"
).split()


@pytest.mark.parametrize(
    ("name", "size"),
    [("efficientnet_lite0", 224), ("efficientnet_lite0", 160), ("dinov2_small", 224), ("dinov2_small", 98)],
)
def test_a_real_student_is_its_teacher_on_photographs(real_teachers, real_student, photographs, name, size):
    teacher, student = real_teachers[name], real_student(name)
    assert student.history.conversion.identity_error <= 1e-5
    assert identity_error(student.model, teacher.model, photographs(teacher.preprocess.at(size))) <= 1e-5


def test_real_weights_are_what_they_say(real_teachers, photographs):
    teacher = real_teachers["efficientnet_lite0"]
    with torch.no_grad():
        decisions = teacher.model(photographs(teacher.preprocess)).argmax(1)
    named = [teacher.labels[int(index)] for index in decisions]
    assert named[:3] == ["tiger cat", "espresso", "missile"]
    assert real_teachers["dinov2_small"].labels is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dead_filters_of_real_weights_give_no_nan(real_student, photographs, dtype):
    student = real_student("efficientnet_lite0")
    filters = [
        layer.weight.flatten(1).norm(dim=1)
        for _, layer in scheduled_layers(student.model)
        if isinstance(layer, BcosConv2d)
    ]
    assert (torch.cat(filters) < 1e-6).sum() > 100
    student.model.to(dtype)
    for beta in (1.0, 0.0):
        set_strength(student.model, 2.0, beta)
        with torch.no_grad():
            out = student.model(photographs(student.preprocess.at(96), 2).to(dtype))
        # Without biases and gains the features shrink to 1e-12, which float16 has not.
        assert out.isfinite().all() and (out.any(1).all() or (beta == 0 and dtype == torch.float16))


@REAL
@pytest.mark.parametrize("strength", [(1.0, 1.0), (1.5, 0.5), (2.0, 0.0)], ids=str)
def test_the_ledger_of_a_real_student_balances(real_student, photographs, name, strength):
    student = real_student(name)
    set_strength(student.model, *strength)
    pictures = photographs(student.preprocess.at(112 if student.labels else 98), 2)
    for target in [SelfTarget(), *([TopTarget(2)] if student.labels else [])]:
        explanation = explain(student.model, pictures, target)
        assert explanation.balanced().all() and explanation.encoded_inputs.shape[1] == 6
        assert explanation.scores.abs().min() > 0 and explanation.contributions.any()


@pytest.mark.parametrize("name", TINY)
def test_a_tiny_student_is_its_teacher_which_stays_untouched(tiny, name):
    teacher = tiny(f"test_{name}", None)
    before, classes = copy.deepcopy(teacher.model.state_dict()), [type(m) for m in teacher.model.modules()]
    student = convert(teacher)
    assert student.history.conversion.identity_error <= 1e-5
    set_strength(student.model, 2.0, 0.0)
    after = teacher.model.state_dict()
    assert [type(m) for m in teacher.model.modules()] == classes
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)
    shared = {id(p) for p in student.model.parameters()} & {id(p) for p in teacher.model.parameters()}
    assert not shared and not student.model.training


@pytest.mark.parametrize("name", TINY)
def test_state_dict_is_the_sources_with_b_and_beta(tiny, name):
    teacher = tiny(f"test_{name}", None)
    student = convert(teacher)
    theirs, ours = set(teacher.model.state_dict()), set(student.model.state_dict())
    stems = {step.name for step in student.plan.swaps if step.becomes.startswith("SixChannel")}
    folded = {key for key in theirs if key.endswith(".gain")}  # of weight standardisation
    assert theirs - ours <= folded | {f"{stem}.bias" for stem in stems}
    assert ours - theirs == {
        f"{layer}.{key}" for layer, module in scheduled_layers(student.model) for key in module.strengths()
    }


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_double_precision_stays_double_and_is_exact(tiny, name):
    teacher = tiny(f"test_{name}")
    teacher.model.double()
    student = convert(teacher)
    assert student.history.conversion.identity_error <= 1e-12
    assert {p.dtype for p in student.model.parameters()} == {torch.float64}


def test_a_converted_layer_that_acts_differently_is_found(teach):
    class Squared(nn.Module):
        """Reads its layer's bias by itself, so that a stem without one is another function."""

        def __init__(self):
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

        def forward(self, x):
            y = self.stem(x).mean((2, 3))
            return self.head(y if self.stem.bias is None else y * self.stem.bias)

    torch.manual_seed(0)
    with pytest.raises(
        LedgerError, match="timm:own: the student differs from its teacher.*nothing was written.*--keep"
    ):
        convert(teach(Squared()))


class Shared(nn.Module):
    """One linear layer that runs twice, and two that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 2, 2)
        self.twice, self.a, self.b, self.head = (nn.Linear(6, 6) for _ in range(4))
        self.alias = self.twice
        self.b.weight = self.a.weight

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = self.alias(torch.tanh(self.twice(x))).mean(1)
        return self.head(self.b(torch.tanh(self.a(x))))


def test_tied_layers_convert_once_and_stay_tied(teach):
    torch.manual_seed(0)
    student = convert(teach(Shared()))
    model = student.model
    assert [step.name for step in student.plan.swaps] == ["stem", "twice", "a", "b", "head"]
    assert model.alias is model.twice and model.a.weight is model.b.weight and isinstance(model.b, BcosLinear)


def test_scale_setting_reaches_the_layers(tiny):
    teacher, pictures = tiny("test_vit"), torch.randn(2, 3, 64, 64)
    outputs = []
    for scale in ("cosine", "unbounded"):
        student = convert(teacher, BcosConfig(scale=scale))
        assert student.history.conversion.identity_error <= 1e-5
        set_strength(student.model, 2.0)
        outputs.append(student.model(pictures))
    assert not torch.allclose(*outputs)


def test_identity_error_is_relative_to_the_largest_output():
    class Const(nn.Module):
        def __init__(self, *values):
            super().__init__()
            self.values = torch.tensor([values])

        def forward(self, x):
            return self.values

    assert identity_error(Const(4.0, -8.4), Const(4.0, -8.0), torch.zeros(1)) == pytest.approx(0.05)


def test_lossy_steps_measure_each_step_and_leave_the_student_alone(tiny):
    teacher = tiny("test_resnet")
    student = convert(teacher)
    before = copy.deepcopy(student.model.state_dict())
    rows = lossy_steps(student, torch.randn(8, 3, 64, 64), {"b": 1.5})
    carried = ("b", "beta", "carry", "window")
    assert [tuple(row.get(name, 0) for name in carried) for row in rows] == [
        (1, 1, 0, 0), (1, 0, 1, 7), (1, 0, 0, 0), (1.5, 1, 0, 0), (1.5, 0, 0, 0), (1.5, 0, 0, 0), (1.5, 0, 1, 7)
    ]  # fmt: skip
    assert [row["step"] for row in rows[-3:]] == [
        "B=1.5, biases removed", "B=1.5, biases removed, reference gains", "B=1.5, biases carried, reference gains"
    ]  # fmt: skip
    assert rows[0]["cosine"] == 1 and all(-1 <= row["cosine"] < 1 for row in rows[1:])
    assert all(torch.equal(value, before[key]) for key, value in student.model.state_dict().items())


@pytest.mark.parametrize(
    "options", [{"dilation": 2, "padding": 2}, {"padding": 3}, {"stride": 2, "groups": 2}], ids=str
)
def test_the_ledger_balances_for_any_convolution(teach, options):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, **options), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    student = convert(teach(model)).model
    set_strength(student, 1.5, 0.5)
    assert explain(student, torch.randn(2, 3, 16, 16), TopTarget(3)).balanced().all()
