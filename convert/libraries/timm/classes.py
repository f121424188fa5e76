"""What the outputs of timm's models are, and the names of their classes, as timm's own records say."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..base import CLASSES, FEATURES, REGRESSION, Source

__all__ = ["embeds", "names_of", "output"]

# The data set that weights were trained on last, in timm's tags: `a1_in1k`, `augreg_in21k_ft_in1k`.
IMAGENET = re.compile(r"(?:^|_)(in\d+k)(?=_|$)")


def names_of(name: str, architecture: str, model: nn.Module) -> tuple[tuple[str, ...], str] | None:
    """The names of the classes of the model that timm calls `name`, and where they come from; None without such.

    They are those in the model's own configuration, or ImageNet's where `name` is one of timm's own sets of weights,
    whose tag says that they were trained on it. How many classes there are says nothing.
    """
    config: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    count = getattr(model, "num_classes", 0) or 0
    own = _configured(config)
    if own and len(own) == count:
        return own, "its configuration (label_names)"
    if own:
        warnings.warn(
            f"timm:{name}: its configuration has names for {len(own):,} classes, but it has {count:,} outputs. They "
            "are left out; name the outputs with --labels FILE.",
            stacklevel=2,
        )
        return None
    tag = config.get("tag") or ""
    published = f"timm/{architecture}.{tag}"
    if name.startswith("local-dir:") or (name.startswith("hf-hub:") and _repo(name) != published):
        return None
    return _imagenet(tag, count)


def _configured(config: Mapping[str, Any]) -> tuple[str, ...]:
    """`label_names` (a list, or number -> name), each by its description where `label_descriptions` has one."""
    names, words = config.get("label_names") or (), config.get("label_descriptions") or {}
    if not names and isinstance(words, Sequence) and not isinstance(words, str):
        names, words = words, {}
    if isinstance(names, Mapping):
        found = {str(key): name for key, name in names.items()}
        names = [found[str(index)] for index in range(len(found)) if str(index) in found]
    words = words if isinstance(words, Mapping) else {}
    return tuple(str(words.get(name) or name) for name in names)


def _imagenet(tag: str, count: int) -> tuple[tuple[str, ...], str] | None:
    """ImageNet's names in the order of the set that `tag` names last, of which timm knows several orders by count."""
    from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset

    sets, subset = IMAGENET.findall(tag), infer_imagenet_subset({"num_classes": count})
    if not sets or subset is None or (sets[-1] == "in1k") != (count == 1000):
        return None
    return tuple(ImageNetInfo(subset).label_descriptions()), f"{subset}, by timm's tag {tag}"  # type: ignore[arg-type]


def embeds(architecture: str, model: nn.Module) -> bool:
    """Whether the outputs are CLIP's embeddings: timm calls their width `num_classes`, too."""
    config: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    return _embeds(architecture, config.get("tag") or "", getattr(model, "num_classes", 0) or 0)


def _embeds(architecture: str, tag: str, count: int) -> bool:
    from timm.models import get_pretrained_cfg

    name = f"{architecture}.{tag}"
    if "clip" not in name or IMAGENET.search(tag):
        return False
    known = None
    with contextlib.suppress(RuntimeError):  # a tag that timm does not know: somebody's own weights
        known = get_pretrained_cfg(name if tag else architecture)
    return known is not None and known.num_classes == count


def output(source: Source, count: int) -> str:
    """What the `count` outputs of a model are, by its reference."""
    tag = source.reference.rpartition("/")[2].partition(".")[2].partition("@")[0]
    if not count or (tag and _embeds(source.architecture, tag, count) and source.weights is None):
        return FEATURES
    return CLASSES if count > 1 else REGRESSION


def _repo(name: str) -> str:
    return name.removeprefix("hf-hub:").partition("@")[0]
