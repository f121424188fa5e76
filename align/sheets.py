"""Explanations of the same few held-out pictures while the student learns: W(x) is seen to become object-shaped.

A classifier is explained in the class that its teacher gives the picture, a regression in its value, an embedding along
the teacher's own feature, centred on the held-out pictures (its mean says nothing of one picture). The score is thus
the same from the first sheet to the last. A sheet has a row for each picture: the picture, its signed contributions,
W(x) in its own colours, and the ledger of the score. Nothing of it reaches the training: no gradient, mode, random
state or statistic is left.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ..convert.libraries import FEATURES
from ..convert.output import OutputKind
from ..convert.taps import first_tensor
from ..core.errors import BcosifyError
from ..core.files import new_file
from ..data.loader import held_out_batches
from ..explain import ClassTarget, DirectionTarget, Target, explain_scores, panel
from .pictures import Pictures

__all__ = ["EXPLANATIONS", "ExplainedPictures", "explained_pictures"]

EXPLANATIONS = "explanations"  # folder inside a run's
CENTRED_ON = 64  # pictures that an embedding's mean is taken over
TILE = 224  # side of a tile of a sheet, in pixels


@dataclass(frozen=True, eq=False)
class ExplainedPictures:
    """P pictures and what is explained of them.

    Attributes:
        shown: (P, 3, S, S) uint8. pictures: the same, as the model takes them.
        target: one score a picture. captions: its name, one a picture.
    """

    shown: Tensor
    pictures: Tensor
    target: Target
    captions: tuple[str, ...]

    def write(self, model: nn.Module, out: Path) -> Image.Image | None:
        """Writes the sheet of `model` as it is now to `out`; where that fails it warns, and the run goes on."""
        try:
            sheet = self.sheet(model)
            with new_file(out) as scratch:
                sheet.save(scratch, format="PNG")
            return sheet
        except (BcosifyError, torch.OutOfMemoryError) as error:
            warnings.warn(f"no explanations in {out}, the run goes on: {error}", stacklevel=2)
            return None

    def sheet(self, model: nn.Module) -> Image.Image:
        """The explanations by `model`, a row for each picture. Raises LedgerError where one does not add up."""
        explanation = explain_scores(model, self.pictures, self.target, batch_size=1)
        rows = [
            panel(_picture(self.shown[i]), explanation, caption, picture=i, size=TILE)
            for i, caption in enumerate(self.captions)
        ]
        sheet = Image.new("RGB", (rows[0].width, sum(row.height for row in rows)), "white")
        for i, row in enumerate(rows):
            sheet.paste(row, (0, i * row.height))
        return sheet


@torch.no_grad()
def explained_pictures(teacher: nn.Module, pictures: Pictures, output: OutputKind) -> ExplainedPictures:
    """The first `Recipe.probe_pictures` held-out pictures, and what `teacher` says of them.

    Args:
        output: what the teacher's output is.
    """
    count, normalised = pictures.recipe.probe_pictures, pictures.normalised
    batches = held_out_batches(pictures.val, size=pictures.recipe.image_size, limit=max(count, CENTRED_ON))
    shown = torch.cat([batch.pictures for batch in batches])
    outputs = torch.cat([first_tensor(teacher(normalised(part))) for part in shown.split(CENTRED_ON)]).float()
    shown, first = shown[:count], outputs[:count]
    if output.kind == FEATURES:
        directions = F.normalize(first - outputs.mean(0), dim=-1)[:, None]
        return ExplainedPictures(
            shown, normalised(shown), DirectionTarget(directions), ("the teacher's feature",) * len(shown)
        )
    # Of several values of a regression the first is shown.
    classes = first.argmax(1) if output.chooses else first.new_zeros(len(first), dtype=torch.long)
    return ExplainedPictures(
        shown, normalised(shown), ClassTarget(classes[:, None]), tuple(map(output.name, classes.tolist()))
    )


def _picture(pixels: Tensor) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))
