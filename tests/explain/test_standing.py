"""Probability, rank and decision beside a score."""

from __future__ import annotations

import pytest
import torch
from bcosify.convert.libraries import CLASSES, FEATURES, LABELS, REGRESSION
from bcosify.convert.output import OutputKind
from bcosify.explain.standing import probabilities_of, standing, standing_in_words

LOGITS = torch.tensor([[0.0, 2.0, -1.0, 2.5]])
NAMES = ("cat", "dog", "bus", "a very long name, $5")


def facts(index: int, kind: str = CLASSES) -> dict:
    output = OutputKind(kind, 4, NAMES)
    shares = probabilities_of(LOGITS, output)
    assert shares is not None
    return {"target": index, **standing(shares[0], index, output.name)}


def test_classes_that_exclude_each_other_have_a_softmax():
    one = facts(1)
    assert one["probability"] == pytest.approx(float(LOGITS[0].softmax(0)[1])) and (one["rank"], one["among"]) == (2, 4)
    assert one["decision"]["target"] == 3 and one["decision"]["label"] == NAMES[3]
    assert standing_in_words(one) == "probability 35%, rank 2 of 4; the model's decision is a very long name, $5 (58%)"
    assert standing_in_words(facts(3)) == "probability 58%, rank 1 of 4: this is the model's decision"


def test_labels_have_a_sigmoid_each():
    one = facts(1, LABELS)
    assert one["probability"] == pytest.approx(float(LOGITS[0, 1].sigmoid())) and one["rank"] == 2


@pytest.mark.parametrize("kind", [FEATURES, REGRESSION])
def test_what_decides_nothing_has_no_probabilities(kind):
    assert probabilities_of(LOGITS, OutputKind(kind, 4)) is None
    assert standing_in_words({"target": 0, "label": "output"}) == ""


def test_one_class_alone_has_no_softmax_but_a_sigmoid():
    assert probabilities_of(LOGITS[:, :1], OutputKind(CLASSES, 1)) is None
    assert probabilities_of(LOGITS[:, :1], OutputKind(LABELS, 1)) is not None


def test_ranks_hold_far_below_the_smallest_float32_probability():
    shares = probabilities_of(torch.tensor([[0.0, 1.0, 300.0]]), OutputKind(CLASSES, 3))
    assert shares is not None and [standing(shares[0], k)["rank"] for k in range(3)] == [3, 2, 1]


@pytest.mark.parametrize(
    ("share", "words"),
    [(0.0004, "under 0.1%"), (0.034, "3.4%"), (0.5, "50%"), (0.994, "99.4%"), (0.9999, "over 99.9%"), (1.0, "100%")],
)
def test_no_probability_is_rounded_to_certainty(share, words):
    said = standing_in_words({"target": 0, "probability": share, "rank": 1, "among": 1000})
    assert said == f"probability {words}, rank 1 of 1,000"
