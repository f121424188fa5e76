"""bcosify evaluate and compare: from shards to a report, and what wrong shards are told."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from bcosify.cli.main import main
from PIL import Image

TINY = ("timm:test_vit", "--no-pretrained", "--image-size", "64")
QUICK = ("--against", "grad-cam", "--grids", "1", "--pictures", "4", "--batch-size", "4")


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("evaluate") / "student"
    torch.manual_seed(0)
    assert main(["convert", *TINY, "--out", str(out)]) == 0
    return out


def write(path: Path, count: int = 6, **members) -> Path:
    """A shard of `count` pictures, with members from functions of the number."""
    random = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for i in range(count):
            picture = Image.fromarray(random.integers(0, 255, (70, 80, 3), dtype=np.uint8))
            data = {"jpg": encoded(picture, "JPEG"), **{name.replace("_", "."): f(i) for name, f in members.items()}}
            for name, content in data.items():
                member = tarfile.TarInfo(f"s{i}.{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def encoded(picture: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    return buffer.getvalue()


def mask(width: int = 80, height: int = 70) -> bytes:
    values = np.zeros((height, width), np.uint8)
    values[: height // 2] = 255
    return encoded(Image.fromarray(values))


def facts(i: int) -> bytes:
    return json.dumps({"box": [0, 0, 79, 34], "group": "ab"[i % 2], "class": i}).encode()


@pytest.fixture
def shard(tmp_path) -> Path:
    return write(tmp_path / "objects.tar", mask_png=lambda i: mask(), json=facts)


def test_a_student_is_measured_and_two_evaluations_are_compared(student, shard, tmp_path, capsys):
    for name in ("one", "two"):
        words = [student, "--data", shard, "--masks", shard, "--labels", "group", "--out", tmp_path / name, *QUICK]
        assert main(["evaluate", *map(str, words), "--json"]) == 0
    printed = capsys.readouterr()
    assert "energy in mask" in printed.err and "report.html" in printed.err
    record = json.loads((tmp_path / "one" / "evaluation.json").read_text())
    rows = {(one["metric"], one["model"], one["method"]): one for one in record["measurements"]}
    # Fresh from convert, the student is its teacher: so are its decisions.
    assert rows["top1_agreement", "both", ""]["value"] == 1
    assert rows["mask_area", "both", ""]["value"] == pytest.approx(0.5, abs=0.02)
    assert rows["zero_shot", "teacher", ""]["reason"] == "the model has no text tower"
    assert record["data"]["explained"] == 4 and record["data"]["pictures"] == 6
    assert record["model"]["teacher_weights"] != "" and record["schema"] == 1
    page = (tmp_path / "one" / "report.html").read_text()
    assert "GridPG" in page and "grad-cam" in page

    assert main(["compare", str(tmp_path / "one"), str(tmp_path / "two"), "--out", str(tmp_path / "both.html")]) == 0
    assert "not measured with the same" not in capsys.readouterr().err
    assert "side by side" in (tmp_path / "both.html").read_text()
    record["settings"]["seed"] = 5
    (tmp_path / "two" / "evaluation.json").write_text(json.dumps(record))
    assert main(["compare", str(tmp_path / "one"), str(tmp_path / "two")]) == 0
    assert "one and two were not measured with the same settings" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("members", "words", "said"),
    [
        ({}, ("--masks", "SHARD"), "s0 in SHARD has no mask.png, and no box"),
        ({"mask_png": lambda i: mask(40, 40)}, ("--masks", "SHARD"), "the mask has 40x40 pixels, its picture 80x70"),
        ({}, ("--labels", "group"), "--labels group: s0 in objects.tar has no such label"),
        ({"json": lambda i: b"{"}, ("--labels", "group"), "s0.json in SHARD is not JSON"),
        ({"cls": lambda i: b"4000"}, ("--labels", "cls"), "A label is 4000, but the model has"),
        ({"cls": lambda i: b"n/a" if i == 1 else b"3"}, ("--labels", "cls"), "but 'n/a' of s1 in objects.tar is not"),
        ({"cls": lambda i: b"-1" if i == 0 else b"cat"}, ("--labels", "cls"), "but '-1' of s0 in objects.tar is not"),
        ({"cls": lambda i: b"3.0"}, ("--labels", "cls"), "Write a whole number from 0 for every sample, or a name"),
        ({}, ("--against", "gradcam"), "no method is called 'gradcam'. Did you mean 'grad-cam'"),
        ({}, ("--against", "tutor:lime"), "there is no model 'tutor'"),
        ({}, ("--removals", "rows:grey"), "no unit 'rows'"),
        ({}, ("--removals", "pixels:gray"), "no fill is called 'gray'"),
        ({}, ("--data", "missing.tar"), "missing.tar"),
    ],
)
def test_bad_input_is_said_and_nothing_is_written(student, tmp_path, capsys, members, words, said):
    shard = write(tmp_path / "objects.tar", **members)
    words = [str(shard) if word == "SHARD" else word for word in words]
    given = ["evaluate", str(student), "--data", str(shard), "--out", str(tmp_path / "report"), *words]
    assert main(given) == 1
    assert said.replace("SHARD", str(shard)) in capsys.readouterr().err
    assert not (tmp_path / "report").exists() and [path.name for path in tmp_path.iterdir()] == ["objects.tar"]


def test_a_box_counts_as_a_mask_and_a_broken_picture_is_named(student, tmp_path):
    from bcosify.convert import load
    from bcosify.core.errors import DataError
    from bcosify.data.labelled import find_pictures, read_pictures

    preprocess = load(student).preprocess
    with_box = read_pictures(find_pictures(str(write(tmp_path / "a.tar", json=facts))), preprocess, count=2, masks=True)
    masked = write(tmp_path / "b.tar", mask_png=lambda i: mask())
    with_mask = read_pictures(find_pictures(str(masked)), preprocess, count=2, masks=True)
    assert torch.equal(with_box.masks > 0.5, with_mask.masks > 0.5)
    broken = write(tmp_path / "c.tar", jpg=lambda i: b"no picture")
    with pytest.raises(DataError, match=r"s\d in .*c.tar is no picture"):
        read_pictures(find_pictures(str(broken)), preprocess, count=2)


def test_one_evaluation_is_nothing_to_compare(tmp_path, capsys):
    assert main(["compare", str(tmp_path)]) == 1 and "two or more" in capsys.readouterr().err
