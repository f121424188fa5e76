"""Folders that the code of an earlier time wrote: they open for ever, and compute what they computed then."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from bcosify.align.recipe import load_recipe
from bcosify.align.trainer import AlignConfig, align
from bcosify.convert import Student, checkpoint, load, save
from bcosify.convert.methods import dynamic_linear
from bcosify.convert.swaps import SWAPS
from bcosify.core.errors import CheckpointError
from safetensors import safe_open

from regression_models import EXPECTED, inputs, outputs

HERE = Path(__file__).parent
STUDENTS = sorted(
    folder.parent for folder in HERE.glob(f"*/*/{EXPECTED}") if (folder.parent / "bcosify.json").is_file()
)
RUNS = sorted(folder.parent for folder in HERE.glob(f"*/*/{EXPECTED}") if (folder.parent / "out.run").is_dir())


def named(folder: Path) -> str:
    return str(folder.relative_to(HERE))


def check(student: Student, expected: Path, tolerance: float, size: int | None = None) -> None:
    """The outputs and maps are those in the file, to what another machine's sums may differ in; on pictures of `size`
    pixels, where that is not the student's own."""
    with safe_open(expected, "pt") as file:
        seed, wanted = int(file.metadata()["seed"]), {name: file.get_tensor(name) for name in file.keys()}
    found = outputs(student.model, inputs(seed, size or student.preprocess.size[0]))
    assert found.keys() == wanted.keys() and wanted["outputs"].std() > 1e-3
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance * float(value.abs().max()))


def test_there_are_folders_of_every_schema_and_method():
    for schema in ("1", "2"):
        names = [folder.name for folder in STUDENTS if folder.parent.name == schema]
        for method in ("bcos", "coda", "fa-cnn", "ca-stream", "kmeans"):
            assert any(name.startswith(method) for name in names)
        assert HERE / schema / "run" in RUNS


def test_every_swap_is_in_a_folder_of_the_newest_schema():
    """What a saved model may hold is held to here, so that no id comes to mean something else."""
    records = [json.loads((folder / "bcosify.json").read_text()) for folder in STUDENTS]
    newest = [record for record in records if record["schema"] == checkpoint.SCHEMA]
    assert {row["swap"] for record in newest for row in record["swaps"]} == set(SWAPS)


@pytest.mark.parametrize("name", ["bcos-clip", "kmeans-maps"])
def test_a_folder_of_an_earlier_schema_is_saved_in_the_newest(tmp_path, name):
    student = load(HERE / "1" / name)
    folder = save(student, tmp_path / "again")
    assert json.loads((folder / "bcosify.json").read_text())["schema"] == checkpoint.SCHEMA
    again = load(folder)
    assert again.plan.swaps == student.plan.swaps and again.history == student.history
    assert student.plan.swaps == load(HERE / "2" / name).plan.swaps
    check(again, HERE / "1" / name / EXPECTED, 1e-5)


def test_schema_1_says_where_the_rules_of_now_make_another_plan(monkeypatch):
    monkeypatch.delitem(dynamic_linear.RULES, "timm.layers.grn.GlobalResponseNorm")
    with pytest.raises(CheckpointError, match="has schema 1.*the rules of this version would swap others"):
        load(HERE / "1" / "bcos-grn")
    check(load(HERE / "2" / "bcos-grn"), HERE / "2" / "bcos-grn" / EXPECTED, 1e-5)


@pytest.mark.parametrize("folder", STUDENTS, ids=named)
def test_a_folder_opens_and_computes_the_same(folder):
    check(load(folder), folder / EXPECTED, 1e-5)


@pytest.mark.parametrize("folder", RUNS, ids=named)
def test_a_run_goes_on_from_its_checkpoint(folder, tmp_path):
    run = shutil.copytree(folder, tmp_path / "run")
    recipe = load_recipe(run / "out.run" / "recipe.yaml")
    align(AlignConfig(run / "student", str(run / "data"), run / "out", recipe, resume=True, quiet=True))
    # Expected are outputs at the teacher's size; a student keeps the size that it was trained at.
    check(load(run / "out"), folder / EXPECTED, 1e-3, load(run / "student").preprocess.size[0])
    assert load(run / "out").preprocess.size == (recipe.image_size, recipe.image_size)
