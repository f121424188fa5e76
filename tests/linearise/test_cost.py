"""What explanation mode does without must not change what it says; and it keeps nothing behind."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.nn.functional as F
from bcosify.convert import convert, set_strength
from bcosify.explain import ClassTarget, explain, gated
from bcosify.linearise.mode import Linearised, gated_by
from bcosify.linearise.rules import attention
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


def gradient(function, x: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The value of `function` in explanation mode, and the gradient of a random score of it."""
    with Linearised() as mode:
        out = function(mode.follow(x))
        weights = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(seed))
        score = (out * weights).sum()
    (found,), _ = mode.pull(score)
    return out.detach(), found


def autograd(function, x: Tensor, seed: int = 0) -> Tensor:
    leaf = x.clone().requires_grad_()
    out = function(leaf)
    weights = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(seed))
    return torch.autograd.grad((out * weights).sum(), leaf)[0]


@pytest.mark.parametrize("weights", [1, 7, 2**20])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (1, 1, 4), (2, 2, 2, 9, 4)])
def test_attention_pulls_back_through_its_weights_part_by_part(monkeypatch, weights, scale, shape):
    monkeypatch.setattr(attention, "ENTRIES", weights)
    query, key, value = torch.randn(3, *shape, dtype=torch.float64)
    out, found = gradient(lambda v: F.scaled_dot_product_attention(query, key, v, scale=scale), value)
    assert torch.equal(out, F.scaled_dot_product_attention(query, key, value, scale=scale))
    torch.testing.assert_close(
        found, autograd(lambda v: F.scaled_dot_product_attention(query, key, v, scale=scale), value)
    )


def test_attention_with_a_mask_or_causal_is_torchs_own():
    query, key, value = torch.randn(3, 2, 3, 5, 4, dtype=torch.float64)
    mask = torch.randn(5, 5, dtype=torch.float64)
    for options in ({"attn_mask": mask}, {"is_causal": True}):
        _, found = gradient(lambda v, o=options: F.scaled_dot_product_attention(query, key, v, **o), value)
        torch.testing.assert_close(
            found, autograd(lambda v, o=options: F.scaled_dot_product_attention(query, key, v, **o), value)
        )


@pytest.mark.parametrize(
    "used", [slice(0, 3), slice(3, 6), slice(6, 9), slice(1, 8), slice(0, 9), slice(4, 5), slice(0, 0)]
)
@pytest.mark.parametrize("shape", [(2, 5), (2, 4, 5), (5,)])
def test_a_projection_of_which_a_part_is_read_pulls_back_that_part(used, shape):
    weight, bias = torch.randn(9, 5, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    x = torch.randn(shape, dtype=torch.float64)

    def part(x: Tensor) -> Tensor:
        mask = torch.zeros(9, dtype=torch.float64)
        mask[used] = 1
        return F.linear(x, weight, bias) * mask

    _, found = gradient(part, x)
    torch.testing.assert_close(found, autograd(part, x))


@pytest.mark.parametrize("shape", [(6,), (3, 6)])
@pytest.mark.parametrize("dressed", [True, False])
def test_layer_norm_is_linear_but_for_its_spread(shape, dressed):
    x = torch.randn(4, 3, 6, dtype=torch.float64)
    weight, bias = torch.randn(2, *shape, dtype=torch.float64) if dressed else (None, None)
    dims = tuple(range(-len(shape), 0))
    spread = (x.var(dims, correction=0, keepdim=True) + 1e-3).sqrt()

    def by_hand(x: Tensor) -> Tensor:
        out = (x - x.mean(dims, keepdim=True)) / spread
        return out if weight is None else out * weight + bias

    out, found = gradient(lambda x: F.layer_norm(x, shape, weight, bias, 1e-3), x)
    assert torch.equal(out, F.layer_norm(x, shape, weight, bias, 1e-3))
    torch.testing.assert_close(found, autograd(by_hand, x))


def test_a_gate_that_is_at_hand_is_the_quotient():
    calls = []

    def apart(x: Tensor, power: float) -> tuple[Tensor, Tensor]:
        calls.append(x)
        factor = x.abs().pow(power)
        return factor, x * factor

    @gated_by(apart)
    def handed(x: Tensor, power: float) -> Tensor:
        return x * x.abs().pow(power)

    @gated
    def divided(x: Tensor, power: float) -> Tensor:
        return x * x.abs().pow(power)

    x = torch.randn(3, 7, dtype=torch.float64)
    x[0] = 0
    for ours, theirs in zip(gradient(lambda x: handed(x, 1.5), x), gradient(lambda x: divided(x, 1.5), x), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert len(calls) == 1
    assert torch.equal(handed(x, 1.5), x * x.abs().pow(1.5))
    with Linearised() as mode:
        mode.follow(x)
        assert torch.equal(handed(x, 1.5), x * x.abs().pow(1.5))  # not moving: nothing to gate


def test_padding_is_linear_unless_it_fills_in_a_number():
    x = torch.randn(2, 3, 4, 4)
    for options, constant in (
        ({}, False),
        ({"value": 0.0}, False),
        ({"mode": "reflect"}, False),
        ({"value": 2.0}, True),
    ):
        with Linearised() as mode:
            out = F.pad(mode.follow(x), (1, 1, 1, 1), **options)
        (found,), shares = mode.pull(out.sum())
        assert bool(shares) is constant
        total = (x * found).flatten(1).sum(1) + sum(shares.values(), torch.zeros(2))
        torch.testing.assert_close(total, F.pad(x, (1, 1, 1, 1), **options).flatten(1).sum(1))


@pytest.fixture(scope="module")
def student() -> nn.Module:
    model = convert("bundled:efficientnet_lite0").model
    set_strength(model, b=2, beta=0)
    return model


def test_many_targets_at_once_are_each_alone(student):
    """The last of several backward passes writes over what the graph kept; no other may see that."""
    pictures = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    together = explain(student, pictures, ClassTarget([3, 5, 7]))
    for k, target in enumerate((3, 5, 7)):
        alone = explain(student, pictures, ClassTarget(target))
        assert torch.equal(alone.encoded_gradients[:, 0], together.encoded_gradients[:, k])
        assert torch.equal(alone.scores[:, 0], together.scores[:, k])


def test_a_graph_that_was_pulled_for_the_last_time_refuses():
    with Linearised() as mode:
        score = F.gelu(mode.follow(torch.randn(2, 3))).sum()
    mode.pull(score, retain_graph=True)
    mode.pull(score)
    with pytest.raises(RuntimeError, match="second time"):
        mode.pull(score)


def test_a_forward_pass_that_nobody_explains_keeps_nothing(student):
    kept = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor), lambda tensor: tensor), torch.no_grad():
        output = student(torch.randn(1, 3, 64, 64))
    assert not kept and output.grad_fn is None


def test_what_is_held_does_not_grow_with_the_pictures(student):
    """Tensors alive after each of several batches, of which nothing but a number is taken."""

    def alive() -> int:
        gc.collect()
        return sum(isinstance(thing, Tensor) for thing in gc.get_objects())

    held, sums = [], []
    for batch in range(5):
        pictures = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(batch))
        explanation = explain(student, pictures, ClassTarget([0, 1]))
        sums.append(float(explanation.contributions.sum()))
        del pictures, explanation
        held.append(alive())
    # What an earlier test left may go with the first batch; after it not one tensor more or less.
    assert held[1] <= held[0] and held[2:] == held[1:2] * 3 and len(set(sums)) == 5


def test_no_graph_outlives_its_explanation(student):
    """Without the garbage collector: a cycle would keep a whole batch until it happens to run."""
    gc.collect()
    gc.disable()
    try:
        before = sum(isinstance(thing, Tensor) for thing in gc.get_objects())
        explanation = explain(student, torch.randn(1, 3, 48, 48), ClassTarget(0))
        assert not explanation.contributions.requires_grad
        del explanation
        assert sum(isinstance(thing, Tensor) for thing in gc.get_objects()) <= before
    finally:
        gc.enable()
