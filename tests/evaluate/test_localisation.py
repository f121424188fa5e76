"""Localisation against maps whose score is known: the mask itself, nothing, everything, the wrong place."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from bcosify.convert import load_teacher
from bcosify.core.errors import NotApplicable
from bcosify.evaluate.baselines import find_method, maps_of
from bcosify.evaluate.decisions import ClassDecisions, decide
from bcosify.evaluate.metrics.localisation import (
    Grids,
    choose_grids,
    energy_in_mask,
    grid_pictures,
    grid_scores,
    native_maps,
    pointing_game,
    pooled,
    signed_shares,
    windowed_maps,
)
from bcosify.evaluate.metrics.randomisation import shuffle_weights
from hypothesis import given, settings
from hypothesis import strategies as st

from toys import CellSums


@pytest.fixture
def masks() -> torch.Tensor:
    masks = torch.zeros(3, 12, 10)
    masks[0, 2:5, 3:9] = masks[1, :6] = masks[2, 11, 9] = 1
    return masks


def test_the_mask_itself_a_flat_map_and_the_negated_mask(masks):
    assert energy_in_mask(masks, masks).tolist() == [1, 1, 1]
    torch.testing.assert_close(energy_in_mask(torch.full_like(masks, 0.3), masks), masks.mean((1, 2)))
    assert energy_in_mask(-masks, masks).tolist() == [0, 0, 0]
    assert energy_in_mask(1 - masks, masks).tolist() == [0, 0, 0]
    assert energy_in_mask(masks * 0, masks).tolist() == [0, 0, 0]
    assert energy_in_mask(masks * torch.nan, masks).isnan().all()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(2, 9), st.integers(2, 9), st.floats(0.1, 50))
def test_energy_does_not_see_scale_and_splits_between_mask_and_rest(b, h, w, scale):
    generator = torch.Generator().manual_seed(b * 100 + h * 10 + w)
    maps = torch.randn(b, h, w, generator=generator)
    masks = (torch.rand(b, h, w, generator=generator) > 0.5).float()
    inside, outside = energy_in_mask(maps, masks), energy_in_mask(maps, 1 - masks)
    torch.testing.assert_close(energy_in_mask(maps * scale, masks), inside)
    any_positive = (maps > 0).flatten(1).any(1).float()
    torch.testing.assert_close(inside + outside, any_positive)


def test_signed_shares_of_the_mask_its_negative_and_what_cancels_out(masks):
    assert signed_shares(masks, masks).tolist() == [1, 1, 1]
    assert signed_shares(-masks, masks).tolist() == [-1, -1, -1]
    assert signed_shares(1 - masks, masks).tolist() == [0, 0, 0]
    assert signed_shares(masks * 0, masks).tolist() == [0, 0, 0]
    torch.testing.assert_close(signed_shares(2 * masks - 1, masks), masks.mean((1, 2)))
    assert signed_shares(masks * torch.nan, masks).isnan().all()


def test_pooling_is_a_mean_of_signed_values_with_nothing_beyond_the_border():
    maps = torch.zeros(1, 9, 7)
    maps[0, 4, 3] = 9
    spread = pooled(maps, 3)
    assert spread.shape == maps.shape and spread.sum() == 9
    assert spread[0, 3:6, 2:5].tolist() == [[1] * 3] * 3
    flat = pooled(torch.ones(1, 9, 9), 3)
    assert float(flat[0, 4, 4]) == pytest.approx(1) and float(flat[0, 0, 0]) == pytest.approx(4 / 9)
    board = (torch.arange(81) % 2).view(1, 9, 9) * 2.0 - 1
    assert pooled(board, 3)[0, 1:-1, 1:-1].abs().max() <= 1 / 9 + 1e-6


def test_pointing_game(masks):
    maps = torch.zeros_like(masks)
    maps[0, 3, 4] = maps[1, 8, 0] = maps[2, 9, 8] = 1
    assert pointing_game(maps, masks).tolist() == [1, 0, 0]
    assert pointing_game(maps, masks, tolerance=2).tolist() == [1, 0, 1]
    assert pointing_game(maps, masks, tolerance=3).tolist() == [1, 1, 1]
    torch.testing.assert_close(pointing_game(torch.ones_like(masks), masks), masks.mean((1, 2)))


# --------------------------------------------------------------------------------------------------------- GridPG


def colours(count: int, size: int = 6) -> torch.Tensor:
    """Pictures (count, 3, size, size) that are 1 in one colour and -1 in the others."""
    pictures = torch.full((count, 3, size, size), -1.0)
    pictures[torch.arange(count), torch.arange(count) % 3] = 1
    return pictures


@pytest.mark.parametrize("side", [2, 3])
def test_grids_are_laid_out_row_by_row(side):
    images = torch.arange(side * side).view(-1, 1, 1, 1).expand(-1, 3, 4, 5).float()
    grid = grid_pictures(images, Grids(torch.arange(side * side)[None], side))
    assert grid.shape == (1, 3, 4 * side, 5 * side)
    assert grid[0, 0, ::4, ::5].tolist() == torch.arange(side * side).view(side, side).float().tolist()


@pytest.mark.parametrize("side", [2, 3])
def test_gridpg_of_a_flat_map_is_chance_and_of_the_cell_is_one(side):
    grids = Grids(torch.zeros(2, side * side, dtype=torch.long), side)
    cells = side * side
    flat = torch.ones(2 * cells, 4 * side, 6 * side)
    torch.testing.assert_close(grid_scores(flat, grids), torch.full((2 * cells,), 1 / cells))
    own = torch.zeros_like(flat)
    for i in range(2 * cells):
        row, column = divmod(i % cells, side)
        own[i, 4 * row : 4 * row + 4, 6 * column : 6 * column + 6] = 1
    assert grid_scores(own, grids).tolist() == [1] * (2 * cells)
    assert grid_scores(-own, grids).tolist() == [0] * (2 * cells)


def test_both_protocols_on_a_model_that_sees_each_colour_where_it_is(subject_of):
    """Three cells of three colours and a second red one: exact maps put half of red's in each red cell."""
    images = colours(4)
    decisions = ClassDecisions(torch.tensor([0, 1, 2, 0]))
    grids = Grids(torch.tensor([[0, 1, 2, 3]]), 2)
    explain = partial(maps_of, find_method("explanation"), subject_of(CellSums(), batch_size=3))
    wanted = torch.tensor([0.5, 1, 1, 0.5])
    native = native_maps(images, decisions, grids, explain)
    torch.testing.assert_close(grid_scores(native, grids), wanted)
    torch.testing.assert_close(grid_scores(windowed_maps(images, decisions, grids, explain), grids), wanted)


@pytest.mark.parametrize("size", [5, 6])
def test_windows_cover_every_pixel_and_are_averaged(size):
    images = colours(4, size)
    grids = Grids(torch.tensor([[0, 1, 2, 3]]), 2)
    seen = []

    def explain(pictures, decisions):
        seen.append(pictures.shape)
        return torch.ones(len(decisions), size, size)

    maps = windowed_maps(images, ClassDecisions(torch.arange(4) % 3), grids, explain)
    assert maps.shape == (4, 2 * size, 2 * size) and bool((maps == 1).all())
    assert len(seen) == 9 and set(seen) == {(1, 3, size, size)}


def test_grids_hold_confident_pictures_of_different_decisions_the_same_every_time():
    classes = torch.arange(20) % 5
    eligible = torch.arange(20) != 7
    grids = choose_grids(ClassDecisions(classes), eligible, 2, 6, seed=1)
    assert len(grids) == 6 and 7 not in grids.pictures
    assert all(len(set(classes[row].tolist())) == 4 for row in grids.pictures)
    assert torch.equal(grids.pictures, choose_grids(ClassDecisions(classes), eligible, 2, 6, seed=1).pictures)
    assert not torch.equal(grids.pictures, choose_grids(ClassDecisions(classes), eligible, 2, 6, seed=2).pictures)


def test_too_few_different_decisions_are_said():
    with pytest.raises(NotApplicable, match="20 pictures are decided confidently, and no 4"):
        choose_grids(ClassDecisions(torch.arange(20) % 3), torch.ones(20, dtype=torch.bool), 2, 5)


def test_decisions_without_classes_are_directions_from_the_mean_and_alike_ones_share_no_grid():
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(6, 32, generator=generator) + 10
    outputs[5] = outputs[4]
    decisions = decide(outputs, classifier=False)
    assert decisions.alike(4, 5) and not decisions.alike(0, 1)
    torch.testing.assert_close(decisions.confidence(outputs), torch.ones(6))
    torch.testing.assert_close(decisions.confidence(2 * outputs.mean(0) - outputs), torch.zeros(6))


@pytest.mark.timeout(600)
def test_shuffled_weights_destroy_the_localisation_of_a_true_method(photographs_in_grids):
    """Real EfficientNet-Lite0: the teacher's own exact explanation points at the right cell; shuffled, it does not."""
    subject, images, decisions, grids = photographs_in_grids
    method = find_method("grad-cam")

    def score(of) -> float:
        maps = native_maps(images, decisions, grids, partial(maps_of, method, of))
        return float(grid_scores(maps, grids).mean())

    true = score(subject)
    shuffle_weights(subject.model)
    assert true > 0.5 > 0.35 > score(subject)


@pytest.fixture
def photographs_in_grids(subject_of):
    from importlib.util import find_spec
    from pathlib import Path

    from PIL import Image

    teacher = load_teacher("bundled:efficientnet_lite0", image_size=160)
    folder = Path(find_spec("skimage").submodule_search_locations[0]) / "data"  # type: ignore[union-attr,index]
    transform = teacher.preprocess.transform()
    names = ("chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png")
    images = torch.stack([transform(Image.open(folder / name).convert("RGB")) for name in names])
    subject = subject_of(teacher.model, mean=teacher.preprocess.mean, std=teacher.preprocess.std)
    with torch.no_grad():
        decisions = decide(teacher.model(images), classifier=True)
    return subject, images, decisions, Grids(torch.arange(4)[None], 2)
