"""The teacher's help inside the student: mixtures of blocks, inputs of one's own; and what cannot have it."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bcosify.align.checks import check_recipe
from bcosify.align.objectives import OBJECTIVES, observe
from bcosify.align.paths import Draw, blended, with_own_inputs
from bcosify.align.recipe import dump
from bcosify.align.schedule import arrived, share_at
from bcosify.convert import convert, load, load_teacher, set_strength
from bcosify.convert.blocks import blocks_of
from bcosify.convert.taps import Call, find_blocks
from bcosify.core.errors import RecipeError
from torch import nn

from runs import CNN_PHASES, PHASES, RECIPE, aligned, asking, converted, rows

torch.set_num_threads(1)

BLEND = dataclasses.replace(PHASES[1], pictures=20, blend=(1.0, 0.0), ramp=0.8)
OWN = dataclasses.replace(PHASES[0], pictures=20, own_inputs=(0.2, 0.8), ramp=0.8)


@pytest.fixture(params=["test_vit", "test_resnet"])
def pair(request) -> tuple[nn.Module, nn.Module]:
    """A student at B = 2 without biases, and its teacher."""
    torch.manual_seed(0)
    teacher = load_teacher(f"timm:{request.param}", pretrained=False, image_size=64)
    student = convert(teacher).model
    set_strength(student, 2.0, 0.0)
    return student, teacher.model.eval().requires_grad_(False)


def pictures(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def test_shares_move_in_a_straight_line_and_patience_waits_for_them():
    assert [share_at(BLEND, "blend", k, 10) for k in (0, 4, 8, 9)] == [1.0, 0.5, 0.0, 0.0]
    assert share_at(PHASES[1], "blend", 3, 10) == 0 == share_at(PHASES[0], "own_inputs", 3, 10)
    assert not arrived(BLEND, 7, 10) and arrived(BLEND, 8, 10) and arrived(PHASES[1], 0, 10)


def test_blocks_give_mixtures_of_both_on_the_students_input(pair):
    student, teacher = pair
    name = find_blocks(student)[-1]
    with blended(student, teacher, 0.25):
        calls, _ = observe(student, pictures(), (name,))
    args, kwargs = calls[name].args, calls[name].kwargs
    with torch.no_grad():
        ours, theirs = (model.get_submodule(name)(*args, **kwargs) for model in pair)
    assert not torch.allclose(ours, theirs)
    assert torch.allclose(calls[name].output, 0.75 * ours + 0.25 * theirs, atol=1e-5)


def test_at_a_share_of_one_the_blocks_are_the_teachers_and_every_parameter_still_has_a_gradient(pair):
    student, teacher = pair
    first, last = find_blocks(student)[0], find_blocks(student)[-1]
    loss = OBJECTIVES["end-to-end"](student, RECIPE)
    with blended(student, teacher, 1.0):
        found = loss(pictures(), *observe(teacher, pictures(), loss.taps))
        found["total"].backward()
        calls, _ = observe(student, pictures(), (first, last))
    with torch.no_grad():
        expected = calls[first].output
        for name in find_blocks(student)[1:]:
            expected = teacher.get_submodule(name)(expected)
    if len(find_blocks(student)) > 1 and expected.shape == calls[last].output.shape:
        assert torch.allclose(calls[last].output, expected, atol=1e-4)
    names = {name: any(name.startswith(f"{block}.") for block in find_blocks(student)) for name in student.state_dict()}
    inside = [p.grad for name, p in student.named_parameters() if names[name] and p.dim() > 1]
    outside = [p.grad for name, p in student.named_parameters() if not names[name] and p.grad is not None]
    assert inside and all(grad is not None and not grad.any() for grad in inside)
    assert sum(float(grad.abs().sum()) for grad in outside) > 0  # through the teacher's blocks
    assert all(p.grad is None for p in teacher.parameters())


def test_nothing_is_left_of_it_also_after_an_exception(pair):
    student, teacher = pair
    expected = student(pictures())
    state = list(student.state_dict())
    with pytest.raises(ZeroDivisionError), blended(student, teacher, 0.5):
        assert not torch.equal(student(pictures()), expected)
        assert list(student.state_dict()) == state  # the teacher is no part of the student
        raise ZeroDivisionError
    assert torch.equal(student(pictures()), expected)
    assert not any(module._forward_hooks for module in student.modules())


def test_a_unit_sees_its_own_input_in_a_share_of_the_places(pair):
    student, teacher = pair
    loss = OBJECTIVES["block-local"](student, RECIPE)
    calls, output = observe(teacher, pictures(), loss.taps)
    own, _ = observe(student, pictures(), loss.taps)
    draw = Draw(seed=0, step=5, batch=3, first=0)
    none, all_ = (with_own_inputs(calls, own, share, 3, draw) for share in (0.0, 1.0))
    assert loss(pictures(), none, output)["total"].item() == loss(pictures(), calls, output)["total"].item()
    name = find_blocks(student)[-1]
    assert torch.equal(all_[name].args[0], own[name].args[0]) and all_[name].output is calls[name].output
    half = with_own_inputs(calls, own, 0.5, 3, draw)[name].args[0]
    theirs, ours = calls[name].args[0], own[name].args[0]
    channels = 1 if theirs.dim() == 4 else -1
    from_us, from_them = ((half == one).all(channels) for one in (ours, theirs))
    assert (from_us ^ from_them).all()  # a place comes whole from one of the two
    assert 0.2 < from_us.float().mean() < 0.8
    # What is fitted is the way from there to the teacher's output.
    fed = student.get_submodule(name)(half)
    error = (fed - calls[name].output).movedim(channels, -1).square().sum(-1)
    size = calls[name].output - half if half.shape == fed.shape else calls[name].output
    size = size.movedim(channels, -1).square().sum(-1)
    found = loss(pictures(), with_own_inputs(calls, own, 0.5, 3, draw), output)[name].item()
    assert found == pytest.approx((error / (size + 0.1 * size.mean())).mean().item(), rel=1e-4)


def test_places_are_drawn_by_seed_step_and_unit_alike_for_any_number_of_processes():
    whole = Draw(0, 3, 8, 0).numbers("blocks.0", 8, 5)
    parts = [Draw(0, 3, 8, first).numbers("blocks.0", 2, 5) for first in range(0, 8, 2)]
    assert torch.equal(torch.cat(parts), whole)
    others = [Draw(1, 3, 8, 0).numbers("blocks.0", 8, 5), Draw(0, 4, 8, 0).numbers("blocks.0", 8, 5)]
    others.append(Draw(0, 3, 8, 0).numbers("blocks.1", 8, 5))
    assert not any(torch.equal(whole, other) for other in others)


def test_inputs_that_do_not_compare_stay_the_teachers():
    call = Call((torch.zeros(4, 7, 3),), {}, torch.zeros(4, 7, 3))
    for own in (Call((torch.ones(4, 6, 3),), {}, call.output), Call((), {}, call.output)):
        assert with_own_inputs({"a": call}, {"a": own}, 1.0, 4, Draw(0, 0, 4, 0))["a"] is call
    assert with_own_inputs({"a": call}, {}, 1.0, 4, Draw(0, 0, 4, 0))["a"] is call
    windows = Call((torch.ones(8, 7, 3),), {"mask": None}, call.output)  # two windows a picture
    found = with_own_inputs({"a": dataclasses.replace(call, args=(torch.zeros(8, 7, 3),), kwargs={"mask": None})},
                            {"a": windows}, 0.5, 4, Draw(0, 0, 4, 0))["a"].args[0]  # fmt: skip
    assert ((found == 0) | (found == 1)).all() and 0 < found.mean() < 1


@pytest.mark.parametrize(
    ("phase", "said"),
    [
        (dataclasses.replace(BLEND, blend=(1.2, 0.0)), "phases.0.blend.0: must be between 0 and 1; got 1.2"),
        (dataclasses.replace(OWN, own_inputs=(0.0, -0.1)), "phases.0.own_inputs.1: must be between 0 and 1; got -0.1"),
        (dataclasses.replace(OWN, blend=(1.0, 0.0)), "blend: the objective block-local has no use for it; it is for e"),
        (dataclasses.replace(BLEND, own_inputs=(0.0, 0.5)), "own_inputs: the objective end-to-end has no use for it"),
    ],
)
def test_shares_and_objectives_that_do_not_fit_are_refused(run, phase, said):
    student = load(run)
    with pytest.raises(RecipeError, match=said):
        check_recipe(dataclasses.replace(RECIPE, phases=(phase,)), student, student.model)


def test_blend_for_a_model_without_blocks_is_refused(tmp_path, shards):

    run = converted("test_vit", tmp_path)
    student = load(run)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(5)).eval()
    net(torch.zeros(1, 3, 64, 64))
    assert not blocks_of(net)
    with pytest.raises(RecipeError, match="blend: Sequential has no blocks"):
        check_recipe(dataclasses.replace(RECIPE, phases=(BLEND,)), dataclasses.replace(student, model=net), net)


def losses(found: list[dict]) -> list[float]:
    return [row["loss"] for row in found if "loss" in row]


@pytest.mark.parametrize("phase", [BLEND, OWN], ids=["blend", "own-inputs"])
def test_runs_are_the_same_in_parts_and_after_a_resume(run, shards, tmp_path, phase):
    recipe = dataclasses.replace(RECIPE, phases=(phase,), checkpoint_every=8)
    whole = aligned(run, shards, tmp_path / "whole", recipe)
    plain = dataclasses.replace(phase, blend=(0.0, 0.0), own_inputs=(0.0, 0.0))
    assert losses(aligned(run, shards, tmp_path / "plain", dataclasses.replace(recipe, phases=(plain,)))) != losses(
        whole
    )
    parts = aligned(run, shards, tmp_path / "parts", dataclasses.replace(recipe, accumulate=2))
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-3)
    # From the checkpoint before the last one.
    shutil.rmtree(tmp_path / "whole")
    newest = sorted((tmp_path / "whole.run/checkpoints").iterdir())[-1]
    shutil.rmtree(newest)
    assert aligned(run, shards, tmp_path / "whole", recipe, resume=True) == whole


def test_two_processes_walk_the_same_path(run, shards, tmp_path):
    """Mixtures, inputs of one's own, trust and maps under DDP, which must find a use for every parameter."""
    phases = (OWN, dataclasses.replace(BLEND, pictures=24, trust=0.1, warmup=0.5))
    recipe = asking(dataclasses.replace(RECIPE, phases=phases), map_weight=0.5, map_share=1.0)
    (tmp_path / "recipe.yaml").write_text(dump(recipe))
    root = Path(__file__).resolve().parents[2]
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(root / "recipes/accelerate/cpu.yaml")]
    command = ["-m", "bcosify.cli", "align", str(run), "--data", str(shards), "--recipe", str(tmp_path / "recipe.yaml")]
    subprocess.run(
        [sys.executable, *launch, *command, "--out", str(tmp_path / "two")],
        check=True, timeout=280, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True,
    )  # fmt: skip
    one, two = aligned(run, shards, tmp_path / "one", recipe), rows(tmp_path / "two")
    assert two[0]["run"]["processes"] == 2
    assert losses(two) == pytest.approx(losses(one), rel=2e-3)


def test_blend_with_gradient_checkpointing_is_the_same_run(run, shards, tmp_path):
    recipe = dataclasses.replace(RECIPE, phases=(dataclasses.replace(BLEND, pictures=12),))
    plain, checkpointed = (
        losses(aligned(run, shards, tmp_path / str(on), dataclasses.replace(recipe, gradient_checkpointing=on)))
        for on in (False, True)
    )
    assert checkpointed == pytest.approx(plain, rel=1e-5)


def test_a_cnn_with_batch_statistics_is_blended(cnn, shards, tmp_path):
    phases = (dataclasses.replace(CNN_PHASES[0], pictures=4, blend=blend) for blend in ((1.0, 0.0), (0.0, 0.0)))
    blended_, plain = (
        losses(aligned(cnn, shards, tmp_path / str(i), dataclasses.replace(RECIPE, phases=(phase,))))
        for i, phase in enumerate(phases)
    )
    assert blended_[0] < 0.9 * plain[0]  # only what lies outside the blocks differs from the teacher
