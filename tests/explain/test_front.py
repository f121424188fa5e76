"""The Python front door: whatever people have in hand goes in, and what comes out can be shown, asked and saved."""

from __future__ import annotations

import io
import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from bcosify.convert import Preprocess, Student, load_teacher
from bcosify.core.errors import CheckpointError, DataError, DataWarning, PlanError, SourceError, TargetError
from bcosify.explain import ClassTarget, Explained, explain_scores
from bcosify.explain.placement import Crop, crop_of, placed
from PIL import Image

import bcosify

from tiny import tiny_teacher

NAMES = ("tabby, tabby cat", "tiger cat", *(f"thing {k}" for k in range(998)))


@pytest.fixture(scope="module")
def student() -> Student:
    return bcosify.convert(tiny_teacher("test_efficientnet"), labels=NAMES)


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> Path:
    spec = find_spec("skimage")
    assert spec is not None and spec.submodule_search_locations
    file = tmp_path_factory.mktemp("front") / "cat.png"
    Image.open(Path(spec.submodule_search_locations[0]) / "data" / "chelsea.png").resize((150, 100)).save(file)
    return file


@pytest.fixture(scope="module")
def normalised(student, photo) -> torch.Tensor:
    return student.preprocess.transform()(Image.open(photo))


# ------------------------------------------------------------------------------------------------------------ pictures


def forms(photo: Path, normalised: torch.Tensor) -> dict[str, object]:
    picture = Image.open(photo)
    array = np.asarray(picture)
    first = torch.from_numpy(array.copy()).permute(2, 0, 1)
    return {
        "path": photo,
        "text": str(photo),
        "PIL": picture,
        "bytes": array,
        "floats": array / 255,
        "with alpha": np.asarray(picture.convert("RGBA")),
        "tensor of bytes": first,
        "batch of bytes": first[None],
        "batch of arrays": array[None],
        "normalised": normalised,
        "normalised batch": normalised[None],
        "list of paths": [photo],
        "list": [picture],
        "list of tensors": [normalised],
    }


def test_pictures_of_every_kind_are_one_picture_to_a_student(student, photo, normalised):
    with torch.no_grad():
        expected = student.model(normalised[None])
    wanted = explain_scores(student.model, normalised[None], ClassTarget(0))
    for name, given in forms(photo, normalised).items():
        assert torch.equal(student(given).detach(), expected), name
        found = student.explain(given, "tabby")
        assert torch.equal(found.scores, wanted.scores) and torch.equal(found.contributions, wanted.contributions), name
        assert [one.label for one in found.ledgers] == ["tabby, tabby cat"], name
    several = [photo, Image.open(photo), normalised, np.asarray(Image.open(photo))]
    assert torch.allclose(student(several), expected.expand(4, -1), atol=1e-5)
    assert torch.equal(student(photo.parent), expected)


def test_gradients_go_through_a_student_that_is_called_as_a_module(student, normalised):
    images = normalised[None].clone().requires_grad_()
    student(images)[0, 0].backward()
    assert images.grad is not None and images.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (3, "cannot be a int. Pictures are files, folders, PIL pictures"),
        (None, "cannot be a NoneType"),
        (b"x", "cannot be a bytes"),
        ([], "there is no picture in what was given"),
        (np.zeros((3, 8, 8), np.float32), "channels last.*torch.from_numpy"),
        (np.full((8, 8, 3), 7.0), "from 7.0 to 7.0 is no picture. Pass bytes"),
        (np.zeros((8, 8, 3), np.int64), "array of int64"),
        (np.zeros(8), "is no picture"),
        (torch.zeros(8, 8), r"a tensor \(8, 8\) is no picture"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.int64), "of torch.int64 is no picture"),
        ([torch.zeros(3, 8, 8), torch.zeros(3, 9, 9)], "differ in shape"),
    ],
    ids=lambda value: None if isinstance(value, str) else f"{value!r:.20}",
)
def test_what_is_no_picture_is_refused_with_what_is_taken(student, given, said):
    for call in (student, student.explain):
        with pytest.raises(TargetError, match=said):
            call(given)


def test_a_file_that_is_missing_is_named(student, tmp_path):
    for given in ("missing.png", [Image.new("RGB", (9, 9)), tmp_path / "missing.png"]):
        with pytest.raises(DataError, match="missing.png.*no such file"):
            student.explain(given)
    with pytest.raises(TargetError, match=r"save\(FOLDER\)"):
        student.explain(Image.new("RGB", (9, 9)), out=tmp_path / "maps")
    assert not (tmp_path / "maps").exists()


# ------------------------------------------------------------------------------------------------------------- targets


def test_targets_by_picture_and_for_every_picture(student, photo, tmp_path):
    other = tmp_path / "other.png"
    Image.open(photo).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(other)
    files, outputs = [photo, other], student([photo, other])
    each = outputs[[0, 1], [1, 0]]
    for target in (torch.tensor([1, 0]), np.array([1, 0]), np.array(["tiger cat", "tabby"]), [[1], [0]]):
        for pictures in (files, [Image.open(file) for file in files]):
            found = student.explain(pictures, target)
            torch.testing.assert_close(found.scores[:, 0], each)
            assert [one.target for one in found.ledgers] == [1, 0]
    for targets in ([0, 1], ["tabby", "tiger cat"], ("0", "class 1"), range(2)):
        torch.testing.assert_close(student.explain(files, targets=targets).scores, outputs[:, :2])
    difference = student.explain(files, lambda y: y[:, 0] - y[:, 1])
    torch.testing.assert_close(difference.scores[:, 0], outputs[:, 0] - outputs[:, 1])
    assert difference.balanced().all()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"target": [0, 1]}, r"target \[0, 1\] is a list of 2.*targets=\[0, 1\] \(or ClassTarget.*torch\.tensor"),
        ({"target": ["tabby", "tiger cat"]}, r"targets=\['tabby', 'tiger cat'\] for every.*numpy\.array"),
        ({"target": 0, "targets": [1]}, "target and targets are two answers"),
        ({"targets": "tabby"}, "is no list of classes"),
        ({"targets": 3}, "is no list of classes"),
        ({"targets": []}, "is no list of classes"),
        ({"targets": [0.5]}, "must be integers"),
        ({"target": 0.5}, "is a float. Pass a class number"),
        ({"target": {"class": 1}}, "is a dict. Pass a class number"),
        ({"target": True}, "is a bool"),
        ({"target": ClassTarget}, r"Pass ClassTarget\(\.\.\.\)"),
        ({"target": "tabyy"}, "Did you mean 'tabby'"),
        ({"target": 1000}, "There is no class 1000"),
        ({"target": torch.tensor([0, 1, 2])}, "3 targets that differ from picture to picture, and 1 pictures"),
    ],
    ids=str,
)
def test_what_is_no_target_is_refused_with_what_to_type(student, photo, options, said):
    with pytest.raises(TargetError, match=said):
        student.explain(photo, **options)


# ------------------------------------------------------------------------------------------------------ what comes out


@pytest.fixture(scope="module")
def found(student, photo):
    return student.explain([photo], targets=["tabby", "tiger cat"])


def test_a_student_and_its_explanation_are_told_in_a_few_lines(student, found):
    assert repr(student) == ("Student(timm:test_efficientnet, bcos, not aligned, pictures 64x64, 1,000 named classes)")
    assert repr(tiny_teacher()).startswith("Teacher(timm:test_vit, pictures 64x64")
    first, *lines = repr(found).splitlines()
    assert first == "Explanation by timm:test_efficientnet: 1 picture, 2 scores each" and len(lines) == 2
    assert lines[0].startswith(f"  cat.png  tabby, tabby cat: {float(found.scores[0, 0]):.4g} = ")
    assert len(repr(explain_scores(student.model, torch.rand(1, 3, 64, 64), ClassTarget(0)))) < 120


def test_a_notebook_shows_the_panel_and_the_ledger(found):
    png = found._repr_png_()
    assert Image.open(io.BytesIO(png)).size == found.panel().size
    page = found._repr_html_()
    assert page.count("<tr>") == 2 and "data:image/png;base64," in page and "tiger cat" in page


def test_names_of_strangers_are_escaped_on_the_page(student, normalised):
    named = bcosify.explain(student, normalised[None], "tabby", labels=("<b>tabby</b>", *NAMES[1:]))
    assert "<b>" not in named._repr_html_() and "&lt;b&gt;" in named._repr_html_()


def test_show_draws_in_a_notebook_and_says_where_there_is_no_window(found, monkeypatch):
    shown: list[object] = []
    monkeypatch.setattr("bcosify.explain.explained._notebook", lambda: shown.append)
    found.show()
    found.show(0)
    assert shown[0] is found.explained and shown[1].size == found.panel(0).size
    monkeypatch.setattr("bcosify.explain.explained._notebook", lambda: None)
    monkeypatch.setattr("PIL.ImageShow.show", lambda *args, **options: False)
    with pytest.warns(DataWarning, match=r"no window.*\.save\('maps'\)"):
        found.show()


def test_it_is_saved_as_the_command_writes_it(student, photo, found, tmp_path):
    found.save(tmp_path / "ours")
    student.explain([photo], targets=["tabby", "tiger cat"], out=tmp_path / "theirs")
    for name in ("cat.png", "cat.json", "cat.npz"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
    with pytest.raises(CheckpointError, match="ours"):
        found.save(tmp_path / "ours")
    found.save(tmp_path / "ours", overwrite=True)
    rows = json.loads((tmp_path / "ours" / "cat.json").read_text())
    assert json.loads(json.dumps(found.to_dict()))["scores"] == rows == [one.row() for one in found]
    student.explain(Image.open(photo)).save(tmp_path / "memory")
    assert {path.name for path in (tmp_path / "memory").iterdir()} == {
        "picture 0.png",
        "picture 0.npz",
        "picture 0.json",
    }


def test_the_largest_constants_and_a_plot(found):
    pytest.importorskip("matplotlib").use("agg")
    (name, first), (_, second) = found.top_constants(2, score=1)
    constants = found[1].constants
    assert abs(first) == max(map(abs, constants.values())) and constants[name] == first and abs(first) >= abs(second)
    axes = found.plot(score=1)
    assert axes.get_title().startswith("tiger cat") and axes.images[0].get_array().shape == (64, 64, 3)
    with pytest.raises(TargetError, match="n is 0"):
        found.top_constants(0)


@pytest.mark.parametrize("place", [{"picture": 1}, {"score": 2}, {"picture": -1}, {"score": True}, {"picture": "cat"}])
def test_no_such_picture_or_score(found, place):
    with pytest.raises(TargetError, match="there are [12], numbered 0 to [01]"):
        found.region((0, 0, 2, 2), **place)


def test_maps_of_many_pictures_are_not_kept(student, photo, monkeypatch):
    monkeypatch.setattr("bcosify.explain.verb.KEPT", 1)
    found = student.explain([photo], "tabby")
    assert len(found) == 1 and repr(found) == "Ledgers(1 scores, 0 pictures skipped)"
    with pytest.raises(TargetError, match=r"\.region: the maps of 1 pictures were not kept"):
        found.region((0, 0, 2, 2))
    with pytest.raises(AttributeError, match="'shew'"):
        _ = found.shew


# -------------------------------------------------------------------------------------------------------------- regions


def test_regions_add_up_to_the_ledger(found):
    left, right = found.region((0, 0, 20, 64)), found.region((20, 0, 64, 64))
    assert left.adds + right.adds == pytest.approx(found[0].input, abs=1e-4 * max(1, abs(found[0].score)))
    mask = np.zeros((64, 64), bool)
    mask[:, :20] = True
    assert found.region(mask) == found.region(torch.from_numpy(mask)) == left and left.area == 20 / 64
    assert left.adds == pytest.approx(float(found.contributions[0, 0, :, :20].double().sum()), abs=1e-9)
    assert left.of_score == left.adds / found[0].score and "tabby" in str(left)
    half = found.region(mask * 0.5)
    assert half.adds == pytest.approx(left.adds / 2)


def test_regions_of_a_real_student_add_up_to_its_ledger():
    """EfficientNet-Lite0, on the pixels that it saw and on the photo's: any tiling of either has the ledger's sum."""
    spec = find_spec("skimage")
    assert spec is not None and spec.submodule_search_locations
    cat = Path(spec.submodule_search_locations[0]) / "data" / "chelsea.png"
    found = bcosify.convert("bundled:efficientnet_lite0").explain(cat, "tabby")
    ledger = found[0]
    total = ledger.input + sum(ledger.constants.values())
    assert total == pytest.approx(ledger.score, abs=1e-4 * max(1, abs(ledger.score)))
    width, height = Image.open(cat).size
    for on, across, down in (("input", 224, 224), ("photo", width, height)):
        boxes = [
            (x, y, min(x + 97, across), min(y + 61, down)) for x in range(0, across, 97) for y in range(0, down, 61)
        ]
        shares = [found.region(box, on=on) for box in boxes]
        assert sum(one.area for one in shares) == pytest.approx(1)
        assert sum(one.adds for one in shares) == pytest.approx(ledger.input, abs=1e-4)
        assert max(abs(one.adds) for one in shares) > 0.05


@pytest.mark.parametrize(
    ("region", "on", "said"),
    [
        ((0, 0, 65, 10), "input", "outside of the input, which is 64 wide and 64 high.*on='photo'"),
        ((-1, 0, 5, 5), "input", "outside"),
        ((5, 5, 5, 9), "input", "is empty or outside"),
        ((0, 0, 151, 5), "photo", "outside of the photo, which is 150 wide and 100 high.*on='input'"),
        ((0, 0, 2.5, 5), "input", "neither a box nor a mask"),
        ((0, 0, 5), "input", "neither a box nor a mask"),
        ("eye", "input", "neither a box nor a mask"),
        (None, "input", "neither a box nor a mask"),
        ((0, 0, float("nan"), 5), "input", "neither a box nor a mask"),
        (np.ones((100, 150)), "input", "mask is 100x150.*on='photo'"),
        (np.zeros((64, 64)), "input", "the mask is empty"),
        (np.full((64, 64), 255), "input", "truth values, or weights from 0 to 1"),
        ((0, 0, 5, 5), "screen", "on='screen'"),
    ],
    ids=str,
)
def test_regions_that_are_none_are_refused(found, region, on, said):
    with pytest.raises(TargetError, match=said):
        found.region(region, on=on)


def test_a_photo_that_is_not_known_is_not_guessed(student, normalised):
    given = student.explain(normalised, "tabby")
    assert isinstance(given, Explained) and given.region((0, 0, 64, 64)).area == 1
    with pytest.raises(TargetError, match="its photo is not known"):
        given.region((0, 0, 5, 5), on="photo")


# ----------------------------------------------------------------------------------------------------- the photo's grid


@pytest.mark.parametrize(
    ("mode", "size", "crop_pct", "wanted"),
    [
        # The shorter side becomes 64 / 0.8 = 80, so a pixel of the input is 6 of the photo; the crop is central.
        ("center", (640, 480), 0.8, Crop(128, 48, 512, 432)),
        ("center", (480, 640), 1.0, Crop(0, 80, 480, 560)),
        ("squash", (640, 480), 1.0, Crop(0, 0, 640, 480)),
        ("border", (640, 480), 1.0, Crop(0, -80, 640, 560)),
        ("center", (40, 32), 1.0, Crop(4, 0, 36, 32)),
    ],
)
def test_the_crop_is_found_in_the_photo(mode, size, crop_pct, wanted):
    record = Preprocess((64, 64), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), crop_pct=crop_pct, crop_mode=mode)
    transform = record.transform()
    found = crop_of(lambda picture: record.denormalise(transform(picture)), size)
    # A library may round its crop by half a pixel of the input.
    assert max(abs(ours - theirs) for ours, theirs in zip(found, wanted, strict=True)) <= 0.55 * size[0] / 64
    contributions = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    there = placed(contributions, found, size)
    assert there.shape == (size[1], size[0]) and float(there.sum()) == pytest.approx(
        float(contributions.sum()), abs=1e-3
    )


def test_a_place_in_the_input_lies_at_its_place_in_the_photo():
    contributions = torch.zeros(64, 64)
    contributions[10, 20] = 2.0
    there = placed(contributions, Crop(128, 48, 512, 432), (640, 480))
    rows, columns = there.nonzero().unbind(1)
    assert (int(rows.min()), int(rows.max()), int(columns.min()), int(columns.max())) == (108, 113, 248, 253)
    assert torch.allclose(there[108:114, 248:254], torch.full((6, 6), 2 / 36))


def test_other_doors_lead_to_the_same_explanation(student, photo, tmp_path):
    folder = student.save(tmp_path / "student")
    assert isinstance(folder, Path)
    ours = student.explain(photo, "tabby")
    torch.testing.assert_close(bcosify.explain(str(folder), photo, "tabby").contributions, ours.contributions)
    teacher = load_teacher("timm:test_vit", pretrained=False)
    assert teacher.explain(photo, 3).scores.item() == pytest.approx(float(teacher(photo)[0, 3]), abs=1e-4)
    module = bcosify.explain(SimpleModule(), torch.rand(2, 3, 8, 8), targets=[0, 1])
    assert [one.label for one in module.ledgers] == ["class 0", "class 1"] * 2 and module.panel(1).width > 0


class SimpleModule(torch.nn.Sequential):
    def __init__(self) -> None:
        super().__init__(torch.nn.Flatten(), torch.nn.Linear(192, 3))


# ------------------------------------------------------------------------------------------------------- first contact


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (
            lambda student: bcosify.convert(timm.create_model("test_vit")),
            PlanError,
            r"save_file\(.*bcosify\.convert\('timm:test_vit', weights='mine\.safetensors'\)",
        ),
        (lambda student: bcosify.convert(SimpleModule()), PlanError, r"'timm:NAME'.*bcosify\.explain\(model"),
        (lambda student: bcosify.convert(SimpleModule), PlanError, "a type is no model"),
        (
            lambda student: bcosify.convert("timm:test_vit", weights=student.model.state_dict()),
            SourceError,
            r"weights is a OrderedDict, and not a file.*save_file",
        ),
        (lambda student: bcosify.explain("resnet50", "cat.jpg"), SourceError, "Did you mean 'timm:resnet50'"),
        (lambda student: bcosify.explain(3, "cat.jpg"), SourceError, "model is a int. Pass a reference"),
        (
            lambda student: bcosify.explain(SimpleModule(), "cat.jpg", "tabby"),
            TargetError,
            "Student or a Teacher, such as",
        ),
        (lambda student: bcosify.load(student), CheckpointError, r"Write it first: student\.save\('runs/mine'\)"),
        (lambda student: bcosify.load(SimpleModule()), CheckpointError, "Convert it first"),
        (lambda student: student.eval(), AttributeError, r"'eval'\. Its module has: \.model\.eval"),
        (lambda student: student.explane, AttributeError, "'explane'"),
    ],
)
def test_first_contact_says_what_was_given_what_is_taken_and_what_to_type(student, call, error, said):
    with pytest.raises(error, match=said):
        call(student)


def test_a_student_that_was_trained_is_saved_as_it_is_and_says_so(photo, tmp_path):
    student = bcosify.convert(tiny_teacher("test_vit"))
    assert student.explain(photo, 0).agreement.words.startswith("The student is still its teacher")
    head = student.model.head
    with torch.no_grad():
        head.weight.mul_(-2)
    before = student(photo)
    said = student.explain(photo, 0).agreement
    assert said.words.startswith("The student was trained since its conversion")
    bcosify.save(student, tmp_path / "mine")
    opened = bcosify.load(tmp_path / "mine")
    assert torch.allclose(opened(photo), before, atol=1e-5) and opened.explain(photo, 0).agreement == said
    assert bcosify.__version__ and set(bcosify.__all__) <= set(dir(bcosify))
