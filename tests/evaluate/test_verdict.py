"""The verdict in words: what is doubted, what is claimed, and that a claim has an interval behind it."""

from __future__ import annotations

import dataclasses

import pytest
from bcosify.evaluate.record import Evaluation, Measurement
from bcosify.evaluate.report import render_page, report_page
from bcosify.evaluate.report.tables import comparison, method_tables, student_first
from bcosify.evaluate.verdict import class_contrast, verdict

SAME = Measurement("fidelity", "top1_agreement", "both", "", "", 0.36, 0.30, 0.42, 256)
COSINE = Measurement("fidelity", "centred_cosine", "both", "", "output", 0.81, 0.79, 0.83, 256)
CONTRAST = Measurement(
    "localisation", "signed_contrast", "student", "explanation", "random class", 0.06, 0.03, 0.09, 12
)
GAIN = Measurement("localisation", "signed_contrast_gain", "both", "explanation", "random class", 0.05, 0.02, 0.08, 12)


def of(*rows: Measurement) -> Evaluation:
    return Evaluation({}, {"pictures": 256, "explained": 12}, {}, rows)


def like(row: Measurement, value: float | None, low: float | None = None, high: float | None = None, **more):
    return dataclasses.replace(row, value=value, low=low, high=high, **more)


def test_it_says_both_numbers_with_their_intervals_and_doubts_a_student_that_decides_otherwise():
    said = verdict(of(SAME, CONTRAST))
    assert str(said) == (
        "Do not trust this student yet: it decides like its teacher on 36 % (30 to 42) of held-out pictures; "
        "its maps differ between classes (+0.06, +0.03 to +0.09)."
    )
    assert [clause.doubt for clause in said.clauses] == [True, False]


@pytest.mark.parametrize(
    ("rows", "doubts", "words"),
    [
        ((like(SAME, 0.5, 0.4, 0.6), CONTRAST), False, "The student decides like its teacher on 50 % (40 to 60)"),
        ((like(SAME, 0.49, 0.4, 0.6), CONTRAST), True, "Do not trust"),
        (
            (like(SAME, 0.9), like(CONTRAST, 0.06, -0.01, 0.1)),
            True,
            "not shown to differ between classes (+0.06, -0",
        ),
        ((like(SAME, 0.9), like(CONTRAST, 0.06)), True, "not shown to differ between classes (+0.06, of one picture)"),
        ((like(SAME, 0.9), like(CONTRAST, -0.2, -0.3, -0.1)), True, "less than those of another class (-0.20"),
        ((like(SAME, 0.9), like(CONTRAST, 0.02, 0.0, 0.04)), True, "(+0.020, +0.000 to +0.040)"),
        ((like(SAME, 0.9),), False, "whether its maps differ between classes was not measured."),
        ((like(SAME, 0.9), like(CONTRAST, None, reason="no masks")), False, "was not measured (no masks)"),
        ((like(SAME, None, reason="the model has no classes"), COSINE), False, "cosine of 0.81 (0.79 to 0.83)"),
        ((like(COSINE, 0.4, 0.3, 0.5), CONTRAST), True, "cosine of 0.40"),
        ((like(SAME, None, reason="all the same"),), False, "not compared with its teacher's decisions (all the same)"),
        ((), False, "not compared with its teacher's decisions; whether"),
    ],
)
def test_doubt_is_agreement_below_a_half_or_a_contrast_that_may_be_zero(rows, doubts, words):
    said = verdict(of(*rows))
    assert said.doubtful is doubts and words in str(said)


def test_better_than_its_teacher_is_said_only_where_the_paired_interval_excludes_zero():
    claim = "they tell classes apart better than its teacher's"
    assert f"{claim} (+0.05, +0.02 to +0.08)" in str(verdict(of(SAME, CONTRAST, GAIN)))
    for row in (like(GAIN, 0.05, -0.01, 0.1), like(GAIN, 0.05)):
        said = str(verdict(of(SAME, CONTRAST, row)))
        assert claim not in said and "are not shown to tell classes apart better" in said
    assert "tell classes apart worse" in str(verdict(of(SAME, CONTRAST, like(GAIN, -0.3, -0.4, -0.2))))
    assert "its teacher's" not in str(verdict(of(SAME, CONTRAST, like(GAIN, None, reason="no masks"))))
    # A larger share alone is no claim about classes.
    share = like(GAIN, 0.1, 0.05, 0.2, metric="energy_in_mask_gain", variant="")
    assert "lie on the object better than its teacher's (+0.10" in str(verdict(of(SAME, CONTRAST, share)))


def test_the_signed_contrast_with_a_random_class_comes_first():
    runner = like(CONTRAST, 0.01, -0.1, 0.1, variant="runner-up")
    energy = like(CONTRAST, 0.5, 0.4, 0.6, metric="energy_in_mask_contrast")
    teacher = like(CONTRAST, 0.7, 0.6, 0.8, model="teacher")
    assert class_contrast(of(teacher, energy, runner, CONTRAST)) == CONTRAST
    assert class_contrast(of(teacher, energy, like(CONTRAST, None, reason="none"))) == energy
    assert class_contrast(of(teacher, energy), "teacher") == teacher and class_contrast(of(SAME)) is None


def test_the_page_opens_with_it_in_red_and_escapes_what_strangers_wrote():
    reason = "<script>alert(1)</script>"
    page = report_page(of(SAME, like(CONTRAST, None, reason=reason)), [], "title", "what")
    opening = page[page.index("<body>") : page.index('class="cards"')]
    assert '<span class="bad">Do not trust this student yet: it</span> <span class="bad">decides like' in opening
    assert "<span>whether its maps differ" in opening and reason not in page and "&lt;script&gt;alert" in opening
    page = report_page(of(like(SAME, 0.9, 0.8, 1.0), COSINE, CONTRAST), [], "title", "what")
    opening = page[page.index("<body>") : page.index("<h2>")]
    assert "bad" not in opening and "doubt" not in opening and "The student" in opening
    # The first card is the contrast.
    assert opening.index("<b>0.060</b><small>0.030 to 0.090</small>") < opening.index("<b>0.810</b>")
    doubted = report_page(of(like(CONTRAST, 0.06, -0.01, 0.1)), [], "title", "what")
    assert '<b class="bad">0.060</b>' in doubted


def test_tables_show_the_contrast_first_and_the_student_before_all_others():
    share = like(CONTRAST, 0.3, 0.2, 0.4, metric="energy_in_mask", variant="")
    rows = [dataclasses.replace(share, model="teacher", method=method) for method in ("grad-cam", "explanation")]
    table = student_first(method_tables(of(*rows, share, CONTRAST, GAIN))["localisation"])
    assert [name for name, _ in table.columns[2:]] == ["signed contrast", "energy in mask", "signed contrast gain"]
    assert [(row[0].text, row[1].text) for row in table.rows] == [
        *(("student", "explanation"), ("teacher", "explanation"), ("teacher", "grad-cam")),
        ("student minus teacher", "explanation"),
    ]


def test_tables_mark_a_method_only_where_its_interval_is_apart_from_all_others():
    one = Measurement("faithfulness", "insertion_auc", "student", "explanation", "v", 0.8, 0.7, 0.9, 5)

    def marked(*rows: Measurement) -> list[bool]:
        return [row[2].best for row in method_tables(of(*rows))[rows[0].section].rows]

    far, near = (like(one, *values, method="grad-cam") for values in ((0.5, 0.4, 0.6), (0.75, 0.6, 0.85)))
    assert marked(one, far) == [True, False] and marked(one, near) == [False, False]
    assert marked(one, far, dataclasses.replace(near, method="rollout")) == [False, False, False]
    # Faithfulness is of a model's own methods; less of a deletion curve is better; what is alone beats nothing.
    assert marked(one, far, dataclasses.replace(near, model="teacher")) == [True, False, False]
    assert marked(*(dataclasses.replace(row, metric="deletion_auc") for row in (one, far))) == [False, True]
    assert marked(one) == [False]
    where = [dataclasses.replace(row, section="localisation", metric="energy_in_mask") for row in (one, far)]
    assert marked(where[0], dataclasses.replace(where[1], model="teacher")) == [True, False]


def marks(*rows: Measurement | None) -> list[bool]:
    table = comparison([(f"run {i}", of(row) if row else of()) for i, row in enumerate(rows)])
    return [cell.best for cell in table.rows[0][3:]]


def test_compare_marks_only_what_intervals_carry():
    row = like(SAME, 0.5, 0.4, 0.6)
    assert marks(row, like(row, 0.8, 0.7, 0.9)) == [False, True]
    assert marks(row, like(row, 0.65, 0.55, 0.75)) == [False, False]
    # Shared rows, such as the teacher's; and what has no interval.
    assert marks(row, row) == [False, False]
    exact = like(row, 1.0, 1.0, 1.0)
    assert marks(exact, exact) == [False, False] and marks(row, like(row, 0.9)) == [False, False]
    assert marks(like(row, 0.1), like(row, 0.9, 0.8, 1.0)) == [False, False]
    # Of three, better than both others; a run without the row does not count.
    assert marks(row, like(row, 0.8, 0.7, 0.9), like(row, 0.85, 0.75, 0.95)) == [False, False, False]
    assert marks(like(row, 0.1, 0.0, 0.2), None, like(row, 0.85, 0.75, 0.95)) == [False, False, True]
    assert marks(row, None) == [False, False]
    # Less is better of some, and of some neither is.
    low = like(row, 0.1, 0.0, 0.2, section="faithfulness", metric="deletion_auc", variant="v")
    assert marks(like(low, 0.5, 0.4, 0.6), low) == [False, True]
    area = like(row, 0.1, 0.0, 0.2, section="localisation", metric="mask_area")
    assert marks(area, like(area, 0.5, 0.4, 0.6)) == [False, False]


def test_the_page_of_compare_says_how_it_marks():
    table = comparison([("one", of(SAME)), ("two", of(SAME))])
    page = render_page("compare.html", names=["one", "two"], warnings=[], table=table)
    assert "intervals that do not overlap" in " ".join(page.split())
