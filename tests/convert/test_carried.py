"""Carried biases: the formula of BatchNorms, what other layers leave as it is, and a ledger of three parts."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
from bcosify.convert import CodaConfig, Student, convert, fold, load, save, set_strength
from bcosify.convert.layers import UncentredBatchNorm, batch_statistics, convert_in_place, scheduled_layers
from bcosify.convert.layers.bcos import BcosLinear
from bcosify.convert.layers.scheduled import BiasScheduled
from bcosify.convert.randomise import randomise
from bcosify.core.errors import CheckpointError
from bcosify.core.pictures import noise_pictures
from bcosify.explain import Explanation, TopTarget, explain
from bcosify.explain.weights import trained_maps
from safetensors.torch import load_file, save_file
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from folders import resigned


def seeded(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def norm_of(kind: type[nn.Module], channels: int = 3, **options) -> UncentredBatchNorm:
    """A BatchNorm whose every number counts."""
    generator = torch.Generator().manual_seed(0)
    norm = kind(channels, **options).eval()
    for name, tensor in [*norm.named_parameters(), *norm.named_buffers()]:
        if tensor.is_floating_point():
            tensor.data.uniform_(0.5, 2.0, generator=generator) if "var" in name else tensor.data.normal_(
                0, 1, generator=generator
            )
    return convert_in_place(norm, UncentredBatchNorm)


def rho_by_hand(x: Tensor, mean: Tensor, var: Tensor, window: float, spread: float) -> Tensor:
    """(B, 1, places...): the size around every place over the expected one, place by place."""
    expected = math.sqrt(sum(float(v) + float(m) ** 2 for m, v in zip(mean, var, strict=True)) / len(mean))
    sides, found = x.shape[2:], torch.zeros(len(x), 1, *x.shape[2:], dtype=x.dtype)
    reach = [int(window * side if window < 1 else window) // 2 for side in sides]
    for picture, sample in enumerate(x):
        whole = math.sqrt(float(sample.square().mean()))
        for place in itertools.product(*map(range, sides)):
            around = [
                [i for i in range(at - r, at + r + 1) if 0 <= i < side]
                for at, r, side in zip(place, reach, sides, strict=True)
            ]
            inside = [float(sample[(slice(None), *other)].square().mean()) for other in itertools.product(*around)]
            near = math.sqrt(sum(inside) / len(inside))
            size = whole if window == 0 or not sides else (1 - spread) * near + spread * whole
            found[(picture, 0, *place)] = size / expected
    return found


def by_hand(layer: UncentredBatchNorm, x: Tensor, batch: bool) -> Tensor:
    """x · scale + b · (beta + carry · rho(x)), without an activation."""
    others = [dim for dim in range(x.dim()) if dim != 1]
    mean, var = layer._buffers["running_mean"], layer._buffers["running_var"]
    if batch:
        mean, var = x.mean(others), x.var(others, unbiased=False)
    scale, bias = (each.detach() for each in layer._parameters.values())
    scale = scale / (var + layer.eps).sqrt()
    strengths = layer.strengths()
    rho = rho_by_hand(x, mean, var, strengths["window"], strengths["spread"])
    scale, shift = (each.view(-1, *[1] * (x.dim() - 2)) for each in (scale, bias - mean * scale))
    return x * scale + shift * (strengths["beta"] + strengths["carry"] * rho)


SHAPES = {"map": (nn.BatchNorm2d, (2, 3, 5, 9)), "row": (nn.BatchNorm1d, (2, 3, 9)), "vector": (nn.BatchNorm1d, (4, 3))}


@pytest.mark.parametrize("batch", [False, True], ids=["eval", "batch-statistics"])
@pytest.mark.parametrize("spread", [0, 0.3])
@pytest.mark.parametrize("window", [0, 0.5, 3, 7])
@pytest.mark.parametrize("kind", SHAPES)
def test_batch_norm_is_the_formula_place_by_place(kind, window, spread, batch):
    """In float64; at the border the mean is over what lies inside of the map."""
    make, shape = SHAPES[kind]
    layer, x = norm_of(make).double(), seeded(*shape, dtype=torch.float64) + 0.7
    for beta, carry in ((0.0, 1.0), (0.3, 0.5)):
        set_strength(layer, beta=beta, carry=carry, window=window, spread=spread)
        before = copy.deepcopy(layer.state_dict())
        wanted = by_hand(layer, x, batch)
        layer.train(batch)
        found = layer(x)
        assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-9)
        assert layer._moments is None and layer.training == batch
        layer.load_state_dict(before)
    layer.eval()
    set_strength(layer, beta=0, carry=1)
    assert torch.allclose(layer(3 * x), 3 * layer(x)) and torch.allclose(layer(1e-3 * x), 1e-3 * layer(x))
    assert (layer(torch.zeros_like(x)) == 0).all()


def test_a_window_that_covers_the_map_is_the_whole_map():
    layer, x = norm_of(nn.BatchNorm2d), seeded(2, 3, 5, 4)
    found = []
    for window in (0, 9, 101):
        set_strength(layer, beta=0, carry=1, window=window)
        found.append(layer(x))
    assert torch.allclose(found[0], found[1], rtol=1e-6) and torch.allclose(found[0], found[2], rtol=1e-6)
    set_strength(layer, window=7)  # does not: the corners see less
    assert not torch.allclose(found[0], layer(x), rtol=1e-3)


def test_drop_out_and_activation_that_timm_builds_in_come_last():
    layer = norm_of(BatchNormAct2d)
    plain = copy.deepcopy(layer)
    plain.act = nn.Identity()
    for model in (layer, plain):
        set_strength(model, beta=0.2, carry=0.7, window=3)
    x = seeded(2, 3, 6, 6)
    assert (plain(x) < 0).any() and torch.equal(layer(x), plain(x).relu())
    assert torch.allclose(plain(x), by_hand(plain, x, False), rtol=1e-5, atol=1e-5)


def test_norms_without_weights_carry_their_mean():
    layer, x = norm_of(nn.BatchNorm2d, affine=False), seeded(2, 3, 4, 4)
    set_strength(layer, beta=0, carry=1)
    mean, var = layer._buffers["running_mean"], layer._buffers["running_var"]
    scale, shape = (var + layer.eps).rsqrt(), (3, 1, 1)
    rho = rho_by_hand(x, mean, var, 0, 0)
    wanted = x * scale.view(shape) - (mean * scale).view(shape) * rho
    assert torch.allclose(layer(x), wanted, rtol=1e-5, atol=1e-5)
    assert explain(nn.Sequential(layer, nn.Flatten()), x, targets=[0, 5]).balanced().all()


def test_the_gradient_is_that_of_the_formula():
    """Through rho, and in training mode through the batch's statistics in E too."""
    for batch in (False, True):
        layer = norm_of(nn.BatchNorm2d).double().train(batch)
        set_strength(layer, beta=0.2, carry=0.7, window=3, spread=0.4)
        x = (seeded(3, 3, 4, 4, dtype=torch.float64) + 0.5).requires_grad_()
        assert torch.autograd.gradcheck(lambda x: layer(x), (x,), atol=1e-6)  # noqa: B023 - called at once


@pytest.mark.parametrize("batch", [False, True])
def test_autocast_rounds_but_does_not_overflow(batch):
    layer = norm_of(nn.BatchNorm2d).train(batch)
    set_strength(layer, beta=0, carry=1, window=3)
    x = seeded(2, 3, 6, 6) * 1e4
    wanted = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x.to(torch.bfloat16))
    assert found.isfinite().all() and F.cosine_similarity(found.float().flatten(), wanted.flatten(), 0) > 0.999


# --------------------------------------------------------------------------------------------------------- whole models


class Encoder(nn.Module):
    """A small transformer from torch's own layers; its attention is taken apart."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 4, 4)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.stem(x).flatten(2).mT).mean(1))


def beit() -> nn.Module:
    """Its q_bias and v_bias are no layer's own."""
    return timm.create_model(
        "beit_base_patch16_224", img_size=32, depth=2, embed_dim=24, num_heads=2, num_classes=4, init_values=0.5
    )


@pytest.fixture
def students(tiny, teach) -> Callable[[str], Student]:
    """students(NAME): a converted model with random biases."""

    def make(name: str, config="bcos") -> Student:
        torch.manual_seed(0)
        if name.startswith("test_"):
            return convert(tiny(name, 32 if "vit" not in name else 64), config)
        model, size = {"encoder": (Encoder, 16), "beit": (beit, 32)}[name]
        return convert(teach(randomise(model(), noise_pictures(2, (size, size))), size), config)

    return make


def pictures_for(student: Student, count: int = 2) -> Tensor:
    return seeded(count, 3, *student.preprocess.size)


NO_BATCH_NORM = ["test_vit", "test_convnext", "encoder", "beit"]
BATCH_NORM = ["test_resnet", "test_efficientnet"]


@pytest.mark.parametrize(("name", "config"), [*((name, "bcos") for name in NO_BATCH_NORM), ("test_vit", CodaConfig())])
def test_what_other_layers_carry_changes_no_value(students, name, config):
    """Where beta + carry is 1, the student is its teacher."""
    student = students(name, config)
    batch = pictures_for(student)
    with torch.no_grad():
        wanted = student.model(batch)
        for beta, carry in ((0.0, 1.0), (0.25, 0.75), (0.7, 0.3)):
            set_strength(student.model, beta=beta, carry=carry)
            assert (student.model(batch) - wanted).abs().max() < 1e-5 * wanted.abs().max()
        set_strength(student.model, beta=0.5, carry=0)
        half = student.model(batch)
        assert not torch.allclose(half, wanted, rtol=1e-2)
        set_strength(student.model, beta=0.2, carry=0.3)
        assert torch.allclose(student.model(batch), half, rtol=1e-4, atol=1e-4 * float(half.abs().max()))


def three_parts(explanation: Explanation) -> Tensor:
    return explanation.direct_part + explanation.carried_part + explanation.constant_part


@pytest.mark.parametrize("carry", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("name", [*NO_BATCH_NORM, *BATCH_NORM])
def test_the_ledger_balances_in_three_parts(students, name, carry):
    student = students(name)
    set_strength(student.model, b=1.25, beta=1 - carry, carry=carry, window=3, spread=0.3)
    state, batch = copy.deepcopy(student.model.state_dict()), pictures_for(student)
    explanation = explain(student.model, batch, TopTarget(2))
    with torch.no_grad():
        assert torch.equal(explanation.outputs, student.model(batch))
    limit = 1e-4 * explanation.scores.abs().clamp_min(1)
    assert (explanation.residual.abs() <= limit).all()
    assert ((three_parts(explanation) - explanation.scores).abs() <= limit).all()
    assert all(torch.equal(value, state[key]) for key, value in student.model.state_dict().items())
    if not carry:
        assert explanation.direct is None and not explanation.carried and (explanation.carried_part == 0).all()
        return
    assert explanation.direct_residual is not None and (explanation.direct_residual.abs() <= limit).all()
    maps = explanation.carried_contributions.abs().sum((-2, -1)) / explanation.contributions.abs().sum((-2, -1))
    assert (maps > 1e-3).all()
    # Where biases are removed for all their carrying, no constant is one; tables, tokens and borders stay.
    biases = {key for key in explanation.constants if "bias" in key or "running_mean" in key} - {"bias_table"}
    biases = {key for key in biases if "bias_table" not in key}
    assert bool(biases) == (carry < 1), biases
    told = {key.removesuffix(".bias").removesuffix(".running_mean") for key in explanation.carried}
    layers = [key for key, layer in scheduled_layers(student.model) if layer._parameters.get("bias") is not None]
    assert len(told & set(layers)) > 0.5 * len(layers)
    row = explanation.row(0, 0)
    assert row["direct"] + row["carried"] == pytest.approx(row["input"], abs=1e-4) and row["carriers"].keys()
    # A few at a time, and in the mode's own batch, it is the same.
    apart = explain(student.model, batch, TopTarget(2), batch_size=1)
    assert apart.direct is not None and explanation.direct is not None
    size = float(explanation.contributions.abs().max())
    assert torch.allclose(apart.contributions, explanation.contributions, atol=1e-4 * size)
    assert torch.allclose(apart.direct, explanation.direct, atol=1e-4 * size)
    for key, share in explanation.carried.items():
        assert torch.allclose(apart.carried[key], share, atol=float(1e-3 * limit.max() + 1e-4 * share.abs().max()))


@pytest.mark.parametrize("name", BATCH_NORM)
def test_without_constants_carriers_add_up_to_the_carried_part(students, name):
    student = students(name)
    set_strength(student.model, b=1.5, beta=0, carry=1, window=3)
    explanation = explain(student.model, pictures_for(student), targets=[0, 1])
    assert explanation.constant_part.abs().max() < 0.1 * explanation.scores.abs().max()
    borders = explanation.constant_part.abs().max()
    total = sum(explanation.carried.values())
    assert explanation.carried_part.abs().max() > 100 * borders
    assert (total - explanation.carried_part).abs().max() < 1e-4 * explanation.scores.abs().max() + 2 * borders


def test_a_response_that_is_small_beside_what_it_carries_is_known_exactly():
    """As a difference of sums it would be rounding, and the ledger off by as much."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), convert_in_place(nn.Linear(12, 5), BcosLinear), nn.Linear(5, 2, bias=False)
    ).eval()
    with torch.no_grad():
        model[1]._parameters["weight"].mul_(1e-6)
        model[1]._parameters["bias"].fill_(3.0)
    x = seeded(2, 3, 2, 2)
    for b in (1.0, 1.5):
        set_strength(model, b=b, beta=0, carry=1)
        explanation = explain(model, x, targets=[0, 1])
        assert explanation.residual.abs().max() < 1e-5 * explanation.scores.abs().min() and not explanation.constants


def test_nothing_of_constants_is_left_at_all(teach):
    """No border that is padded with a number: the input is all there is, and the function is of degree 1."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip
    student = convert(teach(randomise(model, noise_pictures(2, (16, 16))))).model
    set_strength(student, b=1.3, beta=0, carry=1, window=3)
    explanation = explain(student, seeded(2, 3, 16, 16), targets=[0, 1, 2])
    assert not explanation.constants
    assert torch.allclose(sum(explanation.carried.values()), explanation.carried_part, atol=1e-5)
    assert torch.allclose(explanation.direct_part + explanation.carried_part, explanation.scores, atol=1e-5)


def small(last: nn.Module) -> nn.Sequential:
    """Layers at B = 1 behind a ReLU: what is frozen in explanation mode has no derivative but in the norm."""
    torch.manual_seed(3)
    return nn.Sequential(
        convert_in_place(nn.Conv2d(3, 6, 3, bias=False), BiasScheduled), norm_of(nn.BatchNorm2d, 6), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), last,
    ).eval()  # fmt: skip


def test_the_direct_map_is_that_of_detached_carriers():
    """Written out with autograd: rho as a number for the direct map, as a function of x for the whole one."""
    model, x = small(nn.Linear(24, 3)), seeded(2, 3, 8, 8)
    set_strength(model, beta=0.25, carry=0.5, window=3, spread=0.3)
    explanation = explain(model, x, [1])
    norm = model[1]
    scale = norm._parameters["weight"] / (norm._buffers["running_var"] + norm.eps).sqrt()
    shift = (norm._parameters["bias"] - norm._buffers["running_mean"] * scale).view(-1, 1, 1)
    expected = (norm._buffers["running_var"] + norm._buffers["running_mean"].square()).mean().sqrt()

    def score(leaf: Tensor, direct: bool) -> Tensor:
        o = model[0](leaf)
        energy = o.square().mean(1, keepdim=True)
        near = F.avg_pool2d(energy, 3, 1, 1, count_include_pad=False).sqrt()
        rho = (0.7 * near + 0.3 * energy.mean((2, 3), keepdim=True).sqrt()) / expected
        y = o * scale.view(-1, 1, 1) + shift * (0.25 + 0.5 * (rho.detach() if direct else rho))
        return model[3:](y.relu())[:, 1].sum()

    for direct, found in ((True, explanation.direct), (False, explanation.contributions)):
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(score(leaf, direct), leaf)
        wanted = (x * gradient).sum(1)
        assert found is not None and torch.allclose(found[:, 0], wanted, atol=1e-5 * float(wanted.abs().max()))
    assert not torch.allclose(explanation.direct, explanation.contributions, rtol=1e-2)


def test_what_a_linear_layer_carries_follows_its_own_response():
    """Written out: carry · bias · <r, sg(r)> / |r|^2 over the channels of every token."""
    torch.manual_seed(3)
    layer = convert_in_place(nn.Linear(12, 5), BcosLinear)
    model = nn.Sequential(nn.Flatten(2), layer, nn.ReLU(), nn.Flatten(), nn.Linear(15, 2, bias=False)).eval()
    set_strength(model, beta=0.25, carry=0.5)
    x = seeded(2, 3, 3, 4)
    explanation = explain(model, x, [0])
    leaf = x.clone().requires_grad_()
    r = F.linear(leaf.flatten(2), layer.weight)
    bias = layer._parameters["bias"]
    along = (r * r.detach()).sum(-1, keepdim=True) / r.detach().square().sum(-1, keepdim=True)
    score = model[2:](r + 0.25 * bias + 0.5 * bias * along)[:, 0].sum()
    (whole,) = torch.autograd.grad(score, leaf)
    leaf = x.clone().requires_grad_()
    score = model[2:](F.linear(leaf.flatten(2), layer.weight) + 0.75 * bias)[:, 0].sum()
    (direct,) = torch.autograd.grad(score, leaf)
    assert explanation.direct is not None
    assert torch.allclose(explanation.contributions[:, 0], (x * whole).sum(1), atol=1e-5)
    assert torch.allclose(explanation.direct[:, 0], (x * direct).sum(1), atol=1e-5)
    assert explanation.constants.keys() == explanation.carried.keys() == {"1.bias"}
    assert torch.allclose(explanation.constants["1.bias"] * 2, explanation.carried["1.bias"], atol=1e-5)


def test_nothing_is_left_after_an_exception(students):
    student = students("test_resnet")
    set_strength(student.model, beta=0, carry=1, window=3)
    batch = pictures_for(student)
    state, wanted = copy.deepcopy(student.model.state_dict()), student.model(batch)
    hook = student.model.layer2.register_forward_hook(lambda *_: 1 / 0)
    with batch_statistics(student.model), pytest.raises(ZeroDivisionError):
        student.model(batch)
    with pytest.raises(ZeroDivisionError):
        explain(student.model, batch, 0)
    hook.remove()
    norms = [module for module in student.model.modules() if isinstance(module, UncentredBatchNorm)]
    assert all(norm._moments is None and not norm.training for norm in norms)
    student.model.load_state_dict(state)  # what went through in training mode has counted
    assert torch.equal(student.model(batch), wanted) and explain(student.model, batch, 0).balanced().all()


# ------------------------------------------------------------------------------------------- saved, folded, and as maps


MOVED = {"b": 1.5, "beta": 0.2, "carry": 0.7, "window": 3.0, "spread": 0.3}


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_carried_biases_are_saved_and_loaded(students, tmp_path, name):
    student = students(name)
    set_strength(student.model, **MOVED)
    opened = load(save(student, tmp_path / "student"))
    batch = pictures_for(student)
    assert torch.equal(opened.model(batch), student.model(batch))
    for _, layer in scheduled_layers(opened.model):
        assert layer.strengths() == {key: MOVED[key] for key in layer.strength_names}
    ours, theirs = (explain(each.model, batch, 0) for each in (opened, student))
    assert ours.direct is not None and theirs.direct is not None and torch.equal(ours.direct, theirs.direct)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_folders_from_before_there_were_carriers_still_load(students, tmp_path, name):
    student = students(name)
    set_strength(student.model, b=1.5, beta=0.3)
    folder = save(student, tmp_path / "student")
    weights = load_file(folder / "model.safetensors")
    older = {key: value for key, value in weights.items() if key.rsplit(".")[-1] not in ("carry", "window", "spread")}
    assert len(older) < len(weights)
    save_file(older, folder / "model.safetensors", metadata={"format": "pt"})
    opened = load(resigned(folder))
    batch = pictures_for(student)
    assert torch.equal(opened.model(batch), student.model(batch))
    assert {layer.strengths()["carry"] for _, layer in scheduled_layers(opened.model)} == {0}
    save_file({k: v for k, v in older.items() if not k.endswith(".beta")}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing \S+\.beta"):
        load(resigned(folder))


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_vit", "test_convnext"])
def test_folding_keeps_what_is_carried(students, name):
    student = students(name)
    set_strength(student.model, b=1.5, beta=0, carry=1, window=3)
    folded, batch = fold(student), pictures_for(student)
    wanted = student.model(batch)
    assert (folded(batch) - wanted).abs().max() < 1e-5 * wanted.abs().max()
    ours, theirs = explain(folded, batch, targets=[0, 1]), explain(student.model, batch, targets=[0, 1])
    assert ours.direct is not None and theirs.direct is not None
    for found, expected in ((ours.contributions, theirs.contributions), (ours.direct, theirs.direct)):
        assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    assert ours.carried.keys() == theirs.carried.keys()


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_vit", "test_convnext", "encoder", "beit"])
@pytest.mark.parametrize(("beta", "carry"), [(0.0, 1.0), (0.5, 0.25)])
def test_trained_maps_are_the_explanation(students, name, beta, carry):
    """With carriers of all kinds in them, and with a gradient to the weights."""
    student = students(name).model
    set_strength(student, b=1.25, beta=beta, carry=carry, window=3)
    batch = seeded(2, 3, *{"encoder": (16, 16), "test_vit": (64, 64)}.get(name, (32, 32)))
    with torch.no_grad():
        outputs = student(batch).shape[1]
    directions = F.one_hot(torch.tensor([1, 2]), outputs).float()
    loss, maps = trained_maps(student, batch, directions, lambda maps: maps.square().sum())
    found = explain(student, batch, targets=[1, 2])
    expected = torch.stack([found.contributions[0, 0], found.contributions[1, 1]])
    assert found.direct is not None and not torch.allclose(found.direct, found.contributions, rtol=1e-2)
    assert (maps - expected).abs().max() < 1e-4 * expected.abs().max()
    assert torch.allclose(loss, expected.square().sum(), rtol=1e-3)
    loss.backward()
    grads = {key: parameter.grad for key, parameter in student.named_parameters() if parameter.grad is not None}
    assert grads and all(gradient.isfinite().all() for gradient in grads.values())
