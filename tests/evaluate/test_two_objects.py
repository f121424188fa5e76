"""Two objects in one picture: where they come from, and maps whose shares are known."""

from __future__ import annotations

import pytest
import torch
from bcosify.core.errors import NotApplicable
from bcosify.data.labelled import Pictures
from bcosify.evaluate.baselines import find_method, maps_of
from bcosify.evaluate.decisions import ClassDecisions
from bcosify.evaluate.metrics.two_objects import fullest, object_shares, pairs_of, two_objects
from bcosify.evaluate.suite import Settings, evaluate_subjects

from toys import CellSums


def objects(count: int = 6, size: int = 16) -> Pictures:
    """Squares of one colour each, at other places, on black, and their masks."""
    images, masks = torch.full((count, 3, size, size), -1.0), torch.zeros(count, size, size)
    for i in range(count):
        place = (slice(3, 9), slice(i % 4 * 3, i % 4 * 3 + 5))
        masks[i][place] = 1
        images[i, i % 3][place] = 2
    return Pictures(images, tuple(map(str, range(count))), masks)


def test_pairs_are_decided_differently_and_no_picture_is_in_two():
    assert pairs_of(ClassDecisions(torch.tensor([0, 0, 1, 0, 2, 2]))).tolist() == [[0, 2], [1, 4], [3, 5]]
    assert pairs_of(ClassDecisions(torch.tensor([0, 0, 0, 1]))).tolist() == [[0, 3]]
    with pytest.raises(NotApplicable, match="no two of 3 pictures are decided differently"):
        pairs_of(ClassDecisions(torch.zeros(3, dtype=torch.long)))


@pytest.mark.parametrize("width", [16, 15])
def test_each_half_is_where_most_of_the_object_is_and_masks_go_along(width):
    pictures = objects()
    images, masks = pictures.images[..., :width], pictures.masks[..., :width]
    made = two_objects(images, masks, torch.tensor([[0, 1], [3, 2]]))
    assert made.images.shape == (2, 3, 16, width) and made.masks.shape == (2, 2, 16, width)
    for row, pair in enumerate(([0, 1], [3, 2])):
        for side, i in enumerate(pair):
            # All of the object is there, in its own half, and in its own colour.
            assert made.masks[row, side].sum() == masks[i].sum()
            half = slice(None, width // 2) if side == 0 else slice(width // 2, None)
            assert made.masks[row, side][:, half].sum() == masks[i].sum()
            assert bool((made.images[row, i % 3][made.masks[row, side] > 0] == 2).all())


def test_of_windows_that_hold_as_much_the_middle_one_is_taken():
    mask = torch.zeros(4, 12)
    mask[:, 5:7] = 1
    assert fullest(mask, 6) == 3  # 1 to 5 hold all of it
    mask[:, 5:12] = 1
    assert fullest(mask, 6) in (5, 6)


def test_shares_of_maps_that_know_their_class_that_find_objects_and_that_are_wrong():
    masks = two_objects(objects().images, objects().masks, torch.tensor([[0, 1]])).masks
    first, second = masks[:, 0], masks[:, 1]
    knows = object_shares(first, second, masks)
    assert (float(knows["own"]), float(knows["other"]), float(knows["contrast"])) == (1, 0, 1)
    finds = object_shares(first + second, first + second, masks)
    assert float(finds["own"]) == float(finds["other"]) == pytest.approx(0.5) and float(finds["contrast"]) == 0
    wrong = object_shares(second, first, masks)
    assert (float(wrong["own"]), float(wrong["other"]), float(wrong["contrast"])) == (0, 1, -1)
    # Means of both objects: one class is known, the map of the other is nowhere.
    assert float(object_shares(first, second * 0, masks)["own"]) == pytest.approx(0.5)


def test_a_model_that_sees_each_colour_where_it_is_has_all_of_its_own_and_nothing_of_the_other(subject_of):
    pictures = objects()
    decisions = ClassDecisions(torch.arange(6) % 3)
    made = two_objects(pictures.images, pictures.masks, pairs_of(decisions))
    subject, way = subject_of(CellSums()), find_method("explanation")
    maps = [maps_of(way, subject, made.images, decisions.rows(made.pictures[:, i])) for i in (0, 1)]
    shares = object_shares(maps[0], maps[1], made.masks)
    assert shares["own"].tolist() == [1, 1, 1] and shares["other"].tolist() == [0, 0, 0]


@pytest.fixture(scope="module")
def small(subject_of):
    settings = Settings(
        (("teacher", "occlusion"),), grids=1, confident=0.0, subsets=1, subset_pictures=4, cascade_pictures=1
    )

    def run(pictures: Pictures):
        pair = subject_of(CellSums()), subject_of(CellSums(), "student")
        found, _ = evaluate_subjects(*pair, pictures, pictures, settings, progress=False)
        return {(one.metric, one.model, one.method): one for one in found.measurements}

    return run


def test_rows_of_an_evaluation_and_what_does_not_apply(small):
    rows = small(objects())
    assert rows["two_objects_contrast", "student", "explanation"].value == 1
    assert rows["two_objects_own", "student", "explanation"].n == 2
    assert rows["two_objects_contrast", "teacher", "centre"].value == 0  # knows no class
    assert "50 passes" in rows["two_objects_own", "teacher", "occlusion"].reason
    # What is dear is of the first pictures only.
    assert rows["single_deletion", "student", "explanation"].n == 4
    one_class = Pictures(objects().images[[0, 3]], ("a", "b"), objects().masks[[0, 3]])
    assert "no two of 2 pictures" in small(one_class)["two_objects_own", "student", "explanation"].reason
