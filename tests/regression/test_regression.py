"""Folders that the code of an earlier time wrote: they open for ever, and compute what they computed then."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from bcosify.align.recipe import load_recipe
from bcosify.align.trainer import AlignConfig, align
from bcosify.convert import Student, load
from safetensors import safe_open

from regression_models import EXPECTED, inputs, outputs

HERE = Path(__file__).parent
STUDENTS = sorted(
    folder.parent for folder in HERE.glob(f"*/*/{EXPECTED}") if (folder.parent / "bcosify.json").is_file()
)
RUNS = sorted(folder.parent for folder in HERE.glob(f"*/*/{EXPECTED}") if (folder.parent / "out.run").is_dir())


def named(folder: Path) -> str:
    return str(folder.relative_to(HERE))


def check(student: Student, expected: Path, tolerance: float) -> None:
    """The outputs and maps are those in the file, to what another machine's sums may differ in."""
    with safe_open(expected, "pt") as file:
        seed, wanted = int(file.metadata()["seed"]), {name: file.get_tensor(name) for name in file.keys()}
    found = outputs(student.model, inputs(seed, student.preprocess.size[0]))
    assert found.keys() == wanted.keys() and wanted["outputs"].std() > 1e-3
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance * float(value.abs().max()))


def test_there_are_folders_of_every_schema_and_method():
    for schema in ("1",):
        names = [folder.name for folder in STUDENTS if folder.parent.name == schema]
        for method in ("bcos", "coda", "fa-cnn", "ca-stream", "kmeans"):
            assert any(name.startswith(method) for name in names)
        assert HERE / schema / "run" in RUNS


@pytest.mark.parametrize("folder", STUDENTS, ids=named)
def test_a_folder_opens_and_computes_the_same(folder):
    check(load(folder), folder / EXPECTED, 1e-5)


@pytest.mark.parametrize("folder", RUNS, ids=named)
def test_a_run_goes_on_from_its_checkpoint(folder, tmp_path):
    run = shutil.copytree(folder, tmp_path / "run")
    recipe = load_recipe(run / "out.run" / "recipe.yaml")
    align(AlignConfig(run / "student", str(run / "data"), run / "out", recipe, resume=True, quiet=True))
    check(load(run / "out"), folder / EXPECTED, 1e-3)
