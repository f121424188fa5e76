"""Class maps before the pooling, dampened skips, and what is refused."""

from __future__ import annotations

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from bcosify.convert import FaCnnConfig, convert, identity_error, load, plan_for, save, set_strength
from bcosify.convert.blocks import blocks_of
from bcosify.convert.layers import at_start, convert_in_place
from bcosify.convert.methods.anatomy import look
from bcosify.convert.methods.fa_cnn.class_maps import ClassMaps, LastMap, PlaceClassifier, PlaceNorm
from bcosify.convert.methods.fa_cnn.dampening import FORMS, DampenedSkip, skipping
from bcosify.core.errors import PlanError
from bcosify.core.pictures import noise_pictures
from bcosify.explain import DirectionTarget, TopTarget, explain
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

# Ten families and more: pooled with and without a norm, NCHW, NHWC and tokens, linear and 1x1 convolution heads.
FAMILIES = {
    "test_resnet": 96,
    "test_efficientnet": 64,
    "test_efficientnet_ln": 64,
    "test_byobnet": 96,
    "test_convnext": 96,
    "densenet121": 64,
    "test_nfnet": 96,
    "mobilenetv2_050": 64,
    "regnetx_002": 64,
    "resnetv2_18": 64,
    "repvgg_a0": 64,
    "poolformer_s12": 64,
    "swin_s3_tiny_224": 224,
    "gmixer_12_224": 224,
}


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).detach().abs().max() / theirs.detach().abs().max())


def class_maps(student) -> tuple[list[Tensor], object]:
    seen: list[Tensor] = []
    return seen, student.model.class_maps.register_forward_hook(lambda module, args, output: seen.append(output))


# ---------------------------------------------------------------------------------------------------------- class maps


def test_the_mean_of_the_class_maps_is_the_logit_on_real_weights(real_teachers, photographs):
    teacher = real_teachers["efficientnet_lite0"]
    student = convert(teacher, FaCnnConfig())
    pictures = photographs(teacher.preprocess, 2)
    with torch.no_grad():
        output, shares, constants = student.model.output_maps(pictures)
        theirs = teacher.model(pictures)
    assert shares.shape == (2, 1000, 7, 7) and list(constants) == ["classifier.bias"]
    assert torch.equal(constants["classifier.bias"], teacher.model.classifier.bias)
    assert relative(shares.sum((2, 3)) + constants["classifier.bias"], theirs) <= 1e-5
    assert relative(output, theirs) <= 1e-5
    # Independent: every place of the source's own last features, classified on its own.
    with torch.no_grad():
        features = teacher.model.forward_features(pictures)
        places = torch.stack([teacher.model.classifier(place) for place in features.flatten(2).unbind(2)], 2)
    ours = shares.flatten(2) * 49 + constants["classifier.bias"][:, None]
    assert relative(ours, places) <= 1e-5
    labels = teacher.labels
    assert labels is not None and "cat" in labels[output[0].argmax()]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_mean_of_the_class_maps_is_the_logit(tiny, name, tmp_path):
    teacher = tiny(name, FAMILIES[name])
    student = convert(teacher, FaCnnConfig())
    pictures = noise_pictures(2, teacher.preprocess.size, seed=3)
    with torch.no_grad():
        _, shares, constants = student.model.output_maps(pictures)
        theirs = teacher.model(pictures)
    assert shares.shape[:2] == theirs.shape and shares[0, 0].numel() > 1
    assert relative(shares.sum((2, 3)) + sum(constants.values()), theirs) <= 1e-5
    assert identity_error(student.model, teacher.model, pictures) <= 1e-5
    explanation = explain(student.model, pictures, TopTarget(2))
    assert explanation.balanced(1e-5).all() and explanation.encoded_inputs is None
    assert set(explanation.constants) <= {n for n, _ in student.model.named_parameters()}
    # The weights are as they were when `load` plans again, before they are there.
    loaded = load(save(student, tmp_path / "student"))
    assert isinstance(loaded.model, ClassMaps) and torch.equal(loaded.model(pictures), student.model(pictures))


def test_grad_cam_at_the_class_maps_is_the_map(tiny):
    """alpha_k is the mean gradient of the logit at map k; the map of Grad-CAM is sum_k alpha_k M_k, before its ReLU."""
    for name in ("test_resnet", "test_convnext"):
        teacher = tiny(name, 96)
        student = convert(teacher, FaCnnConfig())
        seen, handle = class_maps(student)
        output = student.model(noise_pictures(2, teacher.preprocess.size))
        handle.remove()
        (maps,) = seen
        assert torch.equal(maps.mean((2, 3)), output)
        for c in (0, 7):
            (gradient,) = torch.autograd.grad(output[:, c].sum(), maps, retain_graph=True)
            alpha = gradient.mean((2, 3), keepdim=True)
            cam = (alpha * maps).sum(1)
            places = maps[0, 0].numel()
            scale = maps[:, c].detach().abs().max()
            assert (cam * places - maps[:, c]).abs().max() <= 1e-6 * scale
            # HiResCAM multiplies before it sums; as the gradient is the same everywhere, that is the same map.
            assert ((gradient * maps).sum(1) * places - maps[:, c]).abs().max() <= 1e-6 * scale


def test_grad_cam_of_the_source_s_last_map_is_the_map_without_its_bias(tiny):
    teacher = tiny("test_resnet", 96)
    student = convert(teacher, FaCnnConfig())
    pictures = noise_pictures(1, teacher.preprocess.size)
    features = teacher.model.forward_features(pictures).detach().requires_grad_()
    logits = teacher.model.forward_head(features)
    (gradient,) = torch.autograd.grad(logits[0, 3], features)
    cam = (gradient.mean((2, 3), keepdim=True) * features).sum(1)
    shares = student.model.output_maps(pictures)[1]
    torch.testing.assert_close(cam[0], shares[0, 3], rtol=1e-4, atol=1e-6)


class Own(nn.Module):
    """Features, pooled, and what `after` makes of them."""

    def __init__(self, after: nn.Module, features: nn.Module | None = None, pool=lambda x: x.mean((2, 3))) -> None:
        super().__init__()
        self.features = features or nn.Sequential(nn.Conv2d(3, 6, 4, 4), nn.ReLU())
        self.after = after
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.pool(self.features(x)))


@pytest.mark.parametrize(
    "after",
    [
        nn.Linear(6, 1),
        nn.Linear(6, 20, bias=False),
        nn.Sequential(nn.LayerNorm(6), nn.Dropout(0.5), nn.Linear(6, 4)),
        nn.Sequential(nn.LayerNorm(6, elementwise_affine=False), nn.Linear(6, 4)),
        nn.LayerNorm(6),
        nn.Identity(),
    ],
    ids=["one class", "more classes than channels", "norm", "norm without weights", "norm, headless", "headless"],
)
def test_any_linear_head_over_pooled_places_has_maps(teach, after):
    torch.manual_seed(0)
    teacher = teach(Own(after), size=24)
    student = convert(teacher, FaCnnConfig())
    pictures = noise_pictures(3, (24, 24))
    explanation = explain(student.model, pictures, DirectionTarget(torch.ones(1, teacher.model(pictures).shape[1])))
    assert explanation.balanced(1e-5).all() and explanation.contributions.shape == (3, 1, 24, 24)
    with torch.no_grad():
        torch.testing.assert_close(explanation.outputs, teacher.model(pictures))
    wide = noise_pictures(1, (24, 40))
    assert student.model.output_maps(wide)[1].shape[2:] == (6, 10)


def test_tokens_are_laid_out_as_the_picture_is(teach):
    torch.manual_seed(0)
    tokens = nn.Sequential(nn.Conv2d(3, 6, 4, 4), nn.Flatten(2), Transpose())
    student = convert(teach(Own(nn.Linear(6, 3), tokens, lambda x: x.mean(1)), size=24), FaCnnConfig())
    picture = noise_pictures(1, (16, 24))
    maps = student.model.output_maps(picture)[1]
    assert maps.shape == (1, 3, 4, 6)
    with torch.no_grad():
        features = student.model.features[0](picture)
        expected = torch.einsum("kc,bchw->bkhw", student.model.after.weight, features) / 24
    torch.testing.assert_close(maps.detach(), expected)


class Transpose(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("name", "size", "words"),
    [
        ("mobilenetv3_small_050", 64, r"classifier .*come conv_head \(Conv2d\), .*a mean over places does not commute"),
        ("vgg11", 64, "one place only"),  # its first hidden layer is a convolution as large as the last map
        ("test_vit", 64, "class token, or pooling by attention"),
        ("test_resnet", 16, "one place only.*larger --image-size"),
    ],
)
def test_what_has_no_class_maps_is_refused_by_name(tiny, name, size, words):
    teacher = tiny(name, size)
    with pytest.raises(PlanError, match=f"(?s)cannot convert; nothing was changed.*{words}.*--keep"):
        convert(teacher, FaCnnConfig())


def test_an_mlp_head_is_refused_and_its_skips_can_still_be_dampened(tiny):
    teacher = tiny("test_vit", 64)
    student = convert(teacher, FaCnnConfig(keep=("head",)))
    assert set(student.plan.counts()) == {"DampenedSkip"} and not isinstance(student.model, ClassMaps)
    pictures = noise_pictures(2, (64, 64))
    assert torch.equal(student.model(pictures), teacher.model(pictures))
    set_strength(student.model, dampening=4.0)
    explanation = explain(student.model, pictures, TopTarget(1))
    assert explanation.balanced().all() and explanation.encoded_inputs is not None


def test_an_activation_after_the_pooling_is_named(teach):
    torch.manual_seed(0)
    with pytest.raises(PlanError, match=r"after\.0 \(Linear\), after\.1 \(GELU\), which a mean"):
        plan_for(teach(Own(nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 3))), size=24), FaCnnConfig())


def test_a_form_that_does_not_exist_is_refused():
    with pytest.raises(PlanError, match="no dampening 'bounds'.*Did you mean.*bound"):
        FaCnnConfig(dampening="bounds")  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------ dampened skips


class Block(nn.Module):
    def __init__(self, change: Tensor) -> None:
        super().__init__()
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        return x + self.change


def dampened(change: Tensor, e: float, form: str = "bound") -> DampenedSkip:
    block = convert_in_place(Block(change), DampenedSkip)
    block.form = form  # type: ignore[assignment]
    block.set_strength("dampening", e)
    return block


sizes = st.lists(st.integers(1, 4), min_size=1, max_size=3)


@settings(max_examples=60, deadline=None)
@given(sizes, st.integers(0, 1000), st.floats(0.01, 50), st.floats(0.01, 100))
def test_no_block_changes_more_than_the_bound(shape, seed, e, size):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    change = size * torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    block = dampened(change, e)
    e, y = block.strengths()["dampening"], block(x)
    norm = lambda features: features.flatten(1).norm(dim=1)  # noqa: E731
    ratio, natural = norm(y - x) / norm(x), norm(change) / norm(x)
    assert (ratio <= (1 + 1e-9) / e).all()
    # What is within the bound stays as it is; what is not keeps its direction and goes to the bound.
    torch.testing.assert_close(ratio, natural.clamp_max(1 / e))
    torch.testing.assert_close(F.cosine_similarity((y - x).flatten(1), change.flatten(1)), torch.ones(3).double())
    if e > 1:
        cosine = F.cosine_similarity(x.flatten(1), y.flatten(1))
        assert (cosine >= math.sqrt(1 - 1 / e**2) - 1e-9).all()


def test_a_run_of_blocks_stays_near_where_it_began():
    torch.manual_seed(0)
    x, e, count = torch.randn(4, 5, 3, 3), 4.0, 6
    y = x
    for _ in range(count):
        y = dampened(10 * torch.randn(4, 5, 3, 3), e)(y)
    assert ((y - x).flatten(1).norm(dim=1) <= ((1 + 1 / e) ** count - 1) * x.flatten(1).norm(dim=1)).all()


def test_each_form_is_its_formula_and_begins_at_the_block_itself():
    torch.manual_seed(0)
    x, change = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    a, e = 0.35, 0.3  # (1 - e) / 2
    torch.testing.assert_close(dampened(change, e, "convex")(x), 2 * ((1 - a) * x + a * change))
    torch.testing.assert_close(dampened(change, e, "shortcut")(x), 0.7 * x + change)
    torch.testing.assert_close(dampened(change, e, "branch")(x), x + 0.7 * change)
    for form in FORMS:
        assert torch.equal(dampened(change, 0.0, form)(x), x + change)
    with pytest.raises(ValueError, match="of the form branch is at most 1"):
        dampened(change, 1.5, "branch")
    with pytest.raises(ValueError, match="dampening is at least 0; got -1"):
        set_strength(dampened(change, 0.5), dampening=-1)


def test_nothing_in_or_nothing_changed_gives_no_nan():
    x = torch.randn(2, 3, 4, 4)
    nothing = torch.zeros_like(x)
    for given_, change in ((nothing, x), (x, nothing), (nothing, nothing)):
        given_ = given_.clone().requires_grad_()
        y = dampened(change, 2.0)(given_)
        y.sum().backward()
        assert torch.equal(y, given_) and given_.grad is not None and given_.grad.isfinite().all()


def test_norms_do_not_overflow_in_half_precision():
    x = torch.full((1, 64, 32, 32), 200.0, dtype=torch.float16)
    y = dampened(300 * torch.ones_like(x), 1.0)(x)
    torch.testing.assert_close(y, torch.full_like(x, 400.0))


def test_the_factor_is_a_gate_of_an_explanation(tiny):
    student = convert(tiny("test_resnet", 96), FaCnnConfig(keep=("fc",)))
    set_strength(student.model, dampening=5.0)
    explanation = explain(student.model, noise_pictures(2, (96, 96)), TopTarget(1))
    assert explanation.balanced().all() and explanation.encoded_gradients is not None


def test_an_endless_bound_is_the_teacher_bit_for_bit(real_teachers, photographs):
    """With the output layer where it was; before the pooling, a mean of sums rounds otherwise than a sum of means."""
    teacher = real_teachers["efficientnet_lite0"]
    pictures = photographs(teacher.preprocess, 2)
    skips = convert(teacher, FaCnnConfig(keep=("classifier",)))
    assert skips.plan.counts() == {"DampenedSkip": 9}
    whole = convert(teacher, FaCnnConfig())
    with torch.no_grad():
        assert torch.equal(skips.model(pictures), teacher.model(pictures))
        assert torch.equal(whole.model.forward_features(pictures), teacher.model.forward_features(pictures))
        # In real weights no block changes what it is given by more than it is large, so d = 1 changes nothing either.
        set_strength(skips.model, dampening=1e-6)
        assert relative(skips.model(pictures), teacher.model(pictures)) <= 1e-6
        set_strength(skips.model, dampening=4.0)
        assert relative(skips.model(pictures), teacher.model(pictures)) > 0.1


@pytest.mark.parametrize("name", ["test_resnet", "mobilenetv2_050", "test_convnext", "regnetx_002"])
def test_the_bound_holds_in_every_block_of_a_network(tiny, name):
    teacher = tiny(name, 96)
    student = convert(teacher, FaCnnConfig())
    set_strength(student.model, dampening=4.0)
    ratios = {}

    def measure(block: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        ratios[block] = ((output - args[0]).flatten(1).norm(dim=1) / args[0].flatten(1).norm(dim=1)).max()

    blocks = [module for module in student.model.modules() if isinstance(module, DampenedSkip)]
    assert blocks
    for block in blocks:
        block.register_forward_hook(measure)
    with torch.no_grad():
        student.model(noise_pictures(2, (96, 96)))
    assert len(ratios) == len(blocks) and max(ratios.values()) <= 0.25 + 1e-5
    assert max(ratios.values()) > 0.2


def test_what_no_skip_can_go_through_is_left_and_said(tiny, teach):
    plan = {step.name: step for step in plan_for(tiny("test_resnet", 96), FaCnnConfig()).steps}
    changed = [step.reason for step in plan.values() if step.becomes is None]
    assert changed and all("there is no skip through it" in reason for reason in changed)

    class Overwriting(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.relu_())

    def convolutions() -> list[nn.Module]:
        return [nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)]

    features = nn.Sequential(nn.Conv2d(3, 6, 4, 4), Overwriting(*convolutions()), nn.Sequential(*convolutions()))
    steps = {step.name: step for step in plan_for(teach(Own(nn.Linear(6, 3), features), size=24), FaCnnConfig()).steps}
    assert steps["features.1"].reason == "overwrites what it is given"
    assert steps["features.2"].becomes == "DampenedSkip" and steps["features"].becomes == "LastMap"


def test_a_shared_block_is_dampened_once(teach):
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1))
    features = nn.Sequential(nn.Conv2d(3, 6, 4, 4), block, nn.ReLU(), block)
    student = convert(teach(Own(nn.Linear(6, 3), features), size=24), FaCnnConfig())
    assert student.model.features[1] is student.model.features[3]
    assert student.plan.counts()["DampenedSkip"] == 1


def test_dropout_and_drop_path_left_on_draw_but_leave_no_trace(teach):
    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet", drop_path_rate=0.5, drop_rate=0.5, num_classes=5)
    student = convert(teach(model, size=64), FaCnnConfig())
    pictures = noise_pictures(4, (64, 64))
    with torch.no_grad():
        still = student.model(pictures)
    student.model.train()
    before = {name: value.clone() for name, value in student.model.state_dict().items()}
    state = torch.get_rng_state()
    explanation = explain(student.model, pictures, TopTarget(1))
    assert explanation.balanced().all() and not torch.allclose(explanation.outputs, still)
    assert torch.equal(torch.get_rng_state(), state) and student.model.training
    assert all(torch.equal(value, before[name]) for name, value in student.model.state_dict().items())


# -------------------------------------------------------------------------------------------------------- maps by depth


def test_maps_by_depth_end_at_the_class_maps_and_begin_without_blocks(tiny):
    student = convert(tiny("mobilenetv2_050", 64), FaCnnConfig())
    pictures = noise_pictures(2, (64, 64))
    seen, handle = class_maps(student)
    with torch.no_grad():
        student.model(pictures)
    handle.remove()
    depths = student.model.maps_by_depth(pictures)
    blocks = [step.name for step in student.plan.swaps if step.becomes == "DampenedSkip"]
    assert list(depths) == ["", *blocks] and torch.equal(depths[blocks[-1]], seen[0])
    maps = list(depths.values())
    added = [after - before for before, after in zip(maps, maps[1:], strict=False)]
    assert all(part.abs().max() > 0 for part in added)
    torch.testing.assert_close(maps[0] + sum(added), maps[-1], rtol=1e-4, atol=1e-4)
    # Independent: a network whose blocks were taken out.
    without = convert(tiny("mobilenetv2_050", 64), FaCnnConfig()).model
    for name in blocks:
        parent, _, child = name.rpartition(".")
        setattr(without.get_submodule(parent), child, nn.Identity())
    with torch.no_grad():
        torch.testing.assert_close(without(pictures), maps[0].mean((2, 3)))


def test_blocks_come_back_after_an_error():
    block = dampened(torch.ones(1, 2), 0.5)
    with pytest.raises(RuntimeError), skipping([block]):
        assert block.skipped
        raise RuntimeError
    assert not block.skipped


# ------------------------------------------------------------------------------------------------ plan, save, strengths


def test_anatomy_does_not_depend_on_the_weights(tiny):
    """`load` plans before the weights are there, also of models whose blocks start as nothing."""
    teacher = tiny("test_convnext", 96)
    found = look(teacher.model, (96, 96))
    blank = timm.create_model("test_convnext", pretrained=False).eval()
    for parameter in blank.parameters():
        nn.init.zeros_(parameter)
    assert look(blank, (96, 96)) == found
    assert all((p == 0).all() for p in blank.parameters())
    assert found.head is not None and found.head.norm == "head.norm" and found.head.output == "head.fc"


def test_a_dampened_student_comes_back_from_disk(tiny, tmp_path):
    student = convert(tiny("test_resnet", 96), FaCnnConfig(dampening="branch"))
    assert at_start(student.model)
    set_strength(student.model, dampening=0.3)
    loaded = load(save(student, tmp_path / "student"))
    pictures = noise_pictures(2, (96, 96))
    assert torch.equal(loaded.model(pictures), student.model(pictures)) and not at_start(loaded.model)
    assert loaded.config == FaCnnConfig(dampening="branch")
    parts = (ClassMaps, LastMap, PlaceClassifier)
    assert [sum(isinstance(m, part) for m in loaded.model.modules()) for part in parts] == [1, 1, 1]
    assert not any(isinstance(module, PlaceNorm) for module in loaded.model.modules())


def test_parameters_are_those_of_the_source(tiny):
    teacher = tiny("test_resnet", 96)
    student = convert(teacher, FaCnnConfig())
    theirs = teacher.model.state_dict()
    ours = {name: value for name, value in student.model.state_dict().items() if not name.endswith(".dampening")}
    assert list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_blocks_of_a_stage_that_is_no_sequential_are_found():
    model = timm.create_model("regnetx_004", pretrained=False)
    assert {name for name in blocks_of(model) if name.startswith("s2")} == {"s2.b1", "s2.b2"}
