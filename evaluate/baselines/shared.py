"""What several families need: scores as captum asks for them, its methods, grids of patches, seeds."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.errors import NotApplicable
from ...explain.self_explaining import main_output
from ..decisions import Decisions
from ..subject import Subject


def scores_of(subject: Subject, decisions: Decisions) -> Callable[[Tensor, Tensor], Tensor]:
    """(images (M, 3, H, W), rows (M,)) -> scores (M,): captum repeats the rows as it repeats the pictures."""
    return lambda images, rows: decisions.rows(rows).scores(main_output(subject.model(images)))


def captum_method(name: str) -> Any:
    try:
        import captum.attr
    except ImportError as error:
        raise NotApplicable("captum is not installed; run: pip install 'bcosify[evaluate]'") from error
    return getattr(captum.attr, name)


def rows_of(images: Tensor) -> Tensor:
    return torch.arange(len(images), device=images.device)


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """captum draws from torch's global generator; it is put back afterwards."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def patch_grid(subject: Subject, images: Tensor) -> tuple[int, int]:
    """Rows and columns of patches."""
    if subject.tokens is None:
        raise NotApplicable("this model's grid of patches is not known")
    with torch.no_grad():
        rows, columns = subject.tokens(subject.model, images[:1]).shape[-2:]
    return rows, columns


def patches_of(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """(B, C, rows, columns) of tokens (B, N, C): the last ones, after class token and registers."""
    if tokens.shape[1] < rows * columns:
        raise NotApplicable(f"the last block has {tokens.shape[1]} tokens, not {rows} x {columns} patches")
    return tokens[:, -rows * columns :].transpose(1, 2).unflatten(2, (rows, columns))


def enlarged(maps: Tensor, images: Tensor) -> Tensor:
    """(B, H, W) of maps (B, 1, rows, columns)."""
    return F.interpolate(maps, images.shape[-2:], mode="bilinear")[:, 0]
