"""From a block's activations: Grad-CAM (captum's has no token grids)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...convert.taps import find_blocks
from ...core.errors import NotApplicable
from ...core.hooks import hooked
from ...explain.self_explaining import main_output
from ..decisions import Decisions, side_by_side
from ..subject import Subject
from .registry import method
from .shared import enlarged, patch_grid, patches_of


@method("grad-cam", 2, "Selvaraju et al. 2017, arXiv 1610.02391", in_score_units=False, several=True)
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
        scores = side_by_side(decisions, len(images)).scores(main_output(subject.model(images.requires_grad_())))
        (features,) = kept
        columns = scores.sum(0)
        gradients = [torch.autograd.grad(column, features, retain_graph=True)[0] for column in columns]
    cams = [_cam(subject, images, blocks[-1], features.detach(), gradient) for gradient in gradients]
    return torch.stack(cams, 1).flatten(0, 1)


def _cam(subject: Subject, images: Tensor, block: str, features: Tensor, gradient: Tensor) -> Tensor:
    """(B, H, W) from a block's features, maps or tokens, and their gradient."""
    if features.dim() == 3:
        rows, columns = patch_grid(subject, images)
        features, gradient = (patches_of(tokens, rows, columns) for tokens in (features, gradient))
    elif features.dim() == 4 and features.shape[1] == features.shape[2] != features.shape[3]:
        features, gradient = (maps.movedim(-1, 1) for maps in (features, gradient))
    elif features.dim() != 4:
        raise NotApplicable(f"the last block, {block}, gives no map and no tokens")
    cam = (features * gradient.mean((2, 3), keepdim=True)).sum(1, keepdim=True).relu()
    return enlarged(cam, images)
