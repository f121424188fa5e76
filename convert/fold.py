"""A finished student for inference: the same function in fewer steps. (Ours.)

At a fixed B the norm of a filter goes into the filter,

    |cos(x, w)|^(B-1) w.x = (|v.x| / |x|)^(B-1) v.x,   v = w |w|^(-(B-1)/B)

and so does the gain of a BatchNorm behind it, which without centring and bias is all that it is. What is left is the
norm of x. Contributions stay what they are: the gate and v change places with the gate and w.
"""

from __future__ import annotations

import copy
from collections import Counter

import torch
from torch import Tensor, nn

from ..core.hooks import hooked
from ..core.pictures import fitted, noise_pictures
from .layers import UncentredBatchNorm
from .layers.bcos import BcosConv2d, BcosLinear
from .layers.scheduled import Rescalable
from .student import IDENTITY_LIMIT, Student, identity_error

__all__ = ["fold"]


@torch.no_grad()
def fold(student: Student) -> nn.Module:
    """A copy of the model of `student` in eval mode, quicker in inference and in `explain`, and nothing else.

    It takes and returns what the model does. Its strengths are not to be moved, and it is not to be saved: save the
    student. BatchNorms that still centre or shift (beta > 0) stay.
    """
    model = copy.deepcopy(student.model).eval()
    for layer in model.modules():
        if isinstance(layer, BcosLinear | BcosConv2d):
            layer.take_norms()
    picture = fitted(noise_pictures(1, student.preprocess.size), model)
    norms = _norms_behind_layers(model, picture)
    if not norms:
        return model
    folded = _without_norms(model, norms)
    # Where something else too reads what stands before a norm, only the output tells.
    return folded if identity_error(folded, model, picture) <= IDENTITY_LIMIT else model


def _without_norms(model: nn.Module, norms: dict[str, str]) -> nn.Module:
    """A copy, in which the gains of norms (name -> the layer before it) are in those layers."""
    model = copy.deepcopy(model)
    for name, before in norms.items():
        norm, layer = model.get_submodule(name), model.get_submodule(before)
        assert isinstance(norm, UncentredBatchNorm) and isinstance(layer, Rescalable)
        layer.rescale(_gain(norm))
        # timm builds drop-out and activation into some norms.
        rest = [getattr(norm, part) for part in ("drop", "act") if hasattr(norm, part)]
        model.set_submodule(name, nn.Sequential(*rest) if rest else nn.Identity())
    return model


def _gain(norm: UncentredBatchNorm) -> Tensor:
    """(C,): what a norm without a shift multiplies by."""
    variance = norm.running_var
    assert variance is not None
    inverse = torch.rsqrt(variance + norm.eps)
    return inverse if norm.weight is None else inverse * norm.weight


def _only_scales(norm: nn.Module) -> bool:
    if not isinstance(norm, UncentredBatchNorm) or norm.running_mean is None or norm.strengths()["carry"]:
        return False
    return not any(constant is not None and constant.any() for constant in (norm.running_mean, norm.bias))


def _norms_behind_layers(model: nn.Module, picture: Tensor) -> dict[str, str]:
    """Norm -> layer, by name, where a norm that only scales reads what a layer without a bias gives; both run once."""
    names = {module: name for name, module in model.named_modules()}
    calls: Counter[nn.Module] = Counter()
    returned: list[tuple[Tensor, nn.Module]] = []
    found: dict[nn.Module, nn.Module] = {}

    def watch(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        calls[module] += 1
        if _only_scales(module):
            found.update((module, layer) for tensor, layer in returned if tensor is args[0])
        elif module.bias is None:
            returned.append((output, module))

    with hooked((module, watch) for module in model.modules() if isinstance(module, Rescalable)):
        model(picture)
    return {names[norm]: names[layer] for norm, layer in found.items() if calls[norm] == calls[layer] == 1}
