"""Folders: whole or not there, bit for bit the same when opened again, and every kind of damage named."""

from __future__ import annotations

import copy
import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from bcosify.convert import BcosConfig, Source, agreement_of, checkpoint, convert, load, save, set_strength
from bcosify.convert.history import Alignment, Calibration
from bcosify.convert.layers import BcosLinear, scheduled_layers
from bcosify.convert.libraries import LIBRARIES, Library
from bcosify.core.errors import CheckpointError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from folders import resigned

FILES = ("bcosify.json", "config.json", "model.safetensors", "probe.safetensors")
WEIGHTS, RECORD, PROBE = "model.safetensors", "bcosify.json", "probe.safetensors"


@pytest.fixture(scope="module")
def _saved(tmp_path_factory) -> Path:
    from bcosify.convert import load_teacher

    torch.manual_seed(0)
    student = convert(load_teacher("timm:test_vit", pretrained=False, image_size=32))
    set_strength(student.model, 1.7, 0.3)
    return save(student.with_history(notes={"note": "kept"}), tmp_path_factory.mktemp("saved") / "student")


@pytest.fixture
def folder(_saved, tmp_path) -> Path:
    """A saved student, free to be damaged."""
    return Path(shutil.copytree(_saved, tmp_path / "student"))


def weights_changed(folder: Path, change) -> Path:
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file(state, folder / WEIGHTS)
    return folder


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_parameters_in_half_precision_halve_the_file_and_not_the_computation(tiny, tmp_path, name):
    student = convert(tiny(name))
    set_strength(student.model, 1.3, 0.5)
    pictures = torch.rand(2, 3, *student.preprocess.size) * 2 - 1
    whole, half = (save(student, tmp_path / str(kind), parameters=kind) for kind in (None, torch.float16))
    assert (half / WEIGHTS).stat().st_size < 0.6 * (whole / WEIGHTS).stat().st_size
    again, wanted = load(half).model, copy.deepcopy(student.model)
    for parameter in wanted.parameters():
        parameter.data = parameter.data.half().float()
    assert {parameter.dtype for parameter in again.parameters()} == {torch.float32}
    state = load_file(half / WEIGHTS)
    assert {state[key].dtype for key, _ in again.named_parameters() if key in state} == {torch.float16}
    assert all(torch.equal(value, dict(again.named_buffers())[key]) for key, value in student.model.named_buffers())
    with torch.no_grad():
        assert torch.equal(again(pictures), wanted(pictures))
        assert not torch.equal(student.model(pictures), wanted(pictures))  # the one that was given is not rounded
    twice = load(save(load(half), tmp_path / "again", parameters=torch.float16))
    with torch.no_grad():
        assert torch.equal(twice.model(pictures), again(pictures))


def test_rounding_is_no_training(tiny, tmp_path):
    student = convert(tiny("test_vit"))
    said = agreement_of(student).words
    assert agreement_of(load(save(student, tmp_path / "half", parameters=torch.float16))).words == said
    with torch.no_grad():
        student.model.norm.weight.mul_(1.5)
    trained = agreement_of(load(save(student, tmp_path / "trained", parameters=torch.float16))).words
    assert trained == agreement_of(student).words != said


@pytest.mark.parametrize("kind", [torch.int8, "float16"])
def test_parameters_are_kept_in_a_precision_or_not_at_all(tiny, tmp_path, kind):
    with pytest.raises(CheckpointError, match="parameters must be one of torch.float32"):
        save(convert(tiny("test_vit")), tmp_path / "out", parameters=kind)
    assert not list(tmp_path.iterdir())


def test_a_parameter_that_is_too_large_for_half_precision_is_named(tiny, tmp_path):
    student = convert(tiny("test_vit"))
    student.model.norm.weight.data[0] = 1e6
    with pytest.raises(CheckpointError, match=r"norm.weight has values that are too large for torch.float16"):
        save(student, tmp_path / "half", parameters=torch.float16)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("found", ["complex64", "nn", ["float32"], 16])
def test_a_record_that_computes_in_no_precision_is_refused(folder, found):
    with pytest.raises(CheckpointError, match="computes must be the name of a precision"):
        load(resigned(folder, computes=found))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_efficientnet", "test_convnext"])
def test_a_student_comes_back_bit_for_bit(tiny, tmp_path, name, dtype):
    student = convert(tiny(name))
    set_strength(student.model, 1.7, 0.3)
    student.model.to(dtype)
    opened = load(save(student, tmp_path / "out")).model
    pictures = torch.randn(2, 3, 64, 64, dtype=dtype)
    assert torch.equal(opened(pictures), student.model(pictures))
    ours, theirs = student.model.state_dict(), opened.state_dict()
    assert list(ours) == list(theirs)
    assert all(ours[key].dtype == theirs[key].dtype and torch.equal(ours[key], theirs[key]) for key in ours)
    assert [layer.strengths() for _, layer in scheduled_layers(opened)] == [
        x.strengths() for _, x in scheduled_layers(student.model)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "size"), [("efficientnet_lite0", 96), ("dinov2_small", 98)])
def test_a_real_student_comes_back_bit_for_bit(real_student, photographs, tmp_path, name, size, dtype):
    student = real_student(name)
    set_strength(student.model, 1.5, 0.5)
    student.model.to(dtype)
    opened = load(save(student, tmp_path / "out"))
    pictures = photographs(student.preprocess.at(size), 2).to(dtype)
    assert torch.equal(opened.model(pictures), student.model(pictures))
    assert opened.labels == student.labels and opened.preprocess == student.preprocess


def test_all_that_travels_with_a_model_comes_back(tiny, tmp_path):
    student = convert(tiny("test_vit"), BcosConfig(keep=("head",), scale="unbounded")).with_history(
        calibration=Calibration(8, {"b": 1.5}, 3),
        alignment=Alignment(80, {"cosine": 0.5}, ({"cosine": 0.25}, {"cosine": 0.5}), None, "B is 2", {"classes": 3}),
        notes={"a": [1, 2.5]},
    )
    opened = load(save(student, tmp_path / "deep" / "out"))
    for field in ("source", "preprocess", "labels", "method", "config", "history"):
        assert getattr(opened, field) == getattr(student, field)
    assert opened.plan.swaps == student.plan.swaps and not opened.model.training
    assert sorted(path.name for path in (tmp_path / "deep" / "out").iterdir()) == sorted(FILES)


def test_tied_weights_are_saved_once_and_come_back_tied(teach, tmp_path, monkeypatch):
    def tied() -> nn.Module:
        a, b = nn.Linear(4, 4), nn.Linear(4, 4)
        b.weight = a.weight
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), a, nn.ReLU(), b, b).eval()

    monkeypatch.setitem(LIBRARIES, "own", Library("own", (), lambda _: tied()))
    teacher = teach(tied())
    student = convert(type(teacher)(teacher.model, Source("own:tied", "own", "tied"), teacher.preprocess))
    opened = load(save(student, tmp_path / "out")).model
    assert "5.weight" not in load_file(tmp_path / "out" / WEIGHTS)
    assert opened[3].weight is opened[5].weight and opened[5] is opened[6] and isinstance(opened[5], BcosLinear)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(opened(x), student.model(x))


def test_saving_leaves_the_model_as_it_is(tiny, tmp_path):
    student = convert(tiny("test_efficientnet"))
    student.model.train()
    student.model.blocks.eval()
    before, state = modes(student.model), copy.deepcopy(student.model.state_dict())
    save(student, tmp_path / "out")
    assert modes(student.model) == before and True in before
    assert all(torch.equal(value, state[key]) for key, value in student.model.state_dict().items())


@pytest.mark.parametrize("failing", [1, 2], ids=["weights", "probe"])
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left")], ids=repr
)
def test_nothing_is_left_behind_when_the_disk_is_full(tiny, tmp_path, monkeypatch, failing, error):
    student, calls = convert(tiny()), []

    def full(*args, **kwargs):
        calls.append(args)
        if len(calls) == failing:
            raise error
        save_file(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(CheckpointError, match=r"out could not be written.*No space left.*Nothing was left behind"):
        save(student, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()], ids=repr)
def test_a_failed_overwrite_keeps_what_was_there(tiny, folder, monkeypatch, error):
    def fail(*_, **__):
        raise error

    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises((CheckpointError, KeyboardInterrupt)):
        save(convert(tiny()), folder, overwrite=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["student"]


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_what_exists_is_refused_untouched(tiny, tmp_path, kind):
    out = tmp_path / "out"
    {"folder": out.mkdir, "file": out.touch, "dangling link": lambda: out.symlink_to(tmp_path / "nowhere")}[kind]()
    with pytest.raises(CheckpointError, match=r"out exists already. Nothing was written.*--overwrite"):
        save(convert(tiny()), out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and not (out.is_dir() and list(out.iterdir()))


def test_overwriting_replaces_all_of_it_and_nothing_of_others(tiny, folder):
    student = convert(tiny())
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "mine.txt").write_text("old")
    with pytest.raises(
        CheckpointError, match=r"holds what this command did not write \(mine.txt\).*Nothing was written"
    ):
        save(student, folder, overwrite=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {**before, "mine.txt": b"old"}
    (folder / "mine.txt").unlink()
    save(student, folder, overwrite=True)
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    assert [path.name for path in folder.parent.iterdir()] == ["student"]
    assert load(folder).history == student.history


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", [0.0, 0.02, 0.5, 0.999])
def test_a_changed_byte_is_found_and_its_file_named(folder, name, place):
    data = bytearray((folder / name).read_bytes())
    at = int(place * (len(data) - 1))
    while chr(data[at]).isspace():  # white space in JSON says nothing
        at -= 1
    data[at] ^= 0x41
    (folder / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=name):
        load(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=rf"{name}.* is missing"):
        load(folder)


def swap(state, old, new):
    state[new] = state.pop(old)


DAMAGE = {
    "missing": (lambda s: s.pop("head.weight"), "missing head.weight"),
    "unknown": (lambda s: s.update(extra=torch.zeros(1)), "unknown extra"),
    "misspelt": (lambda s: swap(s, "head.weight", "head.weihgt"), "unknown head.weihgt. Did you mean 'head.weight'"),
    "shape": (lambda s: s.update({"head.bias": torch.zeros(3)}), r"head.bias is \(3,\), should be \(1000,\)"),
    "no beta": (lambda s: s.pop("norm.beta"), "missing norm.beta"),
    "many": (lambda s: [s.pop(key) for key in [*s] if ".mlp." in key], "and [0-9]+ more"),
}


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("kind", DAMAGE)
def test_keys_and_shapes_must_be_the_same(folder, kind, check):
    change, said = DAMAGE[kind]
    with pytest.raises(CheckpointError, match=rf"{WEIGHTS} does not fit the model.*{said}.*Nothing was loaded"):
        load(resigned(weights_changed(folder, change)), check=check)


def test_another_function_is_found_by_the_probe(folder):
    weights_changed(folder, lambda state: state["norm.weight"].mul_(1.1))
    with pytest.raises(CheckpointError, match=rf"{WEIGHTS} was changed"):
        load(folder)
    with pytest.raises(CheckpointError, match="does not compute what it computed when it was saved.*probe differs"):
        load(resigned(folder))
    assert load(folder, check=False).history.notes["note"] == "kept"


@pytest.mark.parametrize("name", ["model.bin", "model.pt", "pytorch_model.bin", "weights.pth", "last.ckpt", "m.pkl"])
@pytest.mark.parametrize("record", [True, False])
def test_pickles_are_refused_by_name(folder, name, record):
    (folder / WEIGHTS).rename(folder / name)
    if not record:
        (folder / RECORD).unlink()
    with pytest.raises(CheckpointError, match=rf"holds {name}: pickles can run code and are never opened"):
        load(folder)


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: None], ids=["empty", "absent"])
def test_folders_that_hold_no_model_are_refused(tmp_path, make):
    make(tmp_path / "none")
    with pytest.raises(CheckpointError, match="none.* is missing"):
        load(tmp_path / "none")


RECORDS = {
    "newer": ({"schema": 3}, r"bcosify\.json has schema 3; this version reads 1 and 2. Update bcosify"),
    "history": ({"history": {"version": 2}}, "history has version 2; this version of bcosify reads 1"),
    "setting": (
        {"config": {"keep": [], "scale": "cosine", "gain": 1}},
        "settings that this version does not know: gain",
    ),
}


@pytest.mark.parametrize("kind", RECORDS)
def test_records_of_other_versions_are_refused(folder, kind):
    changes, said = RECORDS[kind]
    with pytest.raises(CheckpointError, match=said):
        load(resigned(folder, **changes))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1]", "has schema list"),
        ('{"a": 1}', "has schema None"),
        ("{", "is not JSON"),
        ("\xff", "is not JSON"),
    ],
)
def test_a_record_that_is_none_is_refused(folder, text, said):
    (folder / RECORD).write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=rf"{RECORD} (is )?{said}"):
        load(folder)


@pytest.mark.parametrize("key", ["history", "swaps", "source", "labels", "preprocess"])
def test_a_changed_record_is_found(folder, key):
    record = json.loads((folder / RECORD).read_text())
    record[key] = {"alignment": {"pictures": 10**9}}
    (folder / RECORD).write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=r"bcosify\.json was changed after it was written"):
        load(folder)


def test_no_memory_of_pickles_in_what_is_written(folder):
    assert json.loads((folder / "config.json").read_text())["architecture"] == "bcosify"
    record = json.loads((folder / RECORD).read_text())
    assert set(record["files"]) == set(FILES) - {RECORD} and record["source"]["reference"] == "timm:test_vit"
    assert set(load_file(folder / PROBE)) == {"input", "output"}
