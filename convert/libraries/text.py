"""The text half of a dual encoder (CLIP, SigLIP): kept as it is, beside the student, so that zero-shot goes on working.

    text/model.safetensors    its weights, unchanged, with the library's own keys
    text/text.json            library, what builds it, logit scale and bias
    text/...                  its configuration and tokenizer in the library's own files

A saved tower (see `saved_text`) is opened when the first text is embedded, not before.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ...core.errors import SourceError, first_line
from ...core.tensors import untied_state

__all__ = ["RECORD", "WEIGHTS", "Text", "TextTower", "embed_texts", "probabilities"]

WEIGHTS, RECORD = "model.safetensors", "text.json"


class Text(Protocol):
    """What embeds texts, in memory or in a folder."""

    @property
    def logit_scale(self) -> float:
        """What cosines are multiplied with before softmax or sigmoid."""
        ...

    @property
    def logit_bias(self) -> float | None:
        """What is added then: SigLIP's, whose probabilities are sigmoids. None for CLIP's softmax."""
        ...

    def embed(self, texts: Sequence[str]) -> Tensor:
        """(T, D), not normalised. Raises SourceError where the tokenizer cannot be had."""
        ...

    def save(self, folder: Path) -> None:
        """Writes all that opens it again into `folder`, which exists."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class TextTower:
    """A text tower in memory.

    Attributes:
        library: who built it, key of `base.LIBRARIES`.
        model: the text half, in eval mode.
        record: what builds it again, JSON values only.
        encode: (model, tokens) -> (T, D).
        tokenizer: opens the tokenizer, texts -> tokens; raises where its files cannot be had.
        write: writes configuration and tokenizer into a folder, as the library does.
    """

    library: str
    model: nn.Module
    record: dict[str, Any]
    logit_scale: float
    logit_bias: float | None
    encode: Callable[[nn.Module, Any], Tensor]
    tokenizer: Callable[[], Callable[[Sequence[str]], Any]]
    write: Callable[[Path], None]

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Tensor:
        return self.encode(self.model, self._tokenizer(list(texts))).float()

    @functools.cached_property
    def _tokenizer(self) -> Callable[[Sequence[str]], Any]:
        try:
            return self.tokenizer()
        except Exception as error:  # libraries raise anything here, from ImportError to TypeError
            raise SourceError(
                f"the tokenizer of this {self.library} text tower cannot be had ({first_line(error)}). Convert the "
                "model again where its tokenizer files can be reached: they are then kept in the student's folder."
            ) from error

    def save(self, folder: Path) -> None:
        save_file(untied_state(self.model), folder / WEIGHTS, metadata={"format": "pt"})
        self.write(folder)
        record = {"library": self.library, "logit_scale": self.logit_scale, "logit_bias": self.logit_bias}
        (folder / RECORD).write_text(json.dumps({**record, "record": self.record}, indent=2))


def embed_texts(text: Text, texts: Sequence[str], templates: Sequence[str] = ("{}",), batch_size: int = 64) -> Tensor:
    """(T, D) unit vectors: each text's mean over its templates of unit embeddings (CLIP's prompt ensembling).

    Args:
        templates: texts with one `{}` for the text.
    """
    prompts = [template.replace("{}", one) for one in texts for template in templates]
    parts = [text.embed(prompts[start : start + batch_size]) for start in range(0, len(prompts), batch_size)]
    units = nn.functional.normalize(torch.cat(parts), dim=-1)
    return nn.functional.normalize(units.unflatten(0, (len(texts), len(templates))).mean(1), dim=-1)


def probabilities(text: Text, cosines: Tensor) -> Tensor:
    """What the pair was trained to say of cosines (..., T): softmax over the texts, or with a bias a sigmoid each."""
    logits = text.logit_scale * cosines
    return logits.softmax(-1) if text.logit_bias is None else (logits + text.logit_bias).sigmoid()
