"""Warm-up by trust: steps that make the student worse are taken back, and the rate halves; exact at resume."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
from bcosify.align.checks import check_recipe
from bcosify.align.recipe import Phase
from bcosify.align.trust import Trust
from bcosify.convert import load
from bcosify.core.errors import RecipeError
from torch import nn

from runs import CNN_PHASES, RECIPE, aligned

torch.set_num_threads(1)

# A good start, and a rate that destroys it.
WILD = Phase("end-to-end", 64, 0.05, b=(1.05, 1.05), beta=(1.0, 1.0), warmup=0.7, trust=0.1)


def losses(found: list[dict]) -> list[float]:
    return [row["loss"] for row in found if "loss" in row]


def toy(rate: float) -> tuple[nn.Module, torch.optim.Optimizer, Trust]:
    torch.manual_seed(0)
    model = nn.Linear(4, 1, bias=False)
    optimizer = torch.optim.Adam(model.parameters(), rate)
    trust = Trust(0.1, 8, [model], optimizer, lambda values: values)
    trust.begin()
    return model, optimizer, trust


def planned(rate: float, step: int) -> float:
    return rate * min(1.0, (step + 1) / 8)


def walked(rate: float, steps: int = 12) -> tuple[list[torch.Tensor], list[bool], Trust]:
    """Descends on |w - 1|²; the weights before every step, whether it was refused, and the trust."""
    model, optimizer, trust = toy(rate)
    seen, refused = [], []
    loss = lambda: (model.weight - 1).square().sum()  # noqa: E731
    for k in range(steps):
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] = trust.rate(k, planned(rate, k), rate)
        value = loss()
        value.backward()
        seen.append(model.weight.detach().clone())
        refused.append(trust.refuses(k, value, loss))
        if not refused[-1]:
            optimizer.step()
    return seen, refused, trust


def test_steps_that_make_it_worse_are_taken_back_with_the_optimizers_state():
    seen, refused, trust = walked(100.0)
    assert refused == [k in (4, 9) for k in range(12)] and trust.halvings == 2
    assert torch.equal(seen[5], seen[0]) and not torch.equal(seen[4], seen[0])
    # Adam's first step once more, at the first rate of a warm-up to half the peak.
    assert (seen[6] - seen[5]).abs().max().item() == pytest.approx(100 / 8 / 2, rel=1e-3)
    assert trust.rate(30, 100.0, 100.0) == 25 and trust.rate(30, 7.0, 100.0) == 7 / 4


def test_steps_that_teach_are_all_kept():
    seen, refused, trust = walked(0.01)
    assert not any(refused) and trust.halvings == 0 and trust.level < 1
    assert trust.kept == {}  # the warm-up is over
    model, optimizer, _ = toy(0.01)
    for k, expected in enumerate(seen):  # and are those that plain descent takes, bit for bit
        assert torch.equal(model.weight, expected)
        optimizer.param_groups[0]["lr"] = planned(0.01, k)
        optimizer.zero_grad()
        (model.weight - 1).square().sum().backward()
        optimizer.step()


def test_a_loss_that_is_no_number_is_taken_back_too():
    model, _, trust = toy(0.1)
    first = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.fill_(torch.nan)
    found = [trust.refuses(k, model.weight.sum(), lambda: model.weight.sum()) for k in range(1, 5)]
    assert found == [False, False, False, True] and torch.equal(model.weight, first)


def test_a_good_start_survives_a_rate_that_is_too_high(run, shards, tmp_path):
    trusting, plain = (
        aligned(run, shards, tmp_path / str(trust), dataclasses.replace(RECIPE, phases=(phase,)))
        for trust in (0.1, 0.0)
        for phase in (dataclasses.replace(WILD, trust=trust),)
    )
    ends = [found[-1]["held_out"]["centred_cosine"] for found in (trusting, plain)]
    assert ends[0] > ends[1] + 0.1
    rates = [row["learning_rate"] for row in trusting if "loss" in row]
    assert rates[-1] < 0.5 * [row["learning_rate"] for row in plain if "loss" in row][-1]


@pytest.mark.parametrize("pictures", [20, 24, 40])  # just after a decision, and inside a window
def test_resume_is_exact_inside_the_warm_up(run, shards, tmp_path, pictures):
    recipe = dataclasses.replace(RECIPE, phases=(WILD,), checkpoint_every=pictures, average=0.5, evaluate_every=64)
    whole = aligned(run, shards, tmp_path / "x", recipe)
    checkpoints = sorted((tmp_path / "x.run/checkpoints").iterdir())
    shutil.rmtree(tmp_path / "x")
    for path in checkpoints[1:]:
        shutil.rmtree(path)
    noted = json.loads((checkpoints[0] / "state.json").read_text())["trust"]
    assert noted["halvings"] >= 1
    assert aligned(run, shards, tmp_path / "x", recipe, resume=True) == whole


def test_with_a_rising_b_nothing_is_taken_back_at_a_low_rate(cnn, shards, tmp_path):
    """The loss rises with B, but no step is to blame."""
    phase = dataclasses.replace(CNN_PHASES[0], learning_rate=1e-4, warmup=0.5, ramp=0.5)
    found = [
        losses(aligned(cnn, shards, tmp_path / str(trust), dataclasses.replace(RECIPE, phases=(one,))))
        for trust in (0.1, 0.0)
        for one in (dataclasses.replace(phase, trust=trust),)
    ]
    assert found[0] == found[1]


def test_trust_that_cannot_act_is_refused(run):
    student = load(run)
    for changed, said in (
        ({"trust": -0.1}, "must be at least 0; got -0.1"),
        ({"warmup": 0.0}, "give the phase a warmup"),
    ):
        with pytest.raises(RecipeError, match=f"phases.0.trust: .*{said}"):
            recipe = dataclasses.replace(RECIPE, phases=(dataclasses.replace(WILD, **changed),))
            check_recipe(recipe, student, student.model)
