"""Class contrast against maps whose answer is known, and other decisions that are the same for every student."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from bcosify.core.errors import DataError
from bcosify.evaluate.baselines import find_method, maps_of
from bcosify.evaluate.contrast import OTHERS, OWN, contrast, maps_with_others, other_decisions, others_of
from bcosify.evaluate.decisions import ClassDecisions, DirectionDecisions, decide
from bcosify.evaluate.task import Explained, Pictures, Settings
from bcosify.explain import ClassTarget, DirectionTarget, explain
from bcosify.explain.targets import SideBySide
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from toys import CellSums


@pytest.fixture
def masks() -> torch.Tensor:
    masks = torch.zeros(2, 8, 8)
    masks[0, :4] = masks[1, 2:4, 2:4] = 1
    return masks


def test_the_mask_itself_against_its_complement(masks):
    found = contrast(masks, 1 - masks, masks)
    for name in ("in_mask", "signed_share", "pointing"):
        assert found[name].tolist() == [1, 1]
        assert found[f"other_{name}"].tolist() == [0, 0]
        assert found[f"{name}_contrast"].tolist() == [1, 1]


def test_equal_maps_have_no_contrast_however_well_they_lie(masks):
    found = contrast(masks, masks, masks)
    assert all(found[f"{name}_contrast"].tolist() == [0, 0] for name in ("in_mask", "signed_share", "pointing"))


def test_only_the_signed_share_sees_a_map_that_speaks_against(masks):
    found = contrast(masks, -masks, masks)
    assert found["other_in_mask"].tolist() == [0, 0] and found["other_signed_share"].tolist() == [-1, -1]
    assert found["signed_share_contrast"].tolist() == [2, 2]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 30), st.integers(2, 12), st.integers(0, 3))
def test_another_class_is_never_the_own_one_and_always_the_same(n, classes, seed):
    decisions = ClassDecisions(torch.arange(n) % classes)
    other = other_decisions(decisions, classes, seed)
    assert isinstance(other, ClassDecisions)
    assert bool((other.classes != decisions.classes).all()) and set(other.classes.tolist()) <= set(range(classes))
    again = other_decisions(decisions, classes, seed)
    assert isinstance(again, ClassDecisions) and torch.equal(other.classes, again.classes)


def test_other_classes_are_drawn_alike_often_and_by_the_seed():
    decisions = ClassDecisions(torch.full((3000,), 2))
    drawn = [other_decisions(decisions, 4, seed).scores(torch.arange(4).expand(3000, 4)) for seed in (0, 1)]
    assert not torch.equal(*drawn)
    counts = torch.bincount(drawn[0], minlength=4)
    assert counts[2] == 0 and counts[[0, 1, 3]].min() > 900


def test_another_direction_is_that_of_another_picture():
    outputs = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    decisions = decide(outputs, classifier=False)
    other = other_decisions(decisions, 0)
    assert isinstance(decisions, DirectionDecisions) and isinstance(other, DirectionDecisions)
    same = (other.directions[:, None] == decisions.directions[None]).all(-1)
    assert same.any(1).all() and not same.diagonal().any()


def test_without_another_one_it_is_said():
    with pytest.raises(DataError, match="one class"):
        other_decisions(ClassDecisions(torch.zeros(3).long()), 1)
    two = decide(torch.eye(2), classifier=False)
    with pytest.raises(DataError, match="one picture"):
        other_decisions(two.rows(torch.tensor([0])), 0)


def test_targets_side_by_side_are_explained_as_each_alone_also_part_by_part():
    images = torch.rand(5, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    classes = torch.tensor([[0], [1], [2], [0], [1]])
    directions = torch.randn(5, 1, 3, generator=torch.Generator().manual_seed(2))
    both = explain(CellSums(), images, SideBySide((ClassTarget(classes), DirectionTarget(directions))), batch_size=2)
    for k, target in enumerate((ClassTarget(classes), DirectionTarget(directions))):
        alone = explain(CellSums(), images, target)
        torch.testing.assert_close(both.contributions[:, k], alone.contributions[:, 0])
        torch.testing.assert_close(both.scores[:, k], alone.scores[:, 0])


def test_maps_of_the_decision_stay_where_those_of_another_are_not_finite(subject_of):
    """Class 2 has weights that overflow: its maps are none, and the others' are as they were."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3, bias=False))
    with torch.no_grad():
        model[1].weight[2] = 3e38
    subject, images = subject_of(model), 9 * torch.ones(2, 3, 2, 2)
    outputs = torch.tensor([[3.0, 1.0, 2.0], [3.0, 2.0, 1.0]])  # the runner-up of the first is class 2
    task = Explained(
        Pictures(images, ("a", "b")),
        {"teacher": outputs},
        ClassDecisions(torch.tensor([0, 0])),
        {"teacher": subject},
        {},
        1,
        Settings(),
    )
    found = maps_with_others(find_method("input-x-gradient"), subject, task, OTHERS[1:])
    assert list(found) == [OWN] and found[OWN].shape == (2, 2, 2)
    second = dataclasses.replace(task, outputs={"teacher": outputs[[1, 1]]})
    both = maps_with_others(find_method("input-x-gradient"), subject, second, OTHERS[1:])
    assert list(both) == [OWN, OTHERS[1]] and torch.equal(both[OWN], found[OWN])
    wanted = others_of(OTHERS[1], task.decisions, outputs[[1, 1]])
    torch.testing.assert_close(both[OTHERS[1]], maps_of(find_method("input-x-gradient"), subject, images, wanted))
