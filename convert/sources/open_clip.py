"""open_clip models: `open_clip:ARCH/TAG`, `open_clip:hf-hub:ORG/NAME[@rev]`, `open_clip:local-dir:PATH`.

The teacher is the image tower, whose output is the image embedding before it is normalised; the text tower is kept
beside it. Weights are opened from safetensors only: of a tag whose published file is a pickle the hub's safetensors
twin is taken, or the tag is refused.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ...core.errors import CheckpointError, SourceError, near_miss
from ...core.quiet import quiet
from .teacher import Preprocess, Source, Teacher
from .text import TextTower
from .timm import check_buildable
from .weights import misfit, mismatches, read_weights

__all__ = ["OpenClipVision", "build", "load", "open_text", "token_grid"]

CONFIG = "open_clip_config.json"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "model.safetensors")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".npz")
# The half that is not wanted, as small as its constructor allows.
TINY_TEXT: dict[str, Any] = {"context_length": 4, "vocab_size": 4, "width": 8, "heads": 1, "layers": 1}
TINY_VISION: dict[str, Any] = {"image_size": 8, "patch_size": 8, "width": 8, "head_width": 8, "layers": 1}
FAILURES = (AssertionError, AttributeError, KeyError, OSError, RuntimeError, SafetensorError, TypeError, ValueError)


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
    with _said_plainly(name), quiet():
        place = _locate(name, published)
        config: Any = copy.deepcopy(open_clip.get_model_config(place.model))
        _check_size(name, config["vision_cfg"], image_size)
        # A trunk of timm's is resized once its weights are in it.
        forced = None if "timm_model_name" in config["vision_cfg"] else image_size
        if forced is not None:
            config["vision_cfg"]["image_size"] = forced
        if place.quick_gelu is not None:
            config["quick_gelu"] = place.quick_gelu
        options: dict[str, Any] = {} if place.quick_gelu is None else {"quick_gelu": place.quick_gelu}
        model: Any = open_clip.create_model(
            place.model,
            load_weights=False,
            pretrained_text=False,
            force_image_size=forced,
            force_preprocess_cfg=place.preprocess,
            **options,
        )
        has_text = True
        if weights is not None:
            has_text = _load_own(model, weights)
        elif place.weights is not None:
            open_clip.load_checkpoint(model, str(place.weights), strict=True)
        vision = OpenClipVision(model.visual, image_size)
        preprocess = _preprocess(model.visual.preprocess_cfg, model.visual.image_size)
        args = {"config": _vision_config(config), "image_size": image_size}
        source = Source(f"open_clip:{name}", "open_clip", place.architecture, args, place.revision)
        text = _text_tower(model, config, place.tokenizer or place.model) if has_text else None
    return Teacher(vision.eval(), source, preprocess, None, text)


def build(source: Source) -> nn.Module:
    """The empty skeleton of the image tower of `source`: random weights, no network."""
    import open_clip

    config, text = source.model_args["config"], open_clip.CLIPTextCfg(**TINY_TEXT)
    if trunk := config["vision_cfg"].get("timm_model_name"):
        check_buildable(trunk, {"pretrained": config["vision_cfg"].get("timm_model_pretrained")})
    with _said_plainly(source.architecture), quiet():
        # CoCa's image tower is built as CLIP's; its class would build a text decoder too.
        model = open_clip.CustomTextCLIP(config["embed_dim"], config["vision_cfg"], text, config["quick_gelu"])
    return OpenClipVision(model.visual, source.model_args["image_size"]).eval()


# ------------------------------------------------------------------------------------------------------ the wrapper


class OpenClipVision(nn.Module):
    """An open_clip image tower as a function (B, 3, H, W) -> (B, D), with open_clip's own keys, `visual.*`."""

    def __init__(self, visual: Any, image_size: int | None = None) -> None:
        super().__init__()
        self.visual: Any = visual
        _take_any_size(visual, image_size)

    def forward(self, pictures: Tensor) -> Tensor:
        return self._run(self.visual, pictures)

    def forward_tokens(self, pictures: Tensor) -> Tensor:
        """(B, C, rows, columns): the normalised tokens or the last map, before they are pooled."""
        return self._run(_Tokens(self.visual), pictures)

    def _run(self, module: nn.Module, pictures: Tensor) -> Tensor:
        table = getattr(self.visual, "positional_embedding", None)
        if isinstance(table, Tensor) and pictures.shape[-2:] != tuple(self.visual.image_size):
            table = _resized(table, self.visual, pictures.shape[-2:])
            name = "positional_embedding" if module is self.visual else "visual.positional_embedding"
            output = torch.func.functional_call(module, {name: table}, (pictures,))
        else:
            output = module(pictures)
        return output if isinstance(output, Tensor) else output[0]


class _Tokens(nn.Module):
    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual

    def forward(self, pictures: Tensor) -> Tensor:
        # The last norm of a tower with an attention pool stands behind the pool.
        norm = getattr(self.visual, "attn_pool", None) is None
        found = self.visual.forward_intermediates(  # type: ignore[operator]
            pictures, indices=1, normalize_intermediates=norm, intermediates_only=True
        )
        return found["image_intermediates"][-1]


def token_grid(model: nn.Module, pictures: Tensor) -> Tensor:
    """(B, C, rows, columns): the last features of every patch, in front of pooling, from pictures (B, 3, H, W)."""
    assert isinstance(model, OpenClipVision)
    return model.forward_tokens(pictures)


def _resized(table: Tensor, visual: Any, size: Sequence[int]) -> Tensor:
    """A position table (1 + N, C) for pictures of `size`, as open_clip's `force_image_size` makes it."""
    from open_clip.model import resize_pos_embed

    height, width = (side // patch for side, patch in zip(size, visual.patch_size, strict=True))
    state = {"visual.positional_embedding": table}
    resize_pos_embed(state, SimpleNamespace(visual=SimpleNamespace(grid_size=(height, width))))
    return state["visual.positional_embedding"]


def _take_any_size(visual: Any, image_size: int | None) -> None:
    """Lets a timm trunk with a position table take other sizes, as timm's `dynamic_img_size` does when it is built.

    Trunks that cannot are set to `image_size`, once, where timm has a way to.
    """
    from timm.layers.format import Format

    trunk = getattr(visual, "trunk", None)
    embed = getattr(trunk, "patch_embed", None)
    if getattr(trunk, "dynamic_img_size", None) is False and getattr(embed, "flatten", False):
        assert trunk is not None and embed is not None
        trunk.dynamic_img_size = True
        embed.flatten, embed.output_fmt, embed.strict_img_size = False, Format.NHWC, False
    elif image_size is not None and hasattr(trunk, "set_input_size"):
        visual.set_input_size(image_size)


def _check_size(name: str, vision: Mapping[str, Any], size: int | None) -> None:
    if size is not None and isinstance(vision.get("layers"), list) and size != vision["image_size"]:
        raise SourceError(
            f"open_clip:{name} takes pictures of {vision['image_size']} pixels only, not {size}: its attention pool "
            "has a position table that open_clip does not resize. Leave --image-size out."
        )


# -------------------------------------------------------------------------------------------------------- opening


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a reference leads: what open_clip calls the model, its safetensors file, and what the tag says."""

    model: str
    architecture: str
    weights: Path | None = None
    revision: str | None = None
    preprocess: dict[str, Any] | None = None
    quick_gelu: bool | None = None
    tokenizer: str | None = None


def _locate(name: str, published: bool) -> _Place:
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
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    listed = ", ".join(sorted(tags)) or "none"
    if not tag:
        if published:
            raise SourceError(
                f"open_clip:{name} names no weights. Pass open_clip:{architecture}/TAG (tags: {listed}), "
                "or --weights FILE.safetensors, or --no-pretrained."
            )
        return _Place(architecture, architecture)
    if tag not in tags:
        raise SourceError(
            f"open_clip's {architecture} has no weights tagged {tag!r}.{near_miss(tag, tags)} It has: {listed}."
        )
    config = open_clip.get_pretrained_cfg(architecture, tag)
    keys = ("mean", "std", "interpolation", "resize_mode")
    place = _Place(
        architecture,
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


def _local(name: str, published: bool) -> _Place:
    folder = Path(name.removeprefix("local-dir:")).expanduser()
    if not (folder / CONFIG).is_file():
        raise SourceError(f"open_clip:{name}: there is no {CONFIG} in this folder; it is no open_clip model folder.")
    _check_config(folder / CONFIG, name)
    weights = next((folder / file for file in WEIGHTS if (folder / file).is_file()), None)
    if published and weights is None:
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
        found = f"only {', '.join(pickles)}. {_PICKLE}" if pickles else f"no weights ({WEIGHTS[0]})."
        raise SourceError(f"open_clip:{name} holds {found}")
    return _Place(f"local-dir:{folder}", name, weights if published else None)


def _from_hub(name: str, published: bool) -> _Place:
    """A hub repository, fetched file by file into one snapshot, then opened as the local folder that it is."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    repository, _, revision = name.removeprefix("hf-hub:").partition("@")
    config = Path(hf_hub_download(repository, CONFIG, revision=revision or None))
    _check_config(config, name)
    commit = config.parent.name
    weights = None
    for file in WEIGHTS[: 2 if published else 0]:
        with contextlib.suppress(RemoteEntryNotFoundError):
            weights = weights or Path(hf_hub_download(repository, file, revision=commit))
    if published and weights is None:
        raise SourceError(f"open_clip:{name} holds no {WEIGHTS[0]}. {_PICKLE}")
    # The configuration names the tokenizer's repository, which may be another one.
    return _Place(f"local-dir:{config.parent}", name, weights, commit, tokenizer=f"hf-hub:{repository}")


_PICKLE = (
    "Pickles can run code and are never opened. Where you trust the file, convert it once: "
    'safetensors.torch.save_file(open_clip.create_model(ARCH, TAG).state_dict(), "weights.safetensors"), then pass '
    "open_clip:ARCH --weights weights.safetensors."
)


def _check_config(path: Path, name: str) -> None:
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise SourceError(f"open_clip:{name}: {CONFIG} is not JSON: {error}") from error
    missing = {"embed_dim", "vision_cfg", "text_cfg"} - set((values or {}).get("model_cfg") or {})
    if missing:
        raise SourceError(f"open_clip:{name}: {CONFIG} has no {', '.join(sorted(missing))} in its model_cfg.")


def _load_own(model: Any, path: Path) -> bool:
    """Loads a state dict of the whole model, or of its image tower alone; whether it was the whole."""
    from open_clip.convert import convert_state_dict
    from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed

    state = convert_state_dict(model, read_weights(path))
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    resize_pos_embed(state, model)
    wanted = model.state_dict()
    whole = not all(key.startswith("visual.") for key in state)
    if not whole:
        wanted = {key: value for key, value in wanted.items() if key.startswith("visual.")}
    for key in ("logit_scale", "logit_bias"):  # a number or a vector of one, by version
        if key in wanted and key in state and state[key].numel() == 1:
            state[key] = state[key].reshape(wanted[key].shape)
    faults = mismatches(wanted, state)
    if faults:
        raise misfit(path, type(model).__name__, faults)
    model.load_state_dict(state, strict=whole)
    return whole


def _vision_config(config: dict[str, Any]) -> dict[str, Any]:
    """What builds the image tower again; no published weights of its trunk."""
    vision = {**config["vision_cfg"], "timm_model_pretrained": False}
    return {
        "embed_dim": config["embed_dim"],
        "vision_cfg": vision,
        "quick_gelu": bool(config.get("quick_gelu", False)),
    }


def _preprocess(values: Mapping[str, Any], size: Sequence[int] | int) -> Preprocess:
    modes = {"shortest": "center", "longest": "border", "squash": "squash"}
    height, width = (size, size) if isinstance(size, int) else size
    return Preprocess(
        size=(height, width),
        mean=_three(values["mean"]),
        std=_three(values["std"]),
        interpolation=values["interpolation"],
        crop_mode=modes[values["resize_mode"]],
        library="open_clip",
        fill=values["fill_color"],
    )


def _three(values: float | Sequence[float]) -> tuple[float, float, float]:
    return (values,) * 3 if isinstance(values, int | float) else tuple(values)  # type: ignore[return-value]


# ----------------------------------------------------------------------------------------------------------- text


def _text_tower(model: Any, config: dict[str, Any], name: str) -> TextTower:
    """The text half of `model`, which loses its image half (and CoCa's caption decoder)."""
    for part in ("visual", "text_decoder"):
        if hasattr(model, part):
            delattr(model, part)
    bias = getattr(model, "logit_bias", None)

    def tokenizer() -> Callable[[Sequence[str]], Any]:
        import open_clip

        with quiet():
            return open_clip.get_tokenizer(name)  # type: ignore[return-value]

    def write(out: Path) -> None:
        _write_text(model, config, tokenizer, out)

    return TextTower(
        library="open_clip",
        model=model.eval(),
        record={"class": type(model).__name__},
        logit_scale=float(model.logit_scale.detach().exp()),
        logit_bias=None if bias is None else float(bias.detach()),
        encode=lambda model, tokens: model.encode_text(tokens, normalize=False),  # type: ignore[operator]
        tokenizer=tokenizer,
        write=write,
    )


def _write_text(model: Any, config: dict[str, Any], tokenizer: Callable[[], Any], out: Path) -> None:
    """open_clip's own configuration, and the files of a tokenizer or text encoder that are transformers'."""
    config = copy.deepcopy(config)
    encoder: Any = getattr(model, "text", None)
    if config["text_cfg"].get("hf_model_name") and hasattr(encoder, "config"):
        encoder.config.save_pretrained(out)
    if config["text_cfg"].get("hf_tokenizer_name"):
        # A student is worth having without its tokenizer too: `embed` then says what is missing.
        with contextlib.suppress(*FAILURES, ImportError):
            tokenizer().tokenizer.save_pretrained(out)  # type: ignore[attr-defined]
    (out / CONFIG).write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}, indent=2))


def open_text(folder: Path, facts: Mapping[str, Any]) -> TextTower:
    """The text tower in `folder`, with random weights, as `save` described it."""
    import open_clip

    with _said_plainly(str(folder)), quiet():
        config = json.loads((folder / CONFIG).read_text())["model_cfg"]
        # As dictionaries, which all three classes take: what they make of them is theirs.
        text_cfg: Any = {**config["text_cfg"], "hf_model_pretrained": False}
        vision_cfg: Any = TINY_VISION
        if text_cfg.get("hf_model_name"):
            text_cfg["hf_model_name"] = str(folder)
        options = {key: value for key, value in config.items() if key in ("quick_gelu", "init_logit_bias")}
        custom = facts["record"]["class"] != "CLIP"
        if facts["record"]["class"] == "CoCa":
            model: Any = open_clip.CoCa(config["embed_dim"], cast(Any, TINY_TEXT), text_cfg, vision_cfg, **options)
        else:
            model_class = open_clip.CustomTextCLIP if custom else open_clip.CLIP
            model = model_class(config["embed_dim"], vision_cfg, text_cfg, **options)
        tower = _text_tower(model, config, f"local-dir:{folder}")
    return dataclasses.replace(tower, logit_scale=facts["logit_scale"], logit_bias=facts["logit_bias"])


@contextlib.contextmanager
def _said_plainly(name: str) -> Iterator[None]:
    """Turns what open_clip and the hub raise into one SourceError with what to do next."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    reached = (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, ConnectionError, TimeoutError)
    try:
        yield
    except (SourceError, CheckpointError):
        raise
    except HFValidationError as error:
        raise SourceError(f"open_clip:{name}: no name of a hub repository (ORG/NAME): {error}") from error
    except reached as error:
        said = str(error).splitlines() or [type(error).__name__]
        raise SourceError(
            f"open_clip:{name}: the files cannot be reached ({said[0]}). Check the name and the connection, or pass "
            "--weights FILE.safetensors, or --no-pretrained for random weights, or use a local folder: "
            "open_clip:local-dir:PATH."
        ) from error
    except FAILURES as error:
        said = " ".join(line.strip() for line in str(error).splitlines()[:3]) or type(error).__name__
        raise SourceError(f"open_clip:{name}: open_clip cannot build it: {said}") from error
