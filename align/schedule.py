"""Learning rate, B and beta as pure functions of the step: nothing to save, so nothing to lose on resume."""

from __future__ import annotations

import math

from .recipe import Phase

__all__ = ["arrived", "due", "learning_rate", "ramp", "share_at", "strengths_at", "warm_steps"]


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
