"""Controls: contrasts are paired differences of real maps, models that know less are measured, bad masks are told."""

from __future__ import annotations

import copy
import dataclasses
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from bcosify.convert import BcosConfig, convert, original, set_strength
from bcosify.core.errors import DataError, DataWarning, NotApplicable
from bcosify.data.labelled import find_pictures, read_pictures
from bcosify.evaluate import suite
from bcosify.evaluate.baselines import find_method, maps_of
from bcosify.evaluate.contrast import MEASURES, OTHERS, others_of
from bcosify.evaluate.decisions import ClassDecisions, DirectionDecisions, ValueDecisions
from bcosify.evaluate.estimates import bootstrap
from bcosify.evaluate.metrics.controls import less_trained
from bcosify.evaluate.metrics.localisation import energy_in_mask, signed_in_mask
from bcosify.evaluate.suite import Pictures, Settings
from bcosify.evaluate.verb import _untrained
from bcosify.evaluate.verdict import verdict
from PIL import Image

from tiny import tiny_teacher

QUICK = Settings(
    (("teacher", "input-x-gradient"),), grids=1, confident=0.0, subsets=2, cascade_pictures=2, cascade_steps=1
)


def pictures(count: int = 5) -> Pictures:
    masks = torch.zeros(count, 64, 64)
    for i in range(count):
        masks[i, 8 * (i % 4) : 8 * (i % 4) + 24, 16:48] = 1
    images = torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    return Pictures(images, tuple(f"p{i}" for i in range(count)), masks)


@pytest.fixture(scope="module")
def subjects(tiny_subject):
    student = convert(tiny_teacher(), BcosConfig())
    set_strength(student.model, 1.5, 0.5)
    untrained = convert(tiny_teacher(), BcosConfig())
    set_strength(untrained.model, 1.5, 0.5)
    ours = tiny_subject(model=student.model, name="student")
    return tiny_subject(), ours, {"untrained": lambda: tiny_subject(model=untrained.model, name="untrained")}


@pytest.fixture(scope="module")
def measured(subjects):
    teacher, student, untrained = subjects
    return suite.evaluate_subjects(teacher, student, pictures(), pictures(), QUICK, untrained=untrained, progress=False)


def test_contrasts_are_paired_differences_of_the_maps_of_two_classes(measured):
    evaluation, explained = measured
    masks, images = pictures().masks, pictures().images
    assert masks is not None
    for kind in OTHERS:
        for model, method in (("student", "explanation"), ("teacher", "explanation"), ("teacher", "input-x-gradient")):
            wanted = others_of(kind, explained.decisions, explained.outputs["teacher"])
            other = maps_of(find_method(method), explained.subjects[model], images, wanted)
            for one in MEASURES.values():
                difference = one.value(explained.maps[model, method], masks) - one.value(other, masks)
                found = evaluation.find(one.contrast, model, method, kind)
                assert found is not None and found.value == pytest.approx(float(difference.mean()), abs=1e-5)
                expected = bootstrap(difference)
                assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-5)


def test_gains_are_paired_differences_of_student_and_teacher(measured):
    evaluation, explained = measured
    masks = pictures().masks
    assert masks is not None
    ours, theirs = (explained.maps[model, "explanation"] for model in ("student", "teacher"))
    for metric, value in (("energy_in_mask", energy_in_mask), ("signed_share", signed_in_mask)):
        gain = evaluation.find(f"{metric}_gain", "both", "explanation")
        difference = value(ours, masks) - value(theirs, masks)
        assert gain is not None and gain.value == pytest.approx(float(difference.mean()), abs=1e-6)
    contrasts = [
        evaluation.find("signed_contrast", model, "explanation", OTHERS[0]) for model in ("student", "teacher")
    ]
    gain = evaluation.find("signed_contrast_gain", "both", "explanation", OTHERS[0])
    assert gain is not None and gain.value == pytest.approx(contrasts[0].value - contrasts[1].value, abs=1e-5)
    said = str(verdict(evaluation))
    assert "its maps" in said and "not measured" not in said


def test_models_that_know_less_have_the_same_rows(measured, subjects):
    evaluation, explained = measured
    masks, images = pictures().masks, pictures().images
    assert masks is not None
    for name, make in {**less_trained(subjects[1]), **subjects[2]}.items():
        maps = maps_of(find_method("explanation"), make(), images, explained.decisions)
        for one in MEASURES.values():
            found = evaluation.find(one.row, name, "explanation")
            assert found is not None and found.value == pytest.approx(float(one.value(maps, masks).mean()), abs=1e-5)
            assert evaluation.find(one.contrast, name, "explanation", OTHERS[0]).value is not None


def test_shuffled_students_are_others_and_leave_the_student_alone(subjects):
    student = subjects[1]
    before = {name: tensor.clone() for name, tensor in student.model.state_dict().items()}
    changed = {}
    for name, make in less_trained(student).items():
        state = make().model.state_dict()
        changed[name] = {key for key, tensor in state.items() if not torch.equal(tensor, before[key])}
    assert changed["last block random"] < changed["all blocks random"]
    assert {key.split(".")[1] for key in changed["last block random"]} == {"5"}
    assert all(torch.equal(tensor, before[key]) for key, tensor in student.model.state_dict().items())


def test_the_untrained_student_has_its_teachers_weights_at_its_own_strengths(tiny_subject, monkeypatch):
    monkeypatch.setattr(original, "reload_teacher", lambda source, weights: tiny_teacher())
    student, images = convert(tiny_teacher(), BcosConfig()), pictures().images
    set_strength(student.model, 1.5, 0.5)
    converted = copy.deepcopy(student.model).eval()
    with torch.no_grad():
        for parameter in student.model.parameters():
            parameter.mul_(1.2)
        untrained = _untrained(student, None, tiny_subject(model=student.model, name="student"))
        trained, found, expected = (model.eval()(images) for model in (student.model, untrained.model, converted))
    assert untrained.name == "untrained" and torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, trained, atol=1e-2)


def test_controls_that_are_methods_do_not_know_the_class(subjects):
    teacher, images = subjects[0], pictures().images
    one, two = (ClassDecisions(torch.full((5,), number)) for number in (3, 7))
    for name in ("centre", "edges"):
        maps = maps_of(find_method(name), teacher, images, one)
        assert torch.equal(maps, maps_of(find_method(name), teacher, images, two))
    centre, edges = (maps_of(find_method(name), teacher, images, one) for name in ("centre", "edges"))
    assert divmod(int(centre[0].argmax()), 64) in {(31, 31), (31, 32), (32, 31), (32, 32)}
    stripe = torch.zeros(1, 3, 64, 64)
    stripe[..., 32:] = 1
    found = maps_of(find_method("edges"), teacher, stripe, ClassDecisions(torch.zeros(1).long()))[0]
    assert set(found.nonzero()[:, 1].tolist()) == {31, 32} and edges.shape == (5, 64, 64)


def test_without_another_class_the_reason_is_told():
    outputs = torch.randn(3, 1)
    alone = ClassDecisions(torch.zeros(3).long())
    for kind in OTHERS:
        with pytest.raises(NotApplicable, match="no contrast is possible"):
            others_of(kind, alone, outputs)
        with pytest.raises(NotApplicable, match="one output"):
            others_of(kind, ValueDecisions(torch.randn(3), torch.zeros(())), outputs)
    features = DirectionDecisions(torch.eye(3), torch.zeros(3))
    with pytest.raises(NotApplicable, match="no runner-up"):
        others_of("runner-up", features, torch.randn(3, 3))
    decided = ClassDecisions(torch.tensor([0, 2]))
    second = others_of("runner-up", decided, torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]]))
    assert isinstance(second, ClassDecisions) and second.classes.tolist() == [1, 0]


def test_without_controls_there_are_none(subjects):
    settings = dataclasses.replace(QUICK, controls=False, protocols=())
    evaluation, explained = suite.evaluate_subjects(*subjects[:2], pictures(), pictures(), settings, progress=False)
    assert ("teacher", "averaged") not in explained.maps and not explained.controls
    assert {one.model for one in evaluation.measurements} == {"teacher", "student", "both"}
    assert evaluation.find("signed_contrast", "student", "explanation", OTHERS[0]).value is not None


# ----------------------------------------------------------------------------------------------------------- bad masks


def shard(path: Path, masks: list[Image.Image]) -> str:
    """A shard of noise pictures of 40 x 40 with these masks."""
    with tarfile.open(path, "w") as tar:
        for i, mask in enumerate(masks):
            noise = np.random.default_rng(i).integers(0, 255, (40, 40, 3), dtype=np.uint8)
            for name, picture in {"png": Image.fromarray(noise), "mask.png": mask}.items():
                buffer = io.BytesIO()
                picture.save(buffer, "PNG")
                member = tarfile.TarInfo(f"s{i}.{name}")
                member.size = len(buffer.getvalue())
                tar.addfile(member, io.BytesIO(buffer.getvalue()))
    return str(path)


def half(value: int, mode: str = "L") -> Image.Image:
    values = np.zeros((40, 40), np.uint8)
    values[:, :20] = value
    mask = Image.fromarray(values)
    if mode == "P":
        mask = Image.fromarray(values, "P")
        mask.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0] + [7] * (256 - 3) * 3)
    return mask.convert(mode) if mode not in ("L", "P") else mask


def masks_of(path: str) -> torch.Tensor:
    preprocess = dataclasses.replace(tiny_teacher(size=32).preprocess)
    masks = read_pictures(find_pictures(path), preprocess, count=9, masks=True).masks
    assert masks is not None
    return masks > 0.5


def test_masks_of_0_and_1_and_of_palettes_are_those_of_0_and_255(tmp_path):
    wanted = masks_of(shard(tmp_path / "a.tar", [half(255)]))
    assert 0 < int(wanted.sum()) < wanted.numel()
    for name, mask in {"one": half(1), "bits": half(255, "1"), "palette": half(2, "P"), "dark": half(1, "P")}.items():
        assert torch.equal(masks_of(shard(tmp_path / f"{name}.tar", [mask])), wanted), name


def test_masks_of_numbers_are_refused_and_empty_ones_skipped(tmp_path):
    with pytest.raises(DataError, match=r"the largest value of s0\.mask\.png .* is 20\. A mask is 0 outside and 255"):
        masks_of(shard(tmp_path / "a.tar", [half(20)]))
    with pytest.warns(
        DataWarning, match=r"1 of 2 pictures were skipped.*s1 .*cannot be used: nothing of what the model"
    ):
        assert len(masks_of(shard(tmp_path / "b.tar", [half(255), half(0)]))) == 1
    with pytest.raises(DataError, match="None of the 1 pictures can be read.*nothing of what the model sees"):
        masks_of(shard(tmp_path / "c.tar", [half(0)]))


def test_numbered_masks_above_127_and_with_a_void_border_are_refused_and_soft_ones_are_not(tmp_path):
    with pytest.raises(DataError, match=r"the largest value of s0\.mask\.png .* is 200\. A mask is 0 outside and 255"):
        masks_of(shard(tmp_path / "a.tar", [half(200)]))
    values = np.asarray(half(15)).copy()
    values[:, 18:20] = 255  # as Pascal VOC has it: 15 for a person, 255 for its border
    palette = Image.fromarray(values, "P")
    palette.putpalette([0, 0, 0] + [128, 64, 0] * 254 + [224, 224, 192])
    for name, mask in {"grey": Image.fromarray(values), "palette": palette}.items():
        with pytest.raises(
            DataError, match="s0.mask.png .* has 255 beside 15. In masks of numbered objects, such as Pas"
        ):
            masks_of(shard(tmp_path / f"{name}.tar", [mask]))
    many = np.asarray(half(255)).copy()
    many[:15, :20], many[15:30, :20] = 1, 130  # more of numbers than of 255
    with pytest.raises(DataError, match="has 255 beside 1, 130"):
        masks_of(shard(tmp_path / "many.tar", [Image.fromarray(many)]))
    wanted = masks_of(shard(tmp_path / "b.tar", [half(255)]))
    binary = Image.fromarray(np.asarray(half(255)), "P")
    binary.putpalette([0, 0, 0] + [9, 9, 9] * 254 + [255, 255, 255])
    blurred = np.zeros((40, 40), np.uint8)
    blurred[:] = np.clip(255 - (np.arange(40) - 2) * 255 / 35.5, 0, 255)  # a soft edge from left to right
    assert torch.equal(masks_of(shard(tmp_path / "c.tar", [binary])), wanted)
    assert torch.equal(masks_of(shard(tmp_path / "d.tar", [Image.fromarray(blurred)])), wanted)


def test_masks_of_another_size_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"mask has 20x40 pixels, its picture 40x40"):
        masks_of(shard(tmp_path / "a.tar", [half(255).resize((20, 40))]))


def test_a_mask_of_two_objects_of_one_class_holds_both(tmp_path):
    two = np.zeros((40, 40), np.uint8)
    two[:, :8], two[:, 32:] = 255, 255
    mask = masks_of(shard(tmp_path / "a.tar", [Image.fromarray(two)])).float()
    left, right = torch.zeros_like(mask), torch.zeros_like(mask)
    left[..., 2], right[..., -3] = 1, 1
    assert float(energy_in_mask(left, mask)) == float(energy_in_mask(right, mask)) == 1
    assert float(energy_in_mask(left - right, mask)) == 1 and float(signed_in_mask(left - right, mask)) == 0
