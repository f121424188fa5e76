"""open_clip references become teachers: the image tower, whose output is the embedding before it is normalised.

The text tower is kept beside it.
"""

from __future__ import annotations

import contextlib
import copy
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ....core.errors import SourceError
from ....core.quiet import quiet
from ....core.tensors import mismatches
from ..base import Source, Teacher
from ..comparison import check_outputs
from ..weights import mismatch_error, own_weights, read_weights, tell
from .errors import translate_errors
from .files import CONFIG, Place, fetched_encoder, locate
from .preprocess import preprocess_of
from .settings import checked_settings, encoder_folder
from .text import TINY_TEXT, text_tower
from .towers import OpenClipVision, library_output

__all__ = ["build", "load", "load_options"]


def load(name: str, *, pretrained: bool = True, weights: Path | None = None, image_size: int | None = None) -> Teacher:
    """The image tower of the open_clip model `name`, with its text tower beside it.

    Args:
        name: `ARCH/TAG`; `ARCH` with `weights` or without `pretrained`; or one behind `hf-hub:` / `local-dir:`.
        pretrained: False keeps random weights; only the configuration is read.
        weights: a safetensors state dict of the whole model or of its image tower (`visual.*`) alone.
        image_size: side in pixels to build the tower at, where it is not its own.

    Raises:
        SourceError: unknown architecture or tag, weights that cannot be had, only as a pickle, or of another model.
    """
    import open_clip

    published = pretrained and weights is None
    with translate_errors(name), quiet():
        place = locate(name, published)
        config: Any = copy.deepcopy(place.settings)
        check_size(name, config["vision_cfg"], image_size)
        # A trunk of timm's is resized once its weights are in it.
        forced = None if "timm_model_name" in config["vision_cfg"] else image_size
        if forced is not None:
            config["vision_cfg"]["image_size"] = forced
        if place.quick_gelu is not None:
            config["quick_gelu"] = place.quick_gelu
        options: dict[str, Any] = {} if place.quick_gelu is None else {"quick_gelu": place.quick_gelu}
        with _settings_folder(config, place) as folder:
            model: Any = open_clip.create_model(
                f"local-dir:{folder}",
                load_weights=False,
                pretrained_text=False,
                force_image_size=forced,
                force_preprocess_cfg=place.preprocess,
                **options,
            )
        has_text, said = True, ""
        if weights is not None:
            has_text, said = _load_own(model, weights)
        elif place.weights is not None:
            open_clip.load_checkpoint(model, str(place.weights), strict=True)
        own = library_output(model.visual.eval()) if image_size is None else None
        vision = OpenClipVision(model.visual, image_size).eval()
        preprocess = preprocess_of(model.visual.preprocess_cfg, model.visual.image_size, f"open_clip:{name}")
        if own is not None:
            check_outputs(f"open_clip:{name}", vision, own[1], own[0], place.architecture)
        args = {"config": _vision_config(config), "image_size": image_size}
        source = Source(f"open_clip:{name}", "open_clip", place.architecture, args, place.revision)
        text = text_tower(model, config, place.folder) if has_text else None
    tell(said)
    return Teacher(vision, source, preprocess, None, text)


@contextlib.contextmanager
def _settings_folder(settings: Mapping[str, Any], place: Place) -> Iterator[str]:
    """A folder with checked settings and nothing else, so that open_clip reads these and no others."""
    settings, text = dict(settings), dict(settings["text_cfg"])
    if name := text.get("hf_model_name"):
        text["hf_model_name"] = encoder_folder(fetched_encoder(name), name)
    with tempfile.TemporaryDirectory(prefix="bcosify-open-clip-") as folder:
        values = {"model_cfg": {**settings, "text_cfg": text}, "preprocess_cfg": place.own_preprocess}
        (Path(folder) / CONFIG).write_text(json.dumps(values))
        yield folder


def build(source: Source) -> nn.Module:
    """The empty skeleton of the image tower of `source`: random weights, no network."""
    import open_clip

    config = checked_settings({**source.model_args["config"], "text_cfg": TINY_TEXT}, source.reference)
    text = open_clip.CLIPTextCfg(**TINY_TEXT)
    with translate_errors(source.architecture), quiet():
        # CoCa's image tower is built as CLIP's; its class would build a text decoder too.
        model = open_clip.CustomTextCLIP(config["embed_dim"], config["vision_cfg"], text, config["quick_gelu"])
    return OpenClipVision(model.visual, source.model_args["image_size"]).eval()


def check_size(name: str, vision: Mapping[str, Any], size: int | None) -> None:
    if size is not None and isinstance(vision.get("layers"), list) and size != vision["image_size"]:
        raise SourceError(
            f"open_clip:{name} takes pictures of {vision['image_size']} pixels only, not {size}: its attention pool "
            "has a position table that open_clip does not resize. Leave --image-size out."
        )


def _load_own(model: Any, path: Path) -> tuple[bool, str]:
    """Loads a state dict of the whole model, or of its image tower alone: (whether it was the whole, what was done)."""
    from open_clip.convert import convert_state_dict
    from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed

    def resampled(state: dict[str, Any]) -> dict[str, Any]:
        state = convert_state_dict(model, state)
        if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
            state = convert_to_custom_text_state_dict(state)
        resize_pos_embed(state, model)
        return state

    state, said = own_weights(path, read_weights(path), model.state_dict(), resampled)
    wanted = model.state_dict()
    whole = not all(key.startswith("visual.") for key in state)
    if not whole:
        wanted = {key: value for key, value in wanted.items() if key.startswith("visual.")}
    for key in ("logit_scale", "logit_bias"):  # a number or a vector of one, by version
        if key in wanted and key in state and state[key].numel() == 1:
            state[key] = state[key].reshape(wanted[key].shape)
    faults = mismatches(wanted, state)
    if faults:
        raise mismatch_error(path, type(model).__name__, faults)
    model.load_state_dict(state, strict=whole)
    return whole, said


def _vision_config(config: dict[str, Any]) -> dict[str, Any]:
    """What builds the image tower again; no published weights of its trunk."""
    vision = {**config["vision_cfg"], "timm_model_pretrained": False}
    return {
        "embed_dim": config["embed_dim"],
        "vision_cfg": vision,
        "quick_gelu": bool(config.get("quick_gelu", False)),
    }


def load_options(source: Source) -> dict[str, Any]:
    """The options of `load` that make the teacher of `source` again."""
    return {"image_size": source.model_args.get("image_size")}
