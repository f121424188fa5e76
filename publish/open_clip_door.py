"""open_clip: `create_model_and_transforms("hf-hub:ORG/REPO" | "local-dir:DIR")` for students of its own CLIPs.

The text tower is opened from the student's folder and gets the student's image tower as `visual`, so it is a model of
open_clip's own class: `encode_image`, `encode_text`, `logit_scale`, and the transforms of its factory.

open_clip has no registry for towers. `create_model`, which all its factories call, is therefore wrapped: a place whose
open_clip_config.json names the image tower `bcosify` is opened here, all others by open_clip itself. `get_tokenizer` is
wrapped too: open_clip's own passes all that a folder asks for on to transformers, also to run its code.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from pathlib import Path
from typing import Any

from ..convert import Student, load
from ..convert.checkpoint import text_of
from ..convert.hub import OPEN_CLIP, is_student
from ..convert.libraries import SavedText
from ..convert.libraries.open_clip.preprocess import settings_of
from ..convert.library_files import ARCHITECTURE
from ..core.errors import CheckpointError
from ..core.files import read_json

__all__ = ["register"]

# Arguments of open_clip's `create_model` that are honoured; others must keep their defaults.
TAKEN = ("model_name", "pretrained", "device", "cache_dir", "output_dict", "force_preprocess_cfg", "require_pretrained")


def register() -> None:
    """Wraps `open_clip.create_model` and `open_clip.get_tokenizer`, once."""
    import open_clip
    from open_clip import factory

    if hasattr(factory.create_model, "opens_students"):
        return
    original = factory.create_model

    @functools.wraps(original)
    def create_model(model_name: str, *args: Any, **options: Any) -> Any:
        if not _is_student(model_name, options.get("cache_dir")):
            return original(model_name, *args, **options)
        bound = inspect.signature(original).bind(model_name, *args, **options)
        return _create(model_name, bound)

    create_model.opens_students = True  # type: ignore[attr-defined]
    factory.create_model = open_clip.create_model = create_model
    original_tokenizer = factory.get_tokenizer

    @functools.wraps(original_tokenizer)
    def get_tokenizer(model_name: str = "", *args: Any, **options: Any) -> Any:
        if not _is_student(model_name, options.get("cache_dir")):
            return original_tokenizer(model_name, *args, **options)
        bound = inspect.signature(original_tokenizer).bind(model_name, *args, **options)
        return _tokenizer(model_name, bound)

    factory.get_tokenizer = open_clip.get_tokenizer = get_tokenizer


def _is_student(name: str, cache_dir: Any) -> bool:
    """Whether a place is a student's. On the hub that is read in open_clip_config.json, which open_clip reads too."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError
    from open_clip.factory import parse_model_name

    scheme, place = parse_model_name(name)
    if scheme == "local-dir":
        return is_student(name)
    if scheme != "hf-hub":
        return False
    repository, _, revision = place.partition("@")
    try:
        file = hf_hub_download(repository, OPEN_CLIP, revision=revision or None, cache_dir=cache_dir)
        return read_json(Path(file))["model_cfg"]["vision_cfg"].get("timm_model_name") == ARCHITECTURE
    except RemoteEntryNotFoundError:
        return is_student(name)  # of another library: it then says where to go
    except (CheckpointError, OSError, ValueError, LookupError, TypeError, AttributeError):
        return False  # open_clip tries the same again, and says what is wrong in its own words


def _create(name: str, call: inspect.BoundArguments) -> Any:
    defaults = {key: parameter.default for key, parameter in call.signature.parameters.items()}
    given = {key: value for key, value in call.arguments.items() if key not in TAKEN and value != defaults[key]}
    wrong = sorted({**given, **given.pop("model_kwargs", {})})
    if wrong:
        raise CheckpointError(
            f"{name}: a converted model is not opened with {', '.join(wrong)}. Open it as it was saved, then change it "
            "(model.to(...), model.visual)."
        )
    options = call.arguments
    cache = {"cache_dir": options["cache_dir"]} if options.get("cache_dir") else {}
    student = load(name, **cache)
    tower = _pair(name, student)
    model: Any = tower.model
    model.visual = student.model.visual
    if options.get("output_dict") and hasattr(model, "output_dict"):
        model.output_dict = True
    _set_preprocessing(model, student, options.get("force_preprocess_cfg") or {})
    return model.to(options.get("device", "cpu"))


def _pair(name: str, student: Student) -> Any:
    """The student's text tower, where it makes a pair of open_clip's own with the image tower."""
    bare = name.removeprefix("hf-hub:").removeprefix("local-dir:")
    other = f"Open it with transformers.AutoModel.from_pretrained({bare!r}) or bcosify.publish.load({bare!r})."
    library = student.source.library
    if library != "open_clip":
        raise CheckpointError(
            f"{name} was converted from a model of {library} ({student.source.reference}), so it is no pair of "
            f"open_clip's towers. {other}"
        )
    if student.text is None:
        raise CheckpointError(f"{name} has no text tower: its weights were an image tower's alone. {other}")
    assert isinstance(student.text, SavedText)  # as every loaded student's
    tower = student.text.tower
    if not hasattr(tower.model, "encode_image") or hasattr(tower.model, "text_decoder"):
        raise CheckpointError(f"{name}: {type(tower.model).__name__} cannot be put together again. {other}")
    return tower


def _tokenizer(name: str, call: inspect.BoundArguments) -> Any:
    """The tokenizer in the student's folder, by the checked settings of its text tower."""
    cache = {"cache_dir": call.arguments["cache_dir"]} if call.arguments.get("cache_dir") else {}
    wrong = sorted({*call.arguments, *call.arguments.get("kwargs", {})} - {"model_name", "cache_dir", "kwargs"})
    if wrong:
        raise CheckpointError(f"{name}: the tokenizer of a converted model is not opened with {', '.join(wrong)}.")
    text = text_of(name, **cache)
    if text is None:
        raise CheckpointError(f"{name} has no text tower, so it has no tokenizer.")
    return text.tower.tokenizer()


def _set_preprocessing(model: Any, student: Student, changes: dict[str, Any]) -> None:
    """What the factory makes its transforms of."""
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    own = dataclasses.asdict(PreprocessCfg(**settings_of(student.preprocess)))
    model.visual.image_mean, model.visual.image_std = own["mean"], own["std"]
    model.visual.preprocess_cfg = merge_preprocess_dict(own, changes)
