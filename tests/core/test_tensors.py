"""Comparing tensors and state dicts."""

from __future__ import annotations

import torch
from bcosify.core.tensors import mismatches, relative_error, untied_state
from safetensors.torch import save
from torch import nn


def test_the_relative_error_is_of_the_largest():
    theirs = torch.tensor([[1.0, -4.0], [0.5, 2.0]])
    assert relative_error(theirs, theirs) == 0
    assert relative_error(theirs + torch.tensor([[0.0, 0.0], [-1.0, 0.5]]), theirs) == 0.25
    assert relative_error(torch.ones(2), torch.zeros(2)) > 1e9


def test_every_mismatch_is_a_line():
    wanted = {"head.weight": (2, 3), "head.bias": (2,), "norm.weight": (4,)}
    assert mismatches(wanted, dict(reversed(wanted.items()))) == []
    found = {"head.weihgt": (2, 3), "head.bias": (3,), "norm.weight": (4,)}
    assert mismatches(wanted, found) == [
        "missing head.weight",
        "unknown head.weihgt. Did you mean 'head.weight'?",
        "head.bias is (3,), should be (2,)",
    ]
    assert mismatches({}, {"a.b": (1,)}) == ["unknown a.b"]
    tensors = {name: torch.zeros(shape) for name, shape in found.items()}
    assert mismatches(wanted, tensors) == mismatches(wanted, found)


def test_tied_weights_are_written_once():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3, device="meta"))
    model[1].weight = model[0].weight
    model.register_buffer("empty", torch.zeros(0))
    model.register_buffer("other", torch.zeros(0))
    state = untied_state(model)
    assert list(state) == ["empty", "other", "0.weight", "0.bias", "1.bias", "2.weight", "2.bias"]
    save({name: tensor for name, tensor in state.items() if not tensor.is_meta})
    assert torch.equal(state["0.weight"], model[1].weight) and not state["0.weight"].requires_grad
