"""open_clip's image towers as functions of one picture: (B, 3, H, W) -> (B, D)."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ....core.pictures import noise_pictures
from ..base import Features

__all__ = ["OpenClipVision", "features", "library_output", "token_grid"]


class OpenClipVision(nn.Module):
    """An open_clip image tower as a function (B, 3, H, W) -> (B, D), with open_clip's own keys, `visual.*`."""

    def __init__(self, visual: Any, image_size: int | None = None) -> None:
        super().__init__()
        self.visual: Any = visual
        _accept_any_size(visual, image_size)

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


@torch.no_grad()
def library_output(visual: Any) -> tuple[Tensor, Tensor]:
    """(pictures (1, 3, H, W), outputs (1, D)) of open_clip's own tower at its own size, before anything is changed."""
    size = visual.image_size
    pictures = noise_pictures(1, (size, size) if isinstance(size, int) else tuple(size))
    output = visual(pictures)
    return pictures, output if isinstance(output, Tensor) else output[0]


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


def _accept_any_size(visual: Any, image_size: int | None) -> None:
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


def features(network: Any, pictures: Tensor, has_classes: bool) -> Features:
    """The image embedding; a tower shows no other feature. See `Library.features`."""
    embeds = network(pictures)
    return Features(None, embeds, embeds)
