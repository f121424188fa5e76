"""A recipe, a size, a batch or a teacher that does not fit is refused before anything is written."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import timm
import torch
from accelerate import Accelerator
from bcosify.align.checks import NEEDS, check_recipe, choose_recipe
from bcosify.align.recipe import Phase, list_recipes, load_recipe
from bcosify.align.trainer import AlignConfig, align
from bcosify.convert import check_teacher, convert, load, load_teacher, save
from bcosify.convert.history import Calibration
from bcosify.convert.methods import METHODS
from bcosify.core.errors import BcosifyError, DataError, RecipeError, SourceError
from torch import nn

from runs import PHASES, RECIPE, aligned, asking
from tars import simple_tar


def refused(run: Path, shards: Path, out: Path, error: type[BcosifyError], said: str, recipe=RECIPE) -> None:
    """`align` says it, and leaves nothing behind."""
    with pytest.raises(error, match=said):
        align(AlignConfig(run, str(shards), out, recipe, quiet=True))
    assert not list(out.parent.iterdir())


@pytest.mark.parametrize(
    ("model", "name", "said"),
    [
        ("run", "bcos/cnn", "batch-norm, which VisionTransformer has not. Use --recipe bcos/vit or bcos/vit-aloe; "),
        ("cnn", "bcos/vit", "layer-norm, which ResNet has not. Use --recipe bcos/cnn or bcos/cnn-bcosification; "),
    ],
)  # fmt: skip
def test_a_recipe_for_another_family_names_the_right_one(model, name, said, shards, tmp_path, request):
    recipe = load_recipe(name, ["image_size=64"])
    refused(request.getfixturevalue(model), shards, tmp_path / "x", RecipeError, said, recipe)
    student = load(request.getfixturevalue(model))
    check_recipe(load_recipe(name, ["image_size=64", "needs=[]"]), student, student.model)  # at one's own risk


@pytest.mark.parametrize(("model", "name"), [("run", "bcos/vit"), ("cnn", "bcos/cnn")])
def test_the_recipe_of_a_family_is_chosen(model, name, request):
    assert choose_recipe(load(request.getfixturevalue(model))) == name


def test_a_student_that_no_recipe_is_made_for_is_named(run):
    student = dataclasses.replace(load(run), method="fa-cnn", model=nn.Linear(2, 2))
    with pytest.raises(RecipeError, match=r"--recipe auto: none of fa-cnn/cnn is made for .*Name one, or give"):
        choose_recipe(student)


def test_every_recipe_that_auto_may_choose_ships():
    assert {name for method in METHODS.values() for name in method.recipes} <= set(list_recipes())
    assert all(method.recipes for method in METHODS.values())


def test_a_recipe_for_another_method_is_refused(run, shards, tmp_path):
    recipe = dataclasses.replace(RECIPE, method="coda")
    refused(run, shards, tmp_path / "x", RecipeError, "--method coda, this one was made by --method bcos", recipe)


def test_a_net_without_blocks_has_none():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    assert {need: has(net) for need, has in NEEDS.items()} == {
        "blocks": False,
        "batch-norm": True,
        "layer-norm": False,
    }
    deep = nn.Sequential(*(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2)))
    assert NEEDS["blocks"](deep) and NEEDS["layer-norm"](deep) and not NEEDS["batch-norm"](deep)
    with pytest.raises(RecipeError, match="unknown|one of 'blocks'"):
        load_recipe("smoke", ["needs=[block]"])


def test_taps_that_do_not_exist_or_never_run_are_refused(run, shards, tmp_path):
    recipe = asking(RECIPE, taps=("blocks.0.mpl",))
    refused(run, shards, tmp_path / "x", RecipeError, "tap 'blocks.0.mpl' is no module .*'blocks.0.mlp'", recipe)
    student = load(run)
    student.model.add_module("spare", nn.Linear(1, 1))
    with pytest.raises(RecipeError, match="'spare' is a module that the model never runs"):
        check_recipe(asking(RECIPE, taps=("spare",)), student, student.model)


def test_sizes_that_the_model_cannot_take_are_refused(run, shards, tmp_path):
    """Patches of 16 pixels do not fill 60; an MLP over places has weights for one grid alone."""
    recipe = dataclasses.replace(RECIPE, image_sizes=(64, 60))
    said = r"image_sizes: timm:test_vit takes no pictures of 60 pixels \(.*\). It takes, for instance, 64: "
    refused(run, shards, tmp_path / "x", RecipeError, said, recipe)
    mixer = timm.create_model("mixer_s32_224", img_size=64, num_classes=3).eval()
    student = dataclasses.replace(load(run), model=mixer, labels=None)
    with pytest.raises(RecipeError, match=r"no pictures of 96 pixels \(.*\). It takes, for instance, 64:"):
        check_recipe(dataclasses.replace(RECIPE, image_sizes=(64, 96)), student, mixer)
    check_recipe(RECIPE, student, mixer)


def test_a_batch_that_processes_cannot_share_is_refused(run, shards, tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "num_processes", 3)
    refused(run, shards, tmp_path / "x", DataError, "batch of 4 cannot be shared evenly by 3 processes. Use 3 or 6")


def test_more_pictures_a_step_than_there_are_is_refused(run, shards, tmp_path):
    recipe = dataclasses.replace(RECIPE, batch_size=64)
    refused(run, shards, tmp_path / "x", DataError, "batch of 64 needs as many pictures, and there are 40", recipe)


def test_fewer_pictures_than_statistics_are_made_of_are_enough(run, tmp_path):
    few, val = simple_tar(tmp_path / "few" / "a.tar", 6).parent, simple_tar(tmp_path / "val" / "b.tar", 4, 50).parent
    phases = (Phase("end-to-end", 8, 1e-3, calibrate=8, batch_statistics=True),)
    recipe = dataclasses.replace(RECIPE, phases=phases, evaluate_every=8)
    assert aligned(run, few, tmp_path / "out", recipe, val=str(val))[-1]["held_out"]["pictures"] == 8


def test_a_teacher_whose_folder_has_changed_is_refused(shards, tmp_path_factory):
    folder, out = tmp_path_factory.mktemp("teacher"), tmp_path_factory.mktemp("out")
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=5)
    timm.models.save_for_hf(model, str(folder), safe_serialization=True)
    teacher = load_teacher(f"timm:local-dir:{folder}", image_size=64)
    student = convert(teacher).with_history(
        calibration=Calibration(1, {}, 0)
    )  # no longer its teacher, so that is loaded again
    run = save(student, tmp_path_factory.mktemp("run") / "student")
    check_teacher(load(run), load_teacher(f"timm:local-dir:{folder}"))
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight.mul_(1.5)
    timm.models.save_for_hf(model, str(folder), safe_serialization=True)
    said = "is not the teacher that this student was converted from"
    refused(run, shards, out / "x", SourceError, said, dataclasses.replace(RECIPE, phases=PHASES[:1]))
