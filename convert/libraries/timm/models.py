"""timm names become teachers."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ....core.errors import SourceError, near_miss
from ....core.pictures import noise_pictures
from ..base import FEATURES, Features, Source, Teacher
from ..comparison import check_outputs
from ..weights import build_on_meta, is_whole, prefix_of, with_weights
from .classes import embeds, names_of
from .errors import translate_errors
from .preprocess import preprocess_of

__all__ = ["build", "check_buildable", "features", "load", "own_head", "token_grid"]

# Lets a transformer take any size that its patches divide; constructors that do not know it are called without.
OPTIONAL_ARGS = {"dynamic_img_size": True}


def load(name: str, *, pretrained: bool = True, weights: Path | None = None, **model_args: Any) -> Teacher:
    """The teacher that timm calls `name`.

    Args:
        name: a timm name, with or without tag, or one behind `hf-hub:` / `local-dir:`.
        pretrained: False keeps the random weights of the skeleton.
        weights: a safetensors state dict of this architecture, in place of the published weights.
        model_args: more arguments of the timm constructor.

    Raises:
        SourceError: the name is unknown, the weights cannot be had, or they belong to another architecture.
    """
    import timm

    place = name.removeprefix("local-dir:")
    if place != name and not (Path(place) / "config.json").is_file():
        raise SourceError(f"local-dir:{place}: there is no config.json in this folder; it is not a timm model folder.")
    architecture, config, saved_args = _resolve(name)
    check_buildable(architecture, saved_args)
    args = _accepted(architecture, {**saved_args, **model_args})
    if weights is not None:
        args |= _class_count(architecture, args, weights)
    published = pretrained and weights is None

    def bare() -> nn.Module:
        with translate_errors(name):
            return timm.create_model(architecture, pretrained=False, pretrained_cfg=config, **args)

    if published:
        with translate_errors(name):
            model = timm.create_model(name, pretrained=True, **args)
    else:
        model = bare() if weights is None else with_weights(bare, weights, _resampled)
    args |= _decided_by_weights(architecture, args, model.eval())
    with translate_errors(name):
        own = _library_output(architecture, args, model)
    if own is not None:
        check_outputs(f"timm:{name}", model, own[1], own[0], architecture)
    source = Source(f"timm:{name}", "timm", architecture, args, revision=_revision(model) if published else None)
    # Weights of one's own are of other classes, even where there are as many.
    named = names_of(name, architecture, model) if weights is None else None
    names, named_by = named or (None, "")
    output = FEATURES if names is None and embeds(architecture, model) else None
    preprocess = preprocess_of(model, f"timm:{name}")
    return Teacher(model, source, preprocess, names, output=output, named_by=named_by)


def build(source: Source) -> nn.Module:
    """The empty skeleton of `source`: random weights, no network."""
    import timm

    check_buildable(source.architecture, source.model_args)
    with translate_errors(source.architecture):
        return timm.create_model(source.architecture, pretrained=False, **source.model_args).eval()


def _factory_arguments() -> set[str]:
    """Arguments that timm's factories keep for themselves: they open files or wrap the model.

    All others reach the constructor of the model's class alone.
    """
    import timm
    from timm.models._builder import build_model_with_cfg

    named = {*inspect.signature(timm.create_model).parameters, *inspect.signature(build_model_with_cfg).parameters}
    return {*named, "features_only", "out_indices"}


def check_buildable(architecture: str, args: Mapping[str, Any]) -> None:
    """Raises SourceError where `create_model` would do more with recorded arguments than build an empty network."""
    import timm

    if not isinstance(architecture, str) or not timm.is_model(architecture):
        hint = near_miss(str(architecture)[:100], timm.list_models())
        raise SourceError(f"timm has no architecture {architecture!r} in itself.{hint}")
    if found := sorted(name for name in _factory_arguments() & set(args) if args[name]):
        raise SourceError(f"timm's {architecture} with {', '.join(found)}: a recorded model is only ever built empty.")


def own_head(source: Source, model: nn.Module) -> tuple[Source, int] | None:
    """`source` with the number of classes that the classifier of `model` has, where it was given another one."""
    get = getattr(model, "get_classifier", None)
    head = get() if callable(get) else None
    head = head[0] if isinstance(head, tuple | list) else head
    count = 0 if isinstance(head, nn.Identity) else getattr(head, "out_features", getattr(head, "out_channels", None))
    # A model without its classifier still says so by itself.
    if not isinstance(count, int) or count == _built_classes(source):
        return None
    return dataclasses.replace(source, model_args={**source.model_args, "num_classes": count}), count


def _built_classes(source: Source) -> int | None:
    """How many classes the skeleton of `source` has."""
    from timm.models import get_pretrained_cfg

    config = get_pretrained_cfg(source.architecture)
    return source.model_args.get("num_classes", config.num_classes if config else None)


def token_grid(model: nn.Module, pictures: Tensor) -> Tensor:
    """(B, C, rows, columns): the last features of every patch, in front of pooling, from pictures (B, 3, H, W)."""
    intermediates = getattr(model, "forward_intermediates", None)
    if intermediates is None:
        raise SourceError(f"timm's {type(model).__name__} does not show the features of its patches.")
    return intermediates(pictures, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True)[-1]


def features(network: Any, pictures: Tensor, has_classes: bool) -> Features:
    """The last features and what timm's own head pools of them; see `Library.features`."""
    # A network whose head is given other features than its backbone's says which (see CaStream).
    last = getattr(network, "streamed", network.forward_features)(pictures)
    return Features(last, network.forward_head(last, pre_logits=has_classes))


def _resolve(name: str) -> tuple[str, dict[str, Any] | str | None, dict[str, Any]]:
    """(architecture, pretrained configuration or tag or None, saved constructor arguments) of a timm name."""
    import timm
    from timm.models import load_model_config_from_hf, parse_model_name, split_model_name_tag
    from timm.models._hub import load_model_config_from_path

    with translate_errors(name):
        scheme, place = parse_model_name(name)
        if scheme == "hf-hub":
            config, architecture, args = load_model_config_from_hf(place)
        elif scheme == "local-dir":
            config, architecture, args = load_model_config_from_path(place)
        else:
            architecture, tag = split_model_name_tag(place)
            config, args = tag or None, {}
            if not timm.is_model(architecture):
                raise SourceError(f"timm has no model {architecture!r}.{near_miss(architecture, timm.list_models())}")
            tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")]
            if tag and tag not in tags:
                raise SourceError(
                    f"timm's {architecture} has no weights tagged {tag!r}; it has: {', '.join(sorted(tags)) or 'none'}."
                )
    return architecture, config, dict(args or {})


def _accepted(architecture: str, args: dict[str, Any]) -> dict[str, Any]:
    """`args` with those optional ones that the constructor of `architecture` knows."""
    import timm

    try:
        with torch.device("meta"):
            timm.create_model(architecture, pretrained=False, **{**OPTIONAL_ARGS, **args})
    except Exception:  # noqa: BLE001 - any refusal only means "call it without"
        return args
    return {**OPTIONAL_ARGS, **args}


@torch.no_grad()
def _library_output(architecture: str, args: Mapping[str, Any], model: nn.Module) -> tuple[Tensor, Tensor] | None:
    """(pictures (1, 3, H, W), outputs (1, D)) of the model as timm builds it without our arguments, at its own size.

    It shares the weights of `model`. None where there are none of ours, so that `model` is timm's own.
    """
    import timm

    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if size is None or not OPTIONAL_ARGS.items() <= args.items() or getattr(model, "in_chans", 3) != 3:
        return None
    theirs = {key: value for key, value in args.items() if key not in OPTIONAL_ARGS}
    plain = build_on_meta(lambda: timm.create_model(architecture, pretrained=False, **theirs))
    plain.load_state_dict(model.state_dict(keep_vars=True), assign=True)
    if not is_whole(plain):  # what its constructor makes of its weights, such as Swin's tables
        plain = timm.create_model(architecture, pretrained=False, **theirs)
        plain.load_state_dict(model.state_dict(keep_vars=True), assign=True)
    pictures = noise_pictures(1, size)
    return pictures, plain.eval()(pictures)


def _resampled(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state` with position tables of another size at that of `model`, by timm's own filter of its checkpoints."""
    own = model.state_dict()
    filtered = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if filtered is None or all(name not in own or own[name].shape == value.shape for name, value in state.items()):
        return state
    with contextlib.suppress(Exception):  # what it cannot read is said as it does not fit
        return filtered(state, model)
    return state


def _class_count(architecture: str, args: dict[str, Any], weights: Path) -> dict[str, int]:
    """`num_classes` as the classifier in `weights` has it, so that a fine-tuned model loads without being told."""
    import timm
    from timm.models import get_pretrained_cfg

    if "num_classes" in args or not weights.is_file() or weights.suffix != ".safetensors":
        return {}
    config = get_pretrained_cfg(architecture)
    classifier = config.classifier if config else None
    with contextlib.suppress(SafetensorError), safe_open(weights, "pt") as file:
        if isinstance(classifier, str):
            key = f"{classifier}.weight"
            if key not in file.keys():
                own = build_on_meta(lambda: timm.create_model(architecture, pretrained=False, **args))
                key = prefix_of(file.keys(), own.state_dict()) + key
            return {"num_classes": file.get_slice(key).get_shape()[0] if key in file.keys() else 0}
    return {}


def _decided_by_weights(architecture: str, args: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Constructor arguments that timm took from the weights' configuration, where the bare architecture has others.

    One architecture has weights with 1,000 and with 21,843 classes: without these its skeleton would not fit.
    """
    from timm.models import get_pretrained_cfg

    own = get_pretrained_cfg(architecture)
    found: dict[str, Any] = {"num_classes": getattr(model, "num_classes", None)}
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    if config.get("fixed_input_size"):
        found["img_size"] = list(config["input_size"][-2:])
    default = {"num_classes": own.num_classes, "img_size": list(own.input_size[-2:])} if own else {}
    return {key: value for key, value in found.items() if key not in args and value not in (None, default.get(key))}


def _revision(model: nn.Module) -> str | None:
    """Commit of the hub repository whose files are in the cache; None for other sources."""
    from huggingface_hub import try_to_load_from_cache

    repo = (getattr(model, "pretrained_cfg", None) or {}).get("hf_hub_id")
    if not repo:
        return None
    repo, _, revision = repo.partition("@")
    for file in ("model.safetensors", "config.json"):
        found = try_to_load_from_cache(repo, file, revision=revision or None)
        if isinstance(found, str):
            return Path(found).parent.name
    return None
