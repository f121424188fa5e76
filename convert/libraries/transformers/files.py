"""Where the files of a transformers reference lie, and what its config.json says.

A hub repository is fetched as one snapshot (safetensors, JSON and tokenizer files only), and from there on it is a
local folder: what is opened is what the recorded commit holds, and no later call asks the network. Code of a repository
is never run: one that asks for it is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ....core.errors import SourceError, near_miss
from ....core.files import read_json

__all__ = ["check_code_free", "checked_config", "find_folder", "is_dual", "model_size", "read_config"]

# What is fetched of a hub repository: never code, never a pickle, and no folder below the first.
FILES = ("*.json", "*.txt", "*.model", "tokenizer*", "*.jinja")
WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")
# Settings that name code, kernels or networks of other repositories. They are not passed on in any case (see
# `checked_values`); these are also refused, as a model that asks for them is another one without.
FETCHING = {
    *("auto_map", "custom_pipelines", "quantization_config", "use_kernels", "kernel_config"),
    *("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation"),
    *("backbone", "backbone_kwargs", "use_pretrained_backbone", "use_timm_backbone"),
}
# Values of these that are transformers' own code, and so may stand there; they are not passed on either.
BUILT_IN = ("eager", "sdpa")
# Settings of every configuration that say nothing of the network.
COMMON = ("model_type", "num_labels", "transformers_version", "torch_dtype")
# Types whose network is another library's, or made of any other two.
WRAPPERS = ("timm_wrapper", "timm_backbone", "vision-encoder-decoder", "vision-text-dual-encoder")


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
    values = read_json(path, SourceError)
    if not isinstance(values, dict):
        raise SourceError(f"{reference}: config.json holds no configuration.")
    if "auto_map" in values:
        raise SourceError(
            f"{reference} wants its own code to be run (`auto_map` in config.json). Remote code is never executed "
            "here. Use a repository whose model is part of transformers, timm or open_clip."
        )
    if "quantization_config" in values:
        settings = values["quantization_config"]
        kind = settings.get("quant_method") if isinstance(settings, dict) else "unknown method"
        raise SourceError(f"{reference} is quantised ({kind}). Use the original weights in float32 or half precision.")
    if values.get("model_type") == "bcosify":
        raise SourceError(f"{reference} is a converted model already. Use align, explain or inspect on it.")
    if "architecture" in values or values.get("model_type") == "timm_wrapper":
        place = reference.removeprefix("hf:").removeprefix("hf-hub:").removeprefix("local-dir:")
        spelt = f"timm:local-dir:{place}" if Path(place).is_dir() else f"timm:hf-hub:{place}"
        raise SourceError(f"{reference} is a timm model. Pass {spelt} instead.")
    check_code_free(values, reference)
    return values


def check_code_free(values: Any, reference: str) -> None:
    """Raises SourceError for settings, at any depth, that make transformers look elsewhere, for code among others."""
    if not isinstance(values, Mapping):
        raise SourceError(f"{reference}: its configuration holds no settings.")
    if found := sorted({key for key, value in items_in(values) if key in FETCHING and value and value not in BUILT_IN}):
        raise SourceError(
            f"{reference}: {', '.join(found)} in a recorded configuration could run other code, or fetch another "
            "network. Use a model without."
        )


def checked_config(values: Mapping[str, Any], reference: str) -> Any:
    """The configuration object of `values`: of a model type that transformers itself has, and of its settings alone.

    Raises SourceError for other types, and for settings that make transformers look elsewhere.
    """
    check_code_free(values, reference)
    config_class = config_class_of(values, reference)
    config = config_class.from_dict(known_settings(values, config_class, reference))
    for key, value in items_in(config.to_dict()):  # a type may have another one inside where nothing is said
        if key == "model_type" and value in WRAPPERS:
            raise SourceError(f"{reference}: a {config.model_type!r} has a network of another library inside.")
    return config


def config_class_of(values: Mapping[str, Any], reference: str) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES  # type: ignore[attr-defined]

    kind = values.get("model_type")
    if not isinstance(kind, str):
        raise SourceError(f"{reference}: its config.json names no model type (model_type is {str(kind)[:100]}).")
    if kind not in CONFIG_MAPPING_NAMES:
        hint = near_miss(kind[:100], CONFIG_MAPPING_NAMES)
        raise SourceError(f"{reference}: this transformers has no model type {kind[:100]!r}.{hint} Update it.")
    if kind in WRAPPERS:
        raise SourceError(f"{reference}: {kind!r} stands for a network of another library. Pass that one itself.")
    return CONFIG_MAPPING[kind]


def known_settings(values: Mapping[str, Any], config_class: Any, reference: str) -> dict[str, Any]:
    """Those of `values` that `config_class` itself declares: what it does not know it would keep, and others read."""
    parts = getattr(config_class, "sub_configs", {})
    known = {*COMMON, *_defaults(config_class), *parts, *config_class.attribute_map}
    found = {key: value for key, value in values.items() if key in known and key not in FETCHING}
    for key, value in found.items():
        if key in parts and isinstance(value, Mapping):
            # A part of any type says of which one it is.
            kind = config_class_of(value, reference) if parts[key].__name__ == "AutoConfig" else parts[key]
            found[key] = known_settings(value, kind, reference)
    return found


def _defaults(config_class: Any) -> Mapping[str, Any]:
    return config_class().to_dict()


def is_dual(values: Mapping[str, Any]) -> bool:
    architectures = values.get("architectures") or [""]
    return {"vision_config", "text_config"} <= set(values) and "ForImageClassification" not in architectures[0]


def items_in(values: Any) -> Iterator[tuple[str, Any]]:
    """All keys in JSON values, with what they hold."""
    if isinstance(values, Mapping):
        yield from values.items()
    for item in values.values() if isinstance(values, Mapping) else values if isinstance(values, list) else ():
        yield from items_in(item)


def model_size(config: Any) -> tuple[int, int] | None:
    """(height, width) of the pictures that a model's position table is for; None where its configuration says none."""
    size = getattr(getattr(config, "vision_config", config), "image_size", None)
    if size is None:
        return None
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
