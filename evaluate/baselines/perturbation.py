"""From what the score does when parts of the picture are taken away: captum's, and RISE (captum has none)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.errors import NotApplicable
from ...explain.self_explaining import main_output
from ..decisions import Decisions
from ..subject import Subject
from .registry import method
from .shared import captum_method, rows_of, scores_of, seeded


def _shared_forward(subject: Subject, decisions: Decisions) -> Callable[[Tensor, Tensor], Tensor]:
    """`scores_of` without gradients: pictures that are equal to the one before them, as in GridPG, share its pass."""

    def scores(images: Tensor, rows: Tensor) -> Tensor:
        new = torch.ones(len(images), dtype=torch.bool, device=images.device)
        new[1:] = (images[1:] != images[:-1]).flatten(1).any(1)
        outputs = main_output(subject.model(images[new]))
        return decisions.rows(rows).scores(outputs[new.cumsum(0) - 1])

    return scores


@method("occlusion", 50, "Zeiler and Fergus 2014, arXiv 1311.2901; 7 x 7 squares of grey", shared=True, backward=False)
@torch.no_grad()
def _occlusion(subject: Subject, images: Tensor, decisions: Decisions, seed: int) -> Tensor:
    side = -(-min(images.shape[-2:]) // 7)
    maps = captum_method("Occlusion")(_shared_forward(subject, decisions)).attribute(
        images,
        sliding_window_shapes=(3, side, side),
        strides=(3, side, side),
        baselines=subject.normalised(torch.full_like(images[:1], 0.5)),
        additional_forward_args=(rows_of(images),),
        perturbations_per_eval=max(1, subject.batch_size // len(images)),
    )
    # captum gives every pixel of a square, in every channel, the whole square's drop.
    return maps[:, 0] / side**2


@method("lime", 201, "Ribeiro et al. 2016, arXiv 1602.04938; 7 x 7 squares, 200 samples, ridge", backward=False)
@torch.no_grad()
def _lime(subject: Subject, images: Tensor, decisions: Decisions, seed: int) -> Tensor:
    try:
        from captum._utils.models.linear_model import SkLearnRidge

        ridge = SkLearnRidge(alpha=1.0)
    except ImportError as error:
        raise NotApplicable("captum or scikit-learn is not installed; run: pip install 'bcosify[evaluate]'") from error
    height, width = images.shape[-2:]
    square = (torch.arange(height) * 7 // height)[:, None] * 7 + torch.arange(width) * 7 // width
    sizes = square.flatten().bincount()
    explainer = captum_method("Lime")(scores_of(subject, decisions), interpretable_model=ridge)
    maps = []
    for row in rows_of(images).split(1):
        with seeded(seed, images.device):
            found = explainer.attribute(
                images[row],
                baselines=subject.normalised(torch.full_like(images[:1], 0.5)),
                feature_mask=square.to(images.device).expand(1, 3, -1, -1),
                additional_forward_args=(row,),
                n_samples=200,
                perturbations_per_eval=subject.batch_size,
            )
        maps.append(found[:, 0] / sizes[square].to(found))
    return torch.cat(maps)


@method(
    "rise",
    500,
    "Petsiuk et al. 2018, arXiv 1806.07421; 500 masks of 8 x 8, half kept",
    in_score_units=False,
    backward=False,
)
@torch.no_grad()
def _rise(subject: Subject, images: Tensor, decisions: Decisions, seed: int) -> Tensor:
    """Mean of the masks weighted by the confidence under them, minus the plain mean: signed, 0 where none matters."""
    number, cells = 500, 8
    height, width = images.shape[-2:]
    generator = torch.Generator().manual_seed(seed)
    total = images.new_zeros(len(images), height, width)
    plain, weights = images.new_zeros(height, width), images.new_zeros(len(images))
    together = max(1, subject.batch_size // len(images))
    for start in range(0, number, together):
        masks = _rise_masks(min(together, number - start), cells, (height, width), generator).to(images)
        shown = (images[:, None] * masks[None, :, None]).flatten(0, 1)
        rows = rows_of(images).repeat_interleave(len(masks))
        outputs = main_output(subject.model(shown))
        confidence = decisions.rows(rows).confidence(outputs).view(len(images), len(masks))
        total += torch.einsum("bm,mhw->bhw", confidence, masks)
        plain += masks.sum(0)
        weights += confidence.sum(1)
    return (total - weights[:, None, None] * plain / number) / number


def _rise_masks(count: int, cells: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """(count, H, W) in [0, 1]: random grids, enlarged smoothly and shifted by up to a cell."""
    coarse = (torch.rand(count, 1, cells, cells, generator=generator) < 0.5).float()
    step = [-(-length // cells) for length in size]
    large = F.interpolate(coarse, [(cells + 1) * length for length in step], mode="bilinear")[:, 0]
    shifts = [torch.randint(length, (count,), generator=generator).tolist() for length in step]
    return torch.stack(
        [mask[top : top + size[0], left : left + size[1]] for mask, top, left in zip(large, *shifts, strict=True)]
    )
