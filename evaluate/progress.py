"""What an evaluation will do and about how long, and how far it is: one bar on a terminal, else a line a step."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tqdm.auto import tqdm

from .baselines import Method, find_method
from .metrics.max_sensitivity import DRAWS
from .metrics.perturbation import FRACTIONS
from .metrics.single_deletion import SIDE
from .task import OURS, Settings

__all__ = ["Progress", "announced", "in_words", "passes_of"]

DISTINCT = 2 * len(FRACTIONS)  # pictures that two removal curves need
SINGLE = SIDE**2 + 1  # of a picture, for single deletion
LEDGER = 4  # of a picture: its ledger is drawn up apart from its map
DECISIONS = 3  # that a cheap method explains of each picture: the teacher's, another one's, and the runner-up's


class Progress:
    """How many of the named steps are done. On a terminal one bar, elsewhere a line for each that ends; on stderr."""

    def __init__(self, show: bool) -> None:
        self.show = show
        self.bar: Any = None
        self.total = self.count = 0

    def start(self, steps: int, done: int, about: str) -> None:
        """Says what will be done, of so many steps of which some are `done`."""
        self.total, self.count = steps, done
        if self.show:
            print(about, file=sys.stderr, flush=True)
            if sys.stderr.isatty():
                form = "{n_fmt}/{total_fmt} |{bar:20}| {elapsed} {desc}"
                self.bar = tqdm(total=steps, initial=done, bar_format=form, leave=False)

    def begin(self, name: str) -> None:
        if self.bar is not None:
            self.bar.set_description_str(name)

    def end(self, name: str, seconds: float) -> None:
        self.count += 1
        if self.bar is not None:
            self.bar.update()
        elif self.show:
            print(f"{self.count}/{self.total} {name}: {seconds:.1f} s", file=sys.stderr, flush=True)

    def within(self, items: Iterable[Any], total: int, name: str) -> Iterator[Any]:
        """`items` of a long step, which the bar counts behind its name."""
        for number, item in enumerate(items, 1):
            self.begin(f"{name}, {number} of {total}")
            yield item

    def stop(self) -> None:
        if self.bar is not None:
            self.bar.close()


def passes_of(settings: Settings, compared: Mapping[str, int], explained: int) -> dict[str, float]:
    """Model -> about how many forward passes of one picture its measurements take.

    `explained` pictures are explained. `compared`: model -> of how many pictures its features are to be made.
    """
    few, fewer = min(explained, settings.subset_pictures), min(explained, settings.cascade_pictures)
    subsets = len(settings.shares) * settings.subsets + 1
    passes = {model: float(count) for model, count in compared.items()}
    for model in passes:
        passes[model] += few * (subsets + SINGLE) + LEDGER * explained
    for model, name in settings.pairs:
        method = find_method(name)
        passes[model] += explained * (method.forwards(DECISIONS if method.cheap else 1) + 1)
        passes[model] += explained * DISTINCT * len(settings.removals)
        if method.cheap:
            passes[model] += fewer * method.forwards() * (settings.cascade_steps + DRAWS)
            passes[model] += few / 2 * method.forwards(2)  # two objects
        passes[model] += _of_grids(settings, method)
    if settings.controls and "student" in passes:  # three models that know less
        passes["student"] += 3 * explained * find_method(OURS).forwards(2)
    return passes


def _of_grids(settings: Settings, method: Method) -> float:
    """Passes of one picture that GridPG takes: each grid, or each window of it, is explained for all its cells."""
    found = 0.0
    for protocol, side in settings.protocols:
        cells, windows = side**2, (2 * side - 1) ** 2
        seen = cells if protocol == "native" else windows  # pictures that a grid is as large as, or windows
        each = method.passes * seen / (cells if method.shared else 1)
        if each <= settings.most_passes and (method.cheap or not method.control):
            found += max(1, settings.grids * 4 // cells) * seen * method.forwards(cells)
    return found


def in_words(seconds: float) -> str:
    """About how long: `about 40 seconds`, `about 3 minutes`, `about 2 hours`."""
    for unit, length in (("hour", 3600), ("minute", 60)):
        if seconds >= 1.5 * length:
            return f"about {round(seconds / length)} {unit}s"
    tens = max(10, 10 * round(seconds / 10))
    return f"about {tens} seconds"


def announced(
    settings: Settings,
    seconds: Mapping[str, float],
    compared: Mapping[str, int],
    steps: int,
    done: int,
    explained: int,
    fidelity: int,
) -> str:
    """One line: what will be done, and about how long. `seconds` are those of one picture's pass, for each model."""
    passes = passes_of(settings, compared, explained)
    took = sum(passes[model] * seconds[model] for model in seconds) * (1 - done / max(1, steps))
    kept = f", of which {done} are done" if done else ""
    methods = ", ".join(f"{model}'s {method}" for model, method in settings.pairs)
    return (
        f"Evaluation in {steps} steps{kept}: fidelity on {fidelity:,} pictures, maps of {explained:,} ({methods}). "
        f"It takes {in_words(took)}."
    )
