"""CA-Stream: the paper's maths written out by hand, the start, exact contributions, a frozen backbone, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from bcosify.convert import CaStreamConfig, convert, load, load_teacher, save
from bcosify.convert.layers import set_strength
from bcosify.convert.methods.ca_stream.layers import Stream
from bcosify.core.errors import CheckpointError, PlanError
from bcosify.core.pictures import noise_pictures
from bcosify.explain import DirectionTarget, Linearised, SelfExplaining, TopTarget, explain
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn


def stirred(stream: Stream, seed: int = 0) -> Stream:
    """The stream with every number random."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in stream.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return stream


widths = st.lists(st.integers(1, 6), min_size=1, max_size=4)


@settings(deadline=None, max_examples=25)
@given(widths, st.integers(1, 3), st.booleans(), st.data())
def test_the_stream_is_the_papers_recursion(widths, batch, value, data):
    stream = stirred(Stream(range(len(widths)), widths, value)).double()
    maps = [torch.randn(batch, data.draw(st.integers(2, 9)), width, dtype=torch.float64) for width in widths]
    for b in range(batch):
        query = stream.query
        for stage, features in enumerate(maps):
            attention = torch.softmax(features[b] @ query / math.sqrt(widths[stage]), 0)
            pooled = features[b].T @ attention
            if stage + 1 < len(widths):
                query = stream.projections[stage] @ pooled / math.sqrt(widths[stage])
        expected = pooled if stream.value is None else (torch.eye(widths[-1]).double() + stream.value) @ pooled
        torch.testing.assert_close(stream(maps)[b], expected)
    torch.testing.assert_close(stream.shares(maps).sum(1), stream(maps))
    for attention in stream.attention(maps):
        assert bool((attention >= 0).all())
        torch.testing.assert_close(attention.sum(1), torch.ones(batch, dtype=torch.float64))


def test_places_that_change_order_change_the_attentions_order():
    stream = stirred(Stream((0, 1), (4, 5), False))
    maps = [torch.randn(2, 9, 4), torch.randn(2, 6, 5)]
    order = torch.randperm(6)
    before, after = stream.attention(maps)[-1], stream.attention([maps[0], maps[1][:, order]])[-1]
    torch.testing.assert_close(after, before[:, order])


def test_large_half_precision_features_overflow_nothing():
    stream = stirred(Stream((0,), (8,), False)).half()
    attention = stream.attention([300 * torch.randn(2, 6, 8).half()])[0]
    assert bool(attention.isfinite().all()) and attention.sum(1).allclose(torch.ones(2).half(), atol=1e-2)


@pytest.mark.parametrize(("stages", "million"), [(5, 6.96), (4, 6.95), (3, 6.82), (2, 6.29), (1, 4.20)])
def test_parameter_counts_are_the_papers(stages, million):
    """ResNet-50: S0-S4 ... S4-S4."""
    teacher = load_teacher("timm:resnet50", pretrained=False, image_size=64)
    student = convert(teacher, CaStreamConfig(stages=stages, value="linear"))
    assert sum(p.numel() for p in student.model.stream.parameters()) / 1e6 == pytest.approx(million, abs=0.005)


FAMILIES = [
    ("test_resnet", 64, "CaStream"),
    ("test_efficientnet", 96, "CaStream"),
    ("test_convnext", 96, "CaStream"),
    ("mobilenetv3_small_050", 64, "CaStream"),
    ("test_vit", 64, "CaStreamForToken"),
]


@pytest.mark.parametrize(("name", "size", "swap"), FAMILIES)
def test_a_student_starts_as_its_teacher_and_contributions_add_up(tiny, name, size, swap, tmp_path):
    teacher = tiny(name, size)
    student = convert(teacher, CaStreamConfig(stages=2, value="linear"))
    assert student.plan.counts() == {swap: 1} and student.history.conversion.identity_error <= 1e-5
    model, pictures = student.model, noise_pictures(2, teacher.preprocess.size)
    stirred(model.stream)
    set_strength(model, beta=0.25)
    assert isinstance(model, SelfExplaining)
    explanation = explain(model, pictures, TopTarget(2), tolerance=1e-4)
    assert explanation.contributions.shape == (2, 2, size, size)
    with torch.no_grad():
        torch.testing.assert_close(explanation.outputs, model(pictures))
        maps = model.attention_maps(pictures)
    assert [len(found.shape) for found in maps] == [3, 3]
    assert model.extra_maps(pictures).keys() == {f"attention_{stage}" for stage in model.stream.stages}
    loaded = load(save(student, tmp_path / "student")).model
    with torch.no_grad():
        assert torch.equal(loaded(pictures), model(pictures))


@pytest.mark.parametrize("name", ["efficientnet_lite0", "dinov2_small"])
def test_on_real_weights(real_teachers, photographs, name):
    teacher = real_teachers[name]
    student = convert(teacher, CaStreamConfig())
    pictures = photographs(teacher.preprocess, 2)
    with torch.no_grad():
        expected = teacher.model(pictures)
        error = (student.model(pictures) - expected).abs().max() / expected.abs().max()
    assert error <= 1e-5
    stirred(student.model.stream)
    set_strength(student.model, beta=0.0)
    if student.labels:
        assert explain(student.model, pictures, TopTarget(1)).balanced(1e-5).all()
    else:
        directions = torch.randn(2, expected.shape[1])
        explanation = explain(student.model, pictures, DirectionTarget(directions))
        assert explanation.balanced(1e-5).all() and not explanation.constants  # no class token, no constant


def test_contributions_of_a_plain_average_are_class_activation_maps(tiny):
    """At the start: W_c . F_i / P, of which CAM is the classic."""
    teacher = tiny("test_resnet", 64)
    model = convert(teacher, CaStreamConfig(stages=1)).model
    pictures = noise_pictures(1, (64, 64))
    with torch.no_grad():
        outputs, maps, constants = model.output_maps(pictures)
        features = teacher.model.forward_features(pictures)
        cam = torch.einsum("bdhw,cd->bchw", features, teacher.model.fc.weight) / features.shape[-2:].numel()
    torch.testing.assert_close(maps, cam)
    torch.testing.assert_close(maps.sum((2, 3)) + sum(constants.values()), outputs)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_only_the_scores_that_are_asked_for_are_pulled(tiny, name, monkeypatch):
    """One pull through the head a score, and one through the target: not one for each of a thousand classes."""
    model = convert(tiny(name, 64), CaStreamConfig()).model
    stirred(model.stream)
    pictures = noise_pictures(2, (64, 64))
    pulls, plain = [], Linearised.pull
    monkeypatch.setattr(Linearised, "pull", lambda *args, **more: (pulls.append(None), plain(*args, **more))[1])
    found = explain(model, pictures, TopTarget(2))
    assert len(pulls) == 4
    with torch.no_grad():
        outputs, maps, constants = model.output_maps(pictures)  # of every class
    assert len(pulls) == 4 + outputs.shape[1]
    classes = outputs.topk(2).indices
    rows = torch.arange(2)[:, None]
    torch.testing.assert_close(
        found.contributions.sum((-2, -1)), maps.sum((-2, -1))[rows, classes], rtol=1e-4, atol=1e-6
    )
    for name, constant in constants.items():
        torch.testing.assert_close(found.constants[name], constant[rows, classes], rtol=1e-4, atol=1e-6)


def test_train_mode_reaches_the_stream_alone(tiny):
    model = convert(tiny("test_resnet", 64), CaStreamConfig()).model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    assert [name for name, module in model.named_modules() if module.training] == ["stream", "stream.projections"]
    model(noise_pictures(2, (64, 64))).sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Plain(nn.Sequential):
    """No timm model."""


@pytest.mark.parametrize(
    ("make", "config", "said"),
    [
        (lambda: load_teacher("timm:resnet18", pretrained=False, image_size=32), {}, "last map is 1x1"),
        (lambda: load_teacher("timm:vgg11", pretrained=False, image_size=64), {}, "neither averages"),
        (lambda: load_teacher("timm:test_vit2", pretrained=False), {"stages": 9}, "stages=9"),
        (lambda: load_teacher("timm:test_resnet", pretrained=False, image_size=64), {"stages": 9}, "stages=9"),
        (
            lambda: load_teacher("timm:deit_tiny_distilled_patch16_224", pretrained=False),
            {},
            "nor reads the class token alone",
        ),
    ],
    ids=["1x1", "mlp-head", "vit-depth", "cnn-depth", "two-tokens"],
)
def test_what_does_not_fit_is_refused(make, config, said):
    teacher = make()
    with pytest.raises(PlanError, match=said):
        convert(teacher, CaStreamConfig(**config))
    assert not hasattr(teacher.model, "stream")


def test_other_libraries_and_wrong_settings_are_refused(teach):
    model = Plain(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    with pytest.raises(PlanError, match="does not show its feature stages"):
        convert(teach(model), CaStreamConfig())
    for wrong, said in (({"stages": 0}, "at least 1"), ({"value": "liner"}, "linear"), ({"keep": ("fc",)}, "no layer")):
        with pytest.raises(PlanError, match=said):
            CaStreamConfig(**wrong)


def test_a_changed_checkpoint_is_refused(tiny, tmp_path):
    from safetensors.torch import load_file, save_file

    out = save(convert(tiny("test_resnet", 64), CaStreamConfig()), tmp_path / "student")
    state = load_file(out / "model.safetensors")
    state["stream.query"] = state["stream.query"] + 1
    save_file(state, out / "model.safetensors")
    with pytest.raises(CheckpointError, match="sha256"):
        load(out)


@pytest.mark.parametrize(("name", "size"), [("crossvit_tiny_240", 240), ("efficientvim_m1", 64), ("pit_ti_224", 224)])
def test_stages_that_are_no_maps_are_refused_in_words(name, size):
    with pytest.raises(PlanError, match="feature stages cannot be read as maps of places"):
        convert(load_teacher(f"timm:{name}", pretrained=False, image_size=size), CaStreamConfig())


def test_a_head_that_reads_patches_beside_its_token_is_refused():
    with pytest.raises(PlanError, match="nor reads the class token alone"):
        convert(load_teacher("timm:volo_d1_224", pretrained=False, image_size=224), CaStreamConfig())
