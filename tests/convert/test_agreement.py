"""How far a student stands for its teacher is said from its history alone, and low agreement is said to be low."""

from __future__ import annotations

import pytest
from bcosify.convert import agreement_of, convert, load_teacher, set_strength
from bcosify.convert.history import Alignment, Calibration


@pytest.fixture(scope="module")
def student():
    return convert(load_teacher("timm:test_vit", pretrained=False, image_size=64))


def test_a_fresh_student_is_its_teacher_until_something_changes(student):
    fresh = agreement_of(student)
    assert (fresh.share, fresh.low, fresh.unchanged) == (1.0, False, True) and "still its teacher" in fresh.words
    calibrated = agreement_of(student.with_history(calibration=Calibration(4, {"b": 2.0}, 3)))
    assert (calibrated.share, calibrated.low, calibrated.unchanged) == (None, True, False)
    set_strength(student.model, 1.5)
    try:
        assert agreement_of(student) == calibrated and "not aligned" in calibrated.words
    finally:
        set_strength(student.model, 1.0)


@pytest.mark.parametrize(
    ("final", "share", "low", "words"),
    [
        ({"top1_agreement": 0.36, "centred_cosine": 0.8}, 0.36, True, "on 36% of held-out pictures: its maps explain"),
        ({"top1_agreement": 0.5, "centred_cosine": 0.1}, 0.5, False, "on 50% of held-out pictures."),
        ({"centred_cosine": 0.94}, None, False, "centred cosine of 0.94 to its teacher's on held-out pictures."),
        ({"centred_cosine": 0.3}, None, True, "0.30 to its teacher's on held-out pictures: its maps explain another"),
        (None, None, True, "aligned on 80 pictures and never compared"),
    ],
)
def test_an_aligned_student_is_told_by_what_its_alignment_measured(student, final, share, low, words):
    found = agreement_of(student.with_history(alignment=Alignment(80, final)))
    assert (found.share, found.low, found.unchanged) == (share, low, False) and words in found.words
