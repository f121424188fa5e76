"""The pressure of the recipe: without it an exact start has nothing to learn, with it the first step has."""

from __future__ import annotations

import copy

import pytest
import torch
from bcosify.align.losses import class_divergence
from bcosify.align.objectives import OBJECTIVES, observe
from bcosify.align.recipe import load_recipe
from bcosify.convert import FaCnnConfig, convert, load_teacher, set_strength
from torch import Tensor


@pytest.fixture(scope="module")
def gradient():
    """gradient(DAMPENING) -> loss and gradient norm of the recipe's objective on real weights and photographs."""
    from skimage import data
    from torchvision.transforms.functional import to_pil_image

    teacher = load_teacher("bundled:efficientnet_lite0", image_size=112)
    student = convert(teacher, FaCnnConfig())
    transform = teacher.preprocess.transform()
    pictures = torch.stack([transform(to_pil_image(picture)) for picture in (data.chelsea(), data.coffee())])
    recipe = load_recipe("fa-cnn/cnn")
    (phase,) = recipe.phases

    def measure(dampening: float) -> tuple[float, float]:
        model = copy.deepcopy(student.model)
        set_strength(model, dampening=dampening)
        objective = OBJECTIVES[phase.objective](model, recipe)
        loss = objective(pictures, *observe(teacher.model, pictures, objective.taps))["total"]
        loss.backward()
        gradients: list[Tensor] = [p.grad for p in model.parameters() if p.grad is not None]
        return float(loss.detach()), float(torch.stack([g.norm() for g in gradients]).norm())

    return phase, measure


def test_the_first_step_of_the_recipe_has_a_gradient(gradient):
    phase, measure = gradient
    loss, size = measure(phase.dampening[0])
    assert loss > 1e-3 and size > 1e-2
    rest, round_off = measure(0.0)
    assert rest < 1e-6 and round_off < 1e-2 * size


def test_the_recipe_names_its_pressure_and_tightens():
    recipe = load_recipe("fa-cnn/cnn")
    (phase,) = recipe.phases
    assert "bound" in recipe.pressure and phase.dampening[0] < phase.dampening[1]


def test_class_divergence_is_that_of_probabilities():
    ours, theirs = torch.randn(3, 5), torch.randn(3, 5)
    p, q = theirs.softmax(1), ours.softmax(1)
    torch.testing.assert_close(class_divergence(ours, theirs), (p * (p / q).log()).sum(1).mean())
    assert class_divergence(theirs + 7, theirs).abs() < 1e-6
