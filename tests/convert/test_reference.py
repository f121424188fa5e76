"""Reference gains: at its start the student is its teacher while it trains, too; later it keeps the teacher's sizes."""

from __future__ import annotations

import copy

import pytest
import torch
from bcosify.convert import BcosConfig, CodaConfig, convert, set_strength
from bcosify.convert.layers import (
    ReferenceSized,
    RunningGains,
    batch_statistics,
    estimate_gains,
    fold_gains,
    mean_sizes,
    recording,
    reference_gains,
)
from bcosify.convert.layers.bcos import BcosConv2d, BcosLinear
from bcosify.convert.layers.scheduled import convert_in_place
from bcosify.explain import TopTarget, explain
from torch import Tensor, nn

MODELS = ("test_resnet", "test_efficientnet", "test_vit")


def pictures(count: int = 3, size: int = 64, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def pair(tiny, name: str = "test_resnet", config="bcos") -> tuple[nn.Module, nn.Module]:
    """A student, and its teacher in the student's layers."""
    student = convert(tiny(name), config).model.eval()
    return student, copy.deepcopy(student).requires_grad_(False)


def followed(student: nn.Module, teacher: nn.Module, batch: Tensor) -> Tensor:
    """What the student says of a batch beside the teacher."""
    with reference_gains(student, teacher):
        with recording(teacher), torch.no_grad():
            teacher(batch)
        return student(batch)


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def sized_layers(model: nn.Module) -> list[ReferenceSized]:
    return [module for module in model.modules() if isinstance(module, ReferenceSized)]


def assert_nothing_left(*models: nn.Module) -> None:
    for layer in (layer for model in models for layer in sized_layers(model)):
        assert not (layer.records or layer.follows or layer.sized) and layer.sums is None


# ------------------------------------------------------------------------------------------------------ while it trains


@pytest.mark.parametrize("config", [BcosConfig(), BcosConfig(scale="unbounded"), CodaConfig()], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_at_its_start_the_student_is_its_teacher_in_training_mode_too(tiny, name, config):
    teacher = tiny(name)
    original = teacher.model.eval()
    student = convert(teacher, config).model.eval()
    counterpart = copy.deepcopy(student)
    batch = pictures()
    assert relative(followed(student, counterpart, batch), original(batch)) < 1e-5
    assert len(sized_layers(student)) > 10
    assert_nothing_left(student, counterpart)
    if name != "test_vit" and isinstance(config, BcosConfig):  # which batch statistics are not
        with batch_statistics(student):
            assert relative(student(batch), original(batch)) > 0.1


def by_hand(x: Tensor, weight: Tensor, bias: Tensor, b: float, beta: float, theirs: Tensor) -> Tensor:
    """The formula, place by place and channel by channel, for a linear layer x (N, C) of a batch."""
    columns = []
    for row, constant, reference in zip(weight, bias, theirs, strict=True):
        raw = torch.stack([sample @ row for sample in x])
        cosine = torch.stack([(sample @ row) / (sample.norm() * row.norm()) for sample in x])
        response = cosine.abs() ** (b - 1) * raw
        columns.append((reference / response.square().mean()).sqrt() * response + beta * constant)
    return torch.stack(columns, 1)


@pytest.mark.parametrize(("b", "beta"), [(1.0, 1.0), (1.5, 0.5), (2.0, 0.0)])
def test_gain_and_gradient_are_those_of_the_plain_formula(b, beta):
    """In float64, through E[student^2] too, for everything that has a gradient."""
    torch.manual_seed(0)
    source = nn.Linear(5, 4).double()
    teacher = convert_in_place(copy.deepcopy(source), BcosLinear).requires_grad_(False)
    student = convert_in_place(copy.deepcopy(source), BcosLinear)
    with torch.no_grad():
        student.weight.mul_(torch.tensor([1.0, 0.5, 3.0, 1.0])[:, None]).add_(torch.randn(4, 5).double() * 0.3)
    set_strength(student, b, beta)
    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    pull = torch.randn(6, 4, dtype=torch.float64)
    with reference_gains(student, teacher):
        with recording(teacher), torch.no_grad():
            teacher(x)
        found = student(x)
    theirs = (x.detach() @ source.weight.T).square().mean(0)
    parameters = [x, *dict(student.named_parameters()).values()]
    wanted = by_hand(*parameters, b, beta, theirs)
    assert torch.allclose(found, wanted, rtol=1e-6, atol=1e-7)  # energies travel in float32
    gradients = (
        torch.autograd.grad((y * pull).sum(), parameters, allow_unused=True, materialize_grads=True)
        for y in (found, wanted)
    )
    for ours, oracle in zip(*gradients, strict=True):
        assert torch.allclose(ours, oracle, rtol=1e-5, atol=1e-6)
    # Without the way through E[student^2] it would be another one.
    set_strength(student, 1.0, 0.0)
    with reference_gains(student, teacher):
        with recording(teacher), torch.no_grad():
            teacher(x)
        (ours,) = torch.autograd.grad((student(x) * pull).sum(), student.weight)
    assert (ours * student.weight).sum(1).abs().max() < 1e-6  # the size of a filter does not count


def test_the_mean_is_over_pictures_and_places_of_every_channel():
    """A convolution: every channel comes out with the teacher's mean square, whatever the student's filters' size."""
    torch.manual_seed(0)
    teacher = convert_in_place(nn.Conv2d(3, 4, 3, stride=2, bias=True), BcosConv2d).requires_grad_(False)
    student = copy.deepcopy(teacher)
    student.weight.data = torch.randn_like(student.weight) * torch.tensor([0.01, 1.0, 5.0, 100.0]).view(-1, 1, 1, 1)
    set_strength(student, 1.7, 0)
    batch = pictures(3, 11)
    found = followed(student, teacher, batch)
    theirs = nn.functional.conv2d(batch, teacher.weight, stride=2)
    assert torch.allclose(found.square().mean((0, 2, 3)), theirs.square().mean((0, 2, 3)), rtol=1e-4)
    # And it is the same response but for one number a channel.
    ratio = found / student(batch)
    assert torch.allclose(ratio, ratio[:1, :, :1, :1].expand_as(ratio), rtol=1e-3)


@pytest.mark.parametrize("dead", ["teacher", "student", "both"])
def test_dead_channels_stay_finite(dead):
    torch.manual_seed(0)
    teacher = convert_in_place(nn.Conv2d(3, 4, 3), BcosConv2d).requires_grad_(False)
    student = copy.deepcopy(teacher).requires_grad_()
    for name, layer in (("teacher", teacher), ("student", student)):
        if dead in (name, "both"):
            layer.weight.data[1] = 0
    set_strength(student, 1.5, 0.5)
    batch = pictures(2, 9)
    found = followed(student, teacher, batch)
    found.square().sum().backward()
    assert found.isfinite().all() and student.weight.grad is not None and student.weight.grad.isfinite().all()
    # Its neighbours take no notice of it.
    theirs = nn.functional.conv2d(batch, teacher.weight)[:, [0, 2, 3]].square().mean((0, 2, 3))
    ours = (found - student.bias.view(-1, 1, 1))[:, [0, 2, 3]].square().mean((0, 2, 3))
    assert torch.allclose(ours, theirs, rtol=1e-4)
    means = estimate_gains(student, teacher, [batch])
    assert student.resting is not None and student.resting.isfinite().all() and len(means) == 1
    assert student.resting[1] == (pytest.approx(1e-3) if dead == "teacher" else 1)
    assert student(batch).isfinite().all()


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_it_runs_in_half_precision(tiny, name):
    """Under autocast the sizes are still taken in float32: a batch a thousand times as large has the same gains."""
    student, teacher = pair(tiny, name)
    set_strength(student, 1.2, 1)
    wanted = followed(student, teacher, pictures()).detach()
    with torch.autocast("cpu", torch.bfloat16):
        found = followed(student, teacher, pictures())
        found.float().square().sum().backward()
    assert torch.nn.functional.cosine_similarity(found.float().flatten(), wanted.flatten(), 0) > 0.99
    assert all(layer.energy is None or layer.energy.dtype == torch.float32 for layer in sized_layers(teacher))
    gradients = [parameter.grad for parameter in student.parameters() if parameter.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)


def test_every_part_of_a_batch_has_its_own_teacher(tiny):
    """Accumulation: inside one context the teacher is run on each part before the student is; none adds up."""
    student, teacher = pair(tiny)
    set_strength(student, 1.3, 0.5)
    parts = pictures(4).chunk(2)
    with reference_gains(student, teacher):
        found = []
        for part in parts:
            with recording(teacher), torch.no_grad():
                teacher(part)
            found.append(student(part))
            found[-1].square().sum().backward()
    for part, ours in zip(parts, found, strict=True):
        assert torch.equal(ours, followed(student, teacher, part))


class Twice(nn.Module):
    """A layer that runs more than once, on maps of other sizes, between two that run once."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = self.shared(5 * self.shared(x).relu()).relu()
        return self.head(x.mean((2, 3)))


def test_a_layer_that_runs_more_than_once_has_no_gain(teach):
    """One number cannot keep both sizes: it would make another function of the student at its very start."""
    torch.manual_seed(0)
    student = convert(teach(Twice())).model.eval()
    teacher, batch = copy.deepcopy(student).requires_grad_(False), pictures(3, 16)
    for _ in range(2):  # a step is like the one before
        assert relative(followed(student, teacher, batch), teacher(batch)) < 1e-5
    set_strength(student, 2, 0)
    estimate_gains(student, teacher, [batch, pictures(3, 16, 4)])
    gains = {name: layer.resting for name, layer in student.named_modules() if isinstance(layer, ReferenceSized)}
    assert torch.equal(gains["shared"], torch.ones(4)) and all((gains[name] != 1).any() for name in ("first", "head"))


def test_the_teacher_is_not_changed_by_recording(tiny):
    _, teacher = pair(tiny)
    wanted = teacher(pictures())
    with recording(teacher):
        assert relative(teacher(pictures()), wanted) < 1e-5
    assert torch.equal(teacher(pictures()), wanted)


def test_nothing_is_left_behind_after_an_exception(tiny):
    student, teacher = pair(tiny)
    set_strength(student, 1.5, 0)
    plain, state = student(pictures()), copy.deepcopy(student.state_dict())

    def failing(batches):
        yield from batches
        raise KeyError("no more")

    with pytest.raises(KeyError), recording(teacher):
        raise KeyError
    with pytest.raises(KeyError), reference_gains(student, teacher):
        raise KeyError
    with pytest.raises(KeyError):
        estimate_gains(student, teacher, failing([pictures()]))
    with pytest.raises(ValueError, match="a normalised picture"):
        estimate_gains(student, teacher, [torch.zeros(1, 5, 64, 64)])
    assert_nothing_left(student, teacher)
    assert torch.equal(student(pictures()), plain)
    assert state.keys() == student.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in student.state_dict().items())


def test_a_teacher_that_is_not_converted_is_refused(tiny):
    teacher = tiny("test_resnet")
    student = convert(teacher).model
    with pytest.raises((AssertionError, AttributeError)), reference_gains(student, teacher.model):
        pass
    assert_nothing_left(student)


@pytest.mark.parametrize(
    ("name", "config"), [("test_resnet", "bcos"), ("test_vit", "bcos"), ("test_vit", CodaConfig())]
)
def test_the_ledger_balances_while_gains_follow(tiny, name, config):
    """The gains are gates: constants, of which the map is a linear function. The outputs stay bit for bit."""
    student, teacher = pair(tiny, name, config)
    set_strength(student, 1.4, 0.5)
    batch = pictures(1)
    with reference_gains(student, teacher):
        with recording(teacher), torch.no_grad():
            teacher(batch)
        explanation = explain(student, batch, TopTarget(2))
        assert torch.equal(explanation.outputs, student(batch))
    assert explanation.balanced().all()
    assert relative(explanation.outputs, student(batch)) > 1e-3 or config != "bcos"


# -------------------------------------------------------------------------------------------------------------- at rest


CONFIGS = [BcosConfig(), BcosConfig(scale="unbounded"), CodaConfig()]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_folded_gains_are_the_same_function(tiny, name, config):
    student, teacher = pair(tiny, name, config)
    set_strength(student, 1.5, 0.3)
    untouched, batch = student(pictures(seed=9)), pictures(2, seed=9)
    gains = estimate_gains(student, teacher, [pictures(seed=seed) for seed in (1, 2)])
    assert len(gains) == len(sized_layers(student)) and all(
        layer.resting is not None for layer in sized_layers(student)
    )
    resting = student(batch)
    if isinstance(config, BcosConfig):  # alignment units are at B = 1 all the time
        assert relative(resting, untouched[:2]) > 1e-2
    before = copy.deepcopy(student.state_dict())
    fold_gains(student)
    assert relative(student(batch), resting) < 1e-5
    assert_nothing_left(student)
    changed = [name for name, value in student.state_dict().items() if not torch.equal(value, before[name])]
    assert changed and all(name.endswith(("weight", "gain")) for name in changed)


def test_gains_at_rest_are_ratios_of_means_over_all_batches():
    """Not means of ratios: batches that differ a thousandfold in size tell them apart."""
    torch.manual_seed(0)
    teacher = convert_in_place(nn.Linear(5, 4), BcosLinear).requires_grad_(False)
    student = copy.deepcopy(teacher)
    set_strength(student, 2, 0)
    batches = [torch.randn(6, 5), torch.randn(6, 5) * 30]
    estimate_gains(student, teacher, batches)
    theirs, ours = (
        torch.stack([f(x).square().mean(0) for x in batches]).mean(0)
        for f in (lambda x: x @ teacher.weight.T, lambda x: plain(x, student.weight))
    )
    assert torch.allclose(student.resting, (theirs / ours).sqrt(), rtol=1e-4)
    # Estimated once more, they replace the first: they do not pile up.
    first = student.resting
    estimate_gains(student, teacher, batches)
    assert torch.allclose(student.resting, first)


def plain(x: Tensor, weight: Tensor) -> Tensor:
    """B = 2 without bias."""
    raw = x @ weight.T
    return raw.abs() / (x.norm(dim=1, keepdim=True) * weight.norm(dim=1)) * raw


def test_many_batches_see_later_layers_behind_sized_ones(tiny):
    """A layer's gain is estimated of what the layers before it give at their size: one pass is enough for depth."""
    student, teacher = pair(tiny)
    set_strength(student, 1.5, 1)
    batch = pictures(8)
    ragged = student(batch)
    estimate_gains(student, teacher, [batch])
    wanted, rested = teacher(batch), student(batch)
    followed_one = followed(student, teacher, batch)
    assert relative(rested, followed_one) < 1e-4  # one batch: at rest is as it followed
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(rested, wanted).mean() > cosine(ragged, wanted).mean()


def test_gains_at_rest_do_not_hinder_a_new_phase(tiny):
    """Following takes the place of resting; after it, resting is what it was."""
    student, teacher = pair(tiny)
    set_strength(student, 1.3, 0.5)
    wanted = followed(student, teacher, pictures())
    estimate_gains(student, teacher, [pictures(seed=5)])
    resting = student(pictures())
    assert torch.equal(followed(student, teacher, pictures()), wanted)
    assert torch.equal(student(pictures()), resting)


def test_a_student_with_reference_gains_is_nearer(tiny):
    """What the whole is for: above B = 1, untrained, the output stays closer to the teacher's."""
    student, teacher = pair(tiny, "test_vit")
    set_strength(student, 1.25, 1)
    batch = pictures(8)
    cosine = torch.nn.functional.cosine_similarity
    wanted = teacher(batch)
    assert cosine(followed(student, teacher, batch), wanted).mean() > cosine(student(batch), wanted).mean()


# -------------------------------------------------------------------------------------------------------- running means


def a_pair_of_layers() -> tuple[nn.Sequential, nn.Sequential]:
    torch.manual_seed(0)
    source = nn.Sequential(nn.Linear(5, 4))
    teacher, student = copy.deepcopy(source), copy.deepcopy(source)
    for model in (teacher, student):
        convert_in_place(model[0], BcosLinear)
    set_strength(student, 1.6, 0.3)
    return student, teacher.requires_grad_(False)


def test_running_gains_move_towards_every_step_and_no_further():
    student, teacher = a_pair_of_layers()
    batches = [torch.randn(8, 5) for _ in range(3)]
    gains = RunningGains(student, 0.75, mean_sizes(student, teacher, [batches[0]]))
    expected = gains.means["0"].clone()
    for batch in batches:
        sizes = mean_sizes(student, teacher, [batch])["0"]
        followed(student, teacher, batch[:2])  # two parts of one batch, of a quarter and the rest
        gains.collect(0.25)
        followed(student, teacher, batch[2:])
        gains.collect(0.75)
        gains.advance()
        expected = 0.75 * expected + 0.25 * sizes
        assert torch.allclose(gains.means["0"], expected, rtol=1e-5)
    gains.stop()
    assert student[0].running is None and student[0].seen is None and gains.decay == 0.75


def test_a_running_gain_does_not_see_the_batch_but_its_gradient_does():
    student, teacher = a_pair_of_layers()
    gains = RunningGains(student, 0.9, {"0": torch.tensor([[4.0] * 4, [1.0] * 4])})
    plain = copy.deepcopy(student)
    batch, pull = torch.randn(8, 5), torch.randn(8, 4)
    found = followed(student, teacher, batch)
    raw = plain(batch) - plain[0].bias
    assert torch.allclose(found - student[0].bias, 2 * raw, atol=1e-6)  # sqrt(4 / 1), whatever the batch
    size = raw.square().mean(0)
    wanted = 2 * raw * (size.detach() / size).sqrt()
    for y, layer in ((found, student[0]), (wanted, plain[0])):
        (y * pull).sum().backward()
        assert layer.weight.grad is not None
    assert torch.allclose(student[0].weight.grad, plain[0].weight.grad, atol=1e-5)
    # A step along a filter itself would change nothing but its size.
    along = (student[0].weight.grad * student[0].weight).sum(1)
    assert along.abs().max() < 1e-4
    gains.stop()


def test_running_gains_are_one_at_the_start(tiny):
    student, teacher = pair(tiny)
    batches = [pictures(seed=seed) for seed in (1, 2)]
    gains = RunningGains(student, 0.9, mean_sizes(student, teacher, batches))
    other = pictures(seed=3)
    assert relative(followed(student, teacher, other), teacher(other)) < 1e-5
    gains.collect(1.0)
    gains.advance()
    assert relative(followed(student, teacher, batches[0]), teacher(batches[0])) < 1e-5
    gains.stop()
    assert_nothing_left(student, teacher)
