"""transformers models as functions of one picture.

A transformers model takes `pixel_values` and returns a named tuple; `TransformersVision` around it takes a picture and
returns one vector. Below its attribute `model` every key is what the library itself calls it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....core.errors import SourceError
from ....core.pictures import noise_pictures
from ..base import Features, call_first
from .files import model_size

__all__ = [
    "HEADS",
    "ImageTower",
    "NaFlexTower",
    "TransformersVision",
    "class_named",
    "features",
    "library_output",
    "set_checkpointing",
    "token_grid",
]


class TransformersVision(nn.Module):
    """A transformers vision model as a function of one picture (B, 3, H, W) -> (B, D).

    Attributes:
        model: the library's model, with its own keys.
        head: key of `HEADS`.
        config: the library's configuration of `model` or of its vision tower.
    """

    def __init__(self, model: nn.Module, head: str, config: Any) -> None:
        super().__init__()
        self.model = _with_picture_towers(model)
        self.head = head
        self.config = config
        self._resizes = _resizes(self.model)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.headed(self._asked(self.model, pictures, self._resizes))

    def _asked(self, model: Any, pictures: Tensor, resizes: bool) -> Any:
        """The output of `model`, which is asked to resample its position table at sizes that are not its own."""
        own, size = model_size(self.config), tuple(pictures.shape[-2:])
        if not resizes or size == own:
            return model(pictures)
        table = any("position_embedding" in name for name, _ in model.named_parameters())
        if table and own is not None and own[0] != own[1]:
            raise SourceError(
                f"{type(model).__name__} is for pictures of {own[0]} x {own[1]}, not {size[0]} x {size[1]}: "
                "transformers resamples square position tables only. Leave --image-size out."
            )
        return model(pictures, interpolate_pos_encoding=True)

    def headed(self, output: Any) -> Tensor:
        """(B, D): what the head takes of the library's own named output."""
        return HEADS[self.head](output)

    def features(self, pictures: Tensor) -> Any:
        """The library's own named output for pictures (B, 3, H, W), of the part in front of a classifier."""
        if self.head != "classifier":
            return self._asked(self.model, pictures, self._resizes)
        return self.inner_output(pictures)

    def inner_output(self, pictures: Tensor) -> Any:
        """The library's own named output of the part that returns the features of all patches."""
        inner = _backbone(self)
        return self._asked(inner, pictures, _resizes(inner))

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


@torch.no_grad()
def library_output(model: Any, head: str, config: Any) -> tuple[Tensor, Tensor] | None:
    """(pictures (1, 3, H, W), outputs (1, D)) of the library's own `model` at its own size; None of other channels.

    It is called as its users call it, before anything of it is replaced here.
    """
    vision = getattr(config, "vision_config", config)
    if getattr(vision, "num_channels", 3) != 3:
        return None
    native = getattr(vision, "num_patches", None) if type(vision).__name__.startswith("Siglip2") else None
    side = vision.patch_size * math.isqrt(native) if native else SIDE
    pictures = noise_pictures(1, model_size(config) or (side, side))
    inputs: tuple[Any, ...] = (pictures,)
    if native:
        patch, rows = vision.patch_size, side // vision.patch_size
        # (1, patches, numbers of one), row by row, with the channels last.
        cut = pictures.unflatten(2, (rows, patch)).unflatten(4, (rows, patch)).permute(0, 2, 4, 3, 5, 1)
        inputs = (
            cut.flatten(3).flatten(1, 2),
            torch.ones(1, rows * rows, dtype=torch.long),
            torch.tensor([[rows] * 2]),
        )
    if head != "classifier" and hasattr(model, "get_image_features"):
        output = model.get_image_features(*inputs) if head == "embedding" else model.vision_model(*inputs)
        return pictures, output if isinstance(output, Tensor) else output["pooler_output"]
    return pictures, HEADS[head](model(*inputs))


SIDE = 64  # pixels: of models without a size of their own


def _with_picture_towers(model: nn.Module) -> nn.Module:
    """`model` with towers that take cut patches replaced by those that take the picture."""
    if type(model).__name__ == "Siglip2VisionModel":
        return NaFlexTower(model)
    for name, module in model.named_children():
        setattr(model, name, _with_picture_towers(module))
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
    last = model.inner_output(pictures).last_hidden_state
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


def _backbone(vision: TransformersVision) -> Any:
    """The part that returns the features of all patches: the model itself, or what its head stands on."""
    model: Any = vision.model
    if vision.head != "classifier" and not isinstance(model, ImageTower):
        return model
    return model.vision_model if hasattr(model, "vision_model") else model.base_model


def class_named(name: Any, config: Any) -> Any:
    """The model class of transformers of that name, which is one for `config`; raises SourceError for any other."""
    import transformers

    found = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise SourceError(f"this transformers has no model class {name!r}. Update transformers.")
    if found.config_class is not type(config):
        raise SourceError(f"{name} is no class of transformers for models of type {config.model_type!r}.")
    return found


def features(network: Any, pictures: Tensor, has_classes: bool) -> Features:
    """What the library calls features of `pictures` (B, 3, H, W); see `Library.features`."""
    output = network.features(pictures)
    pooled = output.get("pooler_output") if has_classes or network.head == "embedding" else network.headed(output)
    return Features(output.get("last_hidden_state"), pooled, output.get("image_embeds"))


def set_checkpointing(model: nn.Module, on: bool) -> bool:
    """The library's own gradient checkpointing; see `Library.set_checkpointing`."""
    return call_first(model, f"gradient_checkpointing_{'enable' if on else 'disable'}")
