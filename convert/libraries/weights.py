"""State dicts of one's own: safetensors only, and they fit or they are refused with the first mismatches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ...core.errors import BcosifyError, SourceError
from ...core.tensors import mismatches
from ..plan import class_path

__all__ = [
    "assign_weights",
    "build_on_meta",
    "check_plain",
    "is_whole",
    "load_weights",
    "mismatch_error",
    "read_weights",
    "with_weights",
]

# What `torch.compile` puts before every key of a state dict.
COMPILED = "_orig_mod."
# Where classes of quantised layers live: their weights are no numbers that a conversion could read.
QUANTISED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic", "torchao.", "bitsandbytes.", "auto_gptq.", "awq.")


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors in a safetensors file; raises SourceError for a pickle (unread), a broken file, a compiled model."""
    if path.suffix != ".safetensors":
        raise SourceError(
            f"--weights {path}: only .safetensors is read, as a pickle can run code. Convert it "
            f"once, where you trust it: "
            'safetensors.torch.save_file(torch.load(FILE, weights_only=True), "weights.safetensors")'
        )
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise SourceError(f"--weights {path}: cannot be read as safetensors: {error}") from error
    if any(key.startswith(COMPILED) for key in state):
        raise SourceError(
            f"--weights {path}: the keys begin with {COMPILED!r}, so this is what torch.compile made of a model. "
            "Save the model inside instead: save_file(model._orig_mod.state_dict(), FILE)."
        )
    return state


def with_weights(build: Callable[[], nn.Module], path: Path) -> nn.Module:
    """The model that `build` makes, with the state dict in `path`: no random weights first, and no second copy."""
    model = build_on_meta(build)
    load_weights(model, path)
    if not is_whole(model):
        model = build()
        load_weights(model, path)
    return model


def load_weights(model: nn.Module, path: Path) -> None:
    """Loads a safetensors state dict strictly; raises SourceError that names the first keys that do not fit."""
    state = read_weights(path)
    faults = mismatches(model.state_dict(), state)
    if faults:
        raise mismatch_error(path, type(model).__name__, faults)
    assign_weights(model, state)


def build_on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """The model that `build` makes, with its parameters on the meta device; whole where it cannot be built so."""
    try:
        with _parameters_on_meta():
            return build()
    except SourceError:
        return build()  # a library that could not build it: so may be one whose constructor reads its weights
    except BcosifyError:
        raise
    except Exception:  # noqa: BLE001 - any refusal only means that the constructor reads its weights
        return build()


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Inside, parameters lose their memory when a module gets them. (accelerate's `init_empty_weights` unties them.)"""
    register = nn.Module.register_parameter
    seen: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}

    def emptied(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            empty = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
            parameter = seen.setdefault(id(parameter), (parameter, empty))[1]
        register(module, name, parameter)

    nn.Module.register_parameter = emptied  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def is_whole(model: nn.Module) -> bool:
    """Whether nothing of `model` is on the meta device."""
    return not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


def assign_weights(model: nn.Module, state: Mapping[str, Tensor], copy: bool = True) -> None:
    """Puts copies of the tensors in `state` in place of the model's, which must fit; what it ties stays tied.

    Copies, because numbers that lie in memory as they do in a mapped file are summed in another order. Without `copy`
    the model shares their memory.
    """
    own = model.state_dict(keep_vars=True)
    names: dict[int, str] = {}
    first = {name: names.setdefault(id(tensor), name) for name, tensor in own.items()}
    model.load_state_dict({name: state[first[name]].to(own[name].dtype, copy=copy) for name in own}, assign=True)
    taken = model.state_dict(keep_vars=True)
    for name in own:
        owner, _, leaf = name.rpartition(".")
        if first[name] != name:
            setattr(model.get_submodule(owner), leaf, taken[first[name]])


def mismatch_error(path: Path, model: str, faults: Sequence[str]) -> SourceError:
    """The error that says why the state dict in `path` is not one of `model`."""
    shown = "; ".join(faults[:5]) + (f"; and {len(faults) - 5} more" if len(faults) > 5 else "")
    return SourceError(f"--weights {path} does not fit {model}: {shown}.")


def check_plain(model: nn.Module, name: str) -> None:
    """Raises SourceError for a model whose layers cannot be read: compiled, scripted, or quantised."""
    for path, module in model.named_modules():
        where = f" at {path}" if path else ""
        if isinstance(module, torch.jit.ScriptModule):
            raise SourceError(f"{name}{where} is TorchScript, which hides its layers. Pass the Python model.")
        if class_path(module) == "torch._dynamo.eval_frame.OptimizedModule":
            raise SourceError(f"{name}{where} is compiled. Pass the model inside it: model._orig_mod.")
        if class_path(module).startswith(QUANTISED):
            raise SourceError(
                f"{name}{where} is quantised ({class_path(module)}). Pass the model in float32, float16 or bfloat16."
            )
    for path, parameter in model.named_parameters():
        if not parameter.is_floating_point() or type(parameter.data) is not Tensor:
            kind = parameter.dtype if type(parameter.data) is Tensor else type(parameter.data).__name__
            raise SourceError(
                f"{name} holds {path} as {kind}: it is quantised. Pass the model in float32, float16 or bfloat16."
            )
