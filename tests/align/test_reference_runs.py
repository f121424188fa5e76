"""Whole runs with reference gains and carried biases: exact at resume, folded at the end, and compiled as plain."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from bcosify.align import compiling, log
from bcosify.align.recipe import Phase
from bcosify.align.trainer import AlignConfig, align
from bcosify.convert import load
from bcosify.convert.layers import ReferenceSized, strength_spans
from safetensors.torch import load_file

from runs import RECIPE, aligned, rows

CARRIED = Phase(
    "end-to-end", 32, 1e-3, b=(1.0, 1.5), beta=(1.0, 0.0), carry=(0.0, 1.0), ramp=0.5, reference_gains=True
)  # fmt: skip
WINDOWED = dataclasses.replace(CARRIED, window=3.0, spread=(1.0, 0.0))
RUNS = {
    "cnn": dataclasses.replace(RECIPE, phases=(WINDOWED,), evaluate_every=16, checkpoint_every=12, accumulate=2),
    # Gains at rest, an average, and a phase before that has others.
    "run": dataclasses.replace(
        RECIPE,
        phases=(
            dataclasses.replace(CARRIED, objective="block-local", pictures=16),
            dataclasses.replace(CARRIED, pictures=16, b=(1.5, 1.5), beta=(0.0, 0.0), carry=(1.0, 1.0)),
        ),
        evaluate_every=12,
        checkpoint_every=12,
        average=0.9,
    ),
}


class Killed(Exception):
    pass


@pytest.mark.parametrize("model", RUNS)
def test_killed_and_resumed_it_is_the_same_run_bit_for_bit(model, shards, tmp_path, request, monkeypatch):
    run, recipe = request.getfixturevalue(model), RUNS[model]
    whole = aligned(run, shards, tmp_path / "whole", recipe)
    plain = log.PhaseLog.step

    def step(self, progress, losses, norm):
        plain(self, progress, losses, norm)
        if progress.step == 5:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(log.PhaseLog, "step", step)
        aligned(run, shards, tmp_path / "parts", recipe)
    assert aligned(run, shards, tmp_path / "parts", recipe, resume=True) == whole
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("parts", "whole"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_perfect_start_has_no_loss_and_what_is_saved_is_what_was_measured(cnn, shards, tmp_path):
    """In training mode too; and the gains of the last evaluation are in the weights that are saved."""
    recipe = dataclasses.replace(RUNS["cnn"], accumulate=1)
    result = align(AlignConfig(cnn, str(shards), tmp_path / "out", recipe, quiet=True))
    first = next(row for row in rows(tmp_path / "out") if "loss" in row)
    assert abs(first["loss"]) < 1e-5
    student = load(tmp_path / "out")
    assert not any(layer.sized for layer in student.model.modules() if isinstance(layer, ReferenceSized))
    spans = strength_spans(student.model)
    assert {name: span[0] for name, span in spans.items()} == {
        "b": 1.5, "beta": 0, "carry": 1, "window": 3, "spread": 0
    }  # fmt: skip
    evaluated = [point["centred_cosine"] for point in result["curve"]]
    again = dataclasses.replace(recipe, phases=(dataclasses.replace(recipe.phases[0], pictures=4, learning_rate=0.0),))
    start = align(AlignConfig(cnn, str(shards), tmp_path / "b", again, quiet=True, init_from=tmp_path / "out"))["start"]
    assert start is not None and start["centred_cosine"] == pytest.approx(evaluated[-1], abs=1e-4)


def test_a_compiled_run_is_the_plain_run(cnn, shards, tmp_path, monkeypatch):
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    recipe = dataclasses.replace(RUNS["cnn"], phases=(dataclasses.replace(WINDOWED, pictures=16),), accumulate=1)
    plain, compiled = (
        aligned(cnn, shards, tmp_path / str(on), dataclasses.replace(recipe, compile=on)) for on in (False, True)
    )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert len(plain) == len(compiled)
    for ours, theirs in zip(plain, compiled, strict=True):
        if "loss" in ours:
            assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-4, abs=1e-5)
    torch._dynamo.reset()
