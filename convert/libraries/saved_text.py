"""A text tower in a student's folder, opened when the first text is embedded."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from ...core.errors import CheckpointError
from ...core.files import file_digest
from ..limits import read_header, within
from .base import LIBRARIES
from .text import RECORD, WEIGHTS, TextTower

__all__ = ["SavedText"]


@dataclasses.dataclass(frozen=True, eq=False)
class SavedText:
    """A text tower in a student's folder.

    Attributes:
        folder: where it lies.
        files: name -> sha256 of every file, as recorded; checked when it is opened. None skips the check.
    """

    folder: Path
    files: Mapping[str, str] | None

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
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)

    @functools.cached_property
    def _facts(self) -> dict[str, Any]:
        try:
            return json.loads((self.folder / RECORD).read_text())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.folder / RECORD} cannot be read: {error}") from error

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

    def _check(self) -> None:
        for name, digest in (self.files or {}).items():
            if not (self.folder / name).is_file():
                raise CheckpointError(f"{self.folder / name} is missing.")
            if file_digest(self.folder / name) != digest:
                raise CheckpointError(f"{self.folder / name} was changed after it was written: its sha256 differs.")


def _is_tied(tensor: Tensor, wanted: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> bool:
    return any(tensor.data_ptr() == wanted[name].data_ptr() for name in state if name in wanted)
