"""Fidelity, estimates and features against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from bcosify.convert.taps import find_blocks
from bcosify.core.errors import DataError, NotApplicable
from bcosify.evaluate import features
from bcosify.evaluate.estimates import bootstrap, jackknife
from bcosify.evaluate.features import DENSE, OUTPUT, cache_key, features_of
from bcosify.evaluate.metrics.fidelity import (
    _fidelity,
    agreement,
    confident_agreement,
    cosines,
    dense_agreement,
    fidelity,
    linear_cka,
    neighbour_agreement,
    sameness,
)
from bcosify.evaluate.store import Notes
from bcosify.evaluate.subject import weights_digest
from bcosify.evaluate.task import Compared
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_model_agrees_with_itself_wholly():
    x = draw(12, 7)
    assert fidelity(x, x, classifier=True) == pytest.approx(
        {"raw_cosine": 1, "centred_cosine": 1, "cka": 1, "neighbour_agreement": 1, "top1_agreement": 1}
    )
    found = agreement(x, x)
    assert found["kl"].abs().max() < 1e-6 and found["top5_agreement"].min() == 1
    assert float(linear_cka(x, x)) == pytest.approx(1)


def test_raw_cosine_is_flattered_by_a_common_mean_and_centred_cosine_is_not():
    x, y = draw(200, 16, seed=1), draw(200, 16, seed=2)
    found = cosines(x + 20, y + 20)
    assert found["raw_cosine"].mean() > 0.95 and found["centred_cosine"].mean().abs() < 0.1


@settings(max_examples=25, deadline=None)
@given(st.integers(3, 40), st.integers(1, 12), st.integers(1, 12), st.floats(0.1, 10))
def test_linear_cka_does_not_see_turns_shifts_and_scale_and_both_its_forms_agree(n, d, e, scale):
    x, y = draw(n, d, seed=n).double(), draw(n, e, seed=n + 1).double()
    turn, _ = torch.linalg.qr(draw(d, d, seed=d).double())
    plain = float(linear_cka(x, y))
    assert 0 <= plain <= 1 + 1e-6
    assert float(linear_cka(x @ turn * scale + 3, y)) == pytest.approx(plain, abs=1e-4)
    a, b = (z.float().double() - z.float().double().mean(0) for z in (x, y))
    wanted = (b.T @ a).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm()).clamp_min(1e-300)
    assert plain == pytest.approx(float(wanted), abs=1e-5)


def test_classifier_agreement_in_closed_form():
    teacher = torch.tensor([[2.0, 1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 3.0]])
    student = torch.tensor([[0.0, 1, 0, 0, 0, 0, 0], [9, 8, 7, 6, 5, 4, 3.0]])
    found = agreement(student, teacher)
    assert found["top1_agreement"].tolist() == [0, 0] and found["top5_agreement"].tolist() == [1, 0]
    p, q = teacher.softmax(1), student.softmax(1)
    torch.testing.assert_close(found["kl"], (p * (p / q).log()).sum(1))


def test_confident_agreement_leaves_out_what_the_teacher_is_unsure_of():
    teacher = torch.tensor([[9.0, 0, 0], [0, 9, 0], [0.2, 0.1, 0]])
    student = torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 1, 0]])
    assert confident_agreement(student, teacher).tolist() == [1, 0]
    assert confident_agreement(student, teacher, above=0.3).tolist() == [1, 0, 0]
    assert confident_agreement(student, teacher, above=1.0).tolist() == []


def test_dense_agreement_is_one_for_the_same_and_near_zero_for_other_features():
    x = draw(4, 32, 3, 5)
    torch.testing.assert_close(dense_agreement(x * 3 + 1, x), torch.ones(4))
    assert dense_agreement(draw(4, 32, 3, 5, seed=9), x).abs().max() < 0.2


class Overwriting(nn.Module):
    """Writes over what its blocks give, so that this cannot stand for what they would give again."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = images[:, 0, :8, :4]
        for block in self.blocks:
            features = block(features).add_(1)
        return features.mean(1)

    @staticmethod
    def tokens(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
        return model(images)[:, :, None, None]


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "overwriting"])
def test_patch_features_come_from_the_same_pass_and_are_those_of_one_of_their_own(
    name, tiny_subject, subject_of, monkeypatch
):
    if name == "overwriting":
        subject = subject_of(Overwriting(), tokens=Overwriting.tokens)
    else:
        subject = tiny_subject(name)
    images, runs = draw(4, 3, 64, 64), []
    block = subject.model.get_submodule(find_blocks(subject.model)[-1])
    inner = next(module for module in block.modules() if isinstance(module, nn.Linear | nn.Conv2d))
    own = type(inner).forward
    monkeypatch.setattr(inner, "forward", lambda *args: runs.append(1) or own(inner, *args))
    found = features_of(subject, [images])
    assert len(runs) == (2 if name == "overwriting" else 1)
    monkeypatch.setattr(features, "AT_ONCE", -1)  # nothing is held
    again = features_of(subject, [images])
    assert found.keys() == again.keys() and all(torch.equal(found[depth], again[depth]) for depth in found)
    if name == "overwriting":
        assert torch.equal(found[DENSE][:, :, 0, 0], found[OUTPUT])


@pytest.mark.parametrize("other", [(12, 6), (11, 7), (0, 7)])
def test_features_of_other_pictures_or_models_are_refused(other):
    with pytest.raises(DataError, match="belong together|same pictures"):
        neighbour_agreement(draw(*other), draw(12, 7))


# -------------------------------------------------------------------------------------------------------- estimates


def test_the_bootstraps_interval_is_that_of_the_normal_mean():
    values = draw(2000)
    found = bootstrap(values, seed=3)
    spread = 1.96 * float(values.std()) / math.sqrt(2000)
    assert found.value == pytest.approx(float(values.mean()), abs=1e-6) and found.n == 2000
    assert found.low is not None and found.high is not None
    assert found.high - found.low == pytest.approx(2 * spread, rel=0.1)
    assert found == bootstrap(values, seed=3) != bootstrap(values, seed=4)


def test_one_picture_has_no_interval_none_and_nan_have_no_mean():
    assert bootstrap(torch.tensor([0.25])) == (0.25, None, None, 1)
    with pytest.raises(NotApplicable, match="no picture"):
        bootstrap(torch.tensor([]))
    with pytest.raises(NotApplicable, match="2 of 3 values are not finite"):
        bootstrap(torch.tensor([1, math.nan, math.inf]))


def test_the_jackknifes_interval_is_that_of_the_normal_mean():
    values = draw(1000)
    found = jackknife(lambda rows: values[rows].mean(), 1000)
    assert found.high is not None
    assert found.high - found.value == pytest.approx(1.96 * float(values.std()) / math.sqrt(1000), rel=0.6)


def test_a_value_that_is_not_finite_has_no_jackknife():
    with pytest.raises(NotApplicable, match="on 10 pictures is not finite"):
        jackknife(lambda rows: torch.tensor(math.nan), 10)


# --------------------------------------------------------------------------------------------------------- features


def test_features_have_every_picture_every_depth_and_are_kept_by_weights(tiny_subject, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    subject = tiny_subject()
    images = draw(7, 3, 64, 64)
    key = cache_key(subject, "pictures")
    found = features_of(subject, images.split(4), key)  # the last batch has three
    assert all(len(values) == 7 for values in found.values()) and {OUTPUT, DENSE} < set(found) and len(found) == 5
    torch.testing.assert_close(found[OUTPUT], subject.model(images), atol=1e-5, rtol=1e-4)

    def never():
        raise AssertionError("the cache was not used")
        yield

    again = features_of(subject, never(), key)
    assert all(torch.equal(again[name], values) for name, values in found.items())
    with torch.no_grad():
        next(subject.model.parameters()).add_(1e-3)
    assert cache_key(subject, "pictures") != key and cache_key(subject, "others") != cache_key(subject, "pictures")


def test_a_broken_cache_is_made_again(tiny_subject, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    subject, images = tiny_subject(), draw(2, 3, 64, 64)
    features_of(subject, [images], "k")
    (kept,) = tmp_path.rglob("k.safetensors")
    kept.write_bytes(kept.read_bytes()[:100])
    assert len(features_of(subject, [images], "k")[OUTPUT]) == 2


def test_the_digest_of_weights_sees_buffers_too():
    norm = torch.nn.BatchNorm2d(3)
    before = weights_digest(norm)
    assert weights_digest(torch.nn.BatchNorm2d(3)) == before
    norm.running_mean.add_(1)
    assert weights_digest(norm) != before


SAME = torch.ones(6, 4) * torch.tensor([0.0, 3.0, 1.0, 2.0])


def test_agreement_with_a_teacher_that_says_the_same_of_all_pictures_says_nothing():
    one_class = SAME + 0.1 * draw(6, 4)
    assert "all 6 pictures the same output" in sameness(SAME, classifier=False)
    assert "the same class for all 6 pictures" in sameness(one_class, classifier=True)
    assert not sameness(one_class, classifier=False) and not sameness(draw(6, 4), classifier=True)
    assert not sameness(SAME[:1], classifier=True)


@pytest.mark.parametrize("constant", [True, False], ids=["constant", "one class"])
def test_such_agreement_is_left_out_with_the_reason(subject_of, constant):
    subjects = {name: subject_of(torch.nn.Identity(), name=name) for name in ("teacher", "student")}
    outputs = SAME if constant else SAME + 0.1 * draw(6, 4)
    features = {name: {OUTPUT: outputs} for name in subjects}
    notes = Notes({"model": {}, "data": {}, "settings": {}}, None, 0, False)
    _fidelity(notes, Compared(None, subjects, features, None, 0))
    found = {(row.metric, row.variant): row for row in notes.evaluation().measurements}
    assert "same" in found["top1_agreement", ""].reason and found["top1_agreement", ""].value is None
    assert (found["neighbour_agreement", ""].value is None) == constant
    assert (found["centred_cosine", OUTPUT].value is None) == constant


def test_labels_that_do_not_exclude_each_other_are_no_distribution(subject_of):
    subjects = {n: subject_of(torch.nn.Identity(), name=n, output="multi-label") for n in ("teacher", "student")}
    notes = Notes({"model": {}, "data": {}, "settings": {}}, None, 0, False)
    _fidelity(notes, Compared(None, subjects, {name: {OUTPUT: draw(6, 4)} for name in subjects}, None, 0))
    found = {row.metric: row for row in notes.evaluation().measurements if row.variant != "teacher sure"}
    assert found["top1_agreement"].value == 1 and "do not exclude each other" in found["kl"].reason


def test_agreement_where_the_teacher_is_sure_counts_those_pictures_alone(subject_of):
    teacher = torch.tensor([[9.0, 0, 0], [0, 9.0, 0], [0.1, 0, 0], [0, 0.2, 0]])
    student = torch.tensor([[9.0, 0, 0], [9.0, 0, 0], [0.1, 0, 0], [0, 0.2, 0]])
    subjects = {n: subject_of(torch.nn.Identity(), name=n) for n in ("teacher", "student")}
    notes = Notes({"model": {}, "data": {}, "settings": {}}, None, 0, False)
    features = {"teacher": {OUTPUT: teacher}, "student": {OUTPUT: student}}
    _fidelity(notes, Compared(None, subjects, features, None, 0))
    found = {(row.metric, row.variant): row for row in notes.evaluation().measurements}
    sure = found["top1_agreement", "teacher sure"]
    assert found["top1_agreement", ""].value == 0.75 and (sure.value, sure.n) == (0.5, 2)
    # The student is sure of both, and right about one.
    assert found["calibration_error", "teacher sure"].value == pytest.approx(0.5, abs=1e-3)
