"""transformers references become teachers: which class opens a checkpoint, with which head, and whether it is whole."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ....core.errors import SourceError, near_miss
from ..base import CLASSES, FEATURES, LABELS, REGRESSION, Source, Teacher
from ..comparison import check_outputs
from ..text import TextTower
from ..weights import mismatch_error, own_weights, prefix_of, read_weights, tell
from .errors import quiet, translate_errors
from .files import checked_config, find_folder, is_dual, model_size, read_config
from .preprocess import preprocess_of
from .text import text_tower
from .towers import HEADS, ImageTower, TransformersVision, class_named, library_output

__all__ = ["build", "class_count", "load", "load_options", "output", "own_head"]


def load(name: str, *, pretrained: bool = True, weights: Path | None = None, head: str = "auto") -> Teacher:
    """The teacher in a hub repository or a local folder that `save_pretrained` wrote.

    Args:
        name: `ORG/NAME[@rev]` or a folder.
        pretrained: False keeps random weights; only the configuration is read.
        weights: a safetensors state dict of this architecture, with any number of classes, in place of the published.
        head: `auto`; or one of `HEADS`: `classifier` (logits), `embedding` (what a dual encoder compares with text),
            `pooled` (the feature before any projection or classifier).

    Raises:
        SourceError: no such model, weights only as a pickle, code of its own, quantised, or no vision model.
    """
    reference = f"hf:{name}"
    if head != "auto" and head not in HEADS:
        raise SourceError(f"no head {head!r}.{near_miss(head, HEADS)} There are: auto, {', '.join(HEADS)}.")
    published = pretrained and weights is None
    with translate_errors(reference), quiet():
        folder, revision = find_folder(name, published)
        values = read_config(folder, reference)
        state = None if weights is None else read_weights(weights)
        head = _head(values, state) if head == "auto" else head
        opened = _open(folder, values, head, reference, published, state, weights)
        if opened.own is not None:
            pictures, theirs = opened.own
            check_outputs(reference, opened.vision.eval(), theirs, pictures, opened.architecture)
        teacher = Teacher(
            opened.vision.eval(),
            Source(reference, "transformers", opened.architecture, opened.args, revision if published else None),
            preprocess_of(folder, opened.vision.config, reference),
            # Weights of one's own are of other classes, even where there are as many.
            _labels(opened.config) if head == "classifier" and state is None else None,
            opened.text,
        )
    return dataclasses.replace(teacher, named_by="its configuration (id2label)") if teacher.labels else teacher


def build(source: Source) -> nn.Module:
    """The empty skeleton of `source`: random weights, no network."""
    with translate_errors(source.reference), quiet():
        config = checked_config(source.model_args["config"], source.reference)
        head = source.model_args["head"]
        if head not in HEADS:
            raise SourceError(f"{source.reference}: no head {head!r}. There are: {', '.join(HEADS)}.")
        if source.model_args["dual"]:
            tower_class = class_named(source.model_args["vision"], config)
            tower = ImageTower(tower_class(config), source.model_args["projection"])
            return TransformersVision(tower, head, config).eval()
        options = {name: bool(value) for name, value in source.model_args["options"].items() if name in OPTIONS}
        model = class_named(source.architecture, config)(config, **options)
        return TransformersVision(model, head, config).eval()


def _own(weights: Path, state: dict[str, Tensor], model_class: Any, config: Any) -> tuple[dict[str, Tensor], str]:
    """`state`, read from `weights`, in the names of `model_class`, which gets the size that its position table has.

    At other sizes transformers resamples the table whenever the model runs.
    """
    wanted = _names(model_class, config)
    base = f"{model_class.base_model_prefix}."
    if prefix_of(state, wanted) == base:  # transformers' own, which it takes off by itself
        return state, ""
    state, said = own_weights(weights, state, wanted)
    vision, table = getattr(config, "vision_config", config), _table(state)
    before = _table(wanted)
    size = model_size(config)
    patch = getattr(vision, "patch_size", None)
    if table and before and size and isinstance(patch, int) and size[0] == size[1]:
        # Class and register tokens have places of their own, as many at every size.
        places = table[1].shape[-2] - before[1].shape[-2] + (size[0] // patch) ** 2
        found = math.isqrt(max(places, 0))
        if found * found != places or found == size[0] // patch:
            return state, said
        vision.image_size = found * patch
        more = f"{table[0]} is for pictures of {vision.image_size} pixels, not {size[0]}, and is resampled at others"
        said = f"{said.removesuffix('.')}; {more}." if said else f"--weights {weights}: {more}."
    return state, said


def _names(model_class: Any, config: Any) -> dict[str, Tensor]:
    with torch.device("meta"):
        return model_class(config).state_dict()


def _table(state: Mapping[str, Tensor]) -> tuple[str, Tensor] | None:
    """(name, values (..., N, C)) of the position table of pictures, where there is one."""
    found = [name for name in state if re.search(r"position_embeddings?(\.weight)?$", name) and "text" not in name]
    return (found[0], state[found[0]]) if found else None


# Arguments of a model class beside its configuration, that a record may have.
OPTIONS = ("add_pooling_layer",)


@dataclasses.dataclass(frozen=True)
class _Opened:
    vision: TransformersVision
    architecture: str
    args: dict[str, Any]
    config: Any
    own: tuple[Tensor, Tensor] | None  # a picture, and what the library itself says of it
    text: TextTower | None = None


def _open(
    folder: Path,
    values: dict[str, Any],
    head: str,
    reference: str,
    published: bool,
    state: dict[str, Tensor] | None,
    weights: Path | None,
) -> _Opened:
    config = checked_config(values, reference)
    if state is not None and head == "classifier":
        count = _class_count(state)
        if count is not None and count != config.num_labels:
            config.num_labels = count
    model_class = _model_class(values, config, head, reference)
    if weights is not None and state is not None:
        state, said = _own(weights, state, model_class, config)
        tell(said)

    def make(**options: Any) -> tuple[Any, dict[str, Any]]:
        if state is not None:
            place, extra = None, {"state_dict": state}
        elif published:
            place, extra = str(folder), {"use_safetensors": True, "local_files_only": True}
        else:
            return model_class(config, **options), {}
        return model_class.from_pretrained(
            place,
            config=config,
            dtype=torch.float32,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported with all else that does not fit
            **extra,
            **options,
        )

    options: dict[str, Any] = {}
    model, info = make()
    missing = info.get("missing_keys", ())
    pooler = head == "pooled" and missing and all(".pooler." in f".{key}" for key in missing)
    if pooler and "add_pooling_layer" in inspect.signature(model_class).parameters:
        # Its pooler was never trained: the class token is the feature then.
        options = {"add_pooling_layer": False}
        model, info = make(**options)
    _check_complete(info, reference, type(model).__name__, weights, head)
    own = library_output(model.eval(), head, config)
    if is_dual(values):
        return _dual(folder, model, config, head, own)
    args = {"config": _plain(config), "head": head, "dual": False, "options": options}
    return _Opened(TransformersVision(model, head, config), model_class.__name__, args, config, own)


def _dual(folder: Path, model: Any, config: Any, head: str, own: tuple[Tensor, Tensor] | None) -> _Opened:
    """Both halves of a dual encoder; the image half keeps its projection only where the embedding is wanted."""
    projection = model.visual_projection if hasattr(model, "visual_projection") and head == "embedding" else None
    tower = ImageTower(model.vision_model, projection)
    comparable = head == "embedding" or not hasattr(model, "visual_projection")
    shape = None if projection is None else [projection.in_features, projection.out_features]
    args = {
        "config": _plain(config.vision_config),
        "head": head,
        "dual": True,
        "vision": type(model.vision_model).__name__,
        "projection": shape,
    }
    vision = TransformersVision(tower, head, config.vision_config)
    text = text_tower(folder, model, config) if comparable else None
    return _Opened(vision, type(model).__name__, args, config, own, text)


def _head(values: dict[str, Any], state: Mapping[str, Tensor] | None) -> str:
    """What `auto` means: a classifier where there is one, a dual encoder's embedding, else the pooled feature."""
    architecture = (values.get("architectures") or [""])[0]
    if "ForImageClassification" in architecture or (state is not None and _class_count(state) is not None):
        return "classifier"
    return "embedding" if is_dual(values) or architecture.endswith("WithProjection") else "pooled"


def _class_count(state: Mapping[str, Tensor]) -> int | None:
    """Number of classes of the classifier in a state dict, or None where it has none."""
    found = [key for key in state if re.search(r"(^|[._])classifier(\.\d+)?\.weight$", key)]
    return state[found[-1]].shape[0] if found else None


def _model_class(values: dict[str, Any], config: Any, head: str, reference: str) -> Any:
    """The class that opens the checkpoint with the head that is asked for."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, MODEL_MAPPING

    architecture = (values.get("architectures") or [""])[0]
    fits = {
        "classifier": "ForImageClassification" in architecture,
        "embedding": architecture.endswith("VisionModelWithProjection"),
    }
    if fits.get(head):
        model_class = class_named(architecture, config)
    else:
        mapping = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING if head == "classifier" else MODEL_MAPPING
        if type(config) not in mapping or (head == "embedding" and not is_dual(values)):
            raise SourceError(
                f"{reference}: {values['model_type']!r} has no {head} head. Pass another --head: {', '.join(HEADS)}."
            )
        found: Any = mapping[type(config)]
        model_class = found[0] if isinstance(found, tuple) else found
    if is_dual(values):
        if head != "classifier" and not hasattr(model_class, "get_text_features"):
            raise SourceError(f"{reference}: {model_class.__name__} is no pair of an image and a text encoder.")
    elif model_class.main_input_name != "pixel_values":
        raise SourceError(
            f"{reference}: {model_class.__name__} reads {model_class.main_input_name}, not pictures. "
            "Pass a vision model."
        )
    return model_class


def _check_complete(info: Mapping[str, Any], reference: str, model: str, weights: Path | None, head: str) -> None:
    """Weights that transformers would draw at random, or drop, are an error here."""
    faults = [f"missing {key}" for key in sorted(info.get("missing_keys", ()))]
    if weights is not None:
        faults += [f"unknown {key}" for key in sorted(info.get("unexpected_keys", ()))]
    faults += [
        f"{key} is {tuple(found)}, should be {tuple(wanted)}"
        for key, found, wanted in sorted(info.get("mismatched_keys", ()))
    ]
    if faults and weights is not None:
        raise mismatch_error(weights, model, faults)
    if faults:
        more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise SourceError(
            f"{reference}: its weights do not fill {model} (--head {head}): {'; '.join(faults[:5])}{more}. "
            f"Pass another --head ({', '.join(HEADS)}), or --weights FILE.safetensors."
        )


def _plain(config: Any) -> dict[str, Any]:
    """The configuration as JSON values; names of classes travel with the student, not here."""
    values = json.loads(config.to_json_string(use_diff=True))
    for key in ("id2label", "label2id", "transformers_version", "architectures", "dtype", "_name_or_path"):
        values.pop(key, None)
    return {**values, "model_type": config.model_type, "num_labels": config.num_labels}


def _labels(config: Any) -> tuple[str, ...] | None:
    """One name a class; None where the names are transformers' own placeholders."""
    names = tuple(str(config.id2label[index]) for index in range(config.num_labels) if index in config.id2label)
    placeholders = all(re.fullmatch(r"LABEL_\d+", name) for name in names)
    return None if placeholders or len(names) != config.num_labels else names


def class_count(source: Source, model: nn.Module) -> int:
    """How many classes the outputs of `model` are logits of; 0 for features and embeddings."""
    return source.model_args["config"]["num_labels"] if source.model_args["head"] == "classifier" else 0


# What transformers calls the outputs of a classifier.
PROBLEMS = {
    "single_label_classification": CLASSES,
    "multi_label_classification": LABELS,
    "regression": REGRESSION,
}


def output(source: Source, count: int) -> str:
    """What the outputs of a model are: as its `problem_type` says, or as transformers takes it where there is none."""
    if not count:
        return FEATURES
    problem = source.model_args["config"].get("problem_type")
    return PROBLEMS.get(problem, CLASSES if count > 1 else REGRESSION)


def own_head(source: Source, model: nn.Module) -> tuple[Source, int] | None:
    """`source` with the number of classes that the classifier of `model` has, where it was given another one."""
    count = _class_count(dict(model.named_parameters())) if source.model_args["head"] == "classifier" else None
    config = source.model_args["config"]
    if count is None or count == config["num_labels"]:
        return None
    args = {**source.model_args, "config": {**config, "num_labels": count}}
    return dataclasses.replace(source, model_args=args), count


def load_options(source: Source) -> dict[str, Any]:
    """The options of `load` that make the teacher of `source` again."""
    return {"head": source.model_args.get("head", "auto")}
