"""What is done after a step: a list of callbacks, each of which says whether it is due and keeps a state of its own.

SettleStatistics    BatchNorms' statistics and gains of the student as it is now, before it is measured.
Evaluate            held-out fidelity.
AgreementFloor      too little agreement ends the run (`Recipe.min_agreement`).
StrengthWalk        strengths move as fast as a floor allows (`Recipe.keep`).
EarlyStopping       no more improvement ends the phase (`Phase.patience`).
HandOn              at the end of a phase: back to the weights that one of the three kept.
ExplanationSheets   explanations of a few held-out pictures.
Checkpoint          all that a resumed run needs.

The three in the middle are policies: each judges every evaluation by itself and keeps weights of its own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from ..convert.layers import fold_gains
from . import state
from .log import strengths
from .run import Run
from .schedule import Walk, arrived, due, evaluated_every

__all__ = [
    "AgreementFloor",
    "Callback",
    "EarlyStopping",
    "Policy",
    "StrengthWalk",
    "default_callbacks",
]


class Callback:
    """Base.

    Attributes:
        name: of its state in a checkpoint; empty where it has none.
    """

    name: ClassVar[str] = ""

    def begin(self, run: Run) -> None:
        """At the start of a phase, before its first step."""

    def due(self, run: Run) -> bool:
        """Whether it acts after the step just taken; alike in all processes."""
        raise NotImplementedError

    def act(self, run: Run) -> None:
        """Does it. Inside, the student is whole and not compiled."""
        raise NotImplementedError

    def saved(self, run: Run) -> state.Saved:
        """Its state."""
        return state.Saved({})

    def restore(self, run: Run, saved: state.Saved) -> None:
        """In a resumed run: the state that `saved` gave."""


def default_callbacks() -> list[Callback]:
    """What a run does after its steps, in this order."""
    evaluating, sheets = Evaluate(), ExplanationSheets()
    floor, walk, stopping = AgreementFloor(), StrengthWalk(), EarlyStopping()
    # Under a floor, patience judges what the floor let pass, so its best weights come first.
    hand_on = HandOn([stopping, floor, walk])
    return [SettleStatistics([evaluating, sheets]), evaluating, floor, walk, stopping, hand_on, sheets, Checkpoint()]


# ------------------------------------------------------------------------------------------------------------ measuring


def evaluation_due(run: Run) -> bool:
    return run.over or due(run.progress.step, run.recipe.batch_size, evaluated_every(run.recipe, run.phase))


class SettleStatistics(Callback):
    """Before the student is measured or explained."""

    def __init__(self, measuring: Sequence[Callback]) -> None:
        self.measuring = measuring

    def due(self, run: Run) -> bool:
        return any(callback.due(run) for callback in self.measuring)

    def act(self, run: Run) -> None:
        run.settle_statistics(everything=run.over)


class Evaluate(Callback):
    """Every `evaluate_every` pictures, and at the end of the phase."""

    def due(self, run: Run) -> bool:
        return evaluation_due(run)

    def act(self, run: Run) -> None:
        run.evaluate(**(strengths(run.learner.result) if run.recipe.keep else {}))


class ExplanationSheets(Callback):
    """Every `probe_every` pictures, and at the end of the phase, where there are pictures to explain."""

    def due(self, run: Run) -> bool:
        recipe = run.recipe
        return recipe.probe_pictures > 0 and (run.over or due(run.progress.step, recipe.batch_size, recipe.probe_every))

    def act(self, run: Run) -> None:
        run.explain()


# ------------------------------------------------------------------------------------------------------------- policies


class Policy(Callback):
    """Judges the student after every evaluation, and keeps the weights that it would hand on.

    Attributes:
        weights: the student when it was last kept, and `step`, when that was.
    """

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] | None = None
        self.step = 0

    def asked(self, run: Run) -> bool:
        """Whether the recipe asks for this policy in the phase that runs."""
        raise NotImplementedError

    def judge(self, run: Run) -> None:
        """After an evaluation."""
        raise NotImplementedError

    def due(self, run: Run) -> bool:
        return self.asked(run) and not run.guarded and evaluation_due(run)

    def act(self, run: Run) -> None:
        self.judge(run)

    def keep(self, run: Run) -> None:
        """The weights of now are those to hand on."""
        self.weights, self.step = run.learner.snapshot(), run.progress.step

    def saved(self, run: Run) -> state.Saved:
        return state.Saved({"step": self.step}, self.weights)

    def restore(self, run: Run, saved: state.Saved) -> None:
        if self.asked(run):
            self.step, self.weights = saved.values["step"], saved.tensors


class AgreementFloor(Policy):
    """Ends the run where agreement falls below `Recipe.min_agreement`, with the last weights that were above it."""

    name = "agreement-floor"

    def asked(self, run: Run) -> bool:
        return bool(run.recipe.min_agreement)

    def begin(self, run: Run) -> None:
        if self.asked(run):  # the first measurement may fail
            self.keep(run)

    def judge(self, run: Run) -> None:
        if run.agreement() >= run.recipe.min_agreement:  # one that is no number is not
            self.keep(run)
        else:
            run.guarded = run.over = True


class StrengthWalk(Policy):
    """Moves strengths under a floor (`Recipe.keep`), and keeps the furthest student above it. See `schedule.Walk`."""

    name = "strength-walk"

    def asked(self, run: Run) -> bool:
        return bool(run.recipe.keep)

    def begin(self, run: Run) -> None:
        if self.asked(run):  # should nothing stay above the floor
            self.keep(run)

    def judge(self, run: Run) -> None:
        assert run.walk is not None and self.weights is not None and run.stepper is not None
        steps = evaluated_every(run.recipe, run.phase) // run.recipe.batch_size
        agreement, floor = run.agreement(), run.recipe.keep
        run.walk = run.walk.judged(run.progress.step, steps, agreement, floor)
        if run.walk.step == run.progress.step:
            self.keep(run)
        elif not agreement >= floor:
            with run.stepper.prepared.whole():
                run.learner.go_back(self.weights)

    def saved(self, run: Run) -> state.Saved:
        return state.Saved({} if run.walk is None else dataclasses.asdict(run.walk), self.weights)

    def restore(self, run: Run, saved: state.Saved) -> None:
        super().restore(run, saved)
        run.walk = Walk(**saved.values) if self.asked(run) else None


class EarlyStopping(Policy):
    """Ends the phase after `Phase.patience` evaluations in a row without a better centred cosine; keeps the best.

    Judged are evaluations with strengths at their ends, and under `Recipe.min_agreement` those that agree enough.

    Attributes:
        score: of the best evaluation in this phase. waited: how many came after it.
    """

    name = "early-stopping"

    def __init__(self) -> None:
        super().__init__()
        self.score: float | None = None
        self.waited = 0

    def asked(self, run: Run) -> bool:
        return bool(run.phase.patience)

    def begin(self, run: Run) -> None:
        self.score, self.waited = None, 0

    def due(self, run: Run) -> bool:
        return super().due(run) and arrived(run.phase, run.progress.step - run.progress.first - 1, run.steps)

    def judge(self, run: Run) -> None:
        if self.better(run.newest("centred_cosine")):
            self.keep(run)
        run.over = run.over or self.waited >= run.phase.patience

    def better(self, score: float) -> bool:
        """Takes one more `score`; whether it is the best so far. One that is no number is never better."""
        found = score > (-math.inf if self.score is None else self.score)
        self.score, self.waited = (score, 0) if found else (self.score, self.waited + 1)
        return found

    def saved(self, run: Run) -> state.Saved:
        return state.Saved({"score": self.score, "step": self.step, "waited": self.waited}, self.weights)

    def restore(self, run: Run, saved: state.Saved) -> None:
        super().restore(run, saved)
        self.score, self.waited = saved.values["score"], saved.values["waited"]


class HandOn(Callback):
    """At the end of a phase: the student is the one that the first policy kept which kept any."""

    def __init__(self, policies: Sequence[Policy]) -> None:
        self.policies = policies

    def due(self, run: Run) -> bool:
        return run.over

    def act(self, run: Run) -> None:
        kept = next((policy for policy in self.policies if policy.weights is not None), None)
        if kept is not None and kept.weights is not None and kept.step < run.progress.step:
            run.learner.go_back(kept.weights)
            run.settle_statistics(everything=True)
            run.evaluate(weights_of=kept.step * run.recipe.batch_size)
        for policy in self.policies:
            policy.weights = None
        run.progress.end_phase()
        fold_gains(run.learner.model)
        fold_gains(run.learner.result)


class Checkpoint(Callback):
    """Every `checkpoint_every` pictures, at the end of the phase, and where a signal stops the run."""

    def due(self, run: Run) -> bool:
        recipe = run.recipe
        return run.over or run.stopped or due(run.progress.step, recipe.batch_size, recipe.checkpoint_every)

    def act(self, run: Run) -> None:
        stepper, learner = run.stepper, run.learner
        assert stepper is not None and run.log is not None
        run.log.check(run.progress, stepper.losses, stepper.norm)
        run.progress.trust = stepper.trust.numbers()
        run.accelerator.wait_for_everyone()
        state.write(
            run.config.work / state.CHECKPOINTS,
            learner.model,
            stepper.prepared.optimizer,
            run.progress,
            learner.average,
            callbacks={callback.name: callback.saved(run) for callback in run.callbacks if callback.name},
            trusted=stepper.trust.kept,
            sizes=None if stepper.gains is None else stepper.gains.means,
            main=run.accelerator.is_main_process,
        )
        run.accelerator.wait_for_everyone()
