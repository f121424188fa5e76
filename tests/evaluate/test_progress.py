"""What an evaluation says of itself: what it will do, its steps, and how many there are."""

from __future__ import annotations

import dataclasses
import re

import pytest
from bcosify.convert import BcosConfig, convert, set_strength
from bcosify.core.pictures import noise_pictures
from bcosify.evaluate import suite
from bcosify.evaluate.baselines import METHODS, find_method
from bcosify.evaluate.progress import in_words, passes_of
from bcosify.evaluate.suite import Pictures, Settings

from tiny import tiny_teacher

SETTINGS = Settings((("teacher", "rollout"),), grids=1, confident=0.0, subsets=2, cascade_pictures=2, controls=False)


@pytest.fixture(scope="module")
def pair(tiny_subject):
    teacher = tiny_teacher("test_resnet")
    student = convert(teacher, BcosConfig())
    set_strength(student.model, 1.5, 0.5)
    return tiny_subject("test_resnet", teacher.model), tiny_subject("test_resnet", student.model, name="student")


def test_the_steps_are_announced_and_counted_and_those_done_before_too(pair, tmp_path, capsys):
    pictures = Pictures(noise_pictures(2, (64, 64), seed=3), ("a", "b"))
    options = {"work": tmp_path / "work"}
    evaluation, _ = suite.evaluate_subjects(*pair, pictures, pictures, SETTINGS, **options)
    first, *lines = capsys.readouterr().err.splitlines()
    total = int(re.match(r"Evaluation in (\d+) steps: fidelity on 2 pictures, maps of 2 \(teacher's", first)[1])
    assert re.search(r"It takes about \d+ (seconds|minutes)\.$", first)
    # Rollout has no meaning for a CNN: steps of its maps are announced, and not taken.
    names = [re.match(rf"(\d+)/{total} (.*): \d+\.\d s$", line).groups() for line in lines]
    assert [name for _, name in names] == [step.step for step in evaluation.seconds]
    assert [int(number) for number, _ in names] == list(range(1, len(lines) + 1))
    assert len(lines) < total and not any("removal curves: teacher, rollout" in line for line in lines)
    suite.evaluate_subjects(*pair, pictures, pictures, SETTINGS, **options)
    (again,) = capsys.readouterr().err.splitlines()
    assert f"in {total} steps, of which {len(lines)} are done" in again
    suite.evaluate_subjects(*pair, pictures, pictures, SETTINGS, **options, progress=False)
    assert not capsys.readouterr().err


def test_more_is_said_to_take_longer():
    def passes(explained=16, fidelity=16, **changes):
        compared = {"teacher": fidelity, "student": fidelity}
        return passes_of(dataclasses.replace(SETTINGS, **changes), compared, explained)

    plain = passes()
    assert passes(fidelity=116) == {model: count + 100 for model, count in plain.items()}
    dearer = passes(methods=(("teacher", "rise"),))
    assert dearer["teacher"] > plain["teacher"] and dearer["student"] == plain["student"]
    for more in (passes(controls=True), passes(explained=32), passes(grids=4)):
        assert all(more[model] > plain[model] for model in plain)


def test_few_pictures_have_smaller_figures_and_many_the_settings():
    plain = Settings()
    assert plain.sized(128) == plain.sized(5000) == plain
    sizes = [(found.grids, found.subset_pictures, found.cascade_pictures) for found in map(plain.sized, (3, 16, 64))]
    assert sizes == [(1, 4, 4), (4, 4, 4), (16, 16, 8)]
    assert plain.sized(16, grids=9).grids == 9  # asked for
    assert dataclasses.replace(plain, subset_pictures=2).sized(64).subset_pictures == 2


def test_the_cost_of_a_method_knows_what_decisions_share():
    cost = {name: [find_method(name).forwards(count) for count in (1, 2)] for name in METHODS}
    assert cost["explanation"] == [2.5, 4.0] and cost["input-x-gradient"] == [2.5, 5.0]
    assert cost["occlusion"] == [50, 50] and cost["rise"] == [500, 1000]  # no backward pass; a grid's cells share it
    assert cost["rollout"] == [1, 1] and cost["edges"] == [0, 0]


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.1, "about 10 seconds"), (64, "about 60 seconds"), (170, "about 3 minutes"), (7300, "about 2 hours")],
)
def test_in_words(seconds, said):
    assert in_words(seconds) == said
