"""Nearest prototypes: distances written out by hand, the start, margins, maps, refusals."""

from __future__ import annotations

import pytest
import torch
from bcosify.convert import KMeansConfig, convert, load, load_teacher, save
from bcosify.convert.methods.kmeans.layers import PrototypeLinear, joined_stages
from bcosify.core.errors import PlanError
from bcosify.core.pictures import noise_pictures
from bcosify.explain import SelfExplaining, TopTarget, explain
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tiny import tiny_teacher


def stirred(head: PrototypeLinear) -> PrototypeLinear:
    """Every number random, every class with all its prototypes but class 0, which keeps one."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (head.prototypes, head.offsets, head.shift):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        head.offsets[0, 1:] = -torch.inf
        head.temperature.fill_(0.7)
    return head


def test_logits_are_negative_distances_but_for_what_all_classes_share():
    from bcosify.convert.layers import join

    head = join(nn.Linear(6, 5).double(), PrototypeLinear)
    head.start_prototypes(3)
    stirred(head)
    features = torch.randn(4, 6, dtype=torch.float64)
    with torch.no_grad():
        distances = (features[:, None, None] - head.prototypes).square().sum(-1)
        scores = -0.7 * distances / 2 + head.offsets
        shared = 0.7 * features.square().sum(1) / 2 - features @ head.shift
        torch.testing.assert_close(head(features), scores.amax(-1) + shared[:, None])
        torch.testing.assert_close(head(features).softmax(1), scores.amax(-1).softmax(1))


@pytest.mark.parametrize(
    ("name", "size", "maps"), [("test_resnet", 64, True), ("test_vit", 64, False), ("test_convnext", 96, False)]
)
def test_a_student_starts_as_its_teacher_and_explanations_add_up(tiny, name, size, maps, tmp_path):
    teacher = tiny(name, size)
    student = convert(teacher, KMeansConfig(prototypes=2, concepts=4))
    assert student.plan.counts() == {"PrototypeLinear": 1, **({"PrototypeMaps": 1} if maps else {})}
    assert student.history.conversion.identity_error <= 1e-5
    model, pictures = student.model, noise_pictures(3, teacher.preprocess.size)
    stirred(model.get_classifier())
    assert isinstance(model, SelfExplaining) == maps  # others are explained by gradients, as any model is
    assert explain(model, pictures, TopTarget(2)).balanced(1e-5).all()
    loaded = load(save(student, tmp_path / "student")).model
    with torch.no_grad():
        assert torch.equal(loaded(pictures), model(pictures))


def test_the_mean_of_a_margins_map_is_the_margin_and_its_places_are_distances(tiny):
    model = convert(tiny("test_resnet", 64), KMeansConfig()).model
    head = stirred(model.get_classifier())
    pictures = noise_pictures(3, (64, 64))
    with torch.no_grad():
        logits, features = model(pictures), model.forward_features(pictures)
        classes, margins, maps = model.margin_maps(pictures)
        torch.testing.assert_close(maps.mean((1, 2)), margins, atol=1e-5, rtol=1e-5)
        top = logits.topk(2, 1)
        assert torch.equal(classes, top.indices)
        torch.testing.assert_close(margins, top.values[:, 0] - top.values[:, 1], atol=1e-5, rtol=1e-5)
        nearest = head.nearest(head.scores(features.mean((2, 3))))[..., 0]
        for b, (own, rival) in enumerate(classes.tolist()):
            place = features[b, :, 0, 1]
            own_s, rival_s = (
                -0.7 * (place - head.prototypes[c, nearest[b, c]]).square().sum() / 2 + head.offsets[c, nearest[b, c]]
                for c in (own, rival)
            )
            torch.testing.assert_close(maps[b, 0, 1], own_s - rival_s, atol=1e-4, rtol=1e-4)


def test_without_data_it_is_the_linear_classifier_on_real_weights(real_teachers, photographs):
    teacher = real_teachers["efficientnet_lite0"]
    model = convert(teacher, KMeansConfig()).model
    pictures = photographs(teacher.preprocess, 2)
    with torch.no_grad():
        expected = teacher.model(pictures)
        assert (model(pictures) - expected).abs().max() / expected.abs().max() <= 1e-5
        _, margins, maps = model.margin_maps(pictures)
        torch.testing.assert_close(maps.mean((1, 2)), margins, atol=1e-5, rtol=1e-5)
    assert not model.get_classifier().from_data.any()


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 3), st.integers(1, 3), st.lists(st.integers(1, 4), min_size=1, max_size=3))
def test_joined_stages_keep_every_mean(rows, columns, factors):
    largest = max(factors) * 2 if max(factors) % 2 else max(factors)
    stages = [torch.randn(2, 3, rows * largest, columns * largest)]
    stages += [torch.randn(2, 2, rows * largest // f, columns * largest // f) for f in factors if largest % f == 0]
    scales = torch.rand(len(stages)) + 0.5
    joined = joined_stages(stages, scales)
    assert joined is not None
    means = torch.cat([stage.mean((2, 3)) / scale for stage, scale in zip(stages, scales, strict=True)], 1)
    torch.testing.assert_close(joined.mean((2, 3)), means, atol=1e-5, rtol=1e-4)


def test_grids_that_do_not_divide_are_not_joined():
    assert joined_stages([torch.randn(1, 2, 14, 14), torch.randn(1, 2, 4, 4)], torch.ones(2)) is None


@pytest.mark.parametrize(
    ("name", "said"), [("resnetv2_50", "is a Conv2d"), ("dinov2", "has no classifier")], ids=["convolution", "headless"]
)
def test_models_without_a_linear_classifier_are_refused(real_teachers, name, said):
    found = {"dinov2": lambda: real_teachers["dinov2_small"]}
    teacher = found.get(name, lambda: load_teacher(f"timm:{name}", pretrained=False, image_size=64))()
    with pytest.raises(PlanError, match=said) as caught:
        convert(teacher, KMeansConfig())
    assert "has 1 layer(s)" in str(caught.value)


def test_wrong_settings_are_refused():
    for wrong in ({"prototypes": 0}, {"concepts": 0}, {"keep": ("fc",)}):
        with pytest.raises(PlanError):
            KMeansConfig(**wrong)


def test_a_norm_between_the_average_and_the_classifier_is_seen_with_fresh_statistics_too(tmp_path):
    """EfficientViT's head normalises first: as long as its statistics are fresh, that is nothing to be seen."""
    teacher = tiny_teacher("efficientvit_m0", 224)
    student = convert(teacher, KMeansConfig())
    assert student.plan.counts() == {"PrototypeLinear": 1}
    save(student, tmp_path / "student")
    assert load(tmp_path / "student").plan == student.plan
