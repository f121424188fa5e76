"""What of an open_clip_config.json is passed on to open_clip: known keys alone, and nothing that looks elsewhere.

A configuration comes with the weights, so it is as strange as they are. open_clip hands parts of it to timm, to the hub
and to transformers' loaders, which would run the code that it asks for (`trust_remote_code`) or open any file
(`bpe_path`). So what is passed on is listed here, and all else is refused by name.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ....core.errors import SourceError
from ..timm.models import check_buildable
from ..transformers.files import check_code_free, read_json

__all__ = ["checked_settings", "encoder_folder", "open_tokenizer"]

MODEL = ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text", "multimodal_cfg")
MODEL += ("init_logit_scale", "init_logit_bias", "nonscalar_logit_scale")
# What its tokenizers themselves take; all further arguments of theirs go on to transformers' loader.
CLEAN = ("canonicalize", "lower", "whitespace")
FITS: dict[str, Callable[[Any], bool]] = {
    "clean": lambda value: value in CLEAN,
    "strip_sep_token": lambda value: isinstance(value, bool),
    "language": lambda value: isinstance(value, str) and re.fullmatch(r"\w{1,16}", value) is not None,
    "reduction_mask": lambda value: value in ("", "simple", "random", "shuffle"),
}
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def checked_settings(settings: Any, where: str) -> dict[str, Any]:
    """A copy of `model_cfg` that asks for no weights; raises SourceError for keys and names that are not passed on."""
    from open_clip import CLIPTextCfg, CLIPVisionCfg
    from open_clip.coca_model import MultimodalCfg

    parts = {"vision_cfg": CLIPVisionCfg, "text_cfg": CLIPTextCfg, "multimodal_cfg": MultimodalCfg}
    known = {"": MODEL, **{part: [field.name for field in dataclasses.fields(kind)] for part, kind in parts.items()}}
    found = {"": settings, **{part: settings[part] for part in parts if part in settings}}
    for part, values in found.items():
        if not isinstance(values, Mapping):
            raise SourceError(f"{where}: {part or 'model_cfg'} holds no settings.")
        if unknown := sorted(set(map(str, values)) - set(known[part])):
            raise SourceError(
                f"{where}: {part or 'model_cfg'} has settings that are not passed on to open_clip: "
                f"{', '.join(unknown)}. Take them out."
            )
    vision, text = dict(settings["vision_cfg"]), dict(settings["text_cfg"])
    if (trunk := vision.get("timm_model_name")) is not None:
        check_buildable(trunk, {})
        vision["timm_model_pretrained"] = False
    for key in ("hf_model_name", "hf_tokenizer_name"):
        name = text.get(key)
        if name and not (isinstance(name, str) and HUB_NAME.fullmatch(name)):
            raise SourceError(f"{where}: text_cfg.{key} is {name!r}, no name of a hub repository (ORG/NAME).")
    if text.get("hf_model_name"):
        text["hf_model_pretrained"] = False
    _check_tokenizer(text.get("tokenizer_kwargs") or {}, where)
    return {**settings, "vision_cfg": vision, "text_cfg": text}


def _check_tokenizer(settings: Any, where: str) -> None:
    if not isinstance(settings, Mapping):
        raise SourceError(f"{where}: text_cfg.tokenizer_kwargs holds no settings.")
    if wrong := sorted(key for key, value in settings.items() if key not in FITS or not FITS[key](value)):
        raise SourceError(
            f"{where}: text_cfg.tokenizer_kwargs has {', '.join(wrong)}, which could run other code or open other "
            f"files. What is passed on: {', '.join(FITS)}."
        )


def open_tokenizer(text: Mapping[str, Any], folder: Path | None) -> Callable[[Sequence[str]], Any]:
    """The tokenizer of checked settings: open_clip's own; or transformers', in `folder`, or else the hub's.

    open_clip's own factory is not asked: it reads the configuration once more, and passes on all that is in it.
    """
    from open_clip.tokenizer import DEFAULT_CONTEXT_LENGTH, HFTokenizer, SimpleTokenizer

    settings, length = text.get("tokenizer_kwargs") or {}, text.get("context_length", DEFAULT_CONTEXT_LENGTH)
    name = text.get("hf_tokenizer_name")
    if not name:
        return SimpleTokenizer(context_length=length, **settings)  # type: ignore[return-value]
    return HFTokenizer(  # type: ignore[return-value]
        str(folder or name),
        context_length=length,
        tokenizer_mode=text.get("tokenizer_mode"),
        trust_remote_code=False,
        local_files_only=folder is not None,
        **settings,
    )


def encoder_folder(folder: Path, where: str) -> str:
    """`folder`, in which open_clip may look for the configuration of a text encoder of transformers.

    open_clip does not let its caller forbid remote code, so what could ask for some is refused here.
    """
    from open_clip.hf_configs import arch_dict

    values = read_json(folder / "config.json")
    check_code_free(values, where)
    if values.get("model_type") not in arch_dict:
        raise SourceError(f"{where}: open_clip knows no text encoder {values.get('model_type')!r}.")
    return str(folder)
