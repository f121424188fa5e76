"""Which form of a kernel runs, and what a backward pass that is itself followed does."""

from __future__ import annotations

import pytest
import torch
from bcosify.convert.kernels.dispatch import gradients_of, lean
from torch import Tensor
from torch.autograd import forward_ad


def plain(x: Tensor, factor: float) -> Tensor:
    return x * factor


FORMS = {"plain": 1.0, "fused": 2.0, "inference": 3.0}


def form_of(x: Tensor) -> Tensor:
    """1, 2 or 3 for the form that runs."""
    run = lean(plain, lambda x, factor: x * factor * 2, lambda x, factor: x * factor * 3)
    return run(x, 1.0)


def compiled(x: Tensor) -> Tensor:
    return torch.compile(form_of, backend="aot_eager", fullgraph=True)(x)


def exported(x: Tensor) -> Tensor:
    class Model(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return form_of(x)

    return torch.export.export(Model(), (x,), strict=False).module()(x)


def in_dual_level(x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(form_of(forward_ad.make_dual(x, x))).primal


WAYS = {
    "eager": ("fused", form_of),
    "without gradients": ("inference", torch.no_grad()(form_of)),
    "inference mode": ("inference", torch.inference_mode()(form_of)),
    "compiled": ("plain", compiled),
    "exported": ("plain", exported),
    "vmap": ("plain", torch.func.vmap(form_of)),
    "vmap without gradients": ("plain", torch.no_grad()(torch.func.vmap(form_of))),
    "jvp": ("plain", lambda x: torch.func.jvp(form_of, (x,), (x,))[0]),
    "grad": ("plain", torch.func.grad(lambda x: form_of(x).sum())),
    "dual numbers": ("plain", in_dual_level),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_plain_form_runs_wherever_something_follows(way):
    form, run = WAYS[way]
    assert torch.equal(run(torch.ones(2)), torch.full((2,), FORMS[form]))


def test_gradients_of_a_formula_are_its_own_and_have_derivatives():
    x, y = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in "xy")

    def formula(x: Tensor, power: int, y: Tensor) -> tuple[Tensor, Tensor]:
        return x**power * y, x.sum()

    of_x, of_power, of_y = gradients_of(formula, (x, 3, y), (True, False, False), (torch.ones_like(x), None))
    torch.testing.assert_close(of_x, 3 * x**2 * y)
    assert of_power is None and of_y is None
    second = torch.autograd.grad(of_x.sum(), [x, y])
    torch.testing.assert_close(second, (6 * x * y, 3 * x**2))
    with torch.no_grad():
        constant, *_ = gradients_of(formula, (x, 3, y), (True, False, False), (None, torch.ones(()).double()))
    assert not constant.requires_grad and torch.equal(constant, torch.ones_like(x))
