"""Layer-wise relevance by rules on the gradient: input times a gradient whose way through some operations is changed.

AttnLRP and LibraGrad hold the same things: a normaliser's deviation, and an activation f(x) as x times a constant gate;
a product of two factors that move gives each a half. They differ in attention. LibraGrad holds who looks where, as
CP-LRP (Ali et al. 2022, arXiv 2202.07304) does; so does `explanation` of an unconverted model, which is therefore the
same map. AttnLRP gives the matrix a half of what was seen, and queries and keys a half of that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...core.errors import NotApplicable
from ...explain.self_explaining import main_output
from ..decisions import Decisions
from ..subject import Subject
from .attention import SOFTMAX
from .registry import method

ACTIVATIONS = (F.gelu, F.silu, F.mish, F.hardswish, F.elu, F.selu, F.celu, F.leaky_relu, F.softsign)
PRODUCTS = (torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__)
PRODUCTS += (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm)
QUOTIENTS = (torch.div, Tensor.div, Tensor.__truediv__)
HELD = (torch.sigmoid, Tensor.sigmoid, F.sigmoid, torch.rsqrt, Tensor.rsqrt)
CONVERTED = ("bcosify.convert.layers.", "bcosify.convert.methods.")
ATTENTION = (F.scaled_dot_product_attention, F.multi_head_attention_forward)


class RelevanceRules(TorchFunctionMode):
    """Inside, values are the model's and gradients follow the rules; `attention` counts the calls that had one.

    With `matrices` attention's matrices pass relevance on (AttnLRP), without they are held (LibraGrad).
    """

    def __init__(self, matrices: bool) -> None:
        super().__init__()
        self.matrices = matrices
        self.attention = 0

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in ATTENTION:
            self.attention += 1
            given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            for name, share in {"query": 1 / 4, "key": 1 / 4, "value": 1 / 2}.items():
                share = share if self.matrices else float(name == "value")
                given[name] = _passing(given[name], share)
            return func(given.pop("query"), given.pop("key"), given.pop("value"), *args[3:], **given)
        if func in SOFTMAX:
            output = func(*args, **kwargs)
            self.attention += output.dim() == 4
            return output if self.matrices else output.detach()
        if func in HELD:
            return func(*args, **kwargs).detach()
        if func in QUOTIENTS and all(map(_moves, args[:2])):
            return func(args[0], args[1].detach(), *args[2:], **kwargs)
        if func in PRODUCTS and all(map(_moves, args[:2])):
            return _passing(func(*args, **kwargs), 1 / 2)
        if func in ACTIVATIONS and _moves(args[0]):
            value = func(
                args[0].detach(), *args[1:], **{**kwargs, **({"inplace": False} if "inplace" in kwargs else {})}
            )
            gate = torch.where(args[0] == 0, 0, value / args[0]).detach()
            return args[0] * gate + (value - args[0] * gate).detach()
        if func is F.layer_norm:
            return _layer_norm(*args, **kwargs)
        if func is getattr(F, "rms_norm", None):
            return _rms_norm(*args, **kwargs)
        return func(*args, **kwargs)


def _moves(factor: Any) -> bool:
    return isinstance(factor, Tensor) and factor.requires_grad


def _passing(value: Tensor, share: float) -> Tensor:
    """`value`, through which that share of a gradient goes."""
    return value if share == 1 else value.detach() + (share * value - (share * value).detach())


def _layer_norm(
    input: Tensor, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Tensor:
    dims = tuple(range(-len(normalized_shape), 0))
    centred = input - input.mean(dims, keepdim=True)
    output = centred * (centred.detach().square().mean(dims, keepdim=True) + eps).rsqrt()
    output = output if weight is None else output * weight
    return output if bias is None else output + bias


def _rms_norm(input: Tensor, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> Tensor:
    dims = tuple(range(-len(normalized_shape), 0))
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    output = input * (input.detach().square().mean(dims, keepdim=True) + eps).rsqrt()
    return output if weight is None else output * weight


@contextlib.contextmanager
def _weights_held(model: nn.Module) -> Iterator[None]:
    """Inside only what comes of the picture asks for a gradient."""
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in asking:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


def _relevance(subject: Subject, images: Tensor, decisions: Decisions, matrices: bool) -> Tensor:
    if any(type(module).__module__.startswith(CONVERTED) for module in subject.model.modules()):
        raise NotApplicable("its layers are converted, for which there are no such rules; `explanation` is exact")
    with torch.enable_grad(), _weights_held(subject.model):
        with RelevanceRules(matrices) as rules:
            score = decisions.scores(main_output(subject.model(images.requires_grad_()))).sum()
        (gradient,) = torch.autograd.grad(score, images)
    if matrices and not rules.attention:
        raise NotApplicable("no attention was seen in this model; without it the rules are those of `libragrad`")
    return (images * gradient).sum(1)


@method("attn-lrp", 2, "Achtibat et al. 2024, arXiv 2402.05602; epsilon rule in linear layers")
def _attn_lrp(subject: Subject, images: Tensor, decisions: Decisions, seed: int) -> Tensor:
    return _relevance(subject, images, decisions, matrices=True)


@method("libragrad", 2, "Mehri et al. 2024, arXiv 2411.16760; input times Libra's gradient")
def _libragrad(subject: Subject, images: Tensor, decisions: Decisions, seed: int) -> Tensor:
    return _relevance(subject, images, decisions, matrices=False)
