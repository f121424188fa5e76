"""Explanations of the same few held-out pictures while the student learns: W(x) is seen to become object-shaped.

A classifier is explained in the class that its teacher gives the picture, a regression in its value, an embedding along
the teacher's own feature, centred on the held-out pictures (its mean says nothing of one picture). The score is thus
the same from the first sheet to the last. A sheet has a panel for each picture: the picture, its signed contributions,
also over the picture, W(x) in its own colours where it speaks for the score, and the ledger. Nothing of it reaches the
training: no gradient, mode, random state or statistic is left.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn

from ..convert.libraries import FEATURES
from ..convert.output import OutputKind
from ..convert.taps import first_tensor
from ..core.errors import BcosifyError
from ..core.files import new_file
from ..data.loader import held_out_batches
from ..explain import ClassTarget, DirectionTarget, Target, explain_scores, panel
from ..explain.lettering import stacked
from ..explain.standing import probabilities_of, standing, standing_in_words
from .pictures import Pictures

__all__ = ["EXPLANATIONS", "ExplainedPictures", "explained_pictures"]

EXPLANATIONS = "explanations"  # folder inside a run's
CENTRED_ON = 64  # pictures that an embedding's mean is taken over
TILE = 224  # side of a tile of a sheet, in pixels
HEIGHT = 504  # of a panel, and more only where a name takes many lines: sheets of a run are of one size


@dataclass(frozen=True, eq=False)
class ExplainedPictures:
    """P pictures and what is explained of them.

    Attributes:
        shown: (P, 3, S, S) uint8. pictures: the same, as the model takes them.
        target: one score a picture. captions: its name, one a picture. output: what the models' output is.
    """

    shown: Tensor
    pictures: Tensor
    target: Target
    captions: tuple[str, ...]
    output: OutputKind

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
        said = [""] * len(self.captions)
        shares = probabilities_of(explanation.outputs, self.output)
        if shares is not None and isinstance(self.target, ClassTarget):
            classes = self.target.classes(explanation.outputs)[:, 0].tolist()
            facts = [{"target": k, **standing(shares[i], k, self.output.name)} for i, k in enumerate(classes)]
            said = [standing_in_words(one) for one in facts]
        panels = [
            panel(_picture(seen), explanation, caption, picture=i, standing=said[i], own_colours=True, size=TILE)
            for i, (seen, caption) in enumerate(zip(self.shown, self.captions, strict=True))
        ]
        return stacked([ImageOps.expand(one, (0, 0, 0, max(0, HEIGHT - one.height)), "white") for one in panels])


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
        captions = ("the teacher's feature",) * len(shown)
        return ExplainedPictures(shown, normalised(shown), DirectionTarget(directions), captions, output)
    # Of several values of a regression the first is shown.
    classes = first.argmax(1) if output.chooses else first.new_zeros(len(first), dtype=torch.long)
    captions = tuple(map(output.name, classes.tolist()))
    return ExplainedPictures(shown, normalised(shown), ClassTarget(classes[:, None]), captions, output)


def _picture(pixels: Tensor) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))
