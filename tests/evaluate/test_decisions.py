"""What a teacher's outputs stand for: a class, one of several labels, a value, or a feature."""

from __future__ import annotations

import pytest
import torch
from bcosify.evaluate.decisions import ClassDecisions, DirectionDecisions, ValueDecisions, decide

LOGITS = torch.tensor([[2.0, 1.0, -1.0], [-3.0, 0.5, -1.0]])


def test_confidence_of_classes_is_their_softmax_and_of_labels_their_sigmoid():
    classes, labels = decide(LOGITS, True), decide(LOGITS, True, output="multi-label")
    assert isinstance(classes, ClassDecisions) and isinstance(labels, ClassDecisions)
    assert classes.classes.tolist() == labels.classes.tolist() == [0, 1]
    torch.testing.assert_close(classes.confidence(LOGITS), LOGITS.softmax(1).amax(1))
    torch.testing.assert_close(labels.confidence(LOGITS), LOGITS.amax(1).sigmoid())
    torch.testing.assert_close(labels.rows(torch.tensor([1])).confidence(LOGITS[1:]), LOGITS[1:].amax(1).sigmoid())


def test_a_regression_is_explained_in_its_value_with_its_own_sign():
    values = torch.tensor([[-5.0], [-1.0], [0.0]])
    decisions = decide(values, False, output="regression")
    assert isinstance(decisions, ValueDecisions) and len(decisions) == 3
    torch.testing.assert_close(decisions.target().scores(values), values)
    torch.testing.assert_close(decisions.scores(values), values[:, 0])


def test_confidence_of_a_value_is_what_is_left_of_its_distance_from_the_mean():
    values = torch.tensor([[-5.0], [-1.0], [0.0], [-2.0]])  # mean -2
    decisions = decide(values, False, output="regression")
    assert decisions.confidence(values).tolist() == [1, 1, 1, 0]  # the last has none to lose
    changed = torch.tensor([[-3.5], [-2.0], [-9.0], [7.0]])
    assert decisions.confidence(changed).tolist() == pytest.approx([0.5, 0, 0, 0])
    few = decisions.rows(torch.tensor([2, 0]))
    assert few.confidence(torch.tensor([[-1.0], [-5.0]])).tolist() == pytest.approx([0.5, 1])


def test_several_values_are_a_direction():
    assert isinstance(decide(LOGITS, False, output="regression"), DirectionDecisions)
