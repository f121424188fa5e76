"""What is put together to be published: the model's own bytes, checked, with nothing of the publisher's machine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from bcosify.core.errors import BcosifyError, CheckpointError, LedgerError, PublishError
from bcosify.publish.staging import Request, _check_paths, stage


@pytest.fixture
def out(tmp_path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.fixture
def copy(student, tmp_path) -> Path:
    """Of the student, to spoil."""
    return shutil.copytree(student, tmp_path / "model")


def test_all_is_there_and_the_models_files_are_its_own(student, out, evaluated, picture):
    release = stage(Request(student, "org/name", evaluation=evaluated(), picture=picture), out)
    own = {path.name for path in student.iterdir()}
    assert set(release.files) == own | {"README.md", "evaluation.json", "explanation.png"}
    assert all((out / name).read_bytes() == (student / name).read_bytes() for name in own)
    assert release.files == {path.name: path.stat().st_size for path in out.iterdir()}
    assert release.licence.id == "apache-2.0" and release.left_out == ()
    assert release.headline["centred_cosine"] == 0.4321 and "explanation.png" in (out / "README.md").read_text()


def test_the_recipe_beside_the_model_goes_with_it(copy, out):
    run = copy.with_name("model.run")
    run.mkdir()
    text = "image_size: 48\nbatch_size: 4\nseed: 0\nphases:\n- objective: end-to-end\n  pictures: 40\n"
    (run / "recipe.yaml").write_text(text)
    assert stage(Request(copy, "org/name"), out).files["recipe.yaml"] == len(text)
    assert "end-to-end" in (out / "README.md").read_text()
    (run / "recipe.yaml").write_text("a: [")
    with pytest.raises(PublishError, match="not YAML"):
        stage(Request(copy, "org/name"), out)
    for size in ("100000", "0", "'48'", "[48]"):
        (run / "recipe.yaml").write_text(f"image_size: {size}")
        with pytest.raises(PublishError, match="image_size: must be .*; got"):
            stage(Request(copy, "org/name"), out)


def test_what_is_not_the_models_stays_at_home(copy, out):
    (copy / "notes.txt").write_text("my own notes")
    (copy / "cache").mkdir()
    (copy / "cache" / "x.json").write_text("{}")
    release = stage(Request(copy, "org/name"), out)
    assert release.left_out == ("cache/x.json", "notes.txt")
    assert not (out / "notes.txt").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "sub/old.pth", "a.pkl", "b.ckpt"])
def test_a_pickle_is_refused(copy, out, name):
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).write_bytes(b"x")
    with pytest.raises(PublishError, match=f"{Path(name).name}: pickles can run code"):
        stage(Request(copy, "org/name"), out)


@pytest.mark.parametrize("repo", ["name", "a/b/c", "org/", "/name", "org/na me", "https://hub/org/name"])
def test_a_name_that_is_none(student, out, repo):
    with pytest.raises(PublishError, match="ORG/NAME"):
        stage(Request(student, repo), out)


def test_weights_that_changed_are_refused(copy, out):
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="sha256"):
        stage(Request(copy, "org/name"), out)
    with pytest.raises(CheckpointError, match="model.safetensors is missing"):
        stage(Request(out, "org/name"), out)


def test_an_explanation_that_does_not_add_up_is_refused(student, out, monkeypatch):
    import bcosify.publish.staging as staging

    def unbalanced(*_, **__):
        raise LedgerError("does not add up")

    monkeypatch.setattr(staging, "explain_scores", unbalanced)
    with pytest.raises(LedgerError):
        stage(Request(student, "org/name"), out)


def test_the_ledger_is_checked_without_a_picture_too(student, out, monkeypatch):
    import bcosify.publish.staging as staging

    asked = []
    explain = staging.explain_scores
    monkeypatch.setattr(staging, "explain_scores", lambda *args: asked.append(args) or explain(*args))
    stage(Request(student, "org/name"), out)
    assert len(asked) == 1 and asked[0][1].shape == (1, 3, 64, 64)


def test_an_evaluation_of_other_weights_is_refused(student, out, evaluated):
    with pytest.raises(PublishError, match="other weights"):
        stage(Request(student, "org/name", evaluation=evaluated(student_weights="0" * 64)), out)


@pytest.mark.parametrize("content", [b"no picture", b"\x89PNG\r\n\x1a\n broken"])
def test_a_picture_that_cannot_be_read(student, out, tmp_path, content):
    (tmp_path / "cat.png").write_bytes(content)
    with pytest.raises(BcosifyError, match="no picture that can be read"):
        stage(Request(student, "org/name", picture=tmp_path / "cat.png"), out)


@pytest.mark.parametrize(
    "place",
    [
        "/home/me/models/x",
        "timm:local-dir:/home/x/y",
        "see /tmp/x.",
        "~/models",
        "C:\\Users\\me",
        "dir:/Users/me/x",
        '{"nested": ["/home/me/x"]}',
        "(/mnt/data/x)",
    ],
)
def test_a_path_of_this_machine_is_refused(out, place):
    for name, text in (("bcosify.json", json.dumps({"source": {"deep": [place]}})), ("README.md", f"text\n{place}\n")):
        (out / name).write_text(text)
        with pytest.raises(PublishError, match=f"{name} would publish"):
            _check_paths(out)
        (out / name).unlink()


@pytest.mark.parametrize(
    "text",
    [
        "https://huggingface.co/home/x",
        "and/or",
        "models/tmp/x",
        "/m/0123x",
        "1/2",
        "B-cos/CoDA",
        "a / b",
        "hf:org/name",
    ],
)
def test_what_only_looks_like_a_path_is_not(out, text):
    (out / "README.md").write_text(f"text {text}\n")
    (out / "x.json").write_text(json.dumps([text]))
    _check_paths(out)


def test_a_source_in_a_folder_is_told_by_its_name_only(student, out, tmp_path, evaluated):
    import dataclasses

    from bcosify.convert import load, save

    made = load(student)
    source = dataclasses.replace(made.source, reference="timm:local-dir:/home/someone/models/mine")
    folder = save(dataclasses.replace(made, source=source), tmp_path / "private")
    request = Request(
        folder, "org/name", "mit", "https://example.org", evaluation=evaluated(reference=source.reference)
    )
    release = stage(request, out)
    assert release.anew and release.left_out == ()
    for file in out.rglob("*"):
        assert b"someone" not in file.read_bytes()
    again = load(out)
    assert again.source.reference == "timm:local-dir:mine"
    assert all((again.model.state_dict()[name] == tensor).all() for name, tensor in made.model.state_dict().items())


def test_a_folder_of_an_older_version_is_saved_once_more(copy, out):
    from bcosify.convert import checkpoint, load
    from bcosify.core.files import file_digest

    record = json.loads((copy / "bcosify.json").read_text())
    (copy / "config.json").write_text(json.dumps({"architecture": "test_vit", "num_classes": 1000}))
    record["files"]["config.json"] = file_digest(copy / "config.json")
    record["digest"] = checkpoint._digest(record)
    (copy / "bcosify.json").write_text(json.dumps(record))
    assert stage(Request(copy, "org/name"), out).anew
    assert json.loads((out / "config.json").read_text())["architecture"] == "bcosify"
    assert (out / "model.safetensors").read_bytes() == (copy / "model.safetensors").read_bytes()
    load(out)
