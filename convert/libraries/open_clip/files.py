"""Where the files of an open_clip reference lie.

Weights are opened from safetensors only: of a tag whose published file is a pickle the hub's safetensors twin is taken,
or the tag is refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path, PurePosixPath
from typing import Any

from ....core.errors import SourceError, near_miss
from ....core.files import read_json
from .settings import checked_settings

__all__ = ["CONFIG", "Place", "fetched_encoder", "locate"]

CONFIG = "open_clip_config.json"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "model.safetensors")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".npz")


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a reference leads.

    Attributes:
        settings: what builds the model, checked (see `settings`).
        own_preprocess: how its configuration prepares pictures; `preprocess` and `quick_gelu` are what a tag says.
        folder: where the files of its tokenizer lie; None for the hub.
    """

    settings: dict[str, Any]
    architecture: str
    weights: Path | None = None
    revision: str | None = None
    preprocess: dict[str, Any] | None = None
    quick_gelu: bool | None = None
    own_preprocess: dict[str, Any] = dataclasses.field(default_factory=dict)
    folder: Path | None = None


def locate(name: str, published: bool) -> Place:
    import open_clip

    if name.startswith("local-dir:"):
        return _local(name, published)
    if name.startswith("hf-hub:"):
        return _from_hub(name, published)
    known = open_clip.list_models()
    architecture, _, tag = name.partition("/")
    if architecture not in known:
        hint = near_miss(architecture, known)
        raise SourceError(f"open_clip has no architecture {architecture!r}.{hint} Reference: open_clip:ARCH/TAG.")
    settings = checked_settings(open_clip.get_model_config(architecture), f"open_clip:{architecture}")
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    listed = ", ".join(sorted(tags)) or "none"
    if not tag:
        if published:
            raise SourceError(
                f"open_clip:{name} names no weights. Pass open_clip:{architecture}/TAG (tags: {listed}), "
                "or --weights FILE.safetensors, or --no-pretrained."
            )
        return Place(settings, architecture)
    if tag not in tags:
        raise SourceError(
            f"open_clip's {architecture} has no weights tagged {tag!r}.{near_miss(tag, tags)} It has: {listed}."
        )
    config = open_clip.get_pretrained_cfg(architecture, tag)
    keys = ("mean", "std", "interpolation", "resize_mode")
    place = Place(
        settings,
        f"{architecture}/{tag}",
        preprocess={key: config[key] for key in keys if config.get(key) is not None},
        quick_gelu=bool(config.get("quick_gelu", False)),
    )
    if not published:
        return place
    weights = _tag_weights(name, config.get("hf_hub") or "")
    return dataclasses.replace(place, weights=weights, revision=weights.parent.name)


def _tag_weights(name: str, place: str) -> Path:
    """The safetensors file of a tag's hub repository, `ORG/NAME/` or `ORG/NAME/FILE`."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    path = PurePosixPath(place)
    repository = f"{path.parts[0]}/{path.parts[1]}" if len(path.parts) > 1 else ""
    files = [WEIGHTS[0]] if len(path.parts) < 3 else [str(PurePosixPath(*path.parts[2:]).with_suffix(".safetensors"))]
    if repository:
        for file in dict.fromkeys([*files, *WEIGHTS[:1]]):
            with contextlib.suppress(RemoteEntryNotFoundError):
                return Path(hf_hub_download(repository, file))
    raise SourceError(f"open_clip:{name} is published as a pickle only. {_PICKLE}")


def _local(name: str, published: bool) -> Place:
    folder = Path(name.removeprefix("local-dir:")).expanduser()
    if not (folder / CONFIG).is_file():
        raise SourceError(f"open_clip:{name}: there is no {CONFIG} in this folder; it is no open_clip model folder.")
    settings, preprocess = _read_config(folder / CONFIG, name)
    weights = next((folder / file for file in WEIGHTS if (folder / file).is_file()), None)
    if published and weights is None:
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
        found = f"only {', '.join(pickles)}. {_PICKLE}" if pickles else f"no weights ({WEIGHTS[0]})."
        raise SourceError(f"open_clip:{name} holds {found}")
    weights = weights if published else None
    return Place(settings, name, weights, own_preprocess=preprocess, folder=folder)


def _from_hub(name: str, published: bool) -> Place:
    """A hub repository, fetched file by file into one snapshot, then opened as the local folder that it is."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    repository, _, revision = name.removeprefix("hf-hub:").partition("@")
    config = Path(hf_hub_download(repository, CONFIG, revision=revision or None))
    settings, preprocess = _read_config(config, name)
    commit = config.parent.name
    weights = None
    for file in WEIGHTS[: 2 if published else 0]:
        with contextlib.suppress(RemoteEntryNotFoundError):
            weights = weights or Path(hf_hub_download(repository, file, revision=commit))
    if published and weights is None:
        raise SourceError(f"open_clip:{name} holds no {WEIGHTS[0]}. {_PICKLE}")
    # The configuration names the tokenizer's repository, which may be another one.
    return Place(settings, name, weights, commit, own_preprocess=preprocess)


def fetched_encoder(name: str) -> Path:
    """The folder with the config.json of the hub's repository of a text encoder; no more of it is needed."""
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(name, "config.json")).parent


_PICKLE = (
    "Pickles can run code and are never opened. Where you trust the file, convert it once: "
    'safetensors.torch.save_file(open_clip.create_model(ARCH, TAG).state_dict(), "weights.safetensors"), then pass '
    "open_clip:ARCH --weights weights.safetensors."
)


def _read_config(path: Path, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what builds the model, how pictures are prepared), checked."""
    values = read_json(path, SourceError)
    settings = values.get("model_cfg") if isinstance(values, dict) else None
    missing = {"embed_dim", "vision_cfg", "text_cfg"} - set(settings if isinstance(settings, dict) else ())
    if missing:
        raise SourceError(f"open_clip:{name}: {CONFIG} has no {', '.join(sorted(missing))} in its model_cfg.")
    preprocess = values.get("preprocess_cfg") or {}
    if not isinstance(preprocess, dict):
        raise SourceError(f"open_clip:{name}: preprocess_cfg of {CONFIG} holds no settings.")
    return checked_settings(settings, f"open_clip:{name}: {CONFIG}"), preprocess
