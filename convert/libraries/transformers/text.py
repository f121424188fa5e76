"""The text half of a dual encoder of transformers, and its tokenizer."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ....core.files import read_json
from ..text import TextTower
from .errors import FAILURES, quiet, translate_errors
from .files import checked_config
from .towers import class_named

__all__ = ["open_text", "text_tower"]

VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model")
TOKENS = ["input_ids", "attention_mask"]


def text_tower(folder: Path, model: Any, config: Any) -> TextTower:
    """The text half of `model`, which loses its image half."""
    for name in ("vision_model", "visual_projection"):
        if hasattr(model, name):
            delattr(model, name)
    scale = float(model.logit_scale.detach().exp()) if hasattr(model, "logit_scale") else 1.0
    bias = float(model.logit_bias.detach()) if hasattr(model, "logit_bias") else None

    def tokenizer() -> Callable[[Sequence[str]], Any]:
        return _tokenizer(_open_tokenizer(folder), config)

    def write(out: Path) -> None:
        config.save_pretrained(out)
        # A student is worth having without its tokenizer too: `embed` then says what is missing.
        with contextlib.suppress(*FAILURES, ImportError):
            _open_tokenizer(folder).save_pretrained(out)

    record = {"class": type(model).__name__}
    return TextTower("transformers", model.eval(), record, scale, bias, _encode, tokenizer, write)


def open_text(folder: Path, facts: Mapping[str, Any]) -> TextTower:
    """The text tower in `folder`, with random weights, as `save` described it."""
    with translate_errors(str(folder)), quiet():
        values = read_json(folder / "config.json")
        # The image half is built only to be thrown away.
        values["vision_config"] = {**values["vision_config"], "num_hidden_layers": 0}
        config = checked_config(values, str(folder))
        model = class_named(facts["record"]["class"], config)(config)
        tower = text_tower(folder, model, config)
    return dataclasses.replace(tower, logit_scale=facts["logit_scale"], logit_bias=facts["logit_bias"])


def _open_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    # Without them transformers makes an empty tokenizer and says nothing: every word would be unknown.
    if not any((folder / name).is_file() for name in VOCABULARIES):
        raise FileNotFoundError(f"there is none of {', '.join(VOCABULARIES)} in {folder}")
    with quiet():
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)


def _tokenizer(tokenizer: Any, config: Any) -> Callable[[Sequence[str]], Any]:
    """texts -> token tensors of one length, padded as the model was trained."""
    length = config.text_config.max_position_embeddings
    # SigLIP was trained on texts padded to full length, and without a mask.
    padding, keys = ("max_length", ["input_ids"]) if config.model_type.startswith("siglip") else (True, TOKENS)

    def tokenize(texts: Sequence[str]) -> Any:
        tokens = tokenizer(list(texts), padding=padding, truncation=True, max_length=length, return_tensors="pt")
        return {key: tokens[key] for key in keys if key in tokens}

    return tokenize


def _encode(model: nn.Module, tokens: Mapping[str, Tensor]) -> Tensor:
    output = model.get_text_features(**tokens)  # type: ignore[operator]
    return output if isinstance(output, Tensor) else output.pooler_output
