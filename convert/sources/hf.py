"""transformers models: `hf:ORG/NAME[@rev]`, `hf:PATH` (also spelt `hf:hf-hub:...`, `hf:local-dir:...`).

A hub repository is fetched as one snapshot (safetensors, JSON and tokenizer files only), and from there on it is a
local folder: what is opened is what the recorded commit holds, and no later call asks the network. Code of a repository
is never run: one that asks for it is refused.

A transformers model takes `pixel_values` and returns a named tuple; `TransformersVision` around it takes a picture and
returns one vector. Below its attribute `model` every key is what the library itself calls it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from ...core.errors import CheckpointError, SourceError, near_miss
from .teacher import Preprocess, Source, Teacher
from .text import TextTower
from .weights import misfit, read_weights

__all__ = ["HEADS", "TransformersVision", "build", "load", "open_text", "token_grid"]

# What is fetched of a hub repository: never code, never a pickle, and no folder below the first.
FILES = ("*.json", "*.txt", "*.model", "tokenizer*", "*.jinja")
WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")
# What building and loading raise on a bad configuration or file.
FAILURES = (AssertionError, AttributeError, KeyError, OSError, RuntimeError, SafetensorError, TypeError, ValueError)
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model")
TOKENS = ["input_ids", "attention_mask"]
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


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
    with _said_plainly(reference), _quiet():
        folder, revision = _folder(name, published)
        values = _read_config(folder, reference)
        state = None if weights is None else read_weights(weights)
        head = _head(values, state) if head == "auto" else head
        opened = _open(folder, values, head, reference, published, state, weights)
        teacher = Teacher(
            opened.vision.eval(),
            Source(reference, "transformers", opened.architecture, opened.args, revision if published else None),
            _preprocess(folder, opened.vision.config),
            _labels(opened.config) if head == "classifier" else None,
            opened.text,
        )
    return teacher


def build(source: Source) -> nn.Module:
    """The empty skeleton of `source`: random weights, no network."""
    with _said_plainly(source.reference), _quiet():
        if found := sorted(FETCHING & set(_keys(source.model_args["config"]))):
            raise SourceError(
                f"{source.reference}: {', '.join(found)} in a recorded configuration could run other code."
            )
        config = _config_class(source.model_args["config"], source.reference).from_dict(source.model_args["config"])
        head = source.model_args["head"]
        if source.model_args["dual"]:
            tower = ImageTower(_class_named(source.model_args["vision"])(config), source.model_args["projection"])
            return TransformersVision(tower, head, config).eval()
        model = _class_named(source.architecture)(config, **source.model_args["options"])
        return TransformersVision(model, head, config).eval()


# Settings that name code or kernels of other repositories.
FETCHING = {"auto_map", "attn_implementation", "_attn_implementation", "quantization_config", "use_kernels"}


def _keys(values: Any) -> Iterator[str]:
    """All keys in JSON values."""
    if isinstance(values, dict):
        yield from values
    for item in values.values() if isinstance(values, dict) else values if isinstance(values, list) else ():
        yield from _keys(item)


# ------------------------------------------------------------------------------------------------------ the wrapper


class TransformersVision(nn.Module):
    """A transformers vision model as a function of one picture (B, 3, H, W) -> (B, D).

    Attributes:
        model: the library's model, with its own keys.
        head: key of `HEADS`.
        config: the library's configuration of `model` or of its vision tower.
    """

    def __init__(self, model: nn.Module, head: str, config: Any) -> None:
        super().__init__()
        self.model = _on_pictures(model)
        self.head = head
        self.config = config
        self._options = {"interpolate_pos_encoding": True} if _resizes(self.model) else {}

    def forward(self, pictures: Tensor) -> Tensor:
        return self.headed(self.model(pictures, **self._options))

    def headed(self, output: Any) -> Tensor:
        """(B, D): what the head takes of the library's own named output."""
        return HEADS[self.head](output)

    def features(self, pictures: Tensor) -> Any:
        """The library's own named output for pictures (B, 3, H, W), of the part in front of a classifier."""
        if self.head != "classifier":
            return self.model(pictures, **self._options)
        return _inner_output(_backbone(self), pictures)

    def extra_repr(self) -> str:
        return f"head={self.head}"


class ImageTower(nn.Module):
    """The image half of a dual encoder, with the keys of the whole: `vision_model.*`, `visual_projection.*`."""

    def __init__(self, vision_model: nn.Module, projection: Sequence[int] | nn.Module | None) -> None:
        super().__init__()
        self.vision_model = vision_model
        if isinstance(projection, nn.Module):
            self.visual_projection = projection
        elif projection is not None:
            width, features = projection
            self.visual_projection = nn.Linear(width, features, bias=False)

    def forward(self, pixel_values: Tensor, **options: Any) -> dict[str, Tensor]:
        output = self.vision_model(pixel_values, **options)
        projection = getattr(self, "visual_projection", None)
        embeds = output.pooler_output if projection is None else projection(output.pooler_output)
        return {**output, "image_embeds": embeds}


class NaFlexTower(nn.Module):
    """SigLIP2's native-resolution tower on a batch of pictures of one size, of any aspect that its patches divide.

    The library feeds it patches that were cut before, through a linear layer. The same numbers as a convolution read
    the picture itself, which is what a six-channel stem needs; all other keys stay as they are.
    """

    def __init__(self, vision: Any) -> None:
        super().__init__()
        self.config = vision.config
        self.embeddings, self.encoder, self.post_layernorm = vision.embeddings, vision.encoder, vision.post_layernorm
        self.head = vision.head if vision.use_head else None
        side, linear = vision.config.patch_size, vision.embeddings.patch_embedding
        convolution = nn.Conv2d(vision.config.num_channels, linear.out_features, side, side)
        # Patches are flattened row by row with the channels last.
        kernel = linear.weight.detach().unflatten(1, (side, side, -1)).permute(0, 3, 1, 2)
        convolution.weight = nn.Parameter(kernel.contiguous())
        convolution.bias = linear.bias
        self.embeddings.patch_embedding = convolution

    def forward(self, pixel_values: Tensor, **_: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        side = self.config.patch_size
        if pixel_values.shape[-2] % side or pixel_values.shape[-1] % side:
            raise ValueError(f"the sides must be multiples of {side}, the patch size")
        patches = self.embeddings.patch_embedding(pixel_values)
        grid = int(self.embeddings.num_patches**0.5)
        table = self.embeddings.position_embedding.weight.unflatten(0, (grid, grid)).movedim(-1, 0)[None]
        table = F.interpolate(table.float(), size=patches.shape[-2:], mode="bilinear", antialias=True).to(patches.dtype)
        tokens = (patches + table).flatten(2).mT
        tokens = self.post_layernorm(self.encoder(inputs_embeds=tokens, attention_mask=None).last_hidden_state)
        pooled = None if self.head is None else self.head(tokens)
        return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=pooled)


def _on_pictures(model: nn.Module) -> nn.Module:
    """`model` with towers that take cut patches replaced by those that take the picture."""
    if type(model).__name__ == "Siglip2VisionModel":
        return NaFlexTower(model)
    for name, module in model.named_children():
        setattr(model, name, _on_pictures(module))
    return model


def _resizes(model: nn.Module) -> bool:
    """Whether `model` has to be asked to interpolate its position table. (Others do so anyway, or have none.)"""
    inner = [
        module for module in model.modules() if type(module).__name__.endswith(("Model", "ForImageClassification"))
    ]
    takes = [module for module in inner if "interpolate_pos_encoding" in inspect.signature(module.forward).parameters]
    options = inspect.signature(model.forward).parameters.values()
    passed_on = any(option.kind is inspect.Parameter.VAR_KEYWORD for option in options)
    return bool(takes) and (passed_on or model in takes)


def _logits(output: Any) -> Tensor:
    return output["logits"]


def _image_embeds(output: Any) -> Tensor:
    return output["image_embeds"]


def _pooled(output: Any) -> Tensor:
    """(B, D): what the model pools; else the class token, or the mean of a map (B, D, H, W)."""
    pooled = output.get("pooler_output")
    if pooled is None:
        last = output["last_hidden_state"]
        pooled = last[:, 0] if last.dim() == 3 else last.mean((-2, -1))
    return pooled.flatten(1)


HEADS: dict[str, Callable[[Any], Tensor]] = {
    "classifier": _logits,
    "embedding": _image_embeds,
    "pooled": _pooled,
}


def token_grid(model: nn.Module, pictures: Tensor) -> Tensor:
    """(B, C, rows, columns): the last features of every patch, in front of pooling, from pictures (B, 3, H, W)."""
    assert isinstance(model, TransformersVision)
    last = _inner_output(_backbone(model), pictures).last_hidden_state
    if last.dim() == 4:
        return last
    stride = getattr(model.config, "patch_size", 4)
    stride = stride if isinstance(stride, int) else stride[0]
    height, width = pictures.shape[-2:]
    # Hierarchical models halve the grid some times; class and register tokens stand in front of it.
    while (height // stride) * (width // stride) > last.shape[1]:
        stride *= 2
    rows, columns = height // stride, width // stride
    return last[:, last.shape[1] - rows * columns :].mT.unflatten(-1, (rows, columns))


def _inner_output(inner: Any, pictures: Tensor) -> Any:
    return inner(pictures, **({"interpolate_pos_encoding": True} if _resizes(inner) else {}))


def _backbone(vision: TransformersVision) -> Any:
    """The part that returns the features of all patches: the model itself, or what its head stands on."""
    model: Any = vision.model
    if vision.head != "classifier" and not isinstance(model, ImageTower):
        return model
    return model.vision_model if hasattr(model, "vision_model") else model.base_model


# -------------------------------------------------------------------------------------------------------- opening


@dataclasses.dataclass(frozen=True)
class _Opened:
    vision: TransformersVision
    architecture: str
    args: dict[str, Any]
    config: Any
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
    config_class = _config_class(values, reference)
    config = config_class.from_dict(dict(values))
    if state is not None and head == "classifier":
        count = _class_count(state)
        if count is not None and count != config.num_labels:
            config.num_labels = count
    model_class = _model_class(values, config, head, reference)

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
    if _is_dual(values):
        return _dual(folder, model, config, head)
    args = {"config": _plain(config), "head": head, "dual": False, "options": options}
    return _Opened(TransformersVision(model, head, config), model_class.__name__, args, config)


def _dual(folder: Path, model: Any, config: Any, head: str) -> _Opened:
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
    text = _text_tower(folder, model, config) if comparable else None
    return _Opened(vision, type(model).__name__, args, config, text)


def _read_config(folder: Path, reference: str) -> dict[str, Any]:
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


def _config_class(values: dict[str, Any], reference: str) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES  # type: ignore[attr-defined]

    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING_NAMES:
        hint = near_miss(str(kind), CONFIG_MAPPING_NAMES)
        raise SourceError(f"{reference}: this transformers has no model type {kind!r}.{hint} Update transformers.")
    return CONFIG_MAPPING[kind]


def _is_dual(values: Mapping[str, Any]) -> bool:
    architectures = values.get("architectures") or [""]
    return {"vision_config", "text_config"} <= set(values) and "ForImageClassification" not in architectures[0]


def _head(values: dict[str, Any], state: Mapping[str, Tensor] | None) -> str:
    """What `auto` means: a classifier where there is one, a dual encoder's embedding, else the pooled feature."""
    architecture = (values.get("architectures") or [""])[0]
    if "ForImageClassification" in architecture or (state is not None and _class_count(state) is not None):
        return "classifier"
    return "embedding" if _is_dual(values) or architecture.endswith("WithProjection") else "pooled"


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
        model_class = _class_named(architecture)
    else:
        mapping = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING if head == "classifier" else MODEL_MAPPING
        if type(config) not in mapping or (head == "embedding" and not _is_dual(values)):
            raise SourceError(
                f"{reference}: {values['model_type']!r} has no {head} head. Pass another --head: {', '.join(HEADS)}."
            )
        found: Any = mapping[type(config)]
        model_class = found[0] if isinstance(found, tuple) else found
    if _is_dual(values):
        if head != "classifier" and not hasattr(model_class, "get_text_features"):
            raise SourceError(f"{reference}: {model_class.__name__} is no pair of an image and a text encoder.")
    elif model_class.main_input_name != "pixel_values":
        raise SourceError(
            f"{reference}: {model_class.__name__} reads {model_class.main_input_name}, not pictures. "
            "Pass a vision model."
        )
    return model_class


def _class_named(name: str) -> Any:
    import transformers

    found = getattr(transformers, name, None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise SourceError(f"this transformers has no model class {name!r}. Update transformers.")
    return found


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
        raise misfit(weights, model, faults)
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


# ------------------------------------------------------------------------------------------------- where files lie


def _folder(name: str, with_weights: bool) -> tuple[Path, str | None]:
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


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers reports every load on stderr; what matters of it is in our errors."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _said_plainly(reference: str) -> Iterator[None]:
    """Turns what transformers and the hub raise into one SourceError with what to do next."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        yield
    except (SourceError, CheckpointError):
        raise
    except HFValidationError as error:
        raise SourceError(
            f"{reference}: no such folder, and no name of a hub repository (ORG/NAME): {error}"
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, ConnectionError, TimeoutError) as error:
        said = str(error).splitlines() or [type(error).__name__]
        raise SourceError(
            f"{reference}: the files cannot be reached ({said[0]}). Check the name and the connection, "
            "or use a local folder: hf:PATH."
        ) from error
    except FAILURES as error:
        said = str(error).splitlines() or [type(error).__name__]
        raise SourceError(f"{reference}: transformers cannot open it: {said[0]}") from error


# ------------------------------------------------------------------------------------------------ pictures and text


def _preprocess(folder: Path, config: Any) -> Preprocess:
    """The record of the folder's image processor; of the model type's own, at the model's size, where there is none."""
    processor = _own_processor(folder) or _usual_processor(config)
    if processor is None:
        return Preprocess(_model_size(config), *IMAGENET, library="transformers")
    record = _record(processor, config)
    return record if _own_processor(folder) else record.at(_model_size(config))


def _record(processor: Any, config: Any) -> Preprocess:
    values = processor.to_dict()
    # v = (pixel * factor - mean) / std with pixels in 0..255, written for pixels in 0..1.
    factor = 255 * values.get("rescale_factor", 1 / 255) if values.get("do_rescale", True) else 255.0
    normalised = values.get("do_normalize", True)
    mean = [value / factor for value in (values["image_mean"] if normalised else (0, 0, 0))]
    std = [value / factor for value in (values["image_std"] if normalised else (1, 1, 1))]
    size, crop_pct, mode = _resizing(values, config)
    return Preprocess(
        size=size,
        mean=tuple(_rounded(value) for value in mean),  # type: ignore[arg-type]
        std=tuple(_rounded(value) for value in std),  # type: ignore[arg-type]
        interpolation=INTERPOLATIONS[int(values.get("resample") or 2)],
        crop_pct=crop_pct,
        crop_mode=mode,
        library="transformers-float" if type(processor).__name__ in RESIZE_FLOATS else "transformers",
    )


# Image processors that rescale before they resize.
RESIZE_FLOATS = ("DINOv3ViTImageProcessor",)
# Numbers of PIL's filters, as image processors write them.
INTERPOLATIONS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}


def _rounded(value: float) -> float:
    """255 * (1 / 255) is not 1 in floats; the record should say 0.5 where the library does."""
    return float(f"{value:.12g}")


def _resizing(values: Mapping[str, Any], config: Any) -> tuple[tuple[int, int], float, str]:
    """(size, crop_pct, crop_mode) of an image processor's settings."""
    size, crop = values.get("size") or {}, values.get("crop_size") or {}
    if "max_num_patches" in values:
        # Native resolution: a batch has one size here, by default the square that fills the longest sequence.
        side = values["patch_size"] * math.isqrt(values["max_num_patches"])
        return (side, side), 1.0, "squash"
    if "crop_pct" in values and "shortest_edge" in size:
        side = size["shortest_edge"]
        return (side, side), (1.0 if side >= 384 else values["crop_pct"]), ("squash" if side >= 384 else "center")
    cropped = (crop["height"], crop["width"]) if values.get("do_center_crop") and crop else None
    if not values.get("do_resize", True):
        return cropped or _model_size(config), 1.0, "center"
    if "shortest_edge" in size:
        edge = size["shortest_edge"]
        target = cropped or (edge, edge)
        return target, max(target) / edge, "center"
    if "height" not in size:
        return cropped or _model_size(config), 1.0, "squash"
    full = (size["height"], size["width"])
    target = cropped or full
    return target, target[0] / full[0], "squash"


def _model_size(config: Any) -> tuple[int, int]:
    size = getattr(config, "image_size", None) or 224
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _own_processor(folder: Path) -> Any:
    from transformers import AutoImageProcessor

    if not any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        return None
    return AutoImageProcessor.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)


def _usual_processor(config: Any) -> Any:
    """What transformers would make for this model type; None where it has no opinion."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

    # A tower of a pair has no entry of its own.
    with contextlib.suppress(KeyError):
        backends: Any = IMAGE_PROCESSOR_MAPPING[CONFIG_MAPPING[config.model_type.removesuffix("_vision_model")]]
        return backends["torchvision"]()
    return None


def _text_tower(folder: Path, model: Any, config: Any) -> TextTower:
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
    with _said_plainly(str(folder)), _quiet():
        values = json.loads((folder / "config.json").read_text())
        # The image half is built only to be thrown away.
        values["vision_config"] = {**values["vision_config"], "num_hidden_layers": 0}
        config = _config_class(values, str(folder)).from_dict(values)
        model = _class_named(facts["record"]["class"])(config)
        tower = _text_tower(folder, model, config)
    return dataclasses.replace(tower, logit_scale=facts["logit_scale"], logit_bias=facts["logit_bias"])


def _open_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    # Without them transformers makes an empty tokenizer and says nothing: every word would be unknown.
    if not any((folder / name).is_file() for name in VOCABULARIES):
        raise FileNotFoundError(f"there is none of {', '.join(VOCABULARIES)} in {folder}")
    with _quiet():
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
