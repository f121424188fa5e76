"""torch.compile block by block: same numbers, no new program as B and beta move, taps and names as they were."""

from __future__ import annotations

import contextlib

import pytest
import torch
from bcosify.align import compiling
from bcosify.align.compiling import compile_blocks, eager, make_eager
from bcosify.align.objectives import OBJECTIVES, observe
from bcosify.align.recipe import Phase, Recipe
from bcosify.convert import Student, convert, load_teacher, set_strength
from bcosify.convert.layers import batch_statistics, recording, reference_gains
from bcosify.explain import TopTarget, explain
from torch import nn
from torch._dynamo.utils import counters

RECIPE = Recipe("B rises", 64, 4, (Phase("end-to-end", 40, 1e-3, b=(1.0, 2.0), beta=(1.0, 0.0)),))


@pytest.fixture(autouse=True)
def traced(monkeypatch):
    """Dynamo and autograd's graph capture, without the wait for a C++ compiler."""
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def converted(name: str) -> Student:
    torch.manual_seed(0)
    return convert(load_teacher(f"timm:{name}", pretrained=False, image_size=64))


def step(objective: nn.Module, teacher: nn.Module, pictures: torch.Tensor, statistics: bool):
    """Losses and gradients by name."""
    student = objective.student
    student.zero_grad()
    calls, output = observe(teacher, pictures, objective.taps)
    with batch_statistics(student) if statistics else contextlib.nullcontext():
        losses = objective(pictures, calls, output)
        losses["total"].backward()
    grads = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    return {name: loss.detach() for name, loss in losses.items()}, grads


@pytest.mark.parametrize(
    ("name", "objective", "programs"),
    [("test_vit", "end-to-end", 1), ("test_vit", "block-local", 1), ("test_resnet", "end-to-end", 4)],
)
def test_a_ramp_of_b_and_beta_needs_one_program_a_kind_of_block(name, objective, programs):
    """A ViT's blocks are of one kind, the residual blocks of the CNN of four; the compiled teacher's of as many."""
    plain, compiled, teacher = (converted(name).model for _ in range(3))
    ours, theirs = (OBJECTIVES[objective](model, RECIPE) for model in (compiled, plain))
    assert compile_blocks(compiled, ours.taps, moving=True)
    compile_blocks(teacher, ours.taps, moving=False)
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    torch.manual_seed(1)
    for k in range(1, 9, 2):  # eighths are exact in float32, so buffers and their rounded mirrors agree
        pictures = torch.randn(2, 3, 64, 64)
        for model in (compiled, plain):
            set_strength(model, 1 + k / 8, 1 - k / 8)
        (losses, grads), (wanted, expected) = (step(o, teacher, pictures, "resnet" in name) for o in (ours, theirs))
        for key, loss in wanted.items():
            assert losses[key] == pytest.approx(float(loss), rel=1e-5, abs=1e-6)
        size = max(float(gradient.abs().max()) for gradient in expected.values())
        assert all(float((grads[key] - expected[key]).abs().max()) < 1e-5 * size for key in expected)
    assert counters["stats"]["unique_graphs"] == 2 * programs
    assert not counters["graph_break"]
    for key, tensor in plain.state_dict().items():
        assert torch.allclose(compiled.state_dict()[key], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_reference_gains_and_carriers_follow_in_compiled_blocks(name):
    """The teacher records in its compiled blocks, the student reads there; a ramp makes no new program."""
    plain, compiled, teacher, reference = (converted(name).model for _ in range(4))
    ours, theirs = (OBJECTIVES["end-to-end"](model, RECIPE) for model in (compiled, plain))
    compile_blocks(compiled, ours.taps, moving=True)
    compile_blocks(teacher, ours.taps, moving=False)
    torch.manual_seed(1)
    programs = []
    for k in range(1, 5):
        pictures = torch.randn(2, 3, 64, 64)
        found = []
        for objective, model, guide in ((ours, compiled, teacher), (theirs, plain, reference)):
            set_strength(model, 1 + k / 8, 1 - k / 8, carry=k / 8, window=3)
            model.zero_grad()
            with reference_gains(model, guide):
                with recording(guide):
                    calls, output = observe(guide, pictures, objective.taps)
                losses = objective(pictures, calls, output)
                losses["total"].backward()
            losses = {key: float(loss.detach()) for key, loss in losses.items()}
            found.append((losses, {key: p.grad for key, p in model.named_parameters() if p.grad is not None}))
        (losses, grads), (wanted, expected) = found
        for key, loss in wanted.items():
            assert losses[key] == pytest.approx(loss, rel=1e-4, abs=1e-6)
        size = max(float(gradient.abs().max()) for gradient in expected.values())
        assert all(float((grads[key] - expected[key]).abs().max()) < 1e-4 * size for key in expected)
        programs.append(counters["stats"]["unique_graphs"])
    assert len(set(programs)) == 1 and programs[0] > 0
    assert not counters["graph_break"]


def test_taps_see_each_steps_own_tensors_and_blocks_with_taps_inside_stay():
    model = converted("test_vit").model
    inner = "blocks.1.attn.proj"
    names = compile_blocks(model, ("blocks.0", inner), moving=False)
    assert "blocks.0" in names and "blocks.1" not in names
    for seed in range(2):
        torch.manual_seed(seed)
        pictures = torch.randn(1, 3, 64, 64)
        calls, _ = observe(model, pictures, ("blocks.0", inner))
        with eager(model):
            wanted, _ = observe(model, pictures, ("blocks.0", inner))
        for name in calls:
            assert torch.allclose(calls[name].output, wanted[name].output, rtol=1e-5, atol=1e-6)


def test_explanations_of_a_student_in_training_are_those_of_the_plain_one():
    student = converted("test_vit")
    set_strength(student.model, 1.5, 0.5)
    pictures = torch.randn(1, 3, 64, 64)
    wanted = explain(student.model, pictures, TopTarget(1))
    compile_blocks(student.model, (), moving=True)
    student.model(pictures)
    with eager(student.model):
        found = explain(student.model, pictures, TopTarget(1))
    assert torch.equal(found.contributions, wanted.contributions)
    assert all("forward" in vars(block) for block in student.model.blocks)
    make_eager(student.model)
    assert not any("forward" in vars(module) for module in student.model.modules())
    assert torch.equal(explain(student.model, pictures, TopTarget(1)).contributions, wanted.contributions)
