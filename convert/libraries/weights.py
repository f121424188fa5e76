"""State dicts of one's own: safetensors only, and they fit or they are refused with the first mismatches."""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
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
    "own_weights",
    "prefix_of",
    "read_weights",
    "tell",
    "with_weights",
]

# Where classes of quantised layers live: their weights are no numbers that a conversion could read.
QUANTISED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic", "torchao.", "bitsandbytes.", "auto_gptq.", "awq.")


# One line of Python that makes safetensors of any checkpoint: wrappers become the beginnings of names.
CONVERT = (
    "import torch, safetensors.torch as s; "
    "f = lambda d, p='': {k: v for n, x in d.items() for k, v in (f(x, f'{p}{n}.') if isinstance(x, dict) else "
    "{f'{p}{n}': x.clone().contiguous()} if isinstance(x, torch.Tensor) else {}).items()}; "
    "s.save_file(f(torch.load('FILE', map_location='cpu', weights_only=True)), 'weights.safetensors')"
)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors in a safetensors file; raises SourceError for a pickle (which is not read) and a broken file."""
    if path.suffix != ".safetensors":
        raise SourceError(
            f"--weights {path}: only .safetensors is read, as a pickle can run code. Convert it once, where you trust "
            f'it: python -c "{CONVERT.replace("FILE", str(path))}"'
        )
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise SourceError(f"--weights {path}: cannot be read as safetensors: {error}") from error


def prefix_of(names: Iterable[str], wanted: Iterable[str]) -> str:
    """What stands in front of the names of a model, `wanted`, in a file with `names`: `module.`, `state_dict.model.`.

    Some names need be found behind it, as transformers renames others when it loads them, and at least half as many as
    the model has must have it; else nothing. Of several that hold as much, the bare names first, then an average
    (`ema`), as timm does.
    """
    needed = {name for name in wanted if not name.endswith(COUNTER)}
    have: Counter[str] = Counter()  # of each prefix, the names that begin with it
    held: Counter[str] = Counter()  # and those of them that go on as a name of the model
    for name in names:
        places = [0, *(place + 1 for place, letter in enumerate(name) if letter == ".")]
        have.update(name[:place] for place in places)
        held.update(name[:place] for place in places if name[place:] in needed)
    found = [prefix for prefix in held if 2 * have[prefix] >= len(needed)]
    order = sorted(found, key=lambda prefix: (-held[prefix], prefix != "", "ema" not in prefix, len(prefix), prefix))
    return order[0] if order else ""


# Counts the batches of training; older files do not have it, and evaluation does not read it.
COUNTER = "num_batches_tracked"

HALVES = (torch.float16, torch.bfloat16)

State = dict[str, Tensor]


def own_weights(
    path: Path, state: State, wanted: Mapping[str, Tensor], fit: Callable[[State], State] = lambda state: state
) -> tuple[State, str]:
    """(`state`, read from `path`, in the names of a model whose own is `wanted`; what was done to it in words).

    Args:
        fit: what its library does to checkpoints, such as resampling position tables of another size.

    Raises SourceError where a number is NaN or infinite.
    """
    prefix, said = prefix_of(state, wanted), []
    if prefix:
        others = [name for name in state if not name.startswith(prefix)]
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        said.append(f"names are taken without {prefix!r} in front")
        if others:
            said.append(f"{len(others)} tensors that are called otherwise are left out, such as {others[0]}")
    check_finite({name: tensor for name, tensor in state.items() if name in wanted}, f"--weights {path}")
    kinds = {(state[name].dtype, tensor.dtype) for name, tensor in wanted.items() if name in state}
    said += [
        f"its {str(kind)[6:]} numbers become {str(own)[6:]}" for kind, own in kinds if kind in HALVES and kind != own
    ]
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    state = dict(fit(state))
    changed = [name for name, tensor in state.items() if shapes.get(name, tensor.shape) != tensor.shape]
    said += [f"{name} is resampled from {shapes[name]} to {tuple(state[name].shape)}" for name in changed]
    for name in wanted:
        if name.endswith(COUNTER) and name not in state:
            state[name] = torch.zeros_like(wanted[name], device="cpu")
    return state, f"--weights {path}: {'; '.join(said)}." if said else ""


def with_weights(
    build: Callable[[], nn.Module],
    path: Path,
    fit: Callable[[nn.Module, State], State] = lambda model, state: state,
) -> nn.Module:
    """The model that `build` makes, with the state dict in `path`: no random weights first, and no second copy.

    Args:
        fit: (model, state dict) -> the state dict, as its library fits checkpoints to the model.
    """
    model = build_on_meta(build)
    state = _fitting(model, path, partial(fit, model))
    assign_weights(model, state)
    if not is_whole(model):
        model = build()
        assign_weights(model, state)
    return model


def _fitting(model: nn.Module, path: Path, fit: Callable[[State], State] = lambda state: state) -> State:
    """`own_weights` for `model`; raises SourceError that names the first keys that do not fit."""
    wanted = model.state_dict()
    state, said = own_weights(path, read_weights(path), wanted, fit)
    if faults := mismatches(wanted, state):
        raise mismatch_error(path, type(model).__name__, faults)
    tell(said)
    return state


def tell(said: str) -> None:
    """Warns of what was done to weights, if anything."""
    if said:
        warnings.warn(said, stacklevel=2)


def load_weights(model: nn.Module, path: Path) -> None:
    """Loads a safetensors state dict strictly; raises SourceError that names the first keys that do not fit."""
    assign_weights(model, _fitting(model, path))


def build_on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """The model that `build` makes, with its parameters on the meta device; whole where it cannot be built so."""
    try:
        with _parameters_on_meta():
            model = build()
        # No file holds a buffer that was made where the parameters are, such as the masks of Swin's windows.
        return build() if any(buffer.is_meta for buffer in model.buffers()) else model
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


def check_finite(state: Mapping[str, Tensor], whose: str) -> None:
    """Raises SourceError for weights with NaN or infinity, which would pass for a fault of the conversion."""
    broken = [name for name, tensor in state.items() if not (tensor.is_meta or tensor.isfinite().all())]
    if broken:
        more = f", as do {len(broken) - 1} more" if len(broken) > 1 else ""
        raise SourceError(f"{whose}: {broken[0]} holds NaN or infinity{more}. Pass a checkpoint from before that.")


def check_plain(model: nn.Module, name: str) -> None:
    """Raises SourceError for a model that cannot be read: compiled, scripted, quantised, or with NaN in its weights."""
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
    check_finite(dict(model.named_parameters()), name)
