"""The CoDA recipes: each names a pressure, and at its first step there is something to learn."""

from __future__ import annotations

import pytest
from bcosify.align.objectives import OBJECTIVES, observe
from bcosify.align.optimizers import scales
from bcosify.align.recipe import load_recipe
from bcosify.convert import CodaConfig, convert, load_teacher, set_strength
from bcosify.convert.layers import scheduled_layers
from bcosify.core.pictures import noise_pictures

from tiny import tiny_teacher


@pytest.mark.parametrize(("recipe", "name"), [("coda/cnn", "test_resnet"), ("coda/vit", "test_vit")])
def test_the_pressure_gives_a_gradient_at_the_first_step(recipe, name):
    loaded = load_recipe(recipe)
    teacher = tiny_teacher(name)
    student = convert(teacher, CodaConfig()).model.requires_grad_(True)
    phase = loaded.phases[0]
    objective = OBJECTIVES[phase.objective](student, loaded)
    pictures = noise_pictures(4, (64, 64), seed=3)
    calls, output = observe(teacher.model, pictures, objective.taps)
    objective.centre_on(calls, output)

    def gradients(beta: float) -> dict[str, float]:
        set_strength(student, beta=beta)
        student.zero_grad()
        objective(pictures, calls, output)["total"].backward()
        return {key: float(p.grad.norm()) for key, p in student.named_parameters() if p.grad is not None}

    start, exact = gradients(phase.beta[0]), gradients(1.0)
    assert loaded.pressure and phase.beta[0] < 1
    total = sum(value**2 for value in start.values()) ** 0.5
    assert total > 1e-3 and total > 100 * sum(value**2 for value in exact.values()) ** 0.5
    # The dynamic part has one of its own, although it starts at zero.
    assert all(value > 0 for key, value in start.items() if key.endswith(".mixing"))


def test_what_starts_at_zero_can_move():
    student = convert(load_teacher("timm:test_resnet", pretrained=False, image_size=64), CodaConfig()).model
    relative = dict(zip((name for name, _ in student.named_parameters()), scales(student, True), strict=True))
    sizes = {
        f"{name}.{key}": size for name, layer in scheduled_layers(student) for key, size in layer.natural_sizes.items()
    }
    assert sizes and all(relative[name] == size > 0.01 for name, size in sizes.items())
    assert set(scales(student, False)) == {1.0}
