"""From a block's activations: Grad-CAM (captum's has no token grids)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...convert.taps import find_blocks
from ...core.errors import NotApplicable
from ...core.hooks import hooked
from ...explain.self_explaining import main_output
from ..decisions import Decisions
from ..subject import Subject
from .registry import method
from .shared import enlarged, patch_grid, patches_of


@method("grad-cam", 2, "Selvaraju et al. 2017, arXiv 1610.02391", in_score_units=False)
def _grad_cam(subject: Subject, images: Tensor, decisions: Decisions, seed: int) -> Tensor:
    """On the last block's maps, or, for tokens, on what goes into the last block: of what comes out of it, only the
    class token counts in many models."""
    blocks = find_blocks(subject.model)
    last = subject.model.get_submodule(blocks[-1])
    kept: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        kept[:] = [args[0] if args[0].dim() == 3 else output]

    with hooked([(last, keep)]), torch.enable_grad():
        # The picture asks for a gradient, so that activations have one in frozen models too.
        score = decisions.scores(main_output(subject.model(images.requires_grad_())))
        (features,) = kept
        (gradient,) = torch.autograd.grad(score.sum(), features)
    if features.dim() == 3:
        rows, columns = patch_grid(subject, images)
        features, gradient = (patches_of(tokens, rows, columns) for tokens in (features, gradient))
    elif features.dim() == 4 and features.shape[1] == features.shape[2] != features.shape[3]:
        features, gradient = (maps.movedim(-1, 1) for maps in (features, gradient))
    elif features.dim() != 4:
        raise NotApplicable(f"the last block, {blocks[-1]}, gives no map and no tokens")
    cam = (features * gradient.mean((2, 3), keepdim=True)).sum(1, keepdim=True).relu()
    return enlarged(cam, images)
