"""What an evaluation is of: settings, pictures, and what metrics are given of both models."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

from ..core.errors import DataError, NotApplicable
from ..data.labelled import Pictures
from .baselines import CONTROLS, find_method
from .decisions import Decisions
from .fills import FILLS
from .subject import Subject

__all__ = ["OURS", "Compared", "Explained", "Settings"]

OURS = "explanation"
FEW = 4  # pictures, that no figure is of fewer than, where there are as many
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured and how finely. The same settings, weights and pictures give the same numbers on one machine.

    Attributes:
        methods: (model, method) pairs; `explanation` of both models comes first in any case.
        unit: pixels of a square that is taken away; None: an eighth of the side.
        removals: (unit, fill) of every pair of curves; None for `unit`.
        grids: how many 2 x 2 grids GridPG gets; of 3 x 3, as many cells.
        most_passes: a method has no part in a GridPG protocol where a cell would take it more passes of one picture's
            size than this.
        confident: the teacher's least probability for a picture to be in a grid.
        controls: also measure what there is nothing to find in: see `metrics.controls`, and `CONTROLS` of `baselines`.
        cascade_pictures, cascade_steps: of the randomisation check; max-sensitivity is of as many pictures.
        shares, subsets: sizes and number of the random subsets.
        subset_pictures: of sensitivity-n and infidelity, which need shares x subsets passes of each, of single deletion
            and of two objects: the first so many.
    """

    methods: tuple[tuple[str, str], ...] = ()
    unit: int | None = None
    removals: tuple[tuple[int | None, str], ...] = ((None, "grey"),)
    protocols: tuple[tuple[str, int], ...] = (("native", 2), ("native", 3), ("windowed", 2))
    grids: int = 16
    most_passes: int = 128
    confident: float = 0.5
    shares: tuple[float, ...] = (0.1, 0.3, 0.5)
    subsets: int = 8
    subset_pictures: int = 32
    cascade_pictures: int = 16
    cascade_steps: int = 3
    controls: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for _, method in self.methods:
            find_method(method)
        for _, fill in self.removals:
            if fill not in FILLS:
                raise DataError(f"no fill is called {fill!r}. There are: {', '.join(FILLS)}.")

    def sized(self, pictures: int, grids: int | None = None) -> Settings:
        """Sized for so many explained pictures: figures that explain or change each picture often are of a part of
        them, and no grid repeats pictures, unless so many `grids` are asked for. Of 128 pictures or more, as it is."""
        return dataclasses.replace(
            self,
            grids=min(self.grids, max(1, pictures // 4)) if grids is None else grids,
            subset_pictures=min(self.subset_pictures, max(FEW, pictures // 4)),
            cascade_pictures=min(self.cascade_pictures, max(FEW, pictures // 8)),
        )

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        controls = [("teacher", name) for name in CONTROLS] if self.controls else []
        return tuple(dict.fromkeys([("teacher", OURS), ("student", OURS), *self.methods, *controls]))


@dataclasses.dataclass(frozen=True, eq=False)
class Compared:
    """Both models' features of the same pictures: subject's name -> depth -> (N, C), as `features_of` gives them.

    Attributes:
        texts: (K, D) embeddings of the label names, for zero-shot accuracy.
    """

    pictures: Pictures
    subjects: dict[str, Subject]
    features: dict[str, dict[str, Tensor]]
    texts: Tensor | None
    seed: int


@dataclasses.dataclass(frozen=True, eq=False)
class Explained:
    """The pictures, both models' outputs (N, D), the decisions, and maps (N, H, W) of every pair that applies.

    Attributes:
        maps: of the decisions. other_maps: of other decisions, of the pairs that have them: (model, method, kind of
            `contrast.OTHERS`) -> maps.
        controls: name -> makes a model that knows less than the student.
        subjects: by name. unit: pixels of a square that is taken away. shared: see `once`.
    """

    pictures: Pictures
    outputs: dict[str, Tensor]
    decisions: Decisions
    subjects: dict[str, Subject]
    maps: dict[tuple[str, str], Tensor]
    unit: int
    settings: Settings
    other_maps: dict[tuple[str, str, str], Tensor] = dataclasses.field(default_factory=dict)
    controls: dict[str, Callable[[], Subject]] = dataclasses.field(default_factory=dict)
    shared: dict[Any, Any] = dataclasses.field(default_factory=dict)

    def confidence(self, model: str) -> Tensor:
        """(N,) on the whole pictures."""
        return self.decisions.confidence(self.outputs[model])

    @property
    def masks(self) -> Tensor:
        """(N, H, W) of the pictures; raises NotApplicable where they have none."""
        if self.pictures.masks is None:
            raise NotApplicable("the pictures have no masks; pass --masks SHARDS")
        return self.pictures.masks

    def once(self, name: object, make: Callable[[], T]) -> T:
        """What `make` gives, made once for all metrics that ask for it by this name."""
        if name not in self.shared:
            self.shared[name] = make()
        return self.shared[name]
