"""A floor instead of a schedule: the walk along a phase's path, what it hands on, and what it refuses."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from bcosify.align import log
from bcosify.align.checks import check_floor, check_recipe, check_strengths
from bcosify.align.recipe import Phase, Recipe, dump, load_recipe
from bcosify.align.run import Learner
from bcosify.align.schedule import EVALUATIONS, FASTER, FIRST_RATE, SLOWER, Walk, interval, path, strengths_at
from bcosify.align.schedule import floored as in_one_phase
from bcosify.align.trainer import AlignConfig, align
from bcosify.convert import FaCnnConfig, KMeansConfig, Teacher, convert, load, load_teacher
from bcosify.convert.layers import scheduled_layers, strength_spans
from bcosify.core.errors import DataError, RecipeError
from bcosify.data.index import index_shards
from bcosify.data.loader import held_out_batches
from bcosify.data.names import expand
from bcosify.data.order import split
from bcosify.data.views import to_model_input
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from runs import RECIPE, rows

WALKING = Phase(
    "end-to-end", 64, 1e-3, b=(1.0, 2.0), beta=(1.0, 0.0), carry=(0.0, 1.0), window=3.0, ramp=1.0, reference_gains=True
)  # fmt: skip
FLOORED = dataclasses.replace(RECIPE, phases=(WALKING,), keep=0.5, checkpoint_every=20)

# ------------------------------------------------------------------------------------------------------------- the path


def test_the_path_moves_everything_and_fades_what_is_carried_at_last():
    """B, beta and carry as the phase says, windows from the whole map on; then carry alone, to nothing."""
    phase = dataclasses.replace(WALKING, ramps={"b": (0.5, 1.0)})
    start = {"b": 1.0, "beta": 1.0, "dampening": 0.0, "carry": 0.0, "spread": 1.0, "window": 3.0}
    assert path(phase, 0) == start
    assert path(phase, 0.4) == pytest.approx({**start, "beta": 0.5, "carry": 0.5, "spread": 0.5})
    arrived = {**start, "b": 2.0, "beta": 0.0, "carry": 1.0, "spread": 0.0}
    assert path(phase, 0.8) == pytest.approx(arrived)
    assert path(phase, 0.9) == pytest.approx({**arrived, "carry": 0.5})
    assert path(phase, 1) == {**arrived, "carry": 0.0}
    # A spread of its own is kept to; without a window there is none to shrink, and without carriers none to fade.
    assert path(dataclasses.replace(phase, spread=(0.8, 0.4)), 0.4)["spread"] == pytest.approx(0.6)
    assert path(dataclasses.replace(phase, window=0.0), 0.4)["spread"] == 0
    plain = Phase("end-to-end", 40, 1e-3, b=(1.0, 2.0), beta=(1.0, 0.0))
    for share in (0.0, 0.3, 0.8):
        assert path(plain, share) == pytest.approx(strengths_at(plain, share / 0.8, 1))


ends = st.tuples(st.floats(0, 1), st.floats(0, 1))


@settings(deadline=None, max_examples=60)
@given(share=st.floats(0, 1), b=st.floats(1, 3), carry=ends, beta=ends, spread=ends, ramp=st.floats(0, 1))
def test_no_place_of_a_path_leaves_the_ranges(share, b, carry, beta, spread, ramp):
    phase = Phase("end-to-end", 40, 1e-3, b=(1, b), carry=carry, beta=beta, spread=spread, window=3.0, ramp=ramp)
    values = path(phase, share)
    assert values.pop("window") == 3 and 1 <= values.pop("b") <= b
    assert all(0 <= value <= 1 for value in values.values())


# ------------------------------------------------------------------------------------------------------------- the walk


@settings(deadline=None, max_examples=200)
@given(
    first=st.integers(0, 50),
    steps=st.integers(1, 400),
    every=st.integers(1, 40),
    agreements=st.lists(st.floats(0, 1) | st.just(math.nan), min_size=1, max_size=60),
    floor=st.floats(0.05, 1),
)
def test_a_walk_is_pure_and_stays_on_the_path(first, steps, every, agreements, floor):
    walk = Walk.begin(first, every, steps)
    assert walk.at(first) == 0 and (walk.furthest, walk.step) == (0, first)
    step, reached = first, {first: 0.0}
    for agreement in agreements:
        step += every
        for at in range(step - every, step + 2 * every):
            assert 0 <= walk.at(at) <= 1
        measured, before = walk.at(step - 1), walk
        walk = before.judged(step, every, agreement, floor)
        assert walk == before.judged(step, every, agreement, floor)  # nothing is kept anywhere else
        assert walk.furthest >= before.furthest and 0 <= walk.stretch <= 1 and 0 < walk.rate <= 1
        reached[step] = measured
        if agreement >= floor:
            assert walk.furthest == max(before.furthest, measured) and walk.stretch >= before.stretch
            assert walk.at(step) == before.at(step)  # no jump
            assert walk.at(step + every) >= walk.at(step) and walk.rate >= before.rate
        else:
            assert (walk.furthest, walk.agreement, walk.step) == (before.furthest, before.agreement, before.step)
            assert walk.at(step) == walk.furthest and walk.rate == before.rate / 2
            assert walk.at(step + every) == min(1, walk.furthest + walk.stretch) and walk.stretch == before.stretch / 2
        # What is said of the furthest student is what was measured of it.
        assert reached[walk.step] == walk.furthest
        assert walk.step == first or walk.agreement == agreements[(walk.step - first) // every - 1] >= floor


def test_a_student_that_always_agrees_is_at_the_end_before_the_phase_is():
    for steps, every in ((24, 1), (240, 10), (1000, 7)):
        walk = Walk.begin(0, every, steps)
        shares = []
        for step in range(every, steps + 1, every):
            walk = walk.judged(step, every, 1.0, 0.9)
            shares.append(walk.furthest)
        assert shares == sorted(shares) and walk.furthest == 1 and shares.index(1) < 0.7 * len(shares)


def test_below_the_floor_it_goes_back_and_comes_nearer_to_where_it_falls():
    """A student that agrees until 0.4 of the way and no further."""
    walk, steps = Walk.begin(0, 5, 600), []
    for step in range(5, 600, 5):
        here = walk.at(step - 1)
        walk = walk.judged(step, 5, 1 - here, 0.6)
        steps.append(here)
    assert 0.38 < walk.furthest <= 0.4 and walk.agreement == pytest.approx(1 - walk.furthest)
    assert max(steps) < 0.6 and any(after < before for before, after in zip(steps, steps[1:], strict=False))


def test_where_it_stands_the_student_that_agrees_more_is_handed_on():
    walk = Walk(start=1, end=1, since=0, until=5, stretch=1, furthest=1, agreement=0.9, step=3)
    assert walk.judged(10, 5, 0.8, 0.5).step == 3
    better = walk.judged(10, 5, 0.95, 0.5)
    assert (better.step, better.agreement, better.furthest) == (10, 0.95, 1)


def test_evaluations_are_near_enough_to_turn_at():
    assert interval(dataclasses.replace(WALKING, pictures=2400), 16, 1600) == 2400 // EVALUATIONS
    assert interval(dataclasses.replace(WALKING, pictures=2400), 16, 48) == 48
    assert interval(WALKING, 16, 1600) == 16


# --------------------------------------------------------------------------------------------------------- a whole run


def strengths_of(model: torch.nn.Module) -> dict[str, float]:
    spans = strength_spans(model)
    assert all(low == high for low, high in spans.values())
    return {name: low for name, (low, _) in spans.items()}


def agreement(folder, teacher, shards, recipe: Recipe) -> float:
    """Top-1 on the held-out pictures, measured here."""
    ours, theirs = load(folder), load(teacher)
    _, val = split(index_shards(expand(str(shards)), progress=False), recipe.held_out, recipe.seed)
    found = []
    with torch.no_grad():
        for batch in held_out_batches(val, size=recipe.image_size):
            x = to_model_input(batch.pictures, theirs.preprocess.mean, theirs.preprocess.std)
            found.append(ours.model(x).argmax(1) == theirs.model(x).argmax(1))
    assert sum(map(len, found)) == recipe.held_out
    return float(torch.cat(found).float().mean())


@pytest.fixture(scope="module")
def floored(cnn, shards, tmp_path_factory):
    """A run with a floor: what it returned, and its folder."""
    out = tmp_path_factory.mktemp("floored") / "out"
    return align(AlignConfig(cnn, str(shards), out, FLOORED, quiet=True)), out


def test_a_run_hands_on_the_furthest_student_above_the_floor(floored, cnn, shards):
    result, out = floored
    kept, student = result["kept"], load(out)
    assert kept["floor"] == 0.5 <= kept["agreement"] == agreement(out, cnn, shards, FLOORED)
    assert 0 < kept["share_of_path"] <= 1
    # The student that is saved is at the strengths that are reported, and these are that place of the path.
    found = strengths_of(student.model)
    assert {name: kept[name] for name in found} == found
    assert found == pytest.approx(
        {k: v for k, v in path(WALKING, kept["share_of_path"]).items() if k in found}, abs=2e-6
    )
    assert student.history.alignment.kept == kept
    # And of all that were measured it is the furthest.
    points = [point for point in result["curve"][1:] if "weights_of" not in point]
    assert len(points) == 16
    good = [point for point in points if point["top1_agreement"] >= 0.5]
    assert kept["b"] == max([point["b"] for point in good], default=1.0)
    assert any(point["top1_agreement"] < 0.5 for point in points) or kept["share_of_path"] == 1
    moved = [point["b"] for point in points]
    assert moved[0] < max(moved)


class Killed(Exception):
    pass


def killed_and_resumed(run, shards, out, recipe: Recipe, at: int, monkeypatch) -> None:
    plain = log.PhaseLog.step

    def step(self, progress, losses, norm):
        plain(self, progress, losses, norm)
        if progress.step == at:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(log.PhaseLog, "step", step)
        align(AlignConfig(run, str(shards), out, recipe, quiet=True))
    assert not out.exists()
    align(AlignConfig(run, str(shards), out, recipe, quiet=True, resume=True))


@pytest.mark.parametrize("at", [7])
def test_killed_and_resumed_it_is_the_same_run_bit_for_bit(floored, cnn, shards, tmp_path, monkeypatch, at):
    _, whole = floored
    killed_and_resumed(cnn, shards, tmp_path / "out", FLOORED, at, monkeypatch)
    assert rows(tmp_path / "out") == rows(whole)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", whole))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert load(tmp_path / "out").history.alignment.kept == load(whole).history.alignment.kept


def test_a_floor_that_nothing_reaches_hands_back_the_start(cnn, shards, tmp_path):
    """A learning rate that ruins the student at once."""
    phase = dataclasses.replace(WALKING, learning_rate=5.0, pictures=4, reference_gains=False, relative=False)
    recipe = dataclasses.replace(FLOORED, phases=(phase, phase), keep=1.0, evaluate_every=4)
    result = align(AlignConfig(cnn, str(shards), tmp_path / "out", recipe, quiet=True))
    kept = result["kept"]
    assert (kept["share_of_path"], kept["pictures"], kept["b"], kept["beta"], kept["carry"]) == (0, 0, 1, 1, 0)
    assert kept["agreement"] == 1 == result["final"]["top1_agreement"]  # of the start, not of what was tried
    assert result["pictures"] == 8  # the whole length, in one phase
    before, after = (load_file(folder / "model.safetensors") for folder in (cnn, tmp_path / "out"))
    weights = [name for name in before if not name.endswith((".window", ".spread"))]
    assert all(torch.equal(before[name], after[name]) for name in weights)


def test_below_the_floor_weights_go_back_and_the_rate_halves(cnn, shards, tmp_path, monkeypatch):
    plain, went_back = Learner.go_back, []

    def go_back(self, weights):
        plain(self, weights)
        went_back.append(all(torch.equal(value, weights[name]) for name, value in self.model.state_dict().items()))

    monkeypatch.setattr(Learner, "go_back", go_back)
    phase = dataclasses.replace(WALKING, learning_rate=50.0, pictures=16, relative=False, warmup=0.0, decay=0.0)
    recipe = dataclasses.replace(FLOORED, phases=(phase,), keep=1.0, evaluate_every=4, log_every=1)
    curve = align(AlignConfig(cnn, str(shards), tmp_path / "out", recipe, quiet=True))["curve"][1:]
    agreed = [point["top1_agreement"] == 1 for point in curve if "weights_of" not in point]
    handed_on = any("weights_of" in point for point in curve)
    assert len(agreed) == 4 and not all(agreed)
    assert went_back == [True] * (agreed.count(False) + handed_on)
    rates = [FIRST_RATE]
    for above in agreed[:-1]:
        rates.append(rates[-1] * (FASTER if above else SLOWER))
    found = [row["learning_rate"] for row in rows(tmp_path / "out") if "loss" in row]
    assert found == pytest.approx([50 * rate for rate in rates])


def test_carriers_fade_where_the_phase_itself_moves_nothing(cnn, shards, tmp_path):
    phase = Phase("end-to-end", 32, 1e-9, b=(1.0, 1.0), beta=(0.0, 0.0), carry=(1.0, 1.0), window=3.0)
    assert not phase.moving
    recipe = dataclasses.replace(FLOORED, phases=(phase,), keep=0.001, held_out=8)
    points = align(AlignConfig(cnn, str(shards), tmp_path / "out", recipe, quiet=True))["curve"][1:]
    spreads = {point["spread"] for point in points if "spread" in point}
    assert len(spreads) > 1 and max(spreads) == 1


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    torch.manual_seed(0)
    return load_teacher("timm:test_resnet", pretrained=False, image_size=64)


def test_a_floor_that_says_nothing_is_refused(teacher):
    student = convert(teacher)
    check_floor(FLOORED, student)
    check_floor(dataclasses.replace(FLOORED, keep=0.0), student)
    for keep in (-0.1, 1.01, math.nan, math.inf):
        with pytest.raises(RecipeError, match="keep: must be between 0 and 1; got "):
            dataclasses.replace(FLOORED, keep=keep)
    for count in (0, 1):
        with pytest.raises(RecipeError, match=f"held_out: must be at least 2; got {count}"):
            dataclasses.replace(FLOORED, held_out=count)
    with pytest.raises(RecipeError, match="^keep and min_agreement are two floors; take one of them out"):
        check_floor(dataclasses.replace(FLOORED, min_agreement=0.3), student)
    patient = (WALKING, dataclasses.replace(WALKING, patience=2))
    with pytest.raises(RecipeError, match=r"^keep hands on .*, phases\.1\.patience .*; take one of them out"):
        check_floor(dataclasses.replace(FLOORED, phases=patient), student)
    still = convert(teacher, KMeansConfig())
    assert not list(scheduled_layers(still.model))
    with pytest.raises(RecipeError, match="^keep: a student of --method kmeans has no strengths"):
        check_floor(FLOORED, still)


def test_a_run_is_refused_before_anything_is_written(cnn, shards, tmp_path):
    refused = (({"held_out": 100}, DataError, "^Holding out 100"), ({"min_agreement": 0.3}, RecipeError, "^keep"))
    for changes, error, words in refused:
        recipe = dataclasses.replace(FLOORED, **changes)
        with pytest.raises(error, match=words):
            align(AlignConfig(cnn, str(shards), tmp_path / "out", recipe, quiet=True))
    assert not list(tmp_path.iterdir())


def test_strengths_that_do_not_fit_are_refused_all_at_once(teacher):
    wrong = Phase(
        "end-to-end", 40, 1e-3, b=(0.5, 2.0), beta=(1.0, -0.1), carry=(0.0, 1.5), spread=(math.nan, 0.0), window=4.0,
        ramps={"beta": (0.8, 0.2), "b": (0.0, 1.2)}, reference_decay=1.0,
    )  # fmt: skip
    with pytest.raises(RecipeError) as found:
        dataclasses.replace(RECIPE, phases=(RECIPE.phases[0], wrong))
    first, *lines = str(found.value).splitlines()
    assert first == "the recipe has 8 fault(s):"
    for line, words in zip(
        lines,
        (
            "b.0: must be at least 1; got 0.5",
            "beta.1: must be between 0 and 1; got -0.1",
            "carry.1: must be between 0 and 1; got 1.5",
            "spread.0: must be between 0 and 1; got nan",
            "window: must be 0 (the whole map), a share below 1 of its side, or an odd number of places; got 4",
            "ramps.beta: must not fall from one value to the next; got [0.8, 0.2]",
            "ramps.b.1: must be between 0 and 1; got 1.2",
            "reference_decay: must be at least 0 and below 1; got 1",
        ),
        strict=True,
    ):
        assert line.strip() == f"phases.1.{words}"
    wrong = Phase(
        "end-to-end", 40, 1e-3, ramps={"cary": (0.0, 1.0)}, reference_gains=True, batch_statistics=True
    )  # fmt: skip
    recipe = dataclasses.replace(RECIPE, phases=(RECIPE.phases[0], wrong))
    for check in (
        lambda: check_strengths(convert(teacher), recipe),
        lambda: check_recipe(recipe, convert(teacher), teacher.model),
    ):
        with pytest.raises(RecipeError) as found:
            check()
        first, *lines = str(found.value).splitlines()
        assert first == "the recipe has 2 fault(s):"
        for line, words in zip(
            lines,
            (
                "phases.1.ramps: no strength cary. Did you mean",
                "phases.1: reference_gains takes the place of batch_statistics; leave one of them out",
            ),
            strict=True,
        ):
            assert line.strip().startswith(words)


@pytest.mark.parametrize(
    "changes", [{"carry": (0.0, 1.0)}, {"window": 3.0}, {"spread": (1.0, 0.0)}, {"reference_gains": True}], ids=str
)
def test_carriers_are_refused_for_methods_without_any(teacher, changes):
    student = convert(teacher, FaCnnConfig())
    phase = Phase("decisions", 40, 1e-3, dampening=(0.0, 4.0), **changes)
    check_strengths(student, dataclasses.replace(RECIPE, phases=(Phase("decisions", 40, 1e-3, dampening=(0.0, 4.0)),)))
    (name,) = changes
    with pytest.raises(RecipeError, match=rf"1 fault\(s\):\n  phases\.0\.{name}: no layer of a fa-cnn student .*out$"):
        check_strengths(student, dataclasses.replace(RECIPE, phases=(phase,)))


def test_a_window_where_no_norm_has_one_is_harmless():
    torch.manual_seed(0)
    student = convert(load_teacher("timm:test_vit", pretrained=False, image_size=64))
    assert "carry" in strength_spans(student.model) and "window" not in strength_spans(student.model)
    check_strengths(student, dataclasses.replace(RECIPE, phases=(WALKING,)))
    with pytest.raises(RecipeError, match=r"phases\.0\.window: must be 0 .*odd number of places; got 4"):
        dataclasses.replace(RECIPE, phases=(dataclasses.replace(WALKING, window=4.0),))


def test_a_recipe_file_with_a_slip_in_its_ramps_is_told(tmp_path):
    (tmp_path / "recipe.yaml").write_text(dump(FLOORED))
    assert load_recipe(tmp_path / "recipe.yaml") == FLOORED
    for slip in ("phases.0.ramps={b: [0.0]}", "phases.0.ramps={b: 1}", "phases.0.ramps=[b]", "phases.0.keep=0.9"):
        with pytest.raises(RecipeError, match=r"1 fault\(s\)"):
            load_recipe(tmp_path / "recipe.yaml", [slip])


def test_a_floor_makes_one_phase_of_a_ramp_and_a_hold():
    recipe = load_recipe("bcos/cnn", ["keep=0.9"])
    (phase,) = in_one_phase(recipe).phases
    assert phase.pictures == sum(each.pictures for each in recipe.phases)
    assert (phase.b, phase.beta, phase.carry) == ((1.0, 1.5), (1.0, 0.0), (0.0, 1.0))
    assert phase.reference_gains and phase.reference_decay <= 0.9 and phase.window == 7
    assert in_one_phase(in_one_phase(recipe)) == in_one_phase(recipe)
    assert in_one_phase(load_recipe("bcos/cnn")) == load_recipe("bcos/cnn")
