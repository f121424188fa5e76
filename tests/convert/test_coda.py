"""CoDA: the efficient form against weights written out, an exact start, the bound, and whole models."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from bcosify.convert import CodaConfig, convert, identity_error, load, plan_for, save, set_strength
from bcosify.convert.kernels import alignment, memory
from bcosify.convert.kernels.alignment import Layout
from bcosify.convert.kernels.alignment import aligned as response
from bcosify.convert.layers import DynamicConv2d, convert_in_place, scheduled_layers, watching
from bcosify.convert.methods.coda.layers import CodaConv2d, CodaLinear
from bcosify.core.errors import PlanError
from bcosify.explain import Linearised, SelfTarget, TopTarget, explain
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from convolutions import convolutions, source_pads
from pairs import pairs

SQUASHES = ("l2", "sq")
both = pytest.mark.parametrize("squash", SQUASHES)
often = settings(max_examples=25, deadline=None, derandomize=True)
ranks = st.integers(1, 3)
bases = st.integers(0, 2)


def aligned(source: nn.Module, mixin: type, rank: int = 2, basis: int = 2, squash: str = "l2", move: float = 0.1):
    """A converted copy whose low-rank part is random, of this size."""
    layer = convert_in_place(copy.deepcopy(source), mixin)
    layer.start_alignment(rank, basis, squash)
    moving = layer.directions if layer.mixing is None else layer.mixing
    nn.init.normal_(moving, std=move) if move else None
    return layer


def materialised(patches: Tensor, layer: nn.Module, group: int, frozen: bool) -> Tensor:
    """(..., D) patches of one group -> (..., K/G): every dynamic weight written out, after the paper's equations."""
    b = layer.weight.chunk(layer.groups)[group].flatten(1)
    reader = layer.reader.chunk(layer.groups)[group].flatten(1)
    directions = layer.directions.chunk(layer.groups)[group].flatten(1)
    if layer.mixing is None:
        a = directions.unflatten(0, (len(b), -1))
    else:
        a = torch.einsum("kmr,md->krd", layer.mixing.chunk(layer.groups)[group], directions)
    w = b + torch.einsum("...r,krd->...kd", patches @ reader.T, a)
    # Dynamic weights that all but cancel b count as a hundredth of its length.
    norm = torch.maximum(w.norm(dim=-1, keepdim=True), b.detach().norm(dim=-1, keepdim=True) / 100)
    w = w / norm if layer.squash == "l2" else w / norm * norm**2 / (1 + norm**2)
    w = w.detach() if frozen else w
    return layer.gain.chunk(layer.groups)[group] * torch.einsum("...kd,...d->...k", w, patches)


def patches_of(x: Tensor, layer: nn.Module) -> list[Tensor]:
    """(B, P, D) of every group, padded as the source pads."""
    x = F.pad(x, source_pads(layer), mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)
    parts = x.chunk(layer.groups, 1)
    return [F.unfold(part, layer.kernel_size, layer.dilation, 0, layer.stride).mT for part in parts]


def slow_conv(x: Tensor, layer: nn.Module, frozen: bool = False) -> Tensor:
    """(B, K, P) without the bias."""
    out = [materialised(patches, layer, group, frozen) for group, patches in enumerate(patches_of(x, layer))]
    return torch.cat(out, -1).mT


def close(found, wanted) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@both
@pytest.mark.parametrize("mode", ["zeros", "reflect"])
@given(data=st.data(), rank=ranks, basis=bases)
@often
def test_efficient_form_is_the_materialised_one(mode, squash, data, rank, basis):
    source, x = data.draw(convolutions(mode))
    source.bias = None
    layer = aligned(source, CodaConv2d, rank, basis, squash)
    x.requires_grad_()
    wanted, found = slow_conv(x, layer), layer(x)
    close(found.flatten(2), wanted)
    direction = torch.randn_like(wanted)
    leaves = [x, *layer.parameters()]
    gradients = [torch.autograd.grad((y * direction).sum(), leaves) for y in (found.flatten(2), wanted)]
    close(*gradients)
    with Linearised(layer) as mode_on:
        explained = layer(mode_on.follow(x.detach()))
    (gradient,), constants = mode_on.pull((explained.flatten(2) * direction).sum())
    (rows,) = torch.autograd.grad((slow_conv(x, layer, frozen=True) * direction).sum(), x)
    close(gradient, rows)
    assert torch.equal(explained, found) and not constants
    close((gradient * x).sum(), (found.flatten(2) * direction).sum())


@both
@given(st.lists(st.integers(1, 4), max_size=2), ranks, bases, st.integers(0, 9))
@often
def test_efficient_form_of_tokens_is_the_materialised_one(squash, leading, rank, basis, seed):
    torch.manual_seed(seed)
    source, x = nn.Linear(5, 3).double(), torch.randn(*leading, 5, dtype=torch.float64, requires_grad=True)
    layer = aligned(source, CodaLinear, rank, basis, squash)
    wanted, found = materialised(x, layer, 0, False) + layer.bias, layer(x)
    close(found, wanted)
    close(*(torch.autograd.grad(y.square().sum(), [x, *layer.parameters()]) for y in (found, wanted)))


@both
@given(data=st.data(), rank=ranks, basis=bases)
@often
def test_the_start_is_the_source_and_has_a_gradient(squash, data, rank, basis):
    source, x = data.draw(convolutions("zeros"))
    with torch.no_grad():
        source.weight[0] = 0  # real weights have dead filters
    layer = aligned(source, CodaConv2d, rank, basis, squash, move=0)
    y = layer(x)
    torch.testing.assert_close(y, source(x), rtol=1e-12, atol=1e-12)
    y.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())
    if y.numel() > len(source.weight) and source.weight[0].numel() > 1 and source.weight[1:].any():
        assert (layer.directions if layer.mixing is None else layer.mixing).grad.any()


def bounded(layer: nn.Module, x: Tensor) -> Tensor:
    """|y| over gain * |x|; dead units and patches are 0."""
    if not isinstance(layer, DynamicConv2d):
        return (layer(x).abs() / (layer.gain * x.norm(dim=-1, keepdim=True))).nan_to_num(0)
    norm = torch.stack([patches.norm(dim=-1) for patches in patches_of(x, layer)], 1).unsqueeze(2)
    y = layer(x).unflatten(1, (layer.groups, -1)).flatten(3)
    return (y.abs() / (layer.gain.view(layer.groups, -1, 1) * norm)).nan_to_num(0)


@both
@given(data=st.data(), rank=ranks, basis=bases, move=st.sampled_from([0.1, 1.0, 30.0]))
@often
def test_no_response_is_larger_than_gain_times_the_patch(squash, data, rank, basis, move):
    source, x = data.draw(convolutions("zeros"))
    source.bias = None
    layer = aligned(source, CodaConv2d, rank, basis, squash, move)
    assert bounded(layer, x).max() <= 1 + 1e-9
    assert bounded(layer.float(), x.float()).max() <= 1 + 1e-3


@pytest.mark.parametrize("left", [0.0, 1e-7, 1e-4, 1e-2])
def test_weights_that_cancel_stay_within_the_bound(left):
    layer = aligned(nn.Linear(4, 1, bias=False), CodaLinear, 1, 0, move=0)
    x = torch.tensor([[1.0, 2.0, -1.0, 0.5]])
    with torch.no_grad():  # w(x) = left * b + a little of x: next to nothing, in float32
        layer.weight.copy_(F.normalize(x + torch.tensor([[0.0, 1.0, 0.0, 0.0]])))
        layer.reader.copy_(x / x.square().sum())
        layer.directions.copy_(-layer.weight * (1 - left) + 1e-5 * x)
    y = layer(x)
    assert y.isfinite().all() and bounded(layer, x).max() <= 1.01
    y.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


def test_a_unit_trained_on_one_input_points_at_it():
    torch.manual_seed(0)
    layer, x = aligned(nn.Linear(6, 3, bias=False), CodaLinear, rank=6, basis=0, move=0), torch.randn(1, 6)
    assert float(bounded(layer, x).detach().max()) < 0.9
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        (-layer(x) / layer.gain).sum().backward()
        optimizer.step()
    assert float(bounded(layer, x).detach().min()) > 0.999


@both
@pytest.mark.parametrize("layout", [Layout(-1), Layout(1, 2)], ids=["tokens", "maps"])
@pytest.mark.parametrize("mixed", [True, False], ids=["mixed", "own"])
@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
def test_derivatives_of_the_response(squash, layout, mixed, check):
    torch.manual_seed(0)

    def few(channels: int) -> Tensor:
        return torch.randn(*((channels, 5) if layout.groups is None else (2, 2, channels, 3))).double()

    groups = () if layout.groups is None else (2,)
    gram = torch.randn(*groups, 3, 7).double() * 0.05
    gram[..., -1] = 2  # a norm above its floor
    mixing = [torch.randn(*groups, 3, 4).double()] if mixed else []
    leaves = [layout.turned(few(3)).contiguous(), few(2 if mixed else 6), *mixing, few(2), gram]
    gain, floor = torch.rand(3, 1).double(), torch.full((3, 1), 1e-4).double()
    per_unit = [each.flatten() if layout.groups is None else each for each in (gain, floor)]

    def run(static: Tensor, u: Tensor, *others: Tensor) -> Tensor:
        others = others if mixed else (None, *others)
        return response((static, u), *others, *per_unit, squash, layout)

    assert check(run, [each.requires_grad_() for each in leaves])


LAYERS = {
    "linear": (lambda: nn.Linear(6, 12), (3, 7, 6)),
    "conv": (lambda: nn.Conv2d(4, 12, 3, padding=1, bias=False), (3, 4, 6, 5)),
    "grouped": (lambda: nn.Conv2d(4, 12, 3, padding=1, groups=2), (3, 4, 6, 5)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False), (3, 4, 6, 5)),
    "one place": (lambda: nn.Conv2d(4, 12, 1), (3, 4, 1, 1)),
    "one unit": (lambda: nn.Conv2d(4, 1, 3), (3, 4, 6, 5)),
}


def in_double(layer: nn.Module) -> nn.Module:
    return copy.deepcopy(layer).double()


FORMS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
# Pictures, and the share of a block that each fills: one block, several with a smaller one behind, a picture each.
SIZES = {"one block": (6, 0.02), "some a block": (5, 0.4), "one a block": (2, 1.1)}
LARGE = ["linear", "conv", "grouped", "depthwise"]


@pytest.mark.parametrize(("kind", "form", "size", "squash"), pairs(k=LARGE, form=FORMS, size=SIZES, squash=SQUASHES))
def test_blocks_of_any_size_are_the_plain_formula(kind, form, size, squash):
    torch.manual_seed(0)
    source, (_, channels, *_) = LAYERS[kind][0]().double(), LAYERS[kind][1]
    layer = aligned(source, CodaLinear if kind == "linear" else CodaConv2d, squash=squash)
    (count, share), rows = SIZES[size], kind == "linear" or (kind == "conv" and form == "nhwc")
    places = share * (alignment.ROWS if rows else memory.BLOCK) / len(layer.weight)
    if kind == "linear":
        x = torch.randn(count, math.ceil(places), source.in_features).double()
    else:
        side = math.ceil(places**0.5) + 1
        x = torch.randn(count, channels, side, side).double().contiguous(memory_format=FORMS[form])
        layer = layer.to(memory_format=FORMS[form])
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    # Transforms see the plain formula.
    y, pull_back = torch.func.vjp(run, x, *(parameter.detach() for parameter in parameters))
    pull, leaf = torch.randn_like(y), x.requires_grad_()
    ours = torch.autograd.grad(layer(leaf), [leaf, *parameters], pull)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), y, rtol=1e-9, atol=1e-10 * float(y.abs().max()))
    for found, wanted in zip(ours, pull_back(pull), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10 * float(wanted.detach().abs().max()))


@pytest.mark.parametrize(("kind", "form", "squash"), pairs(kind=LAYERS, form=FORMS, squash=SQUASHES))
def test_layouts_and_inference_are_the_materialised_form(kind, form, squash):
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    source, x = make(), torch.randn(shape)
    with torch.no_grad():
        source.weight[0] = 0
    layer = aligned(source, CodaLinear if kind == "linear" else CodaConv2d, squash=squash)
    slow, y64 = in_double(layer), x.double().requires_grad_()
    wanted = materialised(y64, slow, 0, False) if kind == "linear" else slow_conv(y64, slow)
    if kind != "linear":
        x, layer = x.contiguous(memory_format=FORMS[form]), layer.to(memory_format=FORMS[form])
    before, leaf = x.clone(), x.clone().requires_grad_()
    y = layer(leaf)
    wanted = wanted.view(y.shape)
    if slow.bias is not None:
        wanted = wanted + (slow.bias if kind == "linear" else slow.bias.view(-1, 1, 1))
    with torch.no_grad():
        inferred = layer(x)
    assert torch.equal(x, before)
    pull = torch.randn_like(y)
    theirs = torch.autograd.grad(wanted, [y64, *slow.parameters()], pull.double())
    ours = torch.autograd.grad(y, [leaf, *layer.parameters()], pull)
    for found, exact in zip((y, inferred, *ours), (wanted, wanted, *theirs), strict=True):
        size = max(float(exact.detach().abs().max()), 1.0)
        torch.testing.assert_close(found, exact.to(found), rtol=1e-5, atol=1e-5 * size)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_beside_the_output_only_the_few_channels_are_kept(kind):
    make, shape = LAYERS[kind]
    layer, kept = aligned(make(), CodaLinear if kind == "linear" else CodaConv2d, rank=2, basis=3), {}
    x = torch.randn(99, *shape[1:], requires_grad=True)

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    channel = y.untyped_storage().nbytes() // 12  # larger than any parameter
    kept.pop(x.data_ptr())
    assert sorted(nbytes for nbytes in kept.values() if nbytes >= channel) == [(2 + 3) * channel, 12 * channel]


@pytest.mark.parametrize("writes", [True, False])
def test_an_output_that_is_written_to_trains_and_explains_as_others(writes):
    torch.manual_seed(0)
    layer, x = aligned(LAYERS["conv"][0](), CodaConv2d), torch.randn(LAYERS["conv"][1])
    model = nn.Sequential(layer, nn.ReLU(inplace=writes))
    with watching(model), torch.no_grad():
        model(x)
    assert layer.overwritten == writes
    wanted = nn.Sequential(copy.deepcopy(layer), nn.ReLU())
    nets = (model, wanted)
    ours, theirs = (torch.autograd.grad(net(x).square().sum(), [*net.parameters()]) for net in nets)
    torch.testing.assert_close(ours, theirs)
    gradients = []
    for net in nets:
        with Linearised(net) as mode:
            score = net(mode.follow(x)).square().sum()
        gradients.append(mode.pull(score)[0])
    torch.testing.assert_close(*gradients)


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_neither_overflows_nor_rounds_the_gain(squash, dtype):
    torch.manual_seed(0)
    source = nn.Conv2d(4, 6, 3, bias=False)
    with torch.no_grad():
        source.weight.mul_(1000)  # of which the square is infinite in float16
    layer, x = aligned(source, CodaConv2d, squash=squash), torch.randn(2, 4, 6, 6)
    wanted, gain = layer(x), layer.gain.clone()
    layer.to(dtype)
    assert torch.equal(layer.gain, gain) and layer.weight.dtype == dtype
    torch.testing.assert_close(layer(x.to(dtype)).float(), wanted, rtol=0.1, atol=0.1 * float(wanted.abs().max()))


def test_gains_of_a_calibration_go_into_the_gain():
    layer, x = aligned(nn.Linear(5, 3), CodaLinear), torch.randn(2, 5)
    before, factors = layer(x) - layer.bias, torch.tensor([0.5, 2.0, 3.0])
    layer.rescale(factors)
    torch.testing.assert_close(layer(x) - layer.bias, before * factors)


# ------------------------------------------------------------------------------------------------------- whole models


def moved(student, size: float = 0.3):
    """The same student with a random low-rank part, so that its weights are dynamic."""
    torch.manual_seed(1)
    for _, layer in scheduled_layers(student.model):
        for name, natural in layer.natural_sizes.items():
            nn.init.normal_(layer.get_parameter(name), std=size * natural)
    return student


@pytest.mark.parametrize(("name", "size"), [("efficientnet_lite0", 112), ("dinov2_small", 98)])
@both
def test_a_real_student_is_its_teacher_and_explains_itself(real_teachers, photographs, name, size, squash):
    teacher = real_teachers[name]
    student = convert(teacher, CodaConfig(squash=squash))
    assert student.history.conversion.identity_error <= 1e-5
    pictures = photographs(teacher.preprocess.at(size), 2)
    assert identity_error(student.model, teacher.model, pictures) <= 1e-5
    moved(student, 0.03)
    set_strength(student.model, beta=0.5)
    explanation = explain(student.model, pictures, TopTarget(2) if student.labels else SelfTarget())
    assert explanation.balanced().all() and explanation.contributions.any()
    assert explanation.encoded_inputs.shape[1] == 6


@pytest.mark.parametrize("name", ["resnet", "vit", "convnext", "efficientnet", "nfnet", "maxvit"])
def test_a_tiny_student_is_its_teacher_balances_and_comes_back(tiny, tmp_path, name):
    teacher = tiny(f"test_{name}", None)
    config = CodaConfig(rank=3, basis=2, squash="sq", keep=("head",) if name == "vit" else ())
    student = moved(convert(teacher, config))
    assert student.history.conversion.identity_error <= 1e-5 and student.method == "coda"
    set_strength(student.model, beta=0.3)
    pictures = torch.randn(2, 3, *teacher.preprocess.size)
    explanation = explain(student.model, pictures, targets=[0, 1])
    assert explanation.balanced().all()
    with torch.no_grad():
        assert float((student.model(pictures) - teacher.model(pictures)).abs().max()) > 1e-3
        again = load(save(student, tmp_path / "student"))
        assert torch.equal(again.model(pictures), student.model(pictures))
    assert again.config == config and again.plan.swaps == student.plan.swaps


def test_which_layers_become_what(tiny):
    becomes = {step.name: step.becomes for step in plan_for(tiny("test_vit"), CodaConfig()).steps}
    assert becomes["patch_embed.proj"] == "SixChannelCodaConv2d"
    assert becomes["blocks.0.attn.qkv"] == becomes["blocks.0.norm1"] == "BiasScheduled"
    assert {becomes[f"blocks.0.{layer}"] for layer in ("attn.proj", "mlp.fc1", "mlp.fc2")} == {"CodaLinear"}


def test_only_the_last_stages(tiny):
    plan = plan_for(tiny("test_resnet"), CodaConfig(last_stages=1))
    assert plan.swaps and all(step.name.startswith(("layer4", "fc")) for step in plan.swaps)
    early = [step for step in plan.steps if step.name.startswith(("conv1", "layer3")) and step.found == "Conv2d"]
    assert early and all(step.reason == "runs before the last stages (last_stages=1)" for step in early)
    names = {step.name.split(".")[0] for step in plan_for(tiny("test_resnet"), CodaConfig(last_stages=4)).swaps}
    assert "layer1" in names and "conv1" not in names
    student = convert(tiny("test_resnet"), CodaConfig(last_stages=2))
    assert student.history.conversion.identity_error <= 1e-5
    explanation = explain(student.model, torch.randn(1, 3, 64, 64), [0])
    assert explanation.balanced().all() and explanation.encoded_inputs.shape[1] == 3
    with pytest.raises(PlanError, match="last_stages=9: ResNet has 5.*--keep"):
        plan_for(tiny("test_resnet"), CodaConfig(last_stages=9))


def test_stages_are_needed_for_the_last_ones(teach):
    with pytest.raises(PlanError, match="last_stages=1: Sequential does not say what its stages are"):
        plan_for(teach(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())), CodaConfig(last_stages=1))


def test_dead_kernels_are_counted_and_shared_ones_refused(teach):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten())
    with torch.no_grad():
        model[1].weight[:3] = 0
    step = plan_for(teach(model), CodaConfig()).steps[1]
    assert step.reason == "convolution; 3 of its 4 kernels are zero and stay silent"
    assert convert(teach(model), CodaConfig()).history.conversion.identity_error <= 1e-5
    model[2].weight = model[1].weight
    with pytest.raises(PlanError, match=r"(?s)1 \(.*another module holds the same weight.*--keep"):
        convert(teach(model), CodaConfig())


def test_a_layer_that_runs_twice_is_converted_once(teach):
    torch.manual_seed(0)
    shared = nn.Conv2d(4, 4, 3, padding=1)
    student = convert(teach(nn.Sequential(nn.Conv2d(3, 4, 3), shared, nn.ReLU(), shared, nn.Flatten())), CodaConfig())
    assert student.plan.counts()["CodaConv2d"] == 1 and student.history.conversion.identity_error <= 1e-5


def test_dropout_left_on_is_found(teach):
    from bcosify.core.errors import LedgerError

    teacher = teach(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.5), nn.Flatten(), nn.Linear(4 * 14 * 14, 5)))
    teacher.model.train()
    with pytest.raises(LedgerError, match=r"differs from its teacher by .* at beta=1 \(limit"):
        convert(teacher, CodaConfig())


def test_a_model_without_memory_is_converted_too(tiny):
    teacher = tiny("test_resnet")
    wanted = {name: tensor.shape for name, tensor in convert(teacher, CodaConfig()).model.state_dict().items()}
    teacher.model.to("meta")
    student = convert(teacher, CodaConfig())
    assert {name: tensor.shape for name, tensor in student.model.state_dict().items()} == wanted
    assert all(parameter.is_meta for parameter in student.model.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"squash": "l3"}, "no squash 'l3'. There are: l2, sq"),
        ({"rank": 0}, "rank: must be at least 1; got 0"),
        ({"basis": -1}, "basis: must be at least 0; got -1"),
        ({"last_stages": -1}, "last_stages: must be at least 0; got -1"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(PlanError, match=message):
        CodaConfig(**settings)


def kept_bytes(model: nn.Module, picture: Tensor) -> int:
    """What autograd keeps of one forward pass for the backward, weights not counted."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(picture)
    return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in own)


def test_a_resnet50_keeps_at_most_three_times_what_its_source_keeps(tiny):
    teacher = tiny("resnet50", 224)
    student = convert(teacher, CodaConfig())
    set_strength(student.model, beta=0.5)
    picture = torch.randn(1, 3, 224, 224)
    assert kept_bytes(student.model, picture) <= 3 * kept_bytes(teacher.model, picture)
