"""What a Student and a Teacher have in common: they are called with pictures, explained, and told in one line."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...core.pictures import fitted
from .inputs import prepared

__all__ = ["Opened"]

BATCH = 32  # pictures a forward pass


class Opened:
    """A model with all that is needed to feed it. `model`, `source`, `preprocess` and `labels` are its records'."""

    model: nn.Module
    source: Any
    preprocess: Any
    labels: tuple[str, ...] | None

    def __call__(self, pictures: Any) -> Tensor:
        """(B, D) what the model says: logits, an embedding or a pooled feature.

        Args:
            pictures: files, folders, PIL pictures, arrays of colours, or a list of these, which go through the model's
                own preprocessing; or a normalised tensor (B, 3, H, W), which goes to the model as it is, with gradients
                (see `inputs`).

        Raises:
            TargetError, DataError: what is no picture, or cannot be read.
        """
        if isinstance(pictures, Tensor) and pictures.is_floating_point() and pictures.dim() == 4:
            return self.model(pictures)
        inputs = fitted(prepared(pictures, self.preprocess.transform()).inputs, self.model)
        with torch.no_grad():
            return torch.cat([self.model(part) for part in inputs.split(BATCH)])

    def explain(self, pictures: Any, target: Any = None, **options: Any) -> Any:
        """What `bcosify.explain(self, pictures, target, ...)` gives; all its options are taken."""
        import bcosify  # its front door: this folder does not know how models are explained

        return bcosify.explain(self, pictures, target, **options)

    def __repr__(self) -> str:
        size = "x".join(map(str, self.preprocess.size))
        named = f", {len(self.labels):,} named classes" if self.labels else ""
        return f"{type(self).__name__}({self.source.reference}{self._how()}, pictures {size}{named})"

    def __getattr__(self, name: str) -> Any:
        model = self.__dict__.get("model")
        hint = f" Its module has: .model.{name}" if hasattr(model, name) and not name.startswith("__") else ""
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}.{hint}", name=name, obj=self)

    def _how(self) -> str:
        return ""
