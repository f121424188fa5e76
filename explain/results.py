"""What `explain` gives for a picture file: a ledger for each score, and three files of each picture."""

from __future__ import annotations

import contextlib
import dataclasses
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from ..core.errors import DataError
from ..core.files import json_text, read_json
from .attribution import Explanation
from .lettering import stacked
from .render import panel
from .standing import standing_in_words

__all__ = ["ScoreLedger", "as_disks_see_it", "panels", "stem", "write_picture", "written"]

LONGEST = 200  # bytes of a file name that a result keeps: with an ending and a number, 255 are possible

# What NAME.npz holds, where the explanation has it.
RECORDED = {"image", "target", "label", "score", "input", "constants", "residual"}  # of every ledger in NAME.json
ITSELF = "the feature along itself"  # what `self` is called where there is room
STORED = ("contributions", "direct", "encoded_inputs", "encoded_gradients")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreLedger:
    """One score of one picture, and what adds up to it.

    Attributes:
        image: the file.
        target: class number, or the name of what else is scored; `label`: in words.
        probability: of a classifier's class by its own logits; of a text among those that were asked for.
        rank, among: 1 for the most probable, and of how many.
        decision: target, label and probability of the most probable class.
        patch: row and column of the patch that is explained, and of how many rows and columns.
        zero_shot: all labels, best first, in the first row of a picture.
        prototypes: of this class: the training pictures that its prototypes lie nearest to.
        score: input + constants + residual.
        input: the sum of what all pixels add.
        direct, carried, carriers: parts of `input` where biases are carried (see `Explanation`).
        constants: name -> what it adds.
        residual: float rounding.
        views: over which views of the picture all of this is the mean (see `Views`); NAME.npz holds these.
    """

    image: str
    target: int | str
    label: str
    probability: float | None = None
    rank: int | None = None
    among: int | None = None
    decision: dict[str, Any] | None = None
    patch: list[int] | None = None
    zero_shot: list[dict[str, Any]] | None = None
    prototypes: list[dict[str, Any]] | None = None
    score: float
    input: float
    direct: float | None = None
    carried: float | None = None
    carriers: dict[str, float] | None = None
    constants: dict[str, float]
    residual: float
    views: dict[str, Any] | None = None

    def __str__(self) -> str:
        parts = (
            {"input": self.input} if self.direct is None else {"direct": self.direct, "carried": self.carried or 0.0}
        )
        parts["constants"] = sum(self.constants.values())
        return f"{self.label}: {self.score:.4g} = " + " + ".join(f"{part:.4g} {name}" for name, part in parts.items())

    def row(self) -> dict[str, Any]:
        """As NAME.json has it: without what does not apply."""
        values = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        return {name: value for name, value in values if value is not None}


def write_picture(
    folder: Path,
    name: str,
    seen: Image.Image,
    explanation: Explanation,
    picture: int,
    ledgers: Sequence[ScoreLedger],
    more: Mapping[str, Tensor] | None = None,
    draw: Callable[..., Image.Image] = panel,
) -> None:
    """Writes NAME.png (a panel for each score), NAME.npz (raw maps) and NAME.json (the ledgers) into `folder`.

    Args:
        seen: the picture as the model saw it.
        explanation: of a batch; `picture` is the place in it.
        more: other maps of the batch, name -> (B, ...).
        draw: `panel`, with what is the same for all pictures.
    """
    panels(seen, explanation, picture, ledgers, draw).save(folder / f"{name}.png")
    maps = {key: getattr(explanation, key) for key in STORED} | dict(more or {})
    arrays: dict[str, Any] = {key: value[picture].numpy() for key, value in maps.items() if value is not None}
    np.savez_compressed(folder / f"{name}.npz", **arrays)
    (folder / f"{name}.json").write_text(json_text([one.row() for one in ledgers], indent=2))


def panels(
    seen: Image.Image,
    explanation: Explanation,
    picture: int,
    ledgers: Sequence[ScoreLedger],
    draw: Callable[..., Image.Image] = panel,
) -> Image.Image:
    """The panels of all scores of one picture, one below the other; `draw` as of `write_picture`."""
    several = [
        draw(
            seen,
            explanation,
            one.label if one.target != "self" else one.label.replace("self", ITSELF),
            picture=picture,
            score=k,
            standing=standing_in_words(one.row()),
            patch=one.patch,
        )
        for k, one in enumerate(ledgers)
    ]
    return stacked(several)


def written(folder: Path) -> set[str] | None:
    """The names in `folder` that `write_picture` wrote: three files of one name each, with ledgers in one of them."""
    names: set[str] = set()
    for path in folder.glob("*.json"):
        with contextlib.suppress(DataError):
            rows = read_json(path, DataError)
            if isinstance(rows, list) and rows and all(isinstance(row, dict) and set(row) >= RECORDED for row in rows):
                names |= {path.name, f"{path.stem}.png", f"{path.stem}.npz"}
    return names or None


def stem(file: Path) -> str:
    """What results of `file` are called, without ending."""
    return file.stem.encode("utf-8", "surrogateescape")[:LONGEST].decode("utf-8", "ignore") or "picture"


def as_disks_see_it(name: str) -> str:
    """Those of Macs and Windows take `A` and `a` for one name, and some take two spellings of a letter for one."""
    return unicodedata.normalize("NFC", name).casefold()
