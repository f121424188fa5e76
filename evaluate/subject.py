"""A model as methods and metrics see it, and running it over many pictures."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ..core.pictures import denormalise, fitted, normalise
from ..explain.self_explaining import main_output

__all__ = ["Subject", "outputs_of", "weights_digest"]


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model under evaluation.

    Attributes:
        name: `teacher` or `student`.
        model: in eval mode; normalised pictures (B, 3, H, W) to outputs (B, D).
        tokens: (model, pictures) -> patch features (B, C, rows, columns), as `convert.token_grid` gives them.
        mean, std: of the normalisation, per channel, on the [0, 1] scale.
        classifier: whether outputs are logits, of which the largest is a decision.
        output: what outputs are, as `OutputKind.kind` says; None is `classes` of a classifier, else `features`.
        batch_size: pictures a forward pass.
    """

    name: str
    model: nn.Module
    tokens: Callable[[nn.Module, Tensor], Tensor] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classifier: bool
    batch_size: int = 32
    output: str | None = None

    def colours(self, images: Tensor) -> Tensor:
        """Normalised pictures (..., 3, H, W) in [0, 1]."""
        return denormalise(images, self.mean, self.std)

    def normalised(self, colours: Tensor) -> Tensor:
        """Colours in [0, 1] as the model takes them."""
        return normalise(colours, self.mean, self.std)

    @property
    def device(self) -> torch.device:
        return next((tensor.device for tensor in self.model.parameters()), torch.device("cpu"))


@torch.no_grad()
def outputs_of(subject: Subject, batches: Iterable[Tensor]) -> Tensor:
    """(N, D) outputs on the CPU, of batches (B, 3, H, W) with the last one however small."""
    return torch.cat([main_output(subject.model(fitted(batch, subject.model))).float().cpu() for batch in batches])


def weights_digest(model: nn.Module) -> str:
    """sha256 of all weights and buffers, with their names: changes whenever the function can have changed."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
