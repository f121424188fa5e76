"""The ledger of one explanation: which tensors move with the input, and what the constants put into the score.

With its gates frozen a model is affine, so a score is  s = W(x)·x + Σ_j c_j.  Every c_j enters somewhere as a summand:
a tensor `out` on its way to the score is (something that moves with the input) + c. The share that this c has in the
score is the score's gradient at `out`, times c. So a constant costs one hook on a graph tensor, which the backward pass
that brings W(x) fires anyway: one backward pass fills the whole ledger, exactly and for each picture of the batch.

Tensors that move are those that require grad. Everything else has a name, handed on from the model's parameters and
buffers to what is computed from them, so that the ledger can say `blocks.0.attn.proj.bias` and not "remainder".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from ..core.errors import LedgerError

__all__ = [
    "Ledger",
    "continuous",
    "follows_input",
    "frozen",
    "leaves",
    "pulled",
    "tensors",
    "with_gradient_of",
    "write",
]

# What arguments and results are nested in.
NESTS = (tuple, list, dict)

Names = tuple[str, ...]

LITERAL: Names = ("literal",)
UNNAMED: Names = ("unnamed",)
# The name of what an operation without a rule returned. It is never entered, so that the ledger cannot balance.
UNKNOWN = "?"


def follows_input(value: object) -> TypeGuard[Tensor]:
    """Whether `value` is a tensor that moves with the explained input."""
    return isinstance(value, Tensor) and value.requires_grad


def frozen(value: Any) -> Any:
    """`value` with each tensor in it cut from the input; those that do not move with it are themselves."""
    return _each_tensor(lambda tensor: tensor.detach() if tensor.requires_grad else tensor, value)


def _each_tensor(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`value` with `change` of each tensor in it."""
    # What most calls are made of is taken apart here: torch's trees cost more than many of the operations themselves.
    if isinstance(value, Tensor):
        return change(value)
    if type(value) is tuple:
        return tuple([_each_tensor(change, item) for item in value])
    if isinstance(value, NESTS) and any(isinstance(leaf, Tensor) for leaf in leaves(value)):
        return tree_map_only(Tensor, change, value)
    return value


def continuous(value: object) -> TypeGuard[Tensor]:
    """Whether `value` is a tensor that can carry a derivative."""
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in `value`, however nested, that can carry a derivative."""
    return filter(continuous, leaves(value))


def leaves(value: Any) -> list[Any]:
    """What is in `value`, however nested."""
    if not isinstance(value, NESTS):
        return [value]
    found: list[Any] = []
    for item in value.values() if isinstance(value, dict) else value:
        if isinstance(item, NESTS):
            found += leaves(item)
        else:
            found.append(item)
    return found


def with_gradient_of(value: Tensor, linear: Tensor) -> Tensor:
    """`linear`, a fresh tensor, with its values (and strides) replaced by `value`: the model's own, bit for bit.

    A rule thus only chooses the derivative. What it gets wrong shows as a ledger that does not balance, never as
    another output.
    """
    linear.data = value.detach()
    return linear


def pulled(value: Tensor, input: Tensor, pull: Callable[..., Tensor], *kept: Tensor) -> Tensor:
    """`value`, a fresh tensor, as a linear function of `input` whose transpose is pull(gradient, *kept).

    As `with_gradient_of`, for rules that know the derivative: the linear function itself is never computed.
    """
    return _Pulled.apply(input, value, pull, *kept)


class _Pulled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, value: Tensor, pull: Callable[..., Tensor], *kept: Tensor) -> Tensor:
        ctx.pull = pull
        ctx.save_for_backward(*kept)
        return value.data  # no view of it, so that the model may write into what it gets

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.pull(grad, *ctx.saved_tensors), *[None] * (len(ctx.needs_input_grad) - 1)


def write(target: Tensor, value: Tensor) -> None:
    """target.copy_(value), without the zeros that torch makes up as the gradient of what stood in a whole tensor."""
    if target._base is None and target.shape == value.shape and not target.is_leaf:
        _Written.apply(target, value)
    else:
        target.copy_(value)


class _Written(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, target: Tensor, value: Tensor) -> Tensor:
        ctx.mark_dirty(target)
        ctx.dtype = value.dtype
        return target.copy_(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad.to(ctx.dtype)


class Ledger:
    """What is explained, what moves, and what has entered the score besides it.

    A graph that was built under one ledger is pulled by that ledger; none of it outlives the graph.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self.images: list[Tensor] = []
        self.encodings: list[Tensor] = []
        self.unknown: dict[str, int] = {}
        # Whether the graph is pulled for the last time, so that what it keeps may be written over.
        self.last = False
        # Whether the graph is pulled with carriers as constants: what goes through none of them is the direct part.
        self.direct = False
        self._names: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._gates: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._shares: dict[str, Tensor] = {}
        self._carried: dict[str, Tensor] = {}
        # Of biases, by name: which share of them counts as carried (see `carry`).
        self._carried_shares: dict[str, float] = {}
        # Whether part of a bias is carried by what it is added to.
        self.has_carriers = False
        # A zero that requires grad: a constant plus the anchor can be written over something that moves.
        self._anchor = torch.zeros((), requires_grad=True)
        if model is not None:
            for name, tensor in [
                *model.named_parameters(remove_duplicate=False),
                *model.named_buffers(remove_duplicate=False),
            ]:
                self._names.setdefault(tensor, (name,))

    # -------------------------------------------------------------------------------------------------------- the input

    @property
    def inputs(self) -> list[Tensor]:
        """The explained leaves: what the model encoded of the images, or else the images."""
        return self.encodings or self.images

    def follow(self, images: Tensor) -> Tensor:
        """Makes a copy of `images` (B, ...) an explained leaf; returns what to feed to the model."""
        leaf = images.detach().clone().requires_grad_()
        self.images.append(leaf)
        # The model gets a copy, because it may write into its input, and autograd forbids to write into a leaf.
        return leaf.clone()

    def encode(self, encoding: Tensor) -> Tensor:
        """As `follow`, for what the model made of the images by itself: the leaf, to be used within the graph."""
        leaf = encoding.detach().clone().requires_grad_()
        self.encodings.append(leaf)
        return leaf

    # ------------------------------------------------------------------------------------------------------------ names

    def names(self, value: object) -> Names:
        """What `value` is called in the ledger: a tensor by its origin, a string as it says, a number "literal"."""
        if isinstance(value, str):
            return (value,)
        return (self._names.get(value) or UNNAMED) if isinstance(value, Tensor) else LITERAL

    def called(self, value: object) -> str:
        """The names of `value`, joined: `attn.q_bias+v_bias` where it was computed from two tensors of one layer."""
        first, *rest = self.names(value)
        parent = first.rpartition(".")[0]
        return "+".join([first, *(name.removeprefix(f"{parent}.") if parent else name for name in rest)])

    def detach(self, value: Any) -> Any:
        """`value` fit to be an argument: parameters cut from their gradient, so that only the input moves."""
        return _each_tensor(self._detached, value)

    def name(self, result: Any, names: Iterable[str]) -> Any:
        """Names those tensors of `result` that do not move, beside the names that they have."""
        for tensor in tensors(result):
            if not tensor.requires_grad:
                self._names[tensor] = _merged([self._names.get(tensor) or (), names])
        return result

    def inherit(self, result: Any, sources: Any) -> Any:
        """Names those tensors of `result` that neither move nor have a name after what they were computed from."""
        still = [tensor for tensor in tensors(result) if not tensor.requires_grad]
        sources = list(tensors(sources)) if still else []
        for tensor in still:
            # What was written to in place is a source of its own.
            if tensor not in self._names or any(tensor is source for source in sources):
                self.name(tensor, _merged(self._names.get(source) or () for source in sources))
        return result

    def distrust(self, result: Any, operation: str) -> Any:
        """Counts `operation` as one without a rule: its `result` is frozen, but enters no ledger."""
        if any(True for _ in tensors(result)):
            self.unknown[operation] = self.unknown.get(operation, 0) + 1
            self.name(result, (UNKNOWN,))
        return result

    # ------------------------------------------------------------------------------------------------------------ gates

    def gates(self, value: object) -> bool:
        """Whether (a tensor in) `value` moves, but is to be frozen where it multiplies something else that moves."""
        return bool(self._gates) and any(tensor in self._gates for tensor in tensors(value))

    def mark(self, value: Any, gate: bool = True) -> Any:
        """Says whether the tensors in `value` are such gates."""
        for tensor in tensors(value):
            if gate:
                self._gates[tensor] = True
            else:
                self._gates.pop(tensor, None)
        return value

    # -------------------------------------------------------------------------------------------------------- constants

    def enter(
        self,
        out: Tensor,
        constant: Tensor | complex,
        source: object,
        response: Callable[[], Tensor] | None = None,
    ) -> None:
        """Enters `constant`, which broadcasts to `out` and is a summand of it, under the name of `source`.

        `response` gives the rest of `out`, where that is known better than by a difference: it carries the constant.
        """
        if UNKNOWN in self.names(source) or not follows_input(out):
            return
        constant = torch.as_tensor(constant, device=out.device).detach()
        if not constant.any():
            return
        if share := self.carried_share(source):
            rest = out.detach() - constant if response is None else response().detach().expand_as(out)
            out.register_hook(self._carrier(rest, constant, self.called(source), share))
        else:
            out.register_hook(partial(self._add, self.called(source), constant))

    def carry(self, constant: Tensor, source: object, share: float) -> Tensor:
        """Names `constant` after `source`; what it is added to carries this share (0 to 1) of it."""
        named = self.names(source)
        names = ("bias",) if named == UNNAMED else named
        self._carried_shares.update(dict.fromkeys(names, share))
        self.has_carriers = True
        return self.name(constant, names)

    def carried_share(self, source: object) -> float:
        """The share (0 to 1) of the constant of `source` that is carried by what it is added to."""
        return max(self._carried_shares.get(name, 0.0) for name in self.names(source))

    def carries(self, term: Tensor, source: object) -> Tensor:
        """`term`, which moves and carries the constant of `source`: it counts as carried, under that name."""
        self.has_carriers = True
        term.register_hook(partial(self._term, self.called(source), term.detach()))
        return term

    def _term(self, name: str, term: Tensor, gradient: Tensor | None) -> Tensor | None:
        """A backward hook on a carried term."""
        if gradient is None or not self.direct:
            return None
        self._enter_share(self._carried, name, gradient * term)
        return torch.zeros_like(gradient)

    def _carrier(self, r: Tensor, constant: Tensor, name: str, share: float) -> Callable[[Tensor], Tensor | None]:
        """A backward hook on r + constant, where `share` of the constant is carried by r.

        At every place the carried part is  share · constant · <r, sg(r)> / |r|²  over the axes that the constant varies
        along: its own value, as a linear function of r. Where r is zero, the constant stays one.
        """
        aligned = (1,) * (r.dim() - constant.dim()) + tuple(constant.shape)
        axes = [axis for axis, size in enumerate(aligned) if size > 1] or [r.dim() - 1]
        size = r.square().sum(axes, keepdim=True)
        share_at = torch.where(size > 0, share, 0.0)
        direction = r / torch.where(size > 0, size, 1)

        def hook(gradient: Tensor | None) -> Tensor | None:
            if gradient is None:
                return None  # written over before anything read it
            counted = (gradient * constant).sum(axes, keepdim=True)
            carried = counted * share_at
            self._enter_share(self._shares, name, counted - carried)
            if self.direct:
                self._enter_share(self._carried, name, carried)
                return None
            return torch.addcmul(gradient, direction, carried)

        return hook

    def recorded(self, constant: Tensor, source: object) -> Tensor:
        """`constant` as a tensor that autograd follows, already recorded under the name of `source`."""
        out = constant.detach() + self._anchor.to(constant.device, constant.dtype)
        self.enter(out, constant, source)
        return out

    def make_writable(self, target: Tensor) -> None:
        """Readies a constant `target` to be written to with something that moves.

        What stays of it is a constant, and so is what stays of the memory of which it may be a view.
        """
        whole = target if target._base is None else target._base
        whole.copy_(self.recorded(whole.clone(), target))

    def pull(self, score: Tensor, retain_graph: bool = False) -> tuple[list[Tensor], dict[str, Tensor]]:
        """The gradient of `score` () at each explained input, and the share (B,) of each constant in the score."""
        if not score.requires_grad:
            raise LedgerError("The score does not move with the input. Compute it inside the mode, from what moves.")
        self._shares, self.last = {}, not retain_graph
        inputs = self.inputs
        found = torch.autograd.grad(score, [*inputs, self._anchor], retain_graph=retain_graph, allow_unused=True)
        gradients = [
            torch.zeros_like(leaf) if gradient is None else gradient
            for leaf, gradient in zip(inputs, found, strict=False)
        ]
        return gradients, self._shares

    def pull_direct(self, score: Tensor) -> tuple[list[Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """As `pull`, with carriers as constants, and the share (B,) of each carried bias; the graph is kept.

        What the gradients then give is the direct part: what reaches the score through no carrier.
        """
        self._carried, self.direct = {}, True
        try:
            gradients, constants = self.pull(score, retain_graph=True)
        finally:
            self.direct = False
        return gradients, constants, self._carried

    @staticmethod
    def is_detached(tensor: Tensor) -> bool:
        """Whether it is fit to be an argument as it is."""
        return not (tensor.is_inference() or (tensor.requires_grad and tensor.is_leaf))

    def _detached(self, tensor: Tensor) -> Tensor:
        if self.is_detached(tensor):
            return tensor
        detached = tensor.detach().clone() if tensor.is_inference() else tensor.detach()
        if tensor in self._names:
            self._names[detached] = self._names[tensor]
        return detached

    def _add(self, name: str, constant: Tensor, gradient: Tensor | None) -> None:
        """A backward hook: adds Σ gradient · constant of each picture to the share of `name`."""
        if gradient is None:
            return  # written over before anything read it
        constant = constant.reshape((1,) * (gradient.dim() - constant.dim()) + constant.shape)
        # What is broadcast is summed before it is multiplied: a bias costs one pass over the gradient.
        shared = [dim for dim in range(1, gradient.dim()) if constant.shape[dim] == 1]
        gradient = gradient.sum(shared, keepdim=True) if shared else gradient
        # Where the gradient is 0 the constant may be anything: the -inf of a mask, the garbage of torch.empty.
        self._enter_share(self._shares, name, torch.where(gradient == 0, 0, gradient * constant))

    def _enter_share(self, table: dict[str, Tensor], name: str, share: Tensor) -> None:
        """Adds the sum of `share` (B, ...) over each picture to `table`."""
        pictures = self.inputs[0].shape[0]
        if share.dim() and share.shape[0] % pictures == 0:
            share = share.reshape(pictures, -1).sum(1)
        elif pictures == 1:
            share = share.sum()[None]
        else:
            # Pictures are not in front, so shares cannot be told apart. Not a number: it must not seem to balance.
            share = share.new_full((pictures,), torch.nan)
        table[name] = table[name] + share if name in table else share


def _merged(several: Iterable[Iterable[str]]) -> Names:
    return tuple(dict.fromkeys(name for names in several for name in names))
