"""Explanation mode: run any model so that its graph is affine in its input.

A network of linear maps, gates and normalisers is affine in its input x once its gates are frozen:
s = W(x)·x + Σ_j c_j. W(x) is then an ordinary gradient, and every c_j is a named constant (see `ledger`). The mode
swaps each torch call for its frozen-gate form (see `rules`) while the model runs. No rule changes a bit of a value
(torch may, where it takes another kernel because gradients are on). So one file serves every architecture, converted
or not. Of the model nothing changes: no flag, hook, `.grad`, buffer, random state or train/eval state is touched, or it
is put back when the mode ends, also after an exception.

    with Linearised(model) as mode:
        output = model(mode.follow(images))
    (gradient,), constants = mode.pull(output[:, 0].sum())
    # output[:, 0] == (images * gradient).flatten(1).sum(1) + sum(constants.values())

Layers take part by what they call, not by what they are. Decorators declare the functions of dynamic-linear layers,
which torch does not know. Three are for everyone's layers: `gated` (x times a gate), `dynamic_linear` (linear in x, by
weights that may depend on it), and `input_encoding` (picture to channels that are explained). The others spare this
project's own layers time and memory; they may change.

Out of its reach is what torch functions do not show: TorchScript, `torch.autograd.Function`, gradient checkpointing,
compiled code. A ledger that does not balance tells.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function_variadic

from .ledger import Ledger, follows_input, leaves, write
from .rules import (
    IN_PLACE,
    OPERATIONS,
    PROPERTIES,
    Operation,
    Rule,
    carried_bias,
    carrier,
    colours,
    encoding,
    gate,
    gate_by,
    linear,
    linear_in_encoding,
    resolve,
    with_energy_rule,
    with_mean_rule,
    with_statistics_rule,
)

__all__ = ["Linearised", "dynamic_linear", "gated", "input_encoding"]

P = ParamSpec("P")
ResultT = TypeVar("ResultT")


class Linearised(TorchFunctionMode):
    """The context in which `model` runs as an affine function of what `follow` returned.

    Gradients are on inside, whatever the caller set. Modes nest: only the innermost one acts. A graph that was built
    inside may be pulled inside or after the mode, once for each score (`retain_graph`).
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        super().__init__()
        self._model = model
        self._ledger = Ledger(model)
        self._stacks: list[ExitStack] = []

    # What callers use is the ledger's; the mode is only how it gets filled.

    @property
    def inputs(self) -> list[Tensor]:
        """The explained leaves: what the model encoded of the images, or else the images that it was given."""
        return self._ledger.inputs

    @property
    def unknown(self) -> dict[str, int]:
        """The operations on something moving for which there is no rule, with how often they were met."""
        return self._ledger.unknown

    def follow(self, images: Tensor) -> Tensor:
        """Makes a copy of `images` (B, ...) the explained leaf; returns what to feed to the model."""
        with torch.inference_mode(False), torch.enable_grad(), torch._C.DisableTorchFunction():
            return self._ledger.follow(images)

    def pull(self, score: Tensor, retain_graph: bool = False) -> tuple[list[Tensor], dict[str, Tensor]]:
        """The gradient of `score` () at each of `inputs`, and the share (B,) of each named constant in it."""
        with torch.inference_mode(False), torch._C.DisableTorchFunction():
            return self._ledger.pull(score, retain_graph)

    @property
    def has_carriers(self) -> bool:
        """Whether part of a bias is carried by what it is added to."""
        return self._ledger.has_carriers

    def pull_direct(self, score: Tensor) -> tuple[list[Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """As `pull`, with carriers as constants, and the share (B,) of each carried bias; the graph is kept."""
        with torch.inference_mode(False), torch._C.DisableTorchFunction():
            return self._ledger.pull_direct(score)

    def name(self, constant: Tensor) -> str:
        """What a tensor that does not move is called: the parameters or the operation that it was computed from."""
        return self._ledger.called(constant)

    def __enter__(self) -> Linearised:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(_random_state_kept(self._model))
            stack.enter_context(_buffers_kept(self._model))
            stack.enter_context(_innermost(self))
            super().__enter__()
            self._stacks.append(stack.pop_all())
        return self

    def __exit__(self, *exception: Any) -> None:
        stack = self._stacks.pop()
        stack.callback(super().__exit__, *exception)
        stack.__exit__(*exception)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options: dict[str, Any] = kwargs or {}
        if _modes.active[-1] is not self or func in PROPERTIES:
            return func(*args, **options)
        given = [leaf for leaf in leaves((args, options)) if isinstance(leaf, Tensor)]
        if not given:
            return func(*args, **options)
        if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():  # as nearly always: to enter costs time
            return self._recorded_call(func, args, options, given)
        with torch.inference_mode(False), torch.enable_grad():
            return self._recorded_call(func, args, options, given)

    def _recorded_call(
        self, func: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any], given: list[Any]
    ) -> Any:
        """The call, of whose arguments `given` are the tensors."""
        if not all(map(self._ledger.is_detached, given)):
            args, options = self._ledger.detach((args, options))
            given = leaves((args, options))
        if any(map(follows_input, given)):
            return self._linearised(func, args, options)
        return self._ledger.inherit(self._of_constants(func, args, options), given)

    def _of_constants(self, func: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """What a call returns of which no argument moves."""
        if func in _OF_CONSTANTS:
            return _OF_CONSTANTS[func](self._ledger, func, *args, **options)
        return func(*args, **options)

    def _linearised(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The affine form of a call with an argument that moves."""
        ledger, operation = self._ledger, resolve(func)
        into = kwargs.get("out")
        if "out" in kwargs:
            kwargs = {key: value for key, value in kwargs.items() if key != "out"}
        writes = operation.in_place or kwargs.get("inplace")
        if writes and not (operation.rule in IN_PLACE and follows_input(args[0]) and not ledger.gates(args[0])):
            into = args[0]
            if operation.in_place:
                func = _out_of_place(func)
            else:
                kwargs = kwargs | {"inplace": False}
        if into is not None and not follows_input(into):
            ledger.make_writable(into)
        out = ledger.inherit(operation.rule(ledger, func, *args, **kwargs), (args, kwargs))
        if into is None:
            return out
        # Written by a copy, so that views and aliases of the target see it too. What was frozen in place can only be
        # written over something that moves if it seems to move, but it stays a gate.
        write(into, out if follows_input(out) else ledger.recorded(out, out))
        return ledger.mark(into, not follows_input(out) or ledger.gates(out))


# ------------------------------------------------------------------------------------------- to declare your own layers


def gated(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Declares a pointwise f(x, *others) whose value is x times a gate, 0 where x is 0.

    In explanation mode it is x · sg(f(x, *others) / x): the gate and all the others are constants.

        @gated
        def swish(x, slope):
            return x * (slope * x).sigmoid()

        class Swish(nn.Module):
            def forward(self, x):
                return swish(x, 1.5)  # explain(model, ...) now balances; torch's own activations need no decorator
    """
    return _declared(function, gate)


def dynamic_linear(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Declares an f(x, *others) that is linear in x: dynamic weights, made of the others, times x.

    In explanation mode all the others are constants, and need no `detach`:

        @dynamic_linear
        def weighed(x, key):  # (B, N, C): every token's sum of all, by how alike their keys are
            return (key @ key.mT).softmax(-1) @ x

        class Mixer(nn.Module):
            def forward(self, x):
                return weighed(x, self.key(x))
    """
    return _declared(function, linear)


def input_encoding(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Declares an encode(x, mean, std, padding) from pictures x (B, 3, H, W) to channels (B, C, H+t+b, W+l+r).

    `padding` is (left, right, top, bottom). In explanation mode what it returns without padding is what gets explained
    in place of x, and the border that padding adds is a constant called "padding".

        @input_encoding
        def opponent(x, mean, std, padding=(0, 0, 0, 0)):  # dark and light are explained apart
            grey = (x * std + mean).mean(1, keepdim=True)
            return F.pad(torch.cat([grey, 1 - grey], 1), padding)

        class Stem(nn.Module):
            def forward(self, x):  # mean and std are (3, 1, 1)
                return self.conv(opponent(x, self.mean, self.std))
    """
    return _declared(function, encoding)


# ----------------------------------------------------------------------------------- for this project's layers alone


def gated_by(
    apart: Callable[..., tuple[Tensor, Tensor]], gradient: Callable[..., Tensor] | None = None
) -> Callable[[Callable[P, Tensor]], Callable[P, Tensor]]:
    """As `gated`, which spares the division: apart(x, *others) is the gate and what f returns, x times it.

    As f itself in inference it may write over x. Where `gradient` is given, the gate multiplies something else that is
    linear in x: at an x of `size` its gradient is gradient(size, grad, *others).
    """
    return lambda function: _declared(function, gate_by(apart, gradient))


def with_statistics(function: Callable[P, tuple[Tensor, Tensor]]) -> Callable[P, tuple[Tensor, Tensor]]:
    """Declares an f(x, ...) that returns x and something that is only ever part of a gate.

    In explanation mode x is itself and the other a constant.
    """
    return _declared(function, with_statistics_rule)


def with_mean(function: Callable[P, tuple[Tensor, ...]]) -> Callable[P, tuple[Tensor, ...]]:
    """Declares an f(x) that returns x, its mean (C,) over all but the channels, and what is only ever part of a gate.

    In explanation mode x and its mean are what they are, linear in x, and the others constants.
    """
    return _declared(function, with_mean_rule)


def linear_in(
    encode: Callable[..., Tensor], gradient: Callable[..., Tensor]
) -> Callable[[Callable[P, Tensor]], Callable[P, Tensor]]:
    """Declares an f(x, mean, std, padding, *others), linear in what the `input_encoding` encode(x, mean, std, padding)
    returns, and computed without it.

    In explanation mode the encoding gets explained; at one of `size` its gradient is gradient(size, grad, *others).
    """
    return lambda function: _declared(function, linear_in_encoding(encode, gradient))


def input_colours(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Declares a function (x, mean, std) that returns x (B, 3, H, W), a picture normalised by mean and std.

    In explanation mode the colours and their complements [r, 1 - r] (B, 6, H, W) get explained in place of x.
    """
    return _declared(function, colours)


def partly_carried(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Declares an f(bias, beta, carry) that returns (beta + carry) · bias.

    In explanation mode the share carry / (beta + carry) of it is not constant: it is carried by what it is added to, r,
    as the linear function  carry · bias · <r, sg(r)> / |r|²  of r, which has the same value.
    """
    declared = _declared(function, carried_bias)
    _OF_CONSTANTS[declared] = carried_bias
    return declared


def carries_bias(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Declares an f(term, bias) that returns `term`, by which the layer multiplies `bias`: a carried part."""
    return _declared(function, carrier)


def with_energy(function: Callable[P, tuple[Tensor, Tensor]]) -> Callable[P, tuple[Tensor, Tensor]]:
    """Declares an f(x, dim) that returns x and its sum of squares over `dim`, which stays.

    In explanation mode the sum is <x, sg(x)>, linear in x.
    """
    return _declared(function, with_energy_rule)


# Functions that explanation mode must see though none of their arguments moves.
_OF_CONSTANTS: dict[Callable[..., Any], Rule] = {}


def _declared(function: Callable[P, ResultT], rule: Rule) -> Callable[P, ResultT]:
    """`function`, shown to modes as torch's own functions are, with its affine form in the table."""

    @functools.wraps(function)
    def public(*args: P.args, **kwargs: P.kwargs) -> ResultT:
        if has_torch_function_variadic(*args):
            return handle_torch_function(public, args, *args, **kwargs)
        return function(*args, **kwargs)

    OPERATIONS[public] = Operation(public.__name__, rule, in_place=False)
    return public


def _out_of_place(write: Callable[..., Any]) -> Callable[..., Tensor]:
    """A function that writes to its first argument, as one that returns what it would have written."""

    def run(target: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = target.clone()
        write(result, *args, **kwargs)
        return result

    return run


# ------------------------------------------------------------------------------------------ what must be left as it was


class _Modes(threading.local):
    """The modes that this thread has entered; an outer one must not act on what an inner one computes."""

    def __init__(self) -> None:
        self.active: list[Linearised] = []


_modes = _Modes()


@contextmanager
def _innermost(mode: Linearised) -> Iterator[None]:
    _modes.active.append(mode)
    try:
        yield
    finally:
        _modes.active.pop()


@contextmanager
def _random_state_kept(model: nn.Module | None) -> Iterator[None]:
    """Draws inside (dropout of a model in train mode) leave the random state of the model's devices as it was."""
    used = [] if model is None else [tensor.device for tensor in model.parameters() if tensor.is_cuda]
    with torch.random.fork_rng(devices=sorted({device.index for device in used})):
        yield


@contextmanager
def _buffers_kept(model: nn.Module | None) -> Iterator[None]:
    """Puts back what a forward pass in train mode writes to buffers, such as BatchNorm's counter."""
    owners = [] if model is None else list(model.modules())
    # Nothing can be written to inference tensors here.
    before = [
        (module, name, buffer, None if buffer.is_inference() else (buffer._version, buffer.detach().clone()))
        for module in owners
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, kept in before:
                if kept is not None and _written(module, buffer, *kept):
                    buffer.copy_(kept[1])
                module._buffers[name] = buffer


def _written(module: nn.Module, buffer: Tensor, version: int, value: Tensor) -> bool:
    """Whether `buffer` was written to since it had this version and value; a device is asked in train mode only."""
    # There versions say too little: BatchNorm counts none.
    return not torch.equal(buffer, value) if module.training else buffer._version != version
