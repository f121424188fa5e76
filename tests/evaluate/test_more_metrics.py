"""Metrics of one value a picture, each against an independent computation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bcosify.core.errors import NotApplicable
from bcosify.evaluate.baselines import METHODS, Method
from bcosify.evaluate.decisions import ClassDecisions
from bcosify.evaluate.metrics.completeness import completeness_error
from bcosify.evaluate.metrics.fidelity import calibration_error
from bcosify.evaluate.metrics.max_sensitivity import DRAWS, RADIUS, max_sensitivity
from bcosify.evaluate.metrics.segmentation import average_precision, mean_iou, rank_accuracy
from bcosify.evaluate.metrics.single_deletion import deletion_drops, patch_numbers, rank_correlations, single_deletion
from bcosify.evaluate.metrics.sparseness import gini
from bcosify.evaluate.suite import Explained, Pictures, Settings
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score, jaccard_score

from toys import Linear


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 9), st.integers(2, 9), st.booleans())
def test_ranking_pixels_is_what_scikit_learn_says(seed, height, width, tied):
    maps, masks = draw(3, height, width, seed=seed), (draw(3, height, width, seed=seed + 1) > 0.3).float()
    masks[:, 0, 0] = 1
    if tied:
        maps = (maps * 2).round()
    precision, overlap = average_precision(maps, masks), mean_iou(maps, masks)
    for i in range(3):
        inside, values = masks[i].flatten().numpy(), maps[i].flatten().numpy()
        assert float(precision[i]) == pytest.approx(average_precision_score(inside, values), abs=1e-6)
        wanted = [jaccard_score(inside == k, (values > values.mean()) == k, zero_division=0.0) for k in (1, 0)]
        assert float(overlap[i]) == pytest.approx(sum(wanted) / 2, abs=1e-6)


def test_rank_accuracy_counts_the_largest_as_many_as_the_mask_has():
    masks = torch.zeros(2, 4, 4)
    masks[:, 0] = 1
    maps = torch.arange(16.0).view(4, 4).expand(2, 4, 4).clone()
    maps[0] = -maps[0]  # the first row is largest
    maps[1, 0, :2] = 99
    assert rank_accuracy(maps, masks).tolist() == [1.0, 0.5]


def test_completeness_is_the_difference_to_the_score():
    maps = torch.zeros(3, 2, 2)
    maps[:, 0, 0] = torch.tensor([4.0, 4.0, 0.5])
    assert completeness_error(maps, torch.tensor([4.0, -2.0, 0.25])).tolist() == [0.0, 3.0, 0.25]


def test_the_gini_index_is_that_of_its_definition():
    maps = draw(4, 5, 6)
    for i, found in enumerate(gini(maps).tolist()):
        sizes = maps[i].abs().flatten().double()
        gaps = sum(abs(float(a - b)) for a in sizes for b in sizes)
        assert found == pytest.approx(gaps / (2 * len(sizes) ** 2 * float(sizes.mean())), rel=1e-5)
    one = torch.zeros(1, 5, 5)
    one[0, 2, 2] = -3
    assert gini(one).tolist() == pytest.approx([0.96]) and gini(torch.ones(1, 5, 5)).tolist() == pytest.approx([0])
    assert gini(torch.zeros(1, 3, 3)).tolist() == [0]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.booleans())
def test_rank_correlation_is_scipys(seed, tied):
    one, other = draw(3, 16, seed=seed), draw(3, 16, seed=seed + 1)
    if tied:
        one, other = one.round(), (other * 2).round()
    found = rank_correlations(one, other)
    assert found.tolist() == pytest.approx(
        [spearmanr(a, b).statistic for a, b in zip(one, other, strict=True)], abs=1e-6
    )
    assert rank_correlations(torch.ones(1, 16), draw(1, 16)).tolist() == [0]


@pytest.fixture
def linear(subject_of):
    images, decisions = draw(3, 3, 14, 15, seed=1), ClassDecisions(torch.tensor([0, 1, 0]))
    weights = draw(2, 3, 14, 15)
    return subject_of(Linear(weights, draw(2))), images, decisions, weights


def test_deleting_a_patch_of_a_linear_model_costs_what_its_map_says(linear):
    subject, images, decisions, weights = linear
    grey = subject.normalised(torch.full_like(images, 0.5))
    maps = (weights[decisions.classes] * (images - grey)).sum(1)
    number = patch_numbers(14, 15)
    patches, sizes = number.unique(return_counts=True)
    assert patches.tolist() == list(range(16)) and sizes.min() >= 9 and sizes.max() <= 16
    drops = deletion_drops(subject, images, decisions)
    wanted = torch.stack([(maps * (number == patch)).sum((1, 2)) for patch in range(16)], 1)
    torch.testing.assert_close(drops, wanted, atol=1e-4, rtol=1e-4)
    assert single_deletion(maps, drops).tolist() == pytest.approx([1, 1, 1])
    assert single_deletion(-maps, drops).tolist() == pytest.approx([-1, -1, -1])


def test_max_sensitivity_of_a_linear_gradient_is_0_and_of_its_product_the_largest_draw(linear):
    subject, images, decisions, weights = linear
    images = subject.normalised(subject.colours(images).clamp(0.1, 0.9))
    still = Method("still", lambda subject, images, decisions, seed: weights[decisions.classes].sum(1), 1, "")
    maps = weights[decisions.classes].sum(1)
    assert max_sensitivity(still, subject, images, maps, decisions).tolist() == [0, 0, 0]
    product = METHODS["input-x-gradient"]
    maps = (weights[decisions.classes] * images).sum(1)
    found = max_sensitivity(product, subject, images, maps, decisions, seed=4)
    generator, worst = torch.Generator().manual_seed(4), torch.zeros(3)
    for _ in range(DRAWS):
        noise = (2 * torch.rand(images.shape, generator=generator) - 1) * RADIUS
        changed = (weights[decisions.classes] * noise / torch.tensor(subject.std).view(-1, 1, 1)).sum(1)
        worst = worst.maximum(changed.flatten(1).norm(dim=1) / maps.flatten(1).norm(dim=1))
    torch.testing.assert_close(found, worst, rtol=1e-3, atol=1e-5)


def test_calibration_error_by_hand():
    confidence, right = torch.tensor([0.95, 0.95, 0.15, 0.12]), torch.tensor([1.0, 0.0, 0.0, 0.0])
    # Bins of tenths: |1.9 - 1| and |0.27 - 0|, over four pictures.
    assert float(calibration_error(confidence, right, 10)) == pytest.approx((0.9 + 0.27) / 4)
    assert float(calibration_error(torch.ones(3), torch.ones(3))) == 0


def test_what_has_no_masks_or_no_units_says_so(subject_of):
    from bcosify.evaluate.metrics import completeness, segmentation

    maps = {("teacher", "explanation"): torch.ones(1, 2, 2)}
    bare: Any = Pictures(torch.zeros(1, 3, 2, 2), ("a",))
    task: Any = Explained(bare, {}, ClassDecisions(torch.zeros(1).long()), {}, maps, 1, Settings())
    for value in (segmentation._average_precision, segmentation._mean_iou, segmentation._rank_accuracy):
        with pytest.raises(NotApplicable, match="--masks"):
            value(task, "teacher", "explanation")
    with pytest.raises(NotApplicable, match="not in units of the score"):
        completeness._measured(task, "teacher", "rollout")
