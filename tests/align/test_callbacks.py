"""What is due after a step: each policy judges the student by itself, and keeps weights of its own."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from bcosify.align import log
from bcosify.align.recipe import Phase
from bcosify.align.trainer import AlignConfig, align
from safetensors.torch import load_file

from runs import RECIPE, rows

FIDELITY = "bcosify.align.run.fidelity"
# Ten steps with an evaluation after every second one; nothing moves, so each of them counts.
STILL = Phase("end-to-end", 40, 1e-3, b=(1.0, 1.0), beta=(1.0, 1.0), warmup=0.0, patience=2)
BOTH = dataclasses.replace(RECIPE, phases=(STILL,), min_agreement=0.5, evaluate_every=8, checkpoint_every=12)


@pytest.mark.parametrize(
    ("cosines", "agreements", "pictures", "weights_of"),
    [
        # Patience runs out: the best of those that agree enough, not the last.
        ((0.9, 0.8, 0.7), (0.9, 0.9, 0.9), 24, 8),
        # The best one of all agrees too little: the run ends there, with the best before it.
        ((0.7, 0.8, 0.6, 0.99), (0.9, 0.9, 0.9, 0.1), 32, 16),
        # Nothing ever agreed enough: the start of the phase.
        ((0.9,), (0.1,), 8, 0),
        # The last one is the best one.
        ((0.5, 0.6, 0.7, 0.8, 0.9), (0.9,) * 5, 40, None),
    ],
    ids=["patience", "guard", "guard-at-once", "neither"],
)
def test_patience_under_a_floor_hands_on_the_best_weights_that_agree(
    cosines, agreements, pictures, weights_of, run, shards, tmp_path, monkeypatch
):
    script = iter([(1.0, 1.0), *zip(cosines, agreements, strict=True)])
    handed_on = (0.5, 0.5)  # what is measured again once the student went back

    def fidelity(*_):
        cosine, agreement = next(script, handed_on)
        return {"centred_cosine": cosine, "top1_agreement": agreement}

    monkeypatch.setattr(FIDELITY, fidelity)
    result = align(AlignConfig(run, str(shards), tmp_path / "out", BOTH, quiet=True))
    assert next(script, None) is None and result["pictures"] == pictures
    assert result["final"].get("weights_of") == weights_of
    assert result["guarded"] == (agreements[-1] < BOTH.min_agreement)
    # And the weights are those: an equal run that ends there has the same.
    kept = load_file(tmp_path / "out/model.safetensors")
    wanted = pictures if weights_of is None else weights_of
    if wanted == 0:
        other = run
    else:
        monkeypatch.setattr(FIDELITY, lambda *_: {"centred_cosine": 0.5, "top1_agreement": 0.9})
        other = tmp_path / "short"
        steps = torch.optim.AdamW.step
        taken = []

        def step(self, *args, **kwargs):  # the whole phase, of which only the first steps count
            taken.append(None)
            return steps(self, *args, **kwargs) if len(taken) <= wanted // 4 else None

        monkeypatch.setattr(torch.optim.AdamW, "step", step)
        recipe = dataclasses.replace(BOTH, phases=(dataclasses.replace(STILL, patience=0),))
        align(AlignConfig(run, str(shards), other, recipe, quiet=True))
        assert len(taken) == 10
    expected = load_file(other / "model.safetensors")
    assert kept.keys() == expected.keys() and all(torch.equal(kept[name], expected[name]) for name in kept)


# --------------------------------------------------------------------------------------------------------- checkpoints


class Killed(Exception):
    pass


def as_it_was(checkpoint: Path) -> None:
    """The layout of checkpoints when all policies shared one state and one snapshot, best.safetensors."""
    path = checkpoint / "state.json"
    values = json.loads(path.read_text())
    callbacks = values.pop("callbacks")
    names = [name for name in callbacks if (checkpoint / f"{name}.safetensors").is_file()]
    assert len(names) == 1  # the one policy that the recipe asks for
    (checkpoint / f"{names[0]}.safetensors").rename(checkpoint / "best.safetensors")
    walk, judged = callbacks["strength-walk"], callbacks["early-stopping"]
    shared = {"best": judged["score"], "best_step": callbacks[names[0]]["step"], "waited": judged["waited"]}
    path.write_text(json.dumps({**values, **shared, "walk": walk or None}))


# A rate that ruins the student, so that the first evaluation is the best one.
RUINED = dataclasses.replace(STILL, learning_rate=0.1)
PATIENT = dataclasses.replace(BOTH, min_agreement=0.0, phases=(RUINED,))
GUARDED = dataclasses.replace(PATIENT, phases=(dataclasses.replace(STILL, patience=0),), min_agreement=0.01)
FLOORED = dataclasses.replace(
    PATIENT, phases=(dataclasses.replace(STILL, b=(1.0, 2.0), patience=0),), keep=0.3, evaluate_every=8
)


@pytest.mark.parametrize(
    ("recipe", "old"),
    [
        (PATIENT, False), (PATIENT, True), (GUARDED, False), (GUARDED, True), (FLOORED, False), (FLOORED, True),
        # Two policies, whose snapshots the old layout could not hold.
        (dataclasses.replace(BOTH, phases=(dataclasses.replace(STILL, learning_rate=1e-5),)), False),
    ],
    ids=["patience", "patience-old", "guard", "guard-old", "walk", "walk-old", "both"],
)  # fmt: skip
def test_policies_go_on_from_a_checkpoint_bit_for_bit(recipe, old, run, shards, tmp_path, monkeypatch):
    plain = log.PhaseLog.step

    def step(self, progress, losses, norm):
        plain(self, progress, losses, norm)
        if progress.step == 4:
            raise Killed

    align(AlignConfig(run, str(shards), tmp_path / "whole", recipe, quiet=True))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(log.PhaseLog, "step", step)
        align(AlignConfig(run, str(shards), tmp_path / "parts", recipe, quiet=True))
    (checkpoint,) = (tmp_path / "parts.run/checkpoints").iterdir()
    if old:
        as_it_was(checkpoint)
        (checkpoint / "COMPLETE").write_text("")
    align(AlignConfig(run, str(shards), tmp_path / "parts", recipe, quiet=True, resume=True))
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("parts", "whole"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
