"""The text half of an open_clip pair, and the configuration that makes it a pair again with a student."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from ....core.files import read_json
from ....core.quiet import quiet
from ...hub import ARCHITECTURE, TEXT
from ..base import Preprocess
from ..text import TextTower
from .errors import FAILURES, translate_errors
from .files import CONFIG
from .preprocess import settings_of
from .settings import checked_settings, encoder_folder, open_tokenizer

__all__ = ["TINY_TEXT", "open_text", "student_files", "text_tower"]

# The half that is not wanted, as small as its constructor allows.
TINY_TEXT: dict[str, Any] = {"context_length": 4, "vocab_size": 4, "width": 8, "heads": 1, "layers": 1}
TINY_VISION: dict[str, Any] = {"image_size": 8, "patch_size": 8, "width": 8, "head_width": 8, "layers": 1}


def text_tower(model: Any, config: dict[str, Any], folder: Path | None) -> TextTower:
    """The text half of `model`, which loses its image half (and CoCa's caption decoder).

    Args:
        config: checked settings. folder: where its tokenizer's files lie; None for the hub.
    """
    for part in ("visual", "text_decoder"):
        if hasattr(model, part):
            delattr(model, part)
    bias = getattr(model, "logit_bias", None)

    def tokenizer() -> Callable[[Sequence[str]], Any]:
        with quiet():
            return open_tokenizer(config["text_cfg"], folder)

    def write(out: Path) -> None:
        _write_text(model, config, tokenizer, out)

    return TextTower(
        library="open_clip",
        model=model.eval(),
        record={"class": type(model).__name__},
        logit_scale=float(model.logit_scale.detach().exp()),
        logit_bias=None if bias is None else float(bias.detach()),
        encode=lambda model, tokens: model.encode_text(tokens, normalize=False),  # type: ignore[operator]
        tokenizer=tokenizer,
        write=write,
    )


def _write_text(model: Any, config: dict[str, Any], tokenizer: Callable[[], Any], out: Path) -> None:
    """open_clip's own configuration, and the files of a tokenizer or text encoder that are transformers'."""
    config = copy.deepcopy(config)
    encoder: Any = getattr(model, "text", None)
    if config["text_cfg"].get("hf_model_name") and hasattr(encoder, "config"):
        encoder.config.save_pretrained(out)
    if config["text_cfg"].get("hf_tokenizer_name"):
        # A student is worth having without its tokenizer too: `embed` then says what is missing.
        with contextlib.suppress(*FAILURES, ImportError):
            tokenizer().tokenizer.save_pretrained(out)  # type: ignore[attr-defined]
    (out / CONFIG).write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}, indent=2))


def open_text(folder: Path, facts: Mapping[str, Any]) -> TextTower:
    """The text tower in `folder`, with random weights, as `save` described it."""
    import open_clip

    with translate_errors(str(folder)), quiet():
        config = checked_settings(read_json(folder / CONFIG)["model_cfg"], str(folder / CONFIG))
        # As dictionaries, which all three classes take: what they make of them is theirs.
        text_cfg: Any = {**config["text_cfg"], "hf_model_pretrained": False}
        vision_cfg: Any = TINY_VISION
        if text_cfg.get("hf_model_name"):
            text_cfg["hf_model_name"] = encoder_folder(folder, str(folder))
        options = {key: value for key, value in config.items() if key in ("quick_gelu", "init_logit_bias")}
        custom = facts["record"]["class"] != "CLIP"
        if facts["record"]["class"] == "CoCa":
            model: Any = open_clip.CoCa(config["embed_dim"], cast(Any, TINY_TEXT), text_cfg, vision_cfg, **options)
        else:
            model_class = open_clip.CustomTextCLIP if custom else open_clip.CLIP
            model = model_class(config["embed_dim"], vision_cfg, text_cfg, **options)
        tower = text_tower(model, config, folder)
    return dataclasses.replace(tower, logit_scale=facts["logit_scale"], logit_bias=facts["logit_bias"])


def student_files(folder: Path, preprocess: Preprocess) -> dict[str, Any]:
    """open_clip_config.json, from the one in the folder of the text tower; nothing where the student is no pair."""
    path = folder / TEXT / CONFIG
    if not path.is_file():
        return {}
    config = read_json(path)["model_cfg"]
    pair = {
        "embed_dim": config["embed_dim"],
        # The image tower is no architecture of open_clip's any more; the text tower still is.
        "vision_cfg": {"timm_model_name": ARCHITECTURE, "image_size": preprocess.size[0]},
        "text_cfg": config["text_cfg"],
    }
    return {CONFIG: {"model_cfg": pair, "preprocess_cfg": settings_of(preprocess)}}
