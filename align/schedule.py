"""Learning rate, B and beta as pure functions of the step: nothing to save, so nothing to lose on resume."""

from __future__ import annotations

import math

__all__ = ["learning_rate", "ramp"]


def learning_rate(step: int, steps: int, peak: float, warmup: float, final: float) -> float:
    """Linear warm-up over the first `warmup` share of `steps`, then half a cosine down to `final` * `peak`."""
    warm = max(1, int(warmup * steps))
    if step < warm:
        return peak * (step + 1) / warm
    progress = (step - warm) / max(1, steps - warm)
    return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress)))


def ramp(step: int, steps: int, start: float, end: float, over: float) -> float:
    """From `start` to `end` in a straight line over the first `over` share of `steps`, then `end`."""
    if over <= 0:
        return end
    return start + (end - start) * min(1.0, step / (over * steps))
