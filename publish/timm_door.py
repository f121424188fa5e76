"""timm: `create_model("hf-hub:ORG/REPO" | "local-dir:DIR", pretrained=True)` returns the student's own network.

It is the source's timm network with converted layers, so `forward_features`, `forward_head`, `forward_intermediates`
and `reset_classifier` are timm's. `num_classes=0` and other counts, `global_pool`, `features_only` with `out_indices`,
and `pretrained=False` are honoured; other arguments are refused, as a converted network cannot be built another way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..convert import Student, load, skeleton
from ..convert.libraries import find_library
from ..convert.library_files import ARCHITECTURE
from ..core.errors import CheckpointError

__all__ = ["register"]

# Arguments that timm's own scripts always pass, and the values that ask for nothing.
NEUTRAL: dict[str, Any] = {"in_chans": 3, "drop_rate": 0.0, "drop_path_rate": 0.0, "drop_block_rate": 0.0}
TAKEN = ("num_classes", "global_pool", "features_only", "out_indices")


def register() -> None:
    """Adds the entrypoint `bcosify` to timm's registry."""
    from timm.models import is_model, register_model

    if not is_model(ARCHITECTURE):
        register_model(bcosify)


def bcosify(
    pretrained: bool = False,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: Any = None,
    cache_dir: Any = None,
    **options: Any,
) -> nn.Module:
    """The network of the student in the place that timm read `pretrained_cfg` from.

    Raises:
        CheckpointError: as `load`; a bare `create_model("bcosify")`; a student of another library; other options.
    """
    place = _place(pretrained_cfg)
    _check_options(options)
    given = {} if cache_dir is None else {"cache_dir": cache_dir}
    student = (load if pretrained else skeleton)(place, **given)
    _check_library(student, place)
    model: Any = student.model
    facts = {key: value for key, value in pretrained_cfg.items() if value is not None}
    model.pretrained_cfg = {**getattr(model, "pretrained_cfg", {}), **facts, **(pretrained_cfg_overlay or {})}
    model.default_cfg = model.pretrained_cfg
    if options.get("features_only"):
        return _features(student, options.get("out_indices"))
    if "num_classes" in options or "global_pool" in options:
        _reset_head(student, options)
    return model


def _place(pretrained_cfg: Any) -> str:
    """The folder or repository, as `load` takes it."""
    config = pretrained_cfg if isinstance(pretrained_cfg, dict) else {}
    if config.get("source") == "hf-hub" and config.get("hf_hub_id"):
        return f"hf-hub:{config['hf_hub_id']}"
    if config.get("source") == "local-dir" and config.get("file"):
        return f"local-dir:{config['file']}"
    raise CheckpointError(
        f"{ARCHITECTURE} is no architecture of its own: which one it is stands in a converted model's folder. Pass "
        'timm.create_model("hf-hub:ORG/REPO", pretrained=True) or "local-dir:FOLDER".'
    )


def _check_options(options: dict[str, Any]) -> None:
    asked = {name: value for name, value in options.items() if name not in TAKEN and value is not None}
    wrong = [f"{name}={value!r}" for name, value in asked.items() if not (name in NEUTRAL and value == NEUTRAL[name])]
    if wrong:
        raise CheckpointError(
            f"a converted model cannot be built with {', '.join(wrong)}: its layers are those that were converted. "
            f"timm's arguments that it takes: pretrained, {', '.join(TAKEN)}."
        )


def _check_library(student: Student, place: str) -> None:
    library = student.source.library
    if library != "timm":
        bare = place.removeprefix("hf-hub:").removeprefix("local-dir:")
        door = find_library(library).door
        own = f"{door.call.format(place=bare, name=place)}, or with " if door else ""
        raise CheckpointError(
            f"{place} was converted from a model of {library} ({student.source.reference}), so it is no network of "
            f"timm's. Open it with {own}bcosify.publish.load({bare!r})."
        )


def _features(student: Student, out_indices: Any) -> nn.Module:
    """What `features_only=True` is for the source's architecture: the same stages, in the same layout."""
    import timm
    from timm.models._features import FeatureGetterNet

    if not hasattr(student.model, "forward_intermediates"):
        raise CheckpointError(
            f"timm's {student.source.architecture} does not show its stages (no forward_intermediates)."
        )
    if out_indices is None:
        with torch.device("meta"):
            like: Any = timm.create_model(student.source.architecture, features_only=True, **student.source.model_args)
        out_indices = like.feature_info.out_indices
    config = student.model.pretrained_cfg
    net: Any = FeatureGetterNet(student.model, out_indices=out_indices)
    net.pretrained_cfg = net.default_cfg = config
    return net


def _reset_head(student: Student, options: dict[str, Any]) -> None:
    """timm's own `reset_classifier`; a new classifier becomes a layer of the method, as strong as the old one was."""
    model: Any = student.model
    classes, pool = options.get("num_classes", model.num_classes), options.get("global_pool")
    if classes == model.num_classes and pool is None:
        return
    old = dict(model.named_modules())
    model.reset_classifier(classes, *([] if pool is None else [pool]))
    steps = {step.name: step for step in student.plan.swaps}
    for name, module in dict(model.named_modules()).items():
        step = steps.get(name)
        if name and step and step.swap and module is not old.get(name) and type(module).__name__ == step.found:
            step.swap.change(module, student.preprocess, step.arguments)
            for strength, value in getattr(old[name], "strengths", dict)().items():
                module.set_strength(strength, value)
