"""Probes on features whose classes are apart, on noise, and on one text a class."""

from __future__ import annotations

import pytest
import torch
from bcosify.core.errors import NotApplicable
from bcosify.evaluate.metrics.probes import knn, linear_probe, split_labelled, zero_shot

LABELS = torch.arange(120) % 4


def features(spread: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    centres = 3 * torch.eye(4, 10)
    return centres[LABELS] + spread * torch.randn(120, 10, generator=generator)


@pytest.mark.parametrize("probe", [knn, linear_probe])
def test_classes_that_are_apart_are_told_apart_and_noise_is_chance(probe):
    split = split_labelled(LABELS)
    assert probe(features(0.1), LABELS, split).correct.float().mean() == 1
    noise = features(0.0) * 0 + torch.randn(120, 10, generator=torch.Generator().manual_seed(1))
    assert probe(noise, LABELS, split).correct.float().mean() < 0.6


def test_parts_share_no_picture_hold_every_class_and_are_drawn_by_the_seed():
    split = split_labelled(LABELS, seed=1)
    parts = (split.train, split.holdout, split.test)
    assert sorted(torch.cat(parts).tolist()) == list(range(120))
    assert all(set(LABELS[part].tolist()) == {0, 1, 2, 3} for part in parts)
    assert [len(part) for part in parts] == [64, 28, 28]
    assert torch.equal(split.test, split_labelled(LABELS, seed=1).test)


def test_the_test_part_is_not_looked_at_for_any_choice():
    """Whatever the labels of the test pictures are, the same k and weight decay are chosen."""
    split = split_labelled(LABELS)
    wrong = LABELS.clone()
    wrong[split.test] = (wrong[split.test] + 1) % 4
    for probe in (knn, linear_probe):
        ours, theirs = probe(features(1.5), LABELS, split), probe(features(1.5), wrong, split)
        assert ours.chosen == theirs.chosen and not bool((ours.correct & theirs.correct).any())


def test_too_few_pictures_a_class_are_said():
    with pytest.raises(NotApplicable, match="1 classes have four pictures"):
        split_labelled(torch.tensor([0, 0, 0, 0, 1, 1, 2]))


def test_the_linear_probe_is_scikit_learns():
    linear_model = pytest.importorskip("sklearn.linear_model")
    split, x = split_labelled(LABELS), features(1.0)
    found = linear_probe(x, LABELS, split)
    fitted = torch.cat([split.train, split.holdout])
    mean, spread = x[fitted].mean(0), x[fitted].std(0)
    # scikit-learn's C weighs the sum of losses, ours the mean.
    oracle = linear_model.LogisticRegression(C=1 / (found.chosen * len(fitted)), max_iter=1000)
    oracle.fit(((x - mean) / spread)[fitted].numpy(), LABELS[fitted].numpy())
    wanted = oracle.predict(((x - mean) / spread)[split.test].numpy()) == LABELS[split.test].numpy()
    assert (found.correct.numpy() == wanted).mean() > 0.95


def test_zero_shot():
    texts = torch.eye(4, 10)
    assert zero_shot(features(0.1), texts, LABELS).all()
    assert not zero_shot(features(0.1), texts, (LABELS + 1) % 4).any()
