"""CA-Stream and prototypes are aligned: the pressure, the frozen backbone, the guard, the fit; on tiny models."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F
from bcosify.align.kmeans import kmeans
from bcosify.align.losses import decision_error
from bcosify.align.objectives import OBJECTIVES, observe
from bcosify.align.objectives.prototypes import PrototypeFit, calibrated, divergence
from bcosify.align.recipe import Phase, Recipe, load_recipe
from bcosify.align.trainer import AlignConfig, align
from bcosify.convert import CaStreamConfig, KMeansConfig, convert, load, save, set_strength
from bcosify.core.errors import DataError, RecipeError
from bcosify.core.pictures import noise_pictures
from bcosify.data.pack import write_shards
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from tiny import tiny_teacher

PHASE = Phase("decisions", 24, 1e-2, relative=False)
RECIPE = Recipe(
    "the teacher's decisions",
    64,
    4,
    (PHASE,),
    held_out=8,
    evaluate_every=8,
    checkpoint_every=24,
    log_every=1,
    workers=0,
)
FIT = dataclasses.replace(RECIPE, phases=(Phase("prototypes", 24, 0.0),))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """40 crops of photographs from scikit-image."""
    from skimage import data

    folder = tmp_path_factory.mktemp("pictures")
    for name, array in {"cat": data.chelsea(), "coffee": data.coffee()}.items():
        for i in range(20):
            crop = Image.fromarray(array).crop((10 * i, 5 * i, 10 * i + 150, 5 * i + 150))
            crop.resize((80, 80)).save(folder / f"{name}-{i}.jpg")
    out = tmp_path_factory.mktemp("shards") / "all"
    write_shards(folder, out, size=None, progress=False)
    return out


def converted(folder, config, name: str = "test_resnet"):
    return save(convert(tiny_teacher(name), config), folder / "run")


# ------------------------------------------------------------------------------------------------------- the pressure


def test_decision_error_is_its_closed_form():
    ours, theirs = torch.randn(5, 7), torch.randn(5, 7)
    p, q = theirs.softmax(1), ours.softmax(1)
    weights = p.amax(1) / p.amax(1).sum()
    entropy = -(weights * q[range(5), theirs.argmax(1)].log()).sum()
    expected = entropy + 0.3 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(decision_error(ours, theirs, 0.3), expected)


@pytest.mark.parametrize(
    ("name", "objective", "beta"),
    [("test_resnet", "decisions", 1.0), ("test_vit", "end-to-end", 0.0), ("test_vit", "pairwise", 0.0)],
)
def test_the_first_step_has_a_gradient_and_the_backbone_none(name, objective, beta):
    """Well above rounding: at an exact start, Adam would turn rounding into full steps."""
    student = convert(tiny_teacher(name), CaStreamConfig())
    model = student.model.requires_grad_(False)
    model.stream.requires_grad_(True)
    set_strength(model, beta=beta)
    pictures = noise_pictures(4, (64, 64))
    loss = OBJECTIVES[objective](model, RECIPE, {"depths": (1.0,)} if objective == "end-to-end" else {})
    loss(pictures, *observe(tiny_teacher(name).model, pictures, loss.taps))["total"].backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients and all(name.startswith("stream.") for name in gradients)
    assert sum(float(gradient.norm()) for gradient in gradients.values()) > 1e-4


def test_the_pooled_vector_teaches_nothing_and_is_refused(shards, tmp_path):
    run = converted(tmp_path, CaStreamConfig())
    recipe = dataclasses.replace(RECIPE, phases=(dataclasses.replace(PHASE, objective="end-to-end"),))
    with pytest.raises(RecipeError, match="learns nothing from it. It takes: decisions, pairwise"):
        align(AlignConfig(run, str(shards), tmp_path / "out", recipe, quiet=True))
    assert not (tmp_path / "out.run").exists()


@pytest.mark.parametrize("name", ["ca-stream/cnn", "ca-stream/vit", "kmeans/fit"])
def test_recipes_ship_and_name_their_pressure(name):
    assert load_recipe(name).pressure


# --------------------------------------------------------------------------------------------------------- alignment


def test_alignment_leaves_the_backbone_bit_for_bit(shards, tmp_path):
    run = converted(tmp_path, CaStreamConfig())
    result = align(AlignConfig(run, str(shards), tmp_path / "out", RECIPE, quiet=True))
    assert not result["guarded"] and result["pictures"] == 24
    before, after = (load_file(folder / "model.safetensors") for folder in (run, tmp_path / "out"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(name.startswith("stream.") for name in moved)
    assert not any(module.training for module in load(tmp_path / "out").model.modules())


@pytest.mark.parametrize(
    ("measured", "seen", "weights_of"),
    [((1.0, 0.9, 0.5, 0.9), 16, 8), ((1.0, 0.5, 1.0), 8, 0), ((1.0, 0.9, 0.85, 0.8), 24, None)],
    ids=["falls", "falls-at-once", "holds"],
)
def test_the_guard_goes_back_to_the_last_weights_that_agree(measured, seen, weights_of, shards, tmp_path, monkeypatch):
    run = converted(tmp_path, CaStreamConfig())
    script = iter(measured)
    monkeypatch.setattr(
        "bcosify.align.run.fidelity", lambda *_: {"centred_cosine": 1.0, "top1_agreement": next(script)}
    )
    result = align(
        AlignConfig(run, str(shards), tmp_path / "out", dataclasses.replace(RECIPE, min_agreement=0.8), quiet=True)
    )
    assert next(script, None) is None and result["pictures"] == seen
    assert result["guarded"] == (weights_of is not None) and result["final"].get("weights_of") == weights_of
    start, kept = load_file(run / "model.safetensors"), load(tmp_path / "out").model.state_dict()
    assert all(torch.equal(value, start[name]) for name, value in kept.items()) == (weights_of == 0)


# -------------------------------------------------------------------------------------------------------- prototypes


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 5), st.integers(0, 3))
def test_kmeans_centres_are_means_of_their_points_and_near(count, clusters, width, seed):
    points = torch.randn(count, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    centres, assigned = kmeans(points, clusters, torch.Generator().manual_seed(seed))
    again, same = kmeans(points, clusters, torch.Generator().manual_seed(seed))
    assert torch.equal(centres, again) and torch.equal(assigned, same)
    assert len(centres) <= min(clusters, count)
    for k in range(len(centres)):
        torch.testing.assert_close(centres[k], points[assigned == k].mean(0))
    distances = torch.cdist(points, centres)
    torch.testing.assert_close(distances.gather(1, assigned[:, None])[:, 0], distances.amin(1))


def test_kmeans_inertia_does_not_rise():
    points = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))

    def inertia(iterations: int) -> float:
        centres, assigned = kmeans(points, 5, torch.Generator().manual_seed(1), iterations)
        return float((points - centres[assigned]).square().sum())

    found = [inertia(n) for n in range(1, 8)]
    assert all(after <= before + 1e-4 for before, after in zip(found, found[1:], strict=False))


def test_duplicates_have_one_centre():
    centres, assigned = kmeans(torch.ones(7, 3), 4, torch.Generator().manual_seed(0))
    assert centres.tolist() == [[1, 1, 1]] and assigned.tolist() == [0] * 7


def test_calibration_has_a_gradient_at_its_start_and_brings_the_divergence_down():
    torch.manual_seed(0)
    target = torch.randn(30, 6).log_softmax(1)
    linear, data = torch.randn(30, 6, 2), torch.randn(30, 6, 2)
    temperature, offsets = torch.zeros((), requires_grad=True), torch.zeros(6, 2, requires_grad=True)
    start = divergence(target, linear, data, temperature, offsets)
    start.backward()
    assert float(temperature.grad.abs() + offsets.grad.norm()) > 1e-3  # type: ignore[union-attr]
    found = calibrated(target, linear, data, temperature.detach(), offsets.detach())
    assert divergence(target, linear, data, *found) < 0.8 * start


def fitted(model, pictures, floor=0.0, seed=0):
    fit = PrototypeFit(model, floor, seed)
    for batch in pictures.split(8):
        fit.gather(batch)
    fit.join(lambda tensor: tensor)
    return fit.solve([pictures])


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_a_fit_moves_prototypes_to_the_data_and_is_deterministic(name):
    pictures = noise_pictures(40, (64, 64), seed=3)
    models = [convert(tiny_teacher(name), KMeansConfig(prototypes=2, concepts=3)).model for _ in range(2)]
    facts = [fitted(model, pictures) for model in models]
    assert facts[0] == facts[1] and json.dumps(facts[0])
    ours, theirs = (model.state_dict() for model in models)
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    head, found = models[0].get_classifier(), facts[0]
    assert found["classes_from_data"] + found["classes_flagged"] == 1000
    assert int(head.from_data.sum()) == found["classes_from_data"]
    assert found["kl_after_calibration"] <= found["kl_before_calibration"]
    assert all(0 <= one["nearest"] < 40 and one["pictures"] > 0 for one in found["prototypes"])
    with torch.no_grad():
        logits, teacher = models[0](pictures), tiny_teacher(name).model(pictures)
        agreement = (logits.argmax(1) == teacher.argmax(1)).float().mean()
        assert float(agreement) == pytest.approx(found["held_out_agreement"], abs=1e-3)
        probabilities = logits.softmax(1)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(40))
    if name == "test_resnet":
        assert {"concepts_b4", "margin"} <= models[0].extra_maps(pictures[:2]).keys()
        assert 0 <= found["concepts"]["b4_fidelity"] <= 1


def test_a_floor_that_nothing_but_the_teacher_reaches_keeps_prototypes_near_it():
    pictures = noise_pictures(40, (64, 64), seed=3)
    free, held = (
        fitted(convert(tiny_teacher("test_resnet"), KMeansConfig()).model, pictures, floor)["pictures_for_half"]
        for floor in (0.0, 1.0)
    )
    assert held > free


def test_a_teacher_that_decides_on_one_class_only():
    teacher = tiny_teacher("test_resnet")
    with torch.no_grad():
        teacher.model.fc.bias[7] += 100
    model = convert(teacher, KMeansConfig()).model
    found = fitted(model, noise_pictures(16, (64, 64)))
    assert found["classes_from_data"] == 1 and {one["class"] for one in found["prototypes"]} == {7}
    with torch.no_grad():
        assert bool((model(noise_pictures(4, (64, 64))).argmax(1) == 7).all())


def test_features_that_are_no_numbers_are_refused():
    fit = PrototypeFit(convert(tiny_teacher("test_resnet"), KMeansConfig()).model, 0.0, 0)
    with pytest.raises(DataError, match="not finite"):
        fit.gather(torch.full((1, 3, 64, 64), math.nan))
    with pytest.raises(RecipeError, match="--method kmeans"):
        PrototypeFit(tiny_teacher("test_resnet").model, 0.0, 0)


def test_the_fit_runs_as_an_alignment(shards, tmp_path):
    run = converted(tmp_path, KMeansConfig(prototypes=2, concepts=3))
    result = align(AlignConfig(run, str(shards), tmp_path / "out", FIT, quiet=True))
    assert result["curve"][-1]["objective"] == "prototypes"
    student = load(tmp_path / "out")
    fit = student.history.alignment.fit
    assert fit["pictures"] == 24 and all(".tar:" in one["picture"] for one in fit["prototypes"])
    sheet = (tmp_path / "out.run/prototypes.html").read_text()
    assert sheet.count("<figure>") == len(fit["prototypes"]) > 0
    before, after = (load_file(folder / "model.safetensors") for folder in (run, tmp_path / "out"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert all(name.startswith(("fc.", "concepts.")) for name in moved) and "fc.prototypes" in moved
    assert torch.equal(before["fc.weight"], after["fc.weight"])
    with torch.no_grad():
        logits = student.model(noise_pictures(2, (64, 64)))
    assert bool(F.softmax(logits, 1).isfinite().all())


def test_descent_is_refused_for_prototypes(shards, tmp_path):
    run = converted(tmp_path, KMeansConfig())
    with pytest.raises(RecipeError, match="It takes: prototypes"):
        align(AlignConfig(run, str(shards), tmp_path / "out", RECIPE, quiet=True))
