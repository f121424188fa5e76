"""Learning rate and strengths as functions of the step, and, under a floor, of what was measured on the way.

Rate and strengths are pure functions of the step: nothing to save, so nothing to lose on resume.

A floor (`Recipe.keep`) takes the place of the step: strengths move only as fast as the student keeps deciding as its
teacher does. A phase's strengths are a path, and a `Walk` says how far along it the student is. After every evaluation:

- above the floor: the weights are kept as the furthest that are good enough, and the student walks on, a little faster,
  at a higher learning rate (at most the phase's own);
- below it: the weights go back to the furthest, and try half as far at half the rate.

The rate is part of it because steps alone cost decisions: after 3,300 views at the phase's own rate EfficientNet-Lite0
agreed on 64 % of pictures at B = 1.006, where untrained it agrees on 96 %.

The path has two parts: B rises while biases go over to carriers and the carriers' windows shrink, as the phase says; at
last the carried biases fade. The run hands on the furthest student above the floor. (Ours.)
"""

from __future__ import annotations

import dataclasses
import math

from .recipe import Phase, Recipe

__all__ = [
    "Walk",
    "arrived",
    "due",
    "evaluated_every",
    "floored",
    "interval",
    "learning_rate",
    "path",
    "ramp",
    "share_at",
    "strengths_at",
    "warm_steps",
]

# The share of the path after which the phase's own strengths are at their ends, and carried biases fade.
FADING = 0.8
# So many evaluations a phase at least, as the walk can only turn where one is made.
EVALUATIONS = 24

# The most that is left of mean sizes after a step, so that reference gains follow strengths that move.
FOLLOWING = 0.9
# How much longer the next stretch is after one that stayed above the floor, and how much shorter after another.
FASTER, SLOWER = 1.5, 0.5
# The share of the phase's learning rate that a walk begins with: at its start, the student has nothing to learn.
FIRST_RATE = 0.1
# A walk that never falls below the floor is over after this share of the phase; the rest is for the end of the path.
SHARE = 0.6


def learning_rate(phase: Phase, step: int, steps: int) -> float:
    """Linear warm-up over the first `warmup` share of `steps`, then the peak, and over the last `decay` share (but for
    the warm-up) half a cosine down to `final_learning_rate` times the peak."""
    peak, final = phase.learning_rate, phase.final_learning_rate
    warm = warm_steps(phase, steps)
    if step < warm:
        return peak * (step + 1) / warm
    falling = max(1, min(round(phase.decay * steps), steps - warm))
    progress = max(0.0, (step - (steps - falling)) / falling)
    return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress)))


def warm_steps(phase: Phase, steps: int) -> int:
    """Steps with rising learning rate."""
    return max(1, int(phase.warmup * steps))


def ramp(step: float, steps: int, start: float, end: float, over: float) -> float:
    """From `start` to `end` in a straight line over `over` share of `steps`; `start` before step 0, then `end`."""
    if over <= 0:
        return end if step >= 0 else start
    return start + (end - start) * min(1.0, max(0.0, step / (over * steps)))


def strengths_at(phase: Phase, step: float, steps: int) -> dict[str, float]:
    """Every strength at `step` of the `steps` of `phase`, and the window."""
    values = {"window": phase.window}
    for name, (start, end) in phase.strengths.items():
        begin, finish = phase.ramps.get(name, (0.0, phase.ramp))
        values[name] = ramp(step - begin * steps, steps, start, end, finish - begin)
    return values


def share_at(phase: Phase, name: str, step: int, steps: int) -> float:
    """The share `name`, `blend` or `own_inputs`, at `step` of the `steps` of `phase`."""
    start, end = getattr(phase, name)
    return ramp(step, steps, start, end, phase.ramp)


def arrived(phase: Phase, step: int, steps: int) -> bool:
    """Whether strengths and the teacher's help are at their ends at `step`.

    Before, the student is nearer to its teacher for free, or not yet trained for what it will be.
    """
    moving = (name for name, (start, end) in phase.strengths.items() if start != end)
    ends = [phase.ramps.get(name, (0.0, phase.ramp))[1] for name in moving]
    ends += [phase.ramp] if phase.helped else []
    return not ends or step >= max(ends) * steps


def due(step: int, batch_size: int, every: int) -> bool:
    """Whether `every` pictures went by within this step; 0 is never."""
    return every > 0 and step * batch_size // every > (step - 1) * batch_size // every


def floored(recipe: Recipe) -> Recipe:
    """A recipe with a floor in one phase, the last one over the whole length: where to hold is not known before.

    Its strengths go from where the first phase starts to where the last one ends. One without a floor is as it was.
    """
    if not recipe.keep or len(recipe.phases) == 1:
        return recipe
    first, last = recipe.phases[0], recipe.phases[-1]
    ends = {name: (start, last.strengths[name][1]) for name, (start, _) in first.strengths.items()}
    pictures = sum(phase.pictures for phase in recipe.phases)
    decay = min(last.reference_decay, FOLLOWING)
    phase = dataclasses.replace(last, pictures=pictures, ramp=1.0, ramps={}, reference_decay=decay, **ends)
    return dataclasses.replace(recipe, phases=(phase,))


def path(phase: Phase, share: float) -> dict[str, float]:
    """Every strength, and the window, at `share` (0 to 1) of the way of `phase`."""
    values = strengths_at(phase, min(1.0, share / FADING), 1)
    if phase.window:
        start, end = (1.0, 0.0) if phase.spread == (0.0, 0.0) else phase.spread
        values["spread"] = start + (end - start) * min(1.0, share / FADING)
    if share > FADING:
        values["carry"] *= (1 - share) / (1 - FADING)
    return values


def interval(phase: Phase, batch_size: int, evaluate_every: int) -> int:
    """Pictures between two evaluations of a phase with a floor."""
    return max(batch_size, min(evaluate_every, phase.pictures // EVALUATIONS))


def evaluated_every(recipe: Recipe, phase: Phase) -> int:
    """Pictures between two evaluations of `phase`."""
    return interval(phase, recipe.batch_size, recipe.evaluate_every) if recipe.keep else recipe.evaluate_every


@dataclasses.dataclass(frozen=True)
class Walk:
    """How far a phase has come along its path, in shares of it: from `start` at step `since` to `end` at step `until`.

    Attributes:
        stretch: the share of the path that the next evaluation interval may go.
        rate: the share of the phase's learning rate, in (0, 1].
        furthest: the furthest share at which the student agreed enough. agreement: how much it agreed there. step: when
            that was.
    """

    start: float = 0.0
    end: float = 0.0
    since: int = 0
    until: int = 0
    stretch: float = 0.0
    rate: float = FIRST_RATE
    furthest: float = 0.0
    agreement: float = 0.0
    step: int = 0

    def at(self, step: int) -> float:
        """The share of the path at `step`, in [0, 1]."""
        if step >= self.until:
            return self.end
        return self.start + (self.end - self.start) * max(0, step - self.since) / (self.until - self.since)

    @staticmethod
    def begin(step: int, interval: int, steps: int) -> Walk:
        """At the first step of a phase of so many `steps`, with an evaluation every `interval` steps."""
        stretch = min(1.0, interval / max(1.0, SHARE * steps))
        return Walk(end=stretch, since=step, until=step + interval, stretch=stretch, step=step)

    def judged(self, step: int, interval: int, agreement: float, floor: float) -> Walk:
        """After an evaluation at `step` that found this `agreement`; one that is no number is below every floor.

        Below the floor, the walk goes on from the furthest place, to which the weights have to go back too.
        """
        # The student that was measured took its last step one place before the next.
        here, above = self.at(step - 1), agreement >= floor
        start, change = (self.at(step), FASTER) if above else (self.furthest, SLOWER)
        stretch, rate = min(1.0, self.stretch * change), min(1.0, self.rate * change)
        walk = dataclasses.replace(
            self,
            start=start,
            end=min(1.0, start + stretch),
            since=step,
            until=step + interval,
            stretch=stretch,
            rate=rate,
        )
        if above and self._further(here, agreement):
            return dataclasses.replace(walk, furthest=here, agreement=agreement, step=step)
        return walk

    def _further(self, here: float, agreement: float) -> bool:
        """Whether a student above the floor is the one to hand on; at the same place, the one that agrees more."""
        return here > self.furthest or (here == self.furthest and agreement > self.agreement)
