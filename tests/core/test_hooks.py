"""Hooks are gone when their block ends, whatever ends it."""

from __future__ import annotations

import pytest
import torch
from bcosify.core.hooks import captured_inputs, hooked
from torch import nn


@pytest.fixture
def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))


def hooks_of(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_hooks_see_and_change_what_goes_in_and_out(model):
    x, seen = torch.rand(2, 3), []
    before = [(model[0], lambda module, args: (args[0] * 0,))]
    after = [(model[0], lambda module, args, output: seen.append((args[0].clone(), output)))]
    after += [(model[2], lambda module, args, output: output + 1)]
    plain = model(torch.zeros(2, 3))
    with hooked(after, before=before):
        found = model(x)
    assert torch.equal(found, plain + 1) and not seen[0][0].any()
    assert hooks_of(model) == 0 and torch.equal(model(x * 0), plain)


def test_hooks_may_be_given_keywords():
    class Doubles(nn.Module):
        def forward(self, *, x):
            return 2 * x

    module, seen = Doubles(), []
    with hooked([(module, lambda module, args, kwargs, output: seen.append((args, kwargs, output)))], with_kwargs=True):
        module(x=3)
    assert seen == [((), {"x": 3}, 6)]


def test_hooks_are_gone_after_an_error_inside(model):
    with pytest.raises(RuntimeError), hooked((layer, lambda module, args, output: None) for layer in model):
        assert hooks_of(model) == 3
        model(torch.rand(2, 5))
    assert hooks_of(model) == 0


def test_hooks_are_gone_where_not_all_could_be_made(model):
    pairs = ((model.get_submodule(name), lambda module, args, output: None) for name in ("0", "nowhere"))
    with pytest.raises(AttributeError), hooked(pairs):
        pytest.fail("entered")
    assert hooks_of(model) == 0


def test_inputs_are_captured_in_their_order(model):
    first, second = torch.rand(2, 3), torch.rand(1, 3)
    with captured_inputs(model[2]) as inputs:
        assert inputs == []
        model(first)
        model(second)
    model(first)
    assert len(inputs) == 2 and hooks_of(model) == 0
    for x, found in zip((first, second), inputs, strict=True):
        assert torch.equal(model[2](found), model(x))
