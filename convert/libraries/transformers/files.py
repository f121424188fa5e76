"""Where the files of a transformers reference lie, and what its config.json says.

A hub repository is fetched as one snapshot (safetensors, JSON and tokenizer files only), and from there on it is a
local folder: what is opened is what the recorded commit holds, and no later call asks the network. Code of a repository
is never run: one that asks for it is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ....core.errors import SourceError, near_miss

__all__ = ["FETCHING", "config_class_of", "find_folder", "is_dual", "keys_in", "read_config"]

# What is fetched of a hub repository: never code, never a pickle, and no folder below the first.
FILES = ("*.json", "*.txt", "*.model", "tokenizer*", "*.jinja")
WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")
# Settings that name code or kernels of other repositories.
FETCHING = {"auto_map", "attn_implementation", "_attn_implementation", "quantization_config", "use_kernels"}


def find_folder(name: str, with_weights: bool) -> tuple[Path, str | None]:
    """(folder, commit or None) of a reference; a hub repository is fetched."""
    place = name.removeprefix("local-dir:")
    if place != name or place.startswith((".", "/", "~")) or Path(place).is_dir():
        folder = Path(place).expanduser()
        if not folder.is_dir():
            raise SourceError(f"hf:{name}: there is no such folder.")
        if with_weights:
            _refuse_pickles(f"hf:{name}", [path.name for path in folder.iterdir()])
        return folder, None
    from huggingface_hub import snapshot_download

    repository, _, revision = name.removeprefix("hf-hub:").partition("@")
    patterns = [*FILES, *(WEIGHTS if with_weights else ())]
    folder = Path(
        snapshot_download(repository, revision=revision or None, allow_patterns=patterns, ignore_patterns=["*/*"])
    )
    if with_weights and not any(folder.glob("model*.safetensors")):
        raise SourceError(f"hf:{name}: it holds no model.safetensors; {_pickle_reason()}")
    return folder, folder.name


def _refuse_pickles(reference: str, names: Sequence[str]) -> None:
    if any(name.startswith("model") and name.endswith(".safetensors") for name in names):
        return
    pickles = sorted(name for name in names if any(Path(name).match(pattern) for pattern in PICKLES))
    found = f"only {', '.join(pickles)}: {_pickle_reason()}" if pickles else "no weights (model.safetensors)."
    raise SourceError(f"{reference} holds {found}")


def _pickle_reason() -> str:
    return (
        "pickles can run code and are never opened. Where you trust them, convert once: "
        "AutoModel.from_pretrained(REF).save_pretrained(FOLDER), then pass hf:FOLDER."
    )


def read_config(folder: Path, reference: str) -> dict[str, Any]:
    """config.json, with all that makes a model unfit said before anything is opened."""
    path = folder / "config.json"
    if not path.is_file():
        raise SourceError(f"{reference}: there is no config.json in it; it is not a transformers model.")
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise SourceError(f"{reference}: config.json is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise SourceError(f"{reference}: config.json holds no configuration.")
    if "auto_map" in values:
        raise SourceError(
            f"{reference} wants its own code to be run (`auto_map` in config.json: "
            f"{', '.join(sorted(values['auto_map']))}). Remote code is never executed here. "
            "Use a repository whose model is part of transformers, timm or open_clip."
        )
    if "quantization_config" in values:
        kind = (values["quantization_config"] or {}).get("quant_method", "unknown method")
        raise SourceError(f"{reference} is quantised ({kind}). Use the original weights in float32 or half precision.")
    if values.get("model_type") == "bcosify":
        raise SourceError(f"{reference} is a converted model already. Use align, explain or inspect on it.")
    if "architecture" in values or values.get("model_type") == "timm_wrapper":
        place = reference.removeprefix("hf:").removeprefix("hf-hub:").removeprefix("local-dir:")
        spelt = f"timm:local-dir:{place}" if Path(place).is_dir() else f"timm:hf-hub:{place}"
        raise SourceError(f"{reference} is a timm model. Pass {spelt} instead.")
    return values


def config_class_of(values: dict[str, Any], reference: str) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES  # type: ignore[attr-defined]

    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING_NAMES:
        hint = near_miss(str(kind), CONFIG_MAPPING_NAMES)
        raise SourceError(f"{reference}: this transformers has no model type {kind!r}.{hint} Update transformers.")
    return CONFIG_MAPPING[kind]


def is_dual(values: Mapping[str, Any]) -> bool:
    architectures = values.get("architectures") or [""]
    return {"vision_config", "text_config"} <= set(values) and "ForImageClassification" not in architectures[0]


def keys_in(values: Any) -> Iterator[str]:
    """All keys in JSON values."""
    if isinstance(values, dict):
        yield from values
    for item in values.values() if isinstance(values, dict) else values if isinstance(values, list) else ():
        yield from keys_in(item)
