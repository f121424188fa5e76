"""A text tower in a student's folder, opened when the first text is embedded."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from ...core.errors import CheckpointError
from ...core.files import check_file, file_digest, read_json
from ..limits import check_inside, read_header, within
from .base import LIBRARIES
from .text import RECORD, WEIGHTS, TextTower

__all__ = ["SavedText"]


@dataclasses.dataclass(frozen=True, eq=False)
class SavedText:
    """A text tower in a student's folder.

    Attributes:
        folder: where it lies.
        files: name -> sha256 of every file, as recorded. Nothing else may lie there.
        check: compare the digests when it is opened.
    """

    folder: Path
    files: Mapping[str, str]
    check: bool = True

    @property
    def logit_scale(self) -> float:
        return self._facts["logit_scale"]

    @property
    def logit_bias(self) -> float | None:
        return self._facts["logit_bias"]

    def embed(self, texts: Sequence[str]) -> Tensor:
        return self.tower.embed(texts)

    def save(self, folder: Path) -> None:
        self._check()
        for name in self.files:
            shutil.copyfile(self.folder / name, folder / name)

    @functools.cached_property
    def _facts(self) -> dict[str, Any]:
        self._check_listed()
        facts = read_json(self.folder / RECORD)
        kinds = {"library": str, "logit_scale": float | int, "logit_bias": float | int | None, "record": dict}
        if not isinstance(facts, dict) or not all(isinstance(facts.get(key), kind) for key, kind in kinds.items()):
            raise CheckpointError(f"{self.folder / RECORD} does not say what text tower this is.")
        return facts

    @functools.cached_property
    def tower(self) -> TextTower:
        """The tower in memory; raises CheckpointError where its files are not what was saved."""
        self._check()
        library = LIBRARIES.get(self._facts["library"])
        if library is None or library.open_text is None:
            name = self._facts["library"]
            raise CheckpointError(f"{self.folder}: this version has no text towers of {name!r}. Update bcosify.")
        with within(read_header(self.folder / WEIGHTS)):
            tower = library.open_text(self.folder, self._facts)
        state, wanted = load_file(self.folder / WEIGHTS), tower.model.state_dict()
        tied = {name for name, tensor in wanted.items() if name not in state and _is_tied(tensor, wanted, state)}
        if set(state) != set(wanted) - tied:
            odd = sorted(set(state) ^ (set(wanted) - tied))
            raise CheckpointError(f"{self.folder / WEIGHTS} does not fit the text tower: {', '.join(odd[:5])}.")
        tower.model.load_state_dict({**{name: wanted[name] for name in tied}, **state})
        return tower

    def _check_listed(self) -> None:
        """Libraries open whatever they find in the folder, so only what is recorded may be found."""
        check_inside(self.folder.parent, [self.folder.name])
        check_inside(self.folder.parent, self.files, below=self.folder.name)
        others = sorted(path.name for path in self.folder.iterdir() if path.name not in self.files)
        if others := [name for name in others if not name.startswith(".")]:
            raise CheckpointError(
                f"{self.folder} holds {', '.join(others[:5])}, which the student's record does not list. Nothing of it "
                "is opened; move what is not listed away."
            )

    def _check(self) -> None:
        self._check_listed()
        for name, digest in self.files.items():
            check_file(self.folder / name)
            if self.check and file_digest(self.folder / name) != digest:
                raise CheckpointError(f"{self.folder / name} was changed after it was written: its sha256 differs.")


def _is_tied(tensor: Tensor, wanted: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> bool:
    return any(tensor.data_ptr() == wanted[name].data_ptr() for name in state if name in wanted)
