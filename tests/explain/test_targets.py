"""Targets: which scores they are, and what they say of a target that does not exist."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from bcosify.core.errors import TargetError
from bcosify.explain import (
    ClassTarget,
    DirectionTarget,
    Linearised,
    PatchFeature,
    SelfTarget,
    SimilarityTarget,
    TopTarget,
    ZeroShotTarget,
    explain,
    find_class,
)
from bcosify.explain.targets import target_of
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

OUTPUT = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
DIRECTIONS = torch.randn(2, 5, generator=torch.Generator().manual_seed(1))


def test_class_target_takes_one_many_or_a_row_for_each_picture():
    assert torch.equal(ClassTarget(2).scores(OUTPUT), OUTPUT[:, [2]])
    assert torch.equal(ClassTarget([2, 0]).scores(OUTPUT), OUTPUT[:, [2, 0]])
    rows = torch.tensor([[0, 1], [2, 3], [4, 0]])
    assert torch.equal(ClassTarget(rows).scores(OUTPUT), OUTPUT.gather(1, rows))
    assert torch.equal(ClassTarget(rows).rows(slice(1, 3)).scores(OUTPUT[1:]), OUTPUT.gather(1, rows)[1:])
    assert torch.equal(ClassTarget([2, 0]).rows(slice(1, 3)).scores(OUTPUT[1:]), OUTPUT[1:, [2, 0]])


@pytest.mark.parametrize("index", [5, -1, 1000])
def test_class_out_of_range_states_the_range(index):
    with pytest.raises(TargetError, match=rf"no class {index}: the model has 5, numbered 0 to 4"):
        ClassTarget([0, index]).scores(OUTPUT)


@pytest.mark.parametrize("indices", [[0.5], [], [[[1]]]])
def test_class_indices_must_be_indices(indices):
    with pytest.raises(TargetError, match="must be integers"):
        ClassTarget(indices).scores(OUTPUT)


def test_rows_of_classes_must_be_as_many_as_pictures():
    with pytest.raises(TargetError, match="2 rows of classes for 3 pictures"):
        ClassTarget([[1], [2]]).scores(OUTPUT)


def test_top_target_is_the_model_s_own_choice():
    values, classes = OUTPUT.topk(2)
    assert torch.equal(TopTarget(2).scores(OUTPUT), values)
    assert torch.equal(TopTarget(2).classes(OUTPUT), classes)
    for k in (0, 6):
        with pytest.raises(TargetError, match=f"no top {k} of 5 outputs"):
            TopTarget(k).scores(OUTPUT)


def test_directions_and_similarities():
    torch.testing.assert_close(DirectionTarget(DIRECTIONS).scores(OUTPUT), OUTPUT @ DIRECTIONS.T)
    cosines = torch.cosine_similarity(OUTPUT[:, None], DIRECTIONS[None], dim=-1)
    torch.testing.assert_close(SimilarityTarget(DIRECTIONS).scores(OUTPUT), cosines)
    torch.testing.assert_close(SimilarityTarget(DIRECTIONS[0] * 7).scores(OUTPUT), cosines[:, :1])
    each = torch.stack([DIRECTIONS, DIRECTIONS * 2, DIRECTIONS * 3])
    expected = torch.einsum("bd,bkd->bk", OUTPUT, each)
    torch.testing.assert_close(DirectionTarget(each).scores(OUTPUT), expected)
    torch.testing.assert_close(DirectionTarget(each).rows(slice(1, 2)).scores(OUTPUT[1:2]), expected[1:2])
    assert isinstance(SimilarityTarget(each).rows(slice(1, 2)), SimilarityTarget)
    assert SelfTarget().rows(slice(1, 2)) == SelfTarget()


def test_self_target_is_the_norm():
    torch.testing.assert_close(SelfTarget().scores(OUTPUT), OUTPUT.norm(dim=1, keepdim=True))
    assert torch.equal(SelfTarget().scores(torch.zeros(2, 3)), torch.zeros(2, 1))


def test_directions_must_fit():
    with pytest.raises(TargetError, match="4 entries, but the model's output has 5"):
        DirectionTarget(DIRECTIONS[:, :4]).scores(OUTPUT)
    with pytest.raises(TargetError, match=r"\(K, 5\) or \(3, K, 5\), not \(2, 2, 5\)"):
        DirectionTarget(DIRECTIONS.expand(2, 2, 5)).scores(OUTPUT)


@pytest.mark.parametrize("target", [ClassTarget(0), TopTarget(), DirectionTarget(DIRECTIONS), SelfTarget()])
def test_tokens_are_no_vector(target):
    with pytest.raises(TargetError, match=r"returns \(3, 7, 5\).*one vector a picture"):
        target.scores(torch.zeros(3, 7, 5))


@given(
    st.sampled_from([DirectionTarget(DIRECTIONS), SimilarityTarget(DIRECTIONS), SelfTarget(), TopTarget(3)]),
    st.integers(0, 999),
)
def test_a_score_is_its_contributions(target, seed):
    """Also a cosine: its norm is a gate. (Were it not, contributions would sum to zero.)"""
    x = torch.randn(2, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    with Linearised() as mode:
        scores = target.scores(mode.follow(x))
    for k in range(scores.shape[1]):
        (gradient,), constants = mode.pull(scores[:, k].sum(), retain_graph=True)
        torch.testing.assert_close((x * gradient).sum(1), scores[:, k].detach())
        assert not constants


# ---------------------------------------------------------------------------------------------------------- class names

LABELS = ["tabby, tabby cat", "tiger cat", "crane", "Egyptian cat", "crane, digger", "tiger, Panthera tigris"]


@pytest.mark.parametrize(
    ("text", "index"),
    [
        ("tabby", 0),
        ("Tabby Cat", 0),
        ("tabby, tabby cat", 0),
        ("egyptian", 3),
        ("tiger", 5),
        (" panthera tigris ", 5),
        ("digger", 4),
        ("crane", 2),
        ("1", 1),
    ],
)
def test_find_class(text, index):
    assert find_class(LABELS, text) == index


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cat", r"'cat' may be 0 \(tabby, tabby cat\), 1 \(tiger cat\), 3 \(Egyptian cat\)\."),
        ("tabbi", r"No class is called 'tabbi'\. Did you mean 'tabby'"),
        ("zebra", r"No class is called 'zebra'\. The model has 6 classes"),
        ("6", r"no class 6: the model has 6, numbered 0 to 5"),
        ("", r"No class is called ''"),
    ],
)
def test_find_class_says_what_comes_close(text, message):
    with pytest.raises(TargetError, match=message):
        find_class(LABELS, text)


def test_synonyms_shared_by_two_classes_are_ambiguous_and_long_lists_are_cut():
    with pytest.raises(TargetError, match=r"0 \(a, x\), 1 \(b, x\)"):
        find_class(["a, x", "b, x"], "x")
    with pytest.raises(TargetError, match=r"and 12 more"):
        find_class([f"cat {i}" for i in range(20)], "cat")


def test_output_that_moves_to_another_type_is_followed():
    output: Tensor = OUTPUT.double()
    assert DirectionTarget(DIRECTIONS).scores(output).dtype == torch.float64


# --------------------------------------------------------------------------------------------- zero-shot and patches


def test_zero_shot_is_a_choice_among_cosines():
    embeddings = torch.randn(4, 5, generator=torch.Generator().manual_seed(3))
    cosines = SimilarityTarget(embeddings).scores(OUTPUT)
    target = ZeroShotTarget(embeddings, TopTarget(2))
    torch.testing.assert_close(target.similarities(OUTPUT), cosines)
    torch.testing.assert_close(target.scores(OUTPUT), cosines.topk(2, dim=1).values)
    torch.testing.assert_close(ZeroShotTarget(embeddings, ClassTarget([3, 0])).scores(OUTPUT), cosines[:, [3, 0]])
    assert target.rows(slice(0, 1)) is target
    with pytest.raises(TargetError, match="no top 5 of 4 outputs"):
        ZeroShotTarget(embeddings, TopTarget(5)).scores(OUTPUT)
    with pytest.raises(TargetError, match="Directions have 6 entries"):
        ZeroShotTarget(torch.ones(4, 6)).scores(OUTPUT)


def test_a_patchs_feature_is_a_model_of_its_own_with_the_models_names():
    model = torch.nn.Conv2d(3, 5, 2, stride=2)
    images = torch.randn(2, 3, 6, 8, generator=torch.Generator().manual_seed(4))
    patch = PatchFeature(model, lambda model, images: model(images), row=1, column=3)
    torch.testing.assert_close(patch(images), model(images)[:, :, 1, 3])
    explanation = explain(patch, images, SelfTarget())
    assert explanation.balanced(1e-5).all() and set(explanation.constants) == {"bias"}
    # No pixel outside of the patch has a share.
    outside = explanation.contributions.clone()
    outside[..., 2:4, 6:8] = 0
    assert explanation.contributions.any() and not outside.any()


@pytest.mark.parametrize(("row", "column"), [(3, 0), (0, 4), (-1, 0)])
def test_a_patch_outside_of_the_grid_is_refused_with_its_size(row, column):
    patch = PatchFeature(torch.nn.Conv2d(3, 5, 2, stride=2), lambda model, images: model(images), row, column)
    with pytest.raises(TargetError, match=f"no patch {row},{column}: a picture of 6x8 has 3 rows and 4 columns"):
        patch(torch.zeros(1, 3, 6, 8))


# ---------------------------------------------------------------------------------------------- what a target may be

BEST = OUTPUT.argmax(1)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (2, [[2], [2], [2]]),
        (np.int64(2), [[2], [2], [2]]),
        (np.uint8(2), [[2], [2], [2]]),
        (np.array(2), [[2], [2], [2]]),
        (torch.tensor(2), [[2], [2], [2]]),
        ([2], [[2]] * 3),
        (ClassTarget([2, 0]), [[2, 0]] * 3),
        (ClassTarget((np.int32(2), torch.tensor(0))), [[2, 0]] * 3),
        (ClassTarget(range(2)), [[0, 1]] * 3),
        (BEST, BEST[:, None].tolist()),
        (BEST.numpy(), BEST[:, None].tolist()),
        (BEST.numpy().astype("uint16"), BEST[:, None].tolist()),
        (BEST[:, None].expand(3, 2).numpy(), [[k, k] for k in BEST.tolist()]),
        ([[0], [1], [4]], [[0], [1], [4]]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_classes_of_every_common_type_mean_one_thing(given, wanted):
    """An array and a tensor have a class, or a row, for each picture."""
    expected = OUTPUT.gather(1, torch.tensor(wanted))
    assert torch.equal(target_of(given).scores(OUTPUT), expected)
    explanation = explain(torch.nn.Flatten(), OUTPUT[:, :, None, None], given)
    torch.testing.assert_close(explanation.scores, expected)


@pytest.mark.parametrize(
    "given",
    [
        True,
        np.bool_(True),
        [True, False],
        [True, 2],
        np.array([True, False, True]),
        torch.tensor([True, False, True]),
        1.0,
        np.float32(1),
        [0.5],
        torch.tensor([1.0, 2.0, 0.0]),
        "tabby",
        ["tabby"],
        np.array(["a", "b", "c"]),
        b"1",
        {"class": 1},
        None,
        [[1], [1, 2]],
        object,
    ],
    ids=repr,
)
def test_what_is_no_class_is_refused_with_what_is_taken(given):
    with pytest.raises(TargetError, match="Pass a class number, an array or a tensor with one for each picture"):
        target_of(given)


@pytest.mark.parametrize("given", [[2, 0, 1], (np.int32(2), torch.tensor(0), 1), range(3), [2, 0]], ids=repr)
def test_a_list_of_classes_is_refused_until_it_means_one_for_each_picture(given):
    """It meant all of them for every picture. captum's own call, `attribute`, takes it as captum does."""
    pictures = OUTPUT[:, :, None, None]
    for asked in (lambda: target_of(given), lambda: explain(torch.nn.Flatten(), pictures, given)):
        with pytest.raises(TargetError, match=r"is a list of \d.*targets=\[2|0.*every picture.*torch\.tensor"):
            asked()
    every = explain(torch.nn.Flatten(), pictures, targets=given)
    assert torch.equal(every.scores, OUTPUT[:, torch.tensor([int(k) for k in given])])
    if len(given) == len(OUTPUT):
        each = target_of(given, by_picture=True).scores(OUTPUT)
        assert torch.equal(each[:, 0], OUTPUT[range(3), torch.tensor([int(k) for k in given])])


def test_a_function_of_the_output_is_a_target():
    found = explain(torch.nn.Flatten(), OUTPUT[:, :, None, None], lambda y: y[:, 0] - 2 * y[:, 3])
    torch.testing.assert_close(found.scores[:, 0], OUTPUT[:, 0] - 2 * OUTPUT[:, 3])
    assert found.balanced(1e-6).all()
    for wrong in (lambda y: y.sum(), lambda y: 3, lambda y: y[:2]):
        with pytest.raises(TargetError, match="the function returned a.*Return a score for each picture"):
            explain(torch.nn.Flatten(), OUTPUT[:, :, None, None], wrong)
    with pytest.raises(TargetError, match=r"TopTarget is a class of Python\. Pass TopTarget\(\.\.\.\)"):
        target_of(TopTarget)


def test_an_array_of_another_length_than_the_batch_is_refused():
    with pytest.raises(TargetError, match="2 rows of classes for 3 pictures.*for every picture are ClassTarget"):
        target_of(np.array([1, 2])).scores(OUTPUT)


@pytest.mark.parametrize(
    ("text", "index"), [("class 1", 1), ("2020", 1), ("2", 2), ("class 0", 0), ("Class 2", 2), ("0", 0)]
)
def test_a_number_is_a_class_and_a_name_that_is_a_number_a_name(text, index):
    assert find_class(["2019", "2020", "later"], text) == index


def test_a_number_that_is_another_classs_name_is_ambiguous():
    digits = ["1", "0", "2"]
    with pytest.raises(TargetError, match=r"'0' may be 0 \(1\), 1 \(0\)\. Pass 'class 0' or 'class 1'"):
        find_class(digits, "0")
    assert [find_class(digits, text) for text in ("class 0", "class 1", "2")] == [0, 1, 2]


# --------------------------------------------------------------------------------------------- what pictures may be

PICTURES = torch.rand(2, 3, 4, 4)


@pytest.mark.parametrize(
    ("pictures", "said"),
    [
        (PICTURES.double(), r"are torch\.float64, and the model torch\.float32. Pass pictures\.to\(torch\.float32"),
        ((PICTURES * 255).byte(), r"Pictures are torch\.uint8, as files hold them; models take them normalised"),
        (PICTURES.to("meta"), r"Pictures are on meta, and the model on cpu. Pass pictures\.to\('cpu'\)"),
        (PICTURES[0], r"\(B, C, H, W\) with B > 0, not \(3, 4, 4\)"),
        (PICTURES[:0], r"with B > 0, not \(0, 3, 4, 4\)"),
        (PICTURES.numpy(), r"not ndarray\. Pass torch\.from_numpy"),
        ([PICTURES[0], PICTURES[1]], r"not Tensor\. Pass torch\.stack"),
        (Image.new("RGB", (4, 4)), r"not Image\. Pass student\.preprocess\.transform\(\)"),
    ],
    ids=["double", "bytes", "device", "single", "none", "numpy", "list", "PIL"],
)
def test_pictures_of_another_type_or_place_are_refused_with_what_to_pass(pictures, said):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 3))
    with pytest.raises(TargetError, match=said):
        explain(model, pictures, 0)


@pytest.mark.parametrize("channels", [1, 4, 12])
def test_a_model_may_read_other_than_three_channels(channels):
    layers = torch.nn.Conv2d(channels, 5, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(20, 2)
    explanation = explain(torch.nn.Sequential(*layers), torch.randn(2, channels, 4, 4), targets=[0, 1])
    assert explanation.contributions.shape == (2, 2, 4, 4) and explanation.balanced(1e-5).all()


@pytest.mark.parametrize("form", ["(B,)", "tuple", "dict", "nested"])
def test_a_value_for_each_picture_or_several_outputs_are_understood(form):
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(48, 1 if form == "(B,)" else 3)

        def forward(self, x):
            y = self.linear(x.flatten(1))
            forms = {"(B,)": y.squeeze(-1), "tuple": (y, x), "dict": {"features": x, "logits": y}, "nested": [{"a": y}]}
            return forms[form]

    model = Model()
    explanation = explain(model, PICTURES, 0)
    torch.testing.assert_close(explanation.scores, model.linear(PICTURES.flatten(1)).detach()[:, :1])
    assert explanation.balanced(1e-5).all()
