"""Published protocols against slow implementations that share no code with ours: loops over pixels, and scipy."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from bcosify.core.errors import DataError, NotApplicable, TargetError
from bcosify.data.labelled import Pictures
from bcosify.evaluate.baselines import find_method, maps_of
from bcosify.evaluate.decisions import ClassDecisions
from bcosify.evaluate.estimates import bootstrap
from bcosify.evaluate.protocols import (
    PROTOCOLS,
    Aloe,
    BcosV2,
    Idsds,
    Labelled,
    Libragrad,
    aloe_grids,
    bcos_grids,
    evaluate_protocol,
    find_protocol,
)
from bcosify.evaluate.subject import outputs_of
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score
from torch import nn

SIZE = 16
WAY = find_method("explanation")


class Shapes(nn.Module):
    """Six classes, each colour above and below the mean, by 3 x 3 filters: takes any size, and sees where they are."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.filters = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.head = nn.Linear(6, 6)
        with torch.no_grad():
            for one in range(6):
                self.filters.weight[one, one // 2, 1, 1] += (-1) ** one
            self.head.weight.copy_(3 * torch.eye(6))
            self.head.bias.fill_(-1)

    def forward(self, pictures):
        return self.head(self.filters(pictures).relu().mean((2, 3)))


@pytest.fixture(scope="module")
def subject(subject_of):
    torch.set_num_threads(1)
    return subject_of(Shapes(), "student", batch_size=8)


@pytest.fixture(scope="module")
def pictures(subject):
    """40 pictures, three quarters of which have the model's own class as their label."""
    images = torch.randn(40, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    for i in range(40):
        images[i, i % 6 // 2, 2:9, i % 7 : i % 7 + 9] += (-1) ** i * (2 + i % 5)
    own = outputs_of(subject, images.split(8)).argmax(1)
    labels = torch.where(torch.arange(40) % 4 == 0, (own + 1) % 6, own)
    masks = torch.zeros(40, SIZE, SIZE)
    masks[:, 3:9, 5:14] = 1
    return Pictures(images, tuple(map(str, range(40))), masks, labels, labels_are_classes=True)


def given(subject, pictures, **more) -> Labelled:
    return Labelled(subject, pictures, outputs_of(subject, pictures.images.split(8)), pictures, 0, **more)


def values(protocol, subject, pictures):
    """variant, metric -> row, of the explanation."""
    found = evaluate_protocol(protocol, [subject], pictures, pictures, progress=False)
    return {(one.metric, one.variant): one for one in found.measurements}, found


# ----------------------------------------------------------------------------------------------------- choice of grids


def test_bcos_grids_take_the_most_confident_picture_of_each_class_first_and_none_twice():
    labels = torch.arange(30) % 5
    logits = torch.full((30, 5), -9.0)
    height = torch.linspace(0.1, 3, 30)
    logits[torch.arange(30), labels] = height
    logits[7, labels[7]] = -0.1  # right, but its sigmoid is below one half
    logits[8, (labels[8] + 1) % 5] = 9  # wrong
    grids = bcos_grids(logits, labels, 2, 250)
    used = grids.pictures.flatten().tolist()
    assert len(set(used)) == len(used) and not {7, 8} & set(used)
    assert all(len(set(labels[row].tolist())) == 4 for row in grids.pictures)
    for one in range(5):
        eligible = [i for i in range(30) if labels[i] == one and i not in (7, 8)]
        taken = [i for i in used if labels[i] == one]
        assert taken == sorted(eligible, reverse=True)[: len(taken)]  # later pictures are more confident here
    # It stops where fewer classes than cells have pictures left.
    left = {int(labels[i]) for i in range(30) if i not in (*used, 7, 8)}
    assert len(left) < 4
    assert len(bcos_grids(logits, labels, 2, 3)) == 3
    with pytest.raises(NotApplicable, match="0 of 30 pictures are classified rightly with a sigmoid above 0.5"):
        bcos_grids(-logits.abs(), labels, 2, 3)


def test_aloe_keeps_only_grids_of_which_every_cell_is_sure():
    labels, sure = torch.arange(60) % 6, torch.arange(60) % 7 != 0
    grids = aloe_grids(labels, sure, 2, 1000)
    assert bool(sure[grids.pictures].all())
    assert all(len(set(labels[row].tolist())) == 4 for row in grids.pictures)
    # Grid i starts with picture i, and each is tried once.
    first = grids.pictures[:, 0].tolist()
    assert first == sorted(set(first)) and 5 < len(first) < 52
    with pytest.raises(NotApplicable, match="no grid of 4 has only such"):
        aloe_grids(labels, torch.zeros(60, dtype=torch.bool), 2, 100)
    with pytest.raises(NotApplicable, match="pictures of 4 classes, and there are 2"):
        aloe_grids(labels % 2, sure, 2, 100)


# --------------------------------------------------------------------------------------------------------------- GridPG


def slow_share(map_: np.ndarray, top: int, left: int) -> float:
    """Positive contribution inside a cell of SIZE pixels over all of it, pixel by pixel."""
    inside = whole = 0.0
    for y in range(map_.shape[0]):
        for x in range(map_.shape[1]):
            value = max(0.0, float(map_[y, x]))
            whole += value
            if top <= y < top + SIZE and left <= x < left + SIZE:
                inside += value
    return inside / whole if whole > 1e-7 else 0.0


def slow_pool(map_: np.ndarray, kernel: int) -> np.ndarray:
    """Mean over squares of signed values, with zeros beyond the border."""
    reach, out = kernel // 2, np.zeros(map_.shape)
    for y in range(map_.shape[0]):
        for x in range(map_.shape[1]):
            part = map_[max(0, y - reach) : y + reach + 1, max(0, x - reach) : x + reach + 1]
            out[y, x] = part.sum() / kernel**2
    return out


def board(images: torch.Tensor, row: list[int]) -> torch.Tensor:
    """(1, 3, 2 SIZE, 2 SIZE): four pictures, row by row."""
    rows = [torch.cat([images[i] for i in row[start : start + 2]], 2) for start in (0, 2)]
    return torch.cat(rows, 1)[None]


def test_bcos_v2_is_the_median_of_pooled_native_grids(subject, pictures):
    protocol = BcosV2(grids=3)
    everything = given(subject, pictures)
    grids = bcos_grids(everything.outputs, pictures.labels, 2, 3).pictures.tolist()
    shares = []
    for row in grids:
        for cell, i in enumerate(row):
            wanted = ClassDecisions(pictures.labels[[i]])
            map_ = maps_of(WAY, subject, board(pictures.images, row), wanted)[0].numpy()
            shares.append(slow_share(slow_pool(map_, 15), cell // 2 * SIZE, cell % 2 * SIZE))
    rows, _ = values(protocol, subject, pictures)
    assert rows["gridpg", "bcos-v2, median"].value == pytest.approx(np.median(shares), abs=1e-5)
    assert rows["gridpg", "bcos-v2, mean"].value == pytest.approx(np.mean(shares), abs=1e-5)
    assert rows["gridpg", "bcos-v2, 25% quantile"].value == pytest.approx(np.quantile(shares, 0.25), abs=1e-5)
    assert rows["gridpg", "bcos-v2, 75% quantile"].value == pytest.approx(np.quantile(shares, 0.75), abs=1e-5)
    assert rows["gridpg", "bcos-v2, median"].n == 3
    unpooled, _ = values(dataclasses.replace(protocol, pooling=1), subject, pictures)
    assert unpooled["gridpg", "bcos-v2, mean"].value != pytest.approx(np.mean(shares), abs=1e-3)


def test_aloe_is_the_mean_of_windows_that_overlap(subject, pictures):
    protocol = Aloe(least_probability=0.5)
    everything = given(subject, pictures)
    probability = everything.outputs.softmax(1)[torch.arange(40), pictures.labels]
    sure = (everything.outputs.argmax(1) == pictures.labels) & (probability > 0.5)
    grids = aloe_grids(pictures.labels, sure, 2, protocol.grids).pictures.tolist()
    shares = []
    for row in grids:
        whole = board(pictures.images, row)
        for cell, i in enumerate(row):
            total, count = np.zeros((2 * SIZE, 2 * SIZE)), np.zeros((2 * SIZE, 2 * SIZE))
            for top in (0, SIZE // 2, SIZE):
                for left in (0, SIZE // 2, SIZE):
                    window = whole[..., top : top + SIZE, left : left + SIZE]
                    map_ = maps_of(WAY, subject, window, ClassDecisions(pictures.labels[[i]]))[0].numpy()
                    total[top : top + SIZE, left : left + SIZE] += map_
                    count[top : top + SIZE, left : left + SIZE] += 1
            shares.append(slow_share(total / count, cell // 2 * SIZE, cell % 2 * SIZE))
    rows, _ = values(protocol, subject, pictures)
    assert rows["gridpg", "aloe"].value == pytest.approx(np.mean(shares), abs=1e-5)
    assert rows["gridpg", "aloe"].n == len(grids) > 2


# ---------------------------------------------------------------------------------------------------- IDSDS, LibraGrad


def test_idsds_is_spearmans_correlation_of_zeroed_patches(subject, pictures):
    found = []
    for image, label in zip(pictures.images, pictures.labels, strict=True):
        map_ = maps_of(WAY, subject, image[None], ClassDecisions(label[None]))[0]
        whole = outputs_of(subject, [image[None]])[0, label]
        sums, drops = [], []
        for y in range(0, SIZE, 4):
            for x in range(0, SIZE, 4):
                without = image.clone()
                without[:, y : y + 4, x : x + 4] = 0
                drops.append(float(whole - outputs_of(subject, [without[None]])[0, label]))
                sums.append(float(map_[y : y + 4, x : x + 4].sum()))
        found.append(spearmanr(sums, drops)[0])
    rows, record = values(Idsds(), subject, pictures)
    assert rows["single_deletion", "idsds"].value == pytest.approx(np.mean(found), abs=0.005)
    assert rows["single_deletion", "idsds"].n == 40
    settings = json.loads(json.dumps(record.settings))
    assert settings["protocol"] == "idsds" and settings["fill"] == "mean" and settings["side"] == 4
    assert "2407.11910" in settings["source"] and "fine-tuned" in settings["differs"]


def test_libragrad_takes_patches_away_in_tenths_and_has_completeness_error_and_precision(subject, pictures):
    protocol = Libragrad(patch=4)
    curves = {"mif": [], "lif": []}
    right: dict[str, list[float]] = {"mif": [], "lif": []}
    errors, precision = [], []
    for image, label, mask in zip(pictures.images, pictures.labels, pictures.masks, strict=True):
        map_ = maps_of(WAY, subject, image[None], ClassDecisions(label[None]))[0]
        score = float(outputs_of(subject, [image[None]])[0, label])
        errors.append(abs(float(map_.sum()) - score) / max(1, abs(score)))
        precision.append(average_precision_score(mask.flatten().numpy() > 0.5, map_.flatten().numpy()))
        places = [(y, x) for y in range(0, SIZE, 4) for x in range(0, SIZE, 4)]
        places.sort(key=lambda at: -float(map_[at[0] : at[0] + 4, at[1] : at[1] + 4].mean()))
        for name, ordered in (("mif", places), ("lif", places[::-1])):
            for tenths in range(1, 10):
                without = image.clone()
                for y, x in ordered[: round(tenths / 10 * 16)]:
                    without[:, y : y + 4, x : x + 4] = 0
                output = outputs_of(subject, [without[None]])[0]
                curves[name].append(float(output.softmax(0)[label]))
                right[name].append(float(output.argmax() == label))
    rows, _ = values(protocol, subject, pictures)
    for name in ("mif", "lif"):
        assert rows[f"{name}_confidence", "libragrad"].value == pytest.approx(np.mean(curves[name]), abs=1e-3)
        assert rows[f"{name}_accuracy", "libragrad"].value == pytest.approx(np.mean(right[name]), abs=0.01)
    assert np.mean(curves["mif"]) < np.mean(curves["lif"]) - 0.05
    assert rows["completeness_error", "libragrad"].value == pytest.approx(np.mean(errors), abs=1e-4)
    assert rows["average_precision", "libragrad"].value == pytest.approx(np.mean(precision), abs=1e-4)
    without = evaluate_protocol(protocol, [subject], pictures, methods=[("student", "grad-cam")], progress=False)
    reasons = {(one.metric, one.method): one.reason for one in without.measurements}
    assert "pass --masks" in reasons["average_precision", "explanation"]


# ------------------------------------------------------------------------------------------------------------- manners


def test_settings_are_those_that_were_published():
    assert set(PROTOCOLS) == {"bcos-v2", "aloe", "idsds", "libragrad"}
    bcos, aloe = PROTOCOLS["bcos-v2"], PROTOCOLS["aloe"]
    assert (bcos.grids, bcos.side, bcos.least_probability, bcos.pooling) == (250, 2, 0.5, 15)
    assert (aloe.side, aloe.least_probability, aloe.pooling) == (2, 0.95, 1)
    for one in PROTOCOLS.values():
        record = json.loads(json.dumps(one.record()))
        assert record["protocol"] == one.name and record["source"] and record["differs"]
        with pytest.raises(dataclasses.FrozenInstanceError):
            one.side = 9
    with pytest.raises(TargetError, match=r"no protocol is called 'bcos-v1'. Did you mean 'bcos-v2'\?"):
        find_protocol("bcos-v1")


def test_labels_that_are_no_classes_are_refused(subject, pictures):
    words = dataclasses.replace(pictures, label_names=("a", "b"), labels_are_classes=False)
    with pytest.raises(DataError, match="needs the number of each picture's class, and the labels are words"):
        evaluate_protocol(Idsds(), [subject], words, progress=False)


def test_a_stopped_protocol_goes_on_after_what_was_done(subject, pictures, tmp_path, monkeypatch):
    options = {"methods": [("student", "input-x-gradient")], "progress": False, "work": tmp_path / "work"}
    measure, seen = Idsds.measure, []

    def stop(self, notes, given, method):
        seen.append(method.name)
        if len(seen) == 2:
            raise KeyboardInterrupt
        measure(self, notes, given, method)

    monkeypatch.setattr(Idsds, "measure", stop)
    (tmp_path / "work").mkdir()
    with pytest.raises(KeyboardInterrupt):
        evaluate_protocol(Idsds(), [subject], pictures, **options)
    found = evaluate_protocol(Idsds(), [subject], pictures, **options)
    assert seen == ["explanation", "input-x-gradient", "input-x-gradient"]
    assert [one.method for one in found.measurements] == ["explanation", "input-x-gradient"]


def test_the_bootstrap_of_a_median_resamples_whole_rows():
    rows = torch.tensor([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]])
    found = bootstrap(rows, statistic=lambda drawn: drawn.flatten(1).quantile(0.5, dim=1))
    assert found.value == 1 and found.n == 3 and found.low == 0 and found.high == 2
    assert bootstrap(rows[:, 0]) == bootstrap(rows[:, 0], statistic=lambda drawn: drawn.mean(1))
