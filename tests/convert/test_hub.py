"""Which names are folders, which are repositories, and which are neither; no network is asked in any of these."""

from __future__ import annotations

from pathlib import Path

import pytest
from bcosify.convert import hub
from bcosify.convert.hub import RECORD, SHIPPED, STUDENTS, is_student, shipped_students, student_folder
from bcosify.core.errors import CheckpointError


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A working folder with a student in org/repo and a folder of something else."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "repo").mkdir(parents=True)
    (tmp_path / "org" / "repo" / "bcosify.json").touch()
    (tmp_path / "other").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    "name", ["org/repo", "local-dir:org/repo", "hf:org/repo", "hf:local-dir:org/repo", "./org/repo"]
)
def test_a_folder_that_exists_is_taken_before_the_hub(place, name):
    assert student_folder(name).resolve() == place / "org" / "repo"
    assert is_student(name)


def test_paths_never_ask_the_hub(place):
    assert student_folder(Path("my-org/none")) == Path("my-org/none")
    assert student_folder("local-dir:my-org/none") == Path("my-org/none")
    assert not is_student("other") and not is_student("local-dir:my-org/none")


@pytest.mark.parametrize("name", ["my-org/none", "my-org/none@v1", "hf-hub:org/repo", "hf:my-org/none"])
def test_repositories_that_cannot_be_had(place, name):
    """Also one that has a folder's name, where the hub is asked for by name."""
    with pytest.raises(CheckpointError, match="there is no such folder.*cannot be had.*HF_TOKEN.*HF_HOME"):
        student_folder(name)


@pytest.mark.parametrize("name", ["nothing", "a b/c", "../x", "/no/such/folder", "org/repo/more", "a/b@"])
def test_names_that_are_neither(place, name):
    with pytest.raises(CheckpointError, match=r"no hub repository can have that name \(ORG/REPO"):
        student_folder(name)


@pytest.mark.parametrize("name", ["timm:resnet50", "open_clip:ViT-B-32/x", "bundled:dinov2_small", "dir:x", "resnet50"])
def test_references_to_teachers_are_no_students(place, name):
    assert not is_student(name)


def test_students_of_the_package_need_no_hub_and_no_folder():
    assert shipped_students() == ("bundled:bcos-efficientnet-lite0",)
    assert all(is_student(name) and (student_folder(name) / RECORD).is_file() for name in shipped_students())
    assert {record.parent.name for record in STUDENTS.glob(f"*/{RECORD}")} == set(SHIPPED)


def test_a_package_without_its_student_says_how_to_have_it(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "STUDENTS", tmp_path)
    assert is_student("bundled:bcos-efficientnet-lite0")
    with pytest.raises(CheckpointError, match=r"lacks bcosify.json, .* Run: pip install --force-reinstall --no-deps"):
        student_folder("bundled:bcos-efficientnet-lite0")


def test_a_student_of_the_package_that_is_not_there_names_the_nearest():
    with pytest.raises(CheckpointError, match="Did you mean 'bundled:bcos-efficientnet-lite0'"):
        student_folder("bundled:bcos-efficientnet")


def test_only_a_name_that_can_be_a_teachers_is_passed_on(place):
    assert not is_student("hf:my-org/none")
    with pytest.raises(CheckpointError, match="cannot be had"):
        is_student("my-org/none")
