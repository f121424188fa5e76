"""Views: crops, turns, colours, mixing, and what a model takes."""

from __future__ import annotations

import numpy as np
import pytest
import timm.data
import torch
from bcosify.data.loader import held_out_batches
from bcosify.data.pictures import decode
from bcosify.data.views import Augment, CentreCrop, Mixing, to_model_input
from PIL import Image
from torchvision.transforms import v2

from batches import COUNT, SIZE, assert_same, shards_with_bad, train


def test_the_whole_picture_is_the_picture(index):
    whole = Augment(scale=(1, 1), ratio=(69 / 48, 69 / 48), flip=0)
    flipped = Augment(scale=(1, 1), ratio=(69 / 48, 69 / 48), flip=1)
    plain, mirrored = (train(index, augment=view, steps=1, size=32)[0] for view in (whole, flipped))
    assert torch.equal(plain.pictures.flip(-1), mirrored.pictures)
    for id, picture in zip(plain.ids.tolist(), plain.pictures, strict=True):
        source = decode(index.read(id))
        assert source.size == (69, 48)
        expected = torch.from_numpy(np.array(source.resize((32, 32), Image.Resampling.BICUBIC))).permute(2, 0, 1)
        assert (picture.int() - expected.int()).abs().max() <= 2


def test_views_are_turned_within_the_angle_with_grey_corners(index):
    still = train(index, steps=24, size=33)
    turned = train(index, augment=Augment(turn=45), steps=24, size=33)
    same, grey = 0, 0
    for before, after in zip(still, turned, strict=True):
        for left, right in zip(before.pictures, after.pictures, strict=True):
            # The crop is the same one: its centre stays where it is.
            assert (left[:, 16, 16].int() - right[:, 16, 16].int()).abs().max() <= 2
            same += torch.equal(left, right)
            grey += bool((right[:, 0, 0] == 127).all())
    assert same <= 1 and 60 < grey <= 96
    slightly = train(index, augment=Augment(turn=2), steps=1, size=33)[0].pictures
    assert (slightly.int() - still[0].pictures.int()).abs().float().mean() < 12
    assert not torch.equal(slightly, still[0].pictures)


def test_colours_change_with_strength_and_places_do_not(index):
    plain = train(index, steps=6, size=32)

    def far(strength: float) -> float:
        changed = train(index, augment=Augment(colour=strength), steps=6, size=32)
        pairs = [(a.pictures.float(), b.pictures.float()) for a, b in zip(plain, changed, strict=True)]
        for a, b in pairs:  # brighter or greyer, but light stays where it was
            rows = torch.stack([a.mean(1).flatten(1), b.mean(1).flatten(1)], 1)
            found = [float(torch.corrcoef(row)[0, 1]) for row in rows if row.std(1).min() > 1]
            assert sum(found) / len(found) > 0.7
        return sum(float((a - b).abs().mean()) for a, b in pairs)

    weak, strong = far(0.1), far(1.0)
    assert 0 < weak < 0.5 * strong


def test_half_of_the_pictures_are_flipped(index):
    view = Augment(scale=(1, 1), ratio=(69 / 48, 69 / 48))
    never = Augment(scale=(1, 1), ratio=(69 / 48, 69 / 48), flip=0)
    pairs = zip(train(index, augment=view, steps=24), train(index, augment=never, steps=24), strict=True)
    flipped = [
        not torch.equal(a, b) for left, right in pairs for a, b in zip(left.pictures, right.pictures, strict=True)
    ]
    assert 30 < sum(flipped) < 66  # of 96


@pytest.mark.parametrize(("size", "crop_pct"), [(32, 0.875), (32, 1.0), (40, 0.9)])
def test_held_out_pictures_are_what_timm_shows(index, size, crop_pct):
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    shown = timm.data.create_transform(size, interpolation="bicubic", mean=mean, std=std, crop_pct=crop_pct)
    for batch in held_out_batches(index, size=size, crop_pct=crop_pct, batch_size=10):
        expected = torch.stack([shown(decode(index.read(id))) for id in batch.ids.tolist()])
        assert torch.allclose(to_model_input(batch.pictures, mean, std, "cpu"), expected, atol=1e-6)


def test_training_can_take_the_centre_too(index):
    (batch,) = train(index, augment=CentreCrop(), steps=1)
    (held_out,) = held_out_batches(index, size=SIZE, batch_size=COUNT)
    assert torch.equal(batch.pictures, held_out.pictures[batch.ids])


def test_model_input_is_normalised():
    pictures = torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    shown = to_model_input(pictures, (0.0, 0.5, 0.5), (1.0, 0.5, 0.25), "cpu")
    assert shown.dtype == torch.float32
    assert torch.allclose(shown.flatten(), torch.tensor([0, 2 * 128 / 255 - 1, 2.0]), atol=1e-7)
    assert to_model_input(pictures, (0, 0, 0), (1, 1, 1), "cpu", torch.bfloat16).dtype == torch.bfloat16


# --------------------------------------------------------------------------------------------------------------- mixing


VIEW = Augment(turn=20, colour=0.3)
BOTH = Mixing(mixup=0.4, cutmix=0.4)


def test_mixup_and_cutmix_are_torchvisions_on_the_global_batch(index):
    plain = train(index, steps=24)
    for mixing, how in ((Mixing(mixup=1), v2.MixUp()), (Mixing(cutmix=1), v2.CutMix())):
        found, kinds = train(index, steps=24, mixing=mixing), set()
        for step, (view, got) in enumerate(zip(plain, found, strict=True)):
            assert got.ids.tolist() == view.ids.tolist() and got.pictures.dtype == torch.uint8
            mix = mixing.at(3, step)
            assert mix is not None
            with torch.random.fork_rng():
                torch.manual_seed(mix.seed)
                labels = torch.eye(4)
                wanted, shares = how(view.pictures.float(), labels)
            assert torch.equal(wanted.round().to(torch.uint8), got.pictures)
            kinds.add(round(float(shares[0, 0]), 3))
        assert len(kinds) > 12  # another share in every step


def test_so_many_batches_are_mixed_as_the_chances_say():
    steps = [Mixing(0.3, 0.2).at(5, step) for step in range(2000)]
    share = {how: sum(mix is not None and mix.how == how for mix in steps) / 2000 for how in ("mixup", "cutmix")}
    assert share == {"mixup": pytest.approx(0.3, abs=0.04), "cutmix": pytest.approx(0.2, abs=0.04)}
    assert all(Mixing().at(5, step) is None for step in range(50))
    assert all(Mixing(0.5, 0.5).at(5, step) is not None for step in range(50))
    assert steps != [Mixing(0.3, 0.2).at(6, step) for step in range(2000)]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_mixed_batches_are_the_same_for_any_processes_workers_and_resume(index, world_size):
    """A share of one picture too: its neighbour is another process's."""
    mixed = {"augment": VIEW, "mixing": BOTH, "size": (SIZE, 24)}
    whole = train(index, **mixed)
    assert {getattr(BOTH.at(3, step), "how", None) for step in range(8)} == {"mixup", "cutmix", None}
    ranks = [train(index, rank=rank, world_size=world_size, **mixed) for rank in range(world_size)]
    for batch, *parts in zip(whole, *ranks, strict=True):
        assert torch.equal(torch.cat([part.pictures for part in parts]), batch.pictures)
        assert torch.cat([part.ids for part in parts]).tolist() == batch.ids.tolist()
    assert_same(whole, train(index, workers=world_size, **mixed))
    for step in (1, 5, 7):
        assert_same(whole[step:], train(index, first_step=step, steps=8 - step, **mixed))


def test_a_broken_neighbour_is_stood_in_for_alike_in_all_processes(folder, tmp_path):
    index = shards_with_bad(folder, tmp_path / "bad.tar", {4: b"no picture", 11: b"nor this", 17: b""})
    whole = train(index, mixing=Mixing(cutmix=1), steps=12)
    assert {sample.id for batch in whole for sample in batch.bad} == {4, 11, 17}
    ranks = [train(index, mixing=Mixing(cutmix=1), steps=12, rank=rank, world_size=4) for rank in range(4)]
    for batch, *parts in zip(whole, *ranks, strict=True):
        assert torch.equal(torch.cat([part.pictures for part in parts]), batch.pictures)
        assert {sample for part in parts for sample in part.bad} == set(batch.bad)


def test_no_chance_of_mixing_is_the_run_without(index):
    assert_same(train(index), train(index, mixing=Mixing(), augment=Augment(turn=0, colour=0)))
