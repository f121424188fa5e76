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


def ramp(step: int, steps: int, start: float, end: float, over: float) -> float:
    """From `start` to `end` in a straight line over the first `over` share of `steps`, then `end`."""
    if over <= 0:
        return end
    return start + (end - start) * min(1.0, step / (over * steps))


def strengths_at(phase: Phase, step: int, steps: int) -> dict[str, float]:
    """B, beta and dampening at `step` of the `steps` of `phase`."""
    moving = {name: getattr(phase, name) for name in ("b", "beta", "dampening")}
    return {name: ramp(step, steps, start, end, phase.ramp) for name, (start, end) in moving.items()}


def share_at(phase: Phase, name: str, step: int, steps: int) -> float:
    """The share `name`, `blend` or `own_inputs`, at `step` of the `steps` of `phase`."""
    start, end = getattr(phase, name)
    return ramp(step, steps, start, end, phase.ramp)


def arrived(phase: Phase, step: int, steps: int) -> bool:
    """Whether B, beta and the teacher's help are at their ends at `step`: before, the student is nearer to its teacher
    for free, or not yet trained for what it will be."""
    return step >= phase.ramp * steps or not (phase.moving or phase.helped)


def due(step: int, batch_size: int, every: int) -> bool:
    """Whether `every` pictures went by within this step; 0 is never."""
    return every > 0 and step * batch_size // every > (step - 1) * batch_size // every
