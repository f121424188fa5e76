"""Learning rate, B and beta as pure functions of the step: nothing to save, so nothing to lose on resume."""

from __future__ import annotations

import math

__all__ = ["learning_rate", "ramp"]


def learning_rate(step: int, steps: int, peak: float, warmup: float, final: float, decay: float = 1.0) -> float:
    """Linear warm-up over the first `warmup` share of `steps`, `peak`, and over the last `decay` share (but for the
    warm-up) half a cosine down to `final` * `peak`."""
    warm = max(1, int(warmup * steps))
    if step < warm:
        return peak * (step + 1) / warm
    falling = max(1, min(round(decay * steps), steps - warm))
    progress = max(0.0, (step - (steps - falling)) / falling)
    return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress)))


def ramp(step: int, steps: int, start: float, end: float, over: float) -> float:
    """From `start` to `end` in a straight line over the first `over` share of `steps`, then `end`."""
    if over <= 0:
        return end
    return start + (end - start) * min(1.0, step / (over * steps))
