"""Warm-up by trust: a learning rate that starts where the start is good. (Ours.)

Rates are tuned for students that start broken; from a good start the first steps of such a rate destroy more than they
teach. So while the rate rises, every few steps are kept or not: if they made the student worse than it was at the start
of the phase by more than a share, weights and optimizer go back to before them, and the warm-up begins anew, to half
the rate for the rest of the phase.

Worse is measured by the training loss itself, on the same pictures, at the same strengths: the weights of now against
the last ones that were kept, so neither the luck of a batch nor a rising B looks like damage. What the kept windows
multiply to is the loss as a multiple of what the start would have now.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import RecipeError
from .recipe import Recipe

__all__ = ["Trust", "check_trust"]

WINDOW = 4  # steps that are kept or given up together
LEAST = 0.01  # a loss below it counts as it: near an exact start any step multiplies the loss


class Trust:
    """The trust of one phase.

    Attributes:
        halvings: how often the rate was halved. since: the step of the phase at which the warm-up last began.
        kept: the tensors to go back to, and plain values of the optimizer; empty outside the warm-up.
    """

    def __init__(
        self, share: float, warm: int, models: list[nn.Module], optimizer: Any, reduce: Callable[[Tensor], Tensor]
    ) -> None:
        """Args: share: how much worse is accepted; 0 for off. warm: steps of the warm-up. models: whose weights go back
        together, the one that is trained first. reduce: the mean of a tensor over all processes."""
        self.share, self.warm, self.reduce = share, warm if share else 0, reduce
        self.weights = [parameter for model in models for parameter in model.parameters()]
        self.optimizer = optimizer
        self.halvings, self.since, self.level = 0, 0, 1.0
        self.sums: Tensor | None = None
        self.kept: dict[str, Any] = {}

    def rate(self, step: int, planned: float, peak: float) -> float:
        """The learning rate at `step` of the phase, where its recipe alone says `planned`."""
        if not self.halvings:
            return planned
        return 0.5**self.halvings * min(planned, peak * (step - self.since + 1) / self.warm)

    def begin(self) -> None:
        """Before the first step of the phase."""
        if self.warm:
            self._keep()

    def refuses(self, step: int, loss: Tensor, again: Callable[[], Tensor]) -> bool:
        """Whether the steps before `step` of the phase were given up, so that this one is not taken either.

        Args:
            loss: () of this step's pictures, before it is taken. again: the same of whatever the weights then are.

        In the warm-up the student runs once more a step, without a gradient; one step in four waits for the device.
        """
        walked = step - self.since
        if not 0 < walked <= self.warm:
            return False
        with self._at_kept_weights():
            both = self.reduce(torch.stack([loss.detach().float(), again().float()]))
        self.sums = both if self.sums is None else self.sums + both
        if walked % WINDOW and walked != self.warm:
            return False
        least = LEAST * ((walked - 1) % WINDOW + 1)
        now, before = (max(total, least) if total == total else total for total in self.sums.tolist())
        self.sums, level = None, self.level * now / before
        refused = not level <= 1 + self.share  # also where it is no number
        if refused:
            self._go_back()
            self.halvings, self.since = self.halvings + 1, step + 1
        else:
            self.level = level
            self.kept = {}
            if walked < self.warm:
                self._keep()
        return refused

    def numbers(self) -> dict[str, float]:
        """What a resumed run must know beside `kept`."""
        now, before = (0.0, 0.0) if self.sums is None else self.sums.tolist()
        counts = {"halvings": self.halvings, "since": self.since, "level": self.level}
        return {**counts, "now": now, "before": before} if self.share else {}

    def go_on(self, numbers: dict[str, float], kept: dict[str, Any], device: torch.device) -> None:
        """In a resumed run: what `numbers` and `kept` were."""
        if not numbers:
            return
        self.halvings, self.since, self.level = int(numbers["halvings"]), int(numbers["since"]), numbers["level"]
        self.kept = kept
        if numbers["now"] or numbers["before"]:
            self.sums = torch.tensor([numbers["now"], numbers["before"]], device=device)

    @torch.no_grad()
    def _keep(self) -> None:
        self.kept = {f"weight.{i}": weight.detach().clone() for i, weight in enumerate(self.weights)}
        for index, part in self.optimizer.state_dict()["state"].items():
            self.kept |= {f"{index}.{name}": copy.deepcopy(value) for name, value in part.items()}

    def _go_back(self) -> None:
        self._set_weights()
        state: dict[int, dict[str, Any]] = {}
        for key, value in self.kept.items():
            index, _, name = key.partition(".")
            if index != "weight":
                state.setdefault(int(index), {})[name] = copy.deepcopy(value)
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})

    @torch.no_grad()
    def _set_weights(self) -> None:
        for i, weight in enumerate(self.weights):
            weight.copy_(self.kept[f"weight.{i}"])

    @contextlib.contextmanager
    def _at_kept_weights(self) -> Iterator[None]:
        now = [weight.detach().clone() for weight in self.weights]
        self._set_weights()
        try:
            with torch.no_grad():
                yield
        finally:
            with torch.no_grad():
                for weight, value in zip(self.weights, now, strict=True):
                    weight.copy_(value)


def check_trust(recipe: Recipe) -> None:
    """Raises RecipeError for trust where there is no warm-up."""
    for number, phase in enumerate(recipe.phases):
        if phase.trust and phase.warmup <= 0:
            raise RecipeError(f"phases.{number}.trust: it acts while the rate rises; give the phase a warmup above 0")
