"""captum's and Quantus' metrics take our attribution as it is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from bcosify.core.errors import TargetError
from bcosify.explain import Attribution, attribute
from captum.attr import InputXGradient
from captum.metrics import infidelity, infidelity_perturb_func_decorator, sensitivity_max
from torch import nn

import bcosify

from tiny import tiny_teacher

IMAGES = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def linear() -> nn.Module:
    """Of a linear model without constants, input times gradient is exact, so captum's own method is the same."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(108, 4, bias=False))


@infidelity_perturb_func_decorator(True)
def less(inputs: torch.Tensor) -> torch.Tensor:
    return inputs * (torch.rand(inputs.shape, generator=torch.Generator().manual_seed(1)) > 0.3)


@pytest.mark.parametrize("target", [2, [3, 1], torch.tensor([3, 1])], ids=["one", "list", "tensor"])
def test_captums_metrics_say_of_a_linear_model_what_they_say_of_input_times_gradient(linear, target):
    ours, theirs = Attribution(linear), InputXGradient(linear)
    given = torch.as_tensor(target)
    torch.testing.assert_close(ours.attribute(IMAGES, target=target), theirs.attribute(IMAGES, target=given))
    found = []
    for method in (ours, theirs):
        torch.manual_seed(0)
        chosen = target if method is ours else given
        found.append(sensitivity_max(method.attribute, IMAGES, target=chosen, n_perturb_samples=3))
    torch.testing.assert_close(*found)
    assert (found[0] > 0).all()
    wrong = infidelity(linear, less, IMAGES, ours.attribute(IMAGES, target=target), target=given, n_perturb_samples=3)
    assert (wrong < 1e-8).all()
    nothing = infidelity(linear, less, IMAGES, torch.zeros_like(IMAGES), target=given, n_perturb_samples=3)
    assert (nothing > 1e-4).all()


def test_a_student_goes_through_captum_whole():
    student = bcosify.convert(tiny_teacher("test_resnet"))
    ours, images = Attribution(student), torch.rand(2, 3, 64, 64)
    found = ours.attribute((images,), [3, 1])
    assert isinstance(found, tuple) and torch.equal(found[0], attribute(student.model, images, torch.tensor([3, 1])))
    assert torch.isfinite(sensitivity_max(ours.attribute, images, target=[3, 1], n_perturb_samples=2)).all()
    assert ours.multiplies_by_inputs and not ours.has_convergence_delta()


def test_quantus_function_is_the_same_map_of_the_module_it_passes(linear):
    other = nn.Sequential(nn.Flatten(), nn.Linear(108, 4))
    for images in (IMAGES, IMAGES.numpy(), IMAGES.double().numpy()):
        found = Attribution(linear)(model=other, inputs=images, targets=np.array([3, 1]), device="cpu")
        assert isinstance(found, np.ndarray)
        np.testing.assert_allclose(found, attribute(other, IMAGES, [3, 1]).numpy(), atol=1e-6)


def test_quantus_metrics_take_it():
    quantus = pytest.importorskip("quantus", reason="the extra `oracle` is not installed")
    student = bcosify.convert(tiny_teacher("test_resnet"))
    exact, images = Attribution(student), torch.rand(2, 3, 64, 64).numpy()
    data = {"model": exact.model, "x_batch": images, "y_batch": np.array([3, 1]), "device": "cpu"}
    sparse = quantus.Sparseness(abs=True, disable_warnings=True)(a_batch=None, explain_func=exact, **data)
    stable = quantus.MaxSensitivity(nr_samples=2, disable_warnings=True)(a_batch=None, explain_func=exact, **data)
    assert all(0 < value < 1 for value in sparse) and all(value > 0 for value in stable)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda ours: ours.attribute(IMAGES), "needs a target"),
        (lambda ours: ours.attribute((IMAGES, IMAGES), 1), "Leave further inputs out"),
        (lambda ours: ours.attribute(IMAGES, 1, additional_forward_args=(1,)), "Leave additional_forward_args out"),
        (lambda ours: ours.attribute(IMAGES, 1, baselines=0), "Leave baselines out"),
        (lambda ours: ours.attribute(IMAGES, [0, 1, 2]), "3 rows of classes for 2 pictures"),
        (lambda ours: Attribution("timm:resnet50"), "not a str"),
    ],
)
def test_what_captum_has_and_we_have_not_is_refused(linear, call, said):
    with pytest.raises(TargetError, match=said):
        call(Attribution(linear))
