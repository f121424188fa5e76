"""Perturbation metrics on models that are linear, where every answer is arithmetic; and against Quantus."""

from __future__ import annotations

import pytest
import torch
from bcosify.evaluate.baselines import find_method, maps_of
from bcosify.evaluate.decisions import ClassDecisions
from bcosify.evaluate.metrics import perturbation
from bcosify.evaluate.metrics.perturbation import (
    FILLS,
    FRACTIONS,
    area,
    average_drop,
    infidelity,
    masked_confidence,
    pooled,
    ranks,
    regions,
    removal_curve,
    sensitivity_n,
    subset_drops,
)
from bcosify.evaluate.metrics.randomisation import cascade, rank_correlation
from bcosify.evaluate.suite import Explained, Pictures, Settings
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from toys import Linear


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Share(nn.Module):
    """Two logits whose softmax is the share of the picture that is white, and the rest."""

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        white = (pictures > 0).float().mean((1, 2, 3)).clamp(1e-6, 1 - 1e-6)
        return torch.stack([white, 1 - white], 1).log()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 7))
def test_regions_tile_any_picture_and_hold_their_mean(height, width, unit):
    number, total = regions((height, width), unit)
    assert number.unique().tolist() == list(range(total))
    maps = draw(2, height, width)
    wanted = torch.stack([maps[:, number == k].mean(1) for k in range(total)], 1)
    torch.testing.assert_close(pooled(maps, unit), wanted, atol=1e-5, rtol=1e-5)


def test_ties_are_not_broken_by_position():
    places = torch.stack([ranks(torch.zeros(1, 100), "most", seed)[0] for seed in range(20)]).float()
    assert places.sort(1).values.unique(dim=0).shape[0] == 1  # each a permutation
    assert (places.mean(0) - 49.5).abs().max() < 30
    assert ranks(torch.tensor([[3.0, 1, 2]]), "most").tolist() == [[0, 2, 1]]
    assert ranks(torch.tensor([[3.0, 1, 2]]), "least").tolist() == [[2, 0, 1]]


@pytest.mark.parametrize("unit", [1, 2])
def test_removal_curves_in_closed_form(subject_of, unit):
    """The left half is white. A map that knows it loses everything in the first half, and nothing the other way."""
    images = torch.full((3, 3, 8, 8), -1.0)
    images[..., :4] = 1
    subject = subject_of(Share(), mean=(0.5,) * 3, std=(0.5,) * 3)  # so that grey is 0, and not white
    decisions = ClassDecisions(torch.zeros(3, dtype=torch.long))
    maps = images[:, 0]
    fractions = (0.0, 0.25, 0.5, 0.75, 1.0)
    options = {"fractions": fractions, "unit": unit}
    most = removal_curve(subject, images, maps, decisions, "most", **options)
    least = removal_curve(subject, images, maps, decisions, "least", **options)
    torch.testing.assert_close(most, torch.tensor([0.5, 0.25, 0, 0, 0]).expand(3, -1), atol=1e-5, rtol=0)
    torch.testing.assert_close(least, torch.tensor([0.5, 0.5, 0.5, 0.25, 0]).expand(3, -1), atol=1e-5, rtol=0)
    torch.testing.assert_close(area(most, fractions), torch.full((3,), 0.125), atol=1e-5, rtol=0)
    torch.testing.assert_close(area(least, fractions), torch.full((3,), 0.375), atol=1e-5, rtol=0)
    wrong = removal_curve(subject, images, -maps, decisions, "most", **options)
    torch.testing.assert_close(wrong, least)


def test_curves_do_not_depend_on_the_batch_size(subject_of):
    images, maps = draw(5, 3, 9, 7), draw(5, 9, 7, seed=1)
    decisions = ClassDecisions(torch.arange(5) % 3)
    model = Linear(draw(3, 3, 9, 7, seed=2))
    curves = [
        removal_curve(subject_of(model, batch_size=size), images, maps, decisions, "most", unit=2)
        for size in (1, 4, 64)
    ]
    torch.testing.assert_close(curves[0], curves[1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(curves[0], curves[2], atol=1e-5, rtol=1e-5)


def test_methods_of_equal_order_share_their_passes(subject_of):
    seen = []

    class Counted(Share):
        def forward(self, pictures):
            seen.append(len(pictures))
            return super().forward(pictures)

    subject, images, maps = subject_of(Counted()), draw(3, 3, 8, 8), draw(3, 8, 8, seed=1)
    decisions = ClassDecisions(torch.zeros(3, dtype=torch.long))
    task = Explained(
        Pictures(images, ("a", "b", "c")), {}, decisions, {"teacher": subject}, {}, unit=2, settings=Settings()
    )

    def curve(maps, order, **changes):
        return perturbation._curve(task, "teacher", maps, order, **{"unit": 2, "fill": "grey", **changes})

    first, once = curve(maps, "most"), sum(seen)
    assert once == 3 * len(FRACTIONS)
    assert torch.equal(curve(7 * maps, "most"), first) and sum(seen) == once
    other = torch.cat([maps[:2], -maps[2:]])  # one picture of another order is another curve
    others = [(other, "most", "grey"), (maps, "least", "grey"), (maps, "most", "blur")]
    for number, (shown, way, fill) in enumerate(others, 2):
        found = curve(shown, way, fill=fill)
        assert sum(seen) == number * once
        alone = removal_curve(subject_of(Share()), images, shown, decisions, way, unit=2, fill=fill)
        torch.testing.assert_close(found, alone)


@pytest.mark.parametrize("fill", FILLS)
def test_fills_are_colours_that_pictures_have(subject_of, fill):
    subject = subject_of(nn.Identity())
    images = subject.normalised(torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    filled = FILLS[fill](subject, images)
    shown = subject.colours(filled)
    assert filled.shape == images.shape and shown.min() >= -1e-5 and shown.max() <= 1 + 1e-5
    expected = {
        "grey": 0.5,
        "mean": torch.tensor(subject.mean).view(3, 1, 1),
        "complement": 1 - subject.colours(images),
    }
    if fill in expected:
        torch.testing.assert_close(shown, torch.as_tensor(expected[fill]).expand_as(shown), atol=1e-5, rtol=1e-5)
    else:
        assert shown.std() < 0.5 * subject.colours(images).std()


def test_true_contributions_of_a_linear_model_are_perfectly_faithful(subject_of):
    """With a fill of 0 (mean colour), score(x) - score(x without S) is the sum of the contributions in S."""
    images, decisions = draw(4, 3, 8, 8), ClassDecisions(torch.tensor([0, 1, 2, 1]))
    subject = subject_of(Linear(draw(3, 3, 8, 8, seed=1), draw(3, seed=2)))
    maps = maps_of(find_method("explanation"), subject, images, decisions)
    subsets, drops = subset_drops(subject, images, decisions, unit=2, fill="mean", count=6)
    assert subsets.shape == (4, 3, 6, 16) and subsets.sum(-1).unique(dim=1).shape[1] == 3
    torch.testing.assert_close(sensitivity_n(maps, subsets, drops, 2), torch.ones(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(sensitivity_n(-maps, subsets, drops, 2), -torch.ones(4), atol=1e-4, rtol=0)
    found = infidelity(maps, subsets, drops, 2)
    assert found["infidelity"].max() < 1e-6 and found["scaled_infidelity"].max() < 1e-4
    assert infidelity(7 * maps, subsets, drops, 2)["scaled_infidelity"].max() < 1e-4
    nothing = infidelity(0 * maps, subsets, drops, 2)
    torch.testing.assert_close(nothing["infidelity"], drops.flatten(1).square().mean(1))
    assert nothing["scaled_infidelity"].tolist() == [1] * 4
    assert sensitivity_n(torch.ones_like(maps), subsets, drops, 2).tolist() == [0] * 4


def test_infidelity_is_captums(subject_of):
    """The same removals through captum's infidelity."""
    captum = pytest.importorskip("captum.metrics")
    images, decisions = draw(2, 3, 4, 4), ClassDecisions(torch.tensor([0, 1]))
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.ReLU(), nn.Linear(8, 3))
    torch.manual_seed(0)
    subject = subject_of(model)
    maps = draw(2, 4, 4, seed=5)
    subsets, drops = subset_drops(subject, images, decisions, unit=1, fill="mean", shares=(0.5,), count=10)
    turn = iter(range(10))

    def perturb(inputs, baselines):
        gone = subsets[:, 0, next(turn)].view(2, 1, 4, 4).expand(-1, 3, -1, -1)
        # captum divides by what was taken away and multiplies by the attributions: a removed pixel counts once.
        return inputs.where(~gone, baselines)

    per_channel = (maps / 3)[:, None].expand(-1, 3, -1, -1)
    theirs = captum.infidelity(
        lambda x: decisions.scores(model(x)),
        captum.infidelity_perturb_func_decorator(True)(perturb),
        images,
        per_channel,
        baselines=torch.zeros_like(images),
        n_perturb_samples=10,
        max_examples_per_batch=2,
    )
    torch.testing.assert_close(infidelity(maps, subsets, drops, 1)["infidelity"], theirs, atol=1e-5, rtol=1e-4)


def test_average_drop_gain_and_increase():
    found = average_drop(torch.tensor([0.8, 0.5, 0.5]), torch.tensor([0.2, 0.75, 0.5]))
    torch.testing.assert_close(found["average_drop"], torch.tensor([0.75, 0, 0]))
    torch.testing.assert_close(found["average_gain"], torch.tensor([0, 0.5, 0]))
    assert found["increase"].tolist() == [0, 1, 0]


def test_masked_pictures_keep_what_the_map_marks_and_are_black_elsewhere(subject_of):
    subject = subject_of(Share(), mean=(0.5,) * 3, std=(0.5,) * 3)
    images = torch.ones(1, 3, 4, 4)
    maps = torch.zeros(1, 4, 4)
    maps[0, 0] = 5
    decisions = ClassDecisions(torch.zeros(1, dtype=torch.long))
    assert float(masked_confidence(subject, images, maps, decisions)) == pytest.approx(0.25)


# ---------------------------------------------------------------------------------------------------- randomisation


def test_the_cascade_shuffles_from_the_top_and_leaves_the_model_alone(tiny_subject):
    subject = tiny_subject("test_vit")
    before = {name: value.clone() for name, value in subject.model.state_dict().items()}
    states = [(share, {k: v.clone() for k, v in one.model.state_dict().items()}) for share, one in cascade(subject, 2)]
    assert [share for share, _ in states] == [0.5, 1]
    changed = {name for name, value in states[0][1].items() if not torch.equal(value, before[name])}
    first, last = "blocks.0.", f"blocks.{len(subject.model.blocks) - 1}."
    assert any(name.startswith(last) for name in changed) and not any(name.startswith(first) for name in changed)
    assert any(not torch.equal(v, before[k]) for k, v in states[1][1].items() if k.startswith("patch_embed"))
    assert all(torch.equal(value, before[name]) for name, value in subject.model.state_dict().items())
    for name, value in states[1][1].items():  # the same numbers in another order
        torch.testing.assert_close(value.flatten().float().sort().values, before[name].flatten().float().sort().values)


def test_rank_correlation_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    maps, others = draw(3, 8, 8), draw(3, 8, 8, seed=1)
    found = rank_correlation(maps, others, 2)
    for i in range(3):
        wanted = stats.spearmanr(pooled(maps, 2)[i], pooled(others, 2)[i]).statistic
        assert float(found[i]) == pytest.approx(wanted, abs=1e-6)
    torch.testing.assert_close(rank_correlation(maps, maps.exp(), 1), torch.ones(3, dtype=torch.float64))


# ---------------------------------------------------------------------------------------------------------- Quantus


@pytest.mark.parametrize("unit", [16, 4])
def test_deletion_is_quantus_pixel_flipping(subject_of, unit):
    """Most important first, `unit` pixels a step, grey fill: the same confidences as Quantus'."""
    quantus = pytest.importorskip("quantus", reason="the extra `oracle` is not installed")
    import numpy as np

    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, 3)).eval()
    images, maps = draw(4, 1, 8, 8), draw(4, 8, 8, seed=1)
    classes = torch.tensor([0, 1, 2, 0])
    metric = quantus.PixelFlipping(
        features_in_step=unit,
        perturb_baseline=0.0,
        abs=False,
        normalise=False,
        disable_warnings=True,
        display_progressbar=False,
    )
    theirs = metric(
        model=model, x_batch=images.numpy(), y_batch=classes.numpy(), a_batch=maps[:, None].numpy(), softmax=True
    )
    subject = subject_of(model, mean=(0.5,), std=(0.5,))
    steps = 64 // unit
    fractions = tuple((k + 1) / steps for k in range(steps))
    ours = removal_curve(subject, images, maps, ClassDecisions(classes), "most", fractions=fractions, unit=1)
    np.testing.assert_allclose(ours.numpy(), np.asarray(theirs), atol=1e-5)
