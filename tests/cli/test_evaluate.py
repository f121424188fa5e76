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
from bcosify.convert import load
from bcosify.core.errors import DataError, DataWarning
from bcosify.data import labelled
from bcosify.data.labelled import find_pictures, read_pictures
from bcosify.evaluate.protocols import taken
from PIL import Image

from tiny import tiny_teacher

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
    # The verdict comes before every table.
    verdict, _ = printed.err.split("raw cosine", 1)
    assert "decides like its teacher on 100 % (100 to 100) of held-out pictures" in " ".join(verdict.split())
    record = json.loads((tmp_path / "one" / "evaluation.json").read_text())
    plain = [one for one in record["measurements"] if one["variant"] != "teacher sure"]
    rows = {(one["metric"], one["model"], one["method"]): one for one in plain}
    # Fresh from convert, the student is its teacher: so are its decisions.
    assert rows["top1_agreement", "both", ""]["value"] == 1
    assert rows["mask_area", "both", ""]["value"] == pytest.approx(0.5, abs=0.02)
    assert rows["zero_shot", "teacher", ""]["reason"] == "the model has no text tower"
    assert record["data"]["explained"] == 4 and record["data"]["pictures"] == 6
    assert record["model"]["teacher_weights"] != "" and record["schema"] == 1
    page = (tmp_path / "one" / "report.html").read_text()
    assert "GridPG" in page and "grad-cam" in page and "decides like its teacher on 100 %" in page

    assert main(["compare", str(tmp_path / "one"), str(tmp_path / "two"), "--out", str(tmp_path / "both.html")]) == 0
    assert "not measured with the same" not in capsys.readouterr().err
    assert "side by side" in (tmp_path / "both.html").read_text()
    record["settings"]["seed"] = 5
    (tmp_path / "two" / "evaluation.json").write_text(json.dumps(record))
    assert main(["compare", str(tmp_path / "one"), str(tmp_path / "two")]) == 0
    assert "one and two were not measured with the same settings" in " ".join(capsys.readouterr().err.split())


def test_a_protocol_is_measured_with_its_own_settings_and_says_them(student, shard, tmp_path, capsys):
    given = ["evaluate", str(student), "--data", str(shard), "--labels", "class", "--out", str(tmp_path / "out")]
    assert main([*given, "--protocol", "idsds", "--against", "input-x-gradient"]) == 0
    printed = " ".join(capsys.readouterr().err.split())
    assert "idsds: Hesse et al. 2024, arXiv 2407.11910" in printed and "fine-tuned with patches taken away" in printed
    record = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert record["settings"] | {"protocol": "idsds", "side": 4, "fill": "mean"} == record["settings"]
    rows = [(one["model"], one["method"], one["variant"], one["n"]) for one in record["measurements"]]
    assert rows == [
        ("teacher", "explanation", "idsds", 6),
        ("teacher", "input-x-gradient", "idsds", 6),
        ("student", "explanation", "idsds", 6),
    ]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Protocol idsds" in page and "single deletion" in page
    # Few pictures, of which the model decides none rightly: the row says why there are no grids.
    assert main([*given, "--protocol", "bcos-v2", "--overwrite"]) == 0
    record = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert {one["reason"] for one in record["measurements"]} == {
        "0 of 6 pictures are classified rightly with a sigmoid above 0.5, and they are not of 4 classes"
    }


def test_a_grid_reads_its_own_pictures_from_the_shards(student, shard, monkeypatch):
    monkeypatch.setattr(labelled, "IN_MEMORY", 0)
    lazy = read_pictures(find_pictures(str(shard)), load(student).preprocess).images
    every = torch.cat(list(lazy.split(4)))
    assert torch.equal(taken(lazy, [4, 1, 1]), every[[4, 1, 1]]) and torch.equal(taken(every, [5]), every[[5]])


def test_a_protocol_without_labels_is_refused_before_anything_is_loaded(tmp_path, capsys):
    words = ["evaluate", str(tmp_path / "nowhere"), "--data", "nothing.tar", "--out", str(tmp_path / "report")]
    assert main([*words, "--protocol", "bcos-v2"]) != 0
    assert "--protocol bcos-v2 measures labels" in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []


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
        ({}, ("--protocol", "bcos"), "no protocol is called 'bcos'. Did you mean 'bcos-v2'"),
        ({}, ("--protocol", "aloe"), "--protocol aloe measures labels, and none are given. Pass --labels cls"),
        ({"json": facts}, ("--protocol", "aloe", "--labels", "class", "--grids", "5"), "and --grids would change them"),
        ({"json": facts}, ("--protocol", "idsds", "--labels", "class", "--masks", "SHARD"), "idsds uses no masks"),
        (
            {"json": facts},
            ("--protocol", "idsds", "--labels", "group"),
            "number of each picture's class, and the labels",
        ),
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


def test_pictures_are_decoded_once(shard, monkeypatch):
    index, decoded = labelled.find_pictures(shard), []
    decode = labelled.decode
    monkeypatch.setattr(labelled, "decode", lambda data, *more: decoded.append(len(data)) or decode(data, *more))
    preprocess = tiny_teacher("test_resnet").preprocess
    found = labelled.read_pictures(index, preprocess, count=3, masks=True)
    assert len(decoded) == 6 and found.masks.shape == (3, *preprocess.size)  # three pictures and three masks
    decoded.clear()
    whole = labelled.read_pictures(index, preprocess)
    for _ in ("teacher", "student"):
        every = torch.cat(list(whole.images.split(4)))
    assert len(decoded) == 6
    monkeypatch.setattr(labelled, "IN_MEMORY", 5 * every[0].nbytes)  # one picture fewer than there are
    lazy = labelled.read_pictures(index, preprocess)
    assert not isinstance(lazy.images, torch.Tensor) and lazy.digest == whole.digest
    assert torch.equal(torch.cat(list(lazy.images.split(4))), every)
    every = dict(zip(lazy.keys, torch.cat(list(lazy.images.split(4))), strict=True))
    assert all(torch.equal(image, every[key]) for key, image in zip(found.keys, found.images, strict=True))


def test_a_box_counts_as_a_mask_and_a_broken_picture_is_named(student, tmp_path):
    preprocess = load(student).preprocess
    with_box = read_pictures(find_pictures(str(write(tmp_path / "a.tar", json=facts))), preprocess, count=2, masks=True)
    masked = write(tmp_path / "b.tar", mask_png=lambda i: mask())
    with_mask = read_pictures(find_pictures(str(masked)), preprocess, count=2, masks=True)
    assert torch.equal(with_box.masks > 0.5, with_mask.masks > 0.5)
    broken = write(tmp_path / "c.tar", jpg=lambda i: b"no picture")
    with pytest.raises(DataError, match=r"s\d in .*c.tar is no picture"):
        read_pictures(find_pictures(str(broken)), preprocess, count=2)


def test_a_broken_picture_is_skipped_counted_and_listed(student, tmp_path, capsys):
    good = write(tmp_path / "good.tar", mask_png=lambda i: mask())
    with tarfile.open(good) as archive, tarfile.open(tmp_path / "a.tar", "w") as out:
        for member in archive:
            file = archive.extractfile(member)
            assert file is not None
            data = file.read()
            data = data[: len(data) // 2] if member.name == "s2.jpg" else data
            member.size = len(data)
            out.addfile(member, io.BytesIO(data))
    words = ["--data", tmp_path / "a.tar", "--masks", tmp_path / "a.tar", "--out", tmp_path / "report", *QUICK]
    with pytest.warns(DataWarning, match=r"1 of 6 pictures were skipped. The first: s2 in .*a\.tar is no picture"):
        assert main(["evaluate", str(student), *map(str, words)]) == 0
    record = json.loads((tmp_path / "report" / "evaluation.json").read_text())
    (skipped,) = record["data"]["skipped"]
    assert skipped["path"] == f"s2 in {tmp_path / 'a.tar'}" and skipped["reason"]
    assert record["data"]["pictures"] == 5 and record["data"]["explained"] == 4
    assert "1 could not be read" in (tmp_path / "report" / "report.html").read_text()


@pytest.mark.parametrize(
    ("members", "options", "said"),
    [
        ({"json": lambda i: b"[" * 100_000}, {"masks": True}, "is not JSON"),
        ({"json": lambda i: b'{"box": ' + b"9" * 5000 + b"}"}, {"masks": True}, "is not JSON"),
        *(
            ({"json": lambda i, box=box: b'{"box": %s}' % box}, {"masks": True}, r"the box of .*\[left, top, right")
            for box in (
                b"[NaN, 1, 2, 3]",
                b"[0, 0, Infinity, 9]",
                b"[1, 2, 3]",
                b'["1", 2, 3, 4]',
                b"[9, 9, 1, 1]",
                b"[900, 900, 950, 950]",
                b"[0, 0, 1e300, 9]",
                b'"box"',
                b"7",
                b"[[1], 2, 3, 4]",
                b"[true, 0, 3, 4]",
            )
        ),
        ({"mask_png": lambda i: b"no mask"}, {"masks": True}, r"s\d\.mask\.png in .* is no picture"),
        ({"json": lambda i: b'{"group": {"a": 1}}'}, {"label": "group"}, "must be a number or a word"),
        ({"json": lambda i: b'{"group": "%s"}' % (b"x" * 999)}, {"label": "group"}, "must be a number or a word"),
    ],
)
def test_side_files_that_lie_are_refused_by_name(student, tmp_path, members, options, said):
    preprocess = load(student).preprocess
    with pytest.raises(DataError, match=said):
        read_pictures(find_pictures(str(write(tmp_path / "a.tar", **members))), preprocess, count=2, **options)


def test_labels_of_many_digits_are_no_class_numbers(student, tmp_path):
    shard = write(tmp_path / "a.tar", cls=lambda i: b"9" * (1 if i else 30))
    with pytest.raises(DataError, match="5 of 6 labels are class numbers, but '9999"):
        read_pictures(find_pictures(str(shard)), load(student).preprocess, label="cls")


def test_one_evaluation_is_nothing_to_compare(tmp_path, capsys):
    assert main(["compare", str(tmp_path)]) == 1 and "two or more" in capsys.readouterr().err
