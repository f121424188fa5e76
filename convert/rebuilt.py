"""Whether what is saved can be loaded: a student is compared with what its source and its plan build.

Loading knows nothing else of a model. So a head, a wrapper, a reparametrisation, a hook or a layer that came in another
way is found here, by the name of its layer, before anything is written.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import BcosifyError, CheckpointError
from ..core.hooks import hooked
from ..core.pictures import fitted, noise_pictures
from ..core.tensors import mismatches, relative_error, untied_state
from .layers import watching
from .libraries import build
from .libraries.weights import assign_weights, build_on_meta
from .plan import Plan, apply_plan, class_path, read_swaps, written_swaps
from .student import Student, output_of

__all__ = ["check_loadable"]

# Relative; the same weights in the same layers, computed twice.
LIMIT = 1e-4


def check_loadable(student: Student) -> None:
    """Raises CheckpointError, with the name of the layer, where loading would not give the model of `student` again."""
    model = _rebuilt(student)
    state, wanted = untied_state(student.model), untied_state(model)
    if faults := mismatches(wanted, state):
        name, found, builds = _first_unlike(student.model, model) or (faults[0], "", "")
        what = f"{name} is {found}, but they build {builds}" if found else name
        raise CheckpointError(_refusal(what + f" ({faults[0]})" if found else what))
    model.to(next(student.model.parameters()).dtype)
    assign_weights(model, state, copy=False)
    picture = fitted(noise_pictures(1, student.preprocess.size), student.model)
    ours, theirs = _outputs(student.model, picture), _outputs(model.to(picture.device), picture)
    limit = LIMIT * (1 if picture.dtype == torch.float32 else 100)
    if _same(ours[""], theirs[""], limit):
        return
    name = next((name for name in ours if name not in theirs or not _same(ours[name], theirs[name], limit)), "")
    kinds = [type(each.get_submodule(name)).__name__ for each in (student.model, model)]
    changed = f"computes something else than the {kinds[1]} that they build"
    raise CheckpointError(
        _refusal(f"{name or 'the model'} ({kinds[0]}) {changed}: by a hook, or by settings of its own")
    )


def _refusal(what: str) -> str:
    return (
        "this student could not be loaded again, as loading knows only its source and its plan: "
        f"{what}. Nothing was written. Before converting, take off wrappers (model.module), hooks, weight norms "
        "(torch.nn.utils.parametrize.remove_parametrizations) and layers of other tools, and merge adapters; a "
        "classifier of your own may stay."
    )


def _rebuilt(student: Student) -> nn.Module:
    """What `load` builds of the student's record, without weights."""
    try:
        model = build_on_meta(lambda: build(student.source))
        unlike = "" if type(student.model) is type(model) else f" (its model is a {type(student.model).__name__})"
        try:
            plan = Plan(student.method, read_swaps(written_swaps(student.plan), model))
        except BcosifyError as error:
            raise CheckpointError(_refusal(f"{error}{unlike}")) from error
        apply_plan(model, plan, student.preprocess)
    except CheckpointError:
        raise
    except BcosifyError as error:
        raise CheckpointError(_refusal(str(error).removesuffix("."))) from error
    return model.eval()


def _first_unlike(found: nn.Module, wanted: nn.Module) -> tuple[str, str, str] | None:
    """(name, class, class that it should have) of the first module of another class, shape, or that should not be."""
    ours, theirs = dict(found.named_modules()), dict(wanted.named_modules())
    for name in [*theirs, *ours]:
        is_now, should_be = (_kind(modules.get(name)) for modules in (ours, theirs))
        if is_now != should_be:
            return name or "the model", is_now or "nothing", should_be or "nothing"
    return None


def _kind(module: nn.Module | None) -> str:
    """Class and shapes of a module; empty for none."""
    if module is None:
        return ""
    shapes = {name: tuple(tensor.shape) for name, tensor in module.named_parameters(recurse=False)}
    return class_path(module).rpartition(".")[2] + (f" {shapes}" if shapes else "")


@torch.no_grad()
def _outputs(model: nn.Module, picture: Tensor) -> dict[str, Tensor]:
    """Name -> the last output of every module that returns a tensor, in the order in which they end; last the model."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            if isinstance(output, Tensor):
                outputs.pop(name, None)
                outputs[name] = output

        return hook

    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with watching(model), hooked((module, keep(name)) for name, module in model.named_modules() if name):
            output = output_of(model, picture)
    finally:
        for module, mode in modes:
            module.training = mode
    return {**outputs, "": output}


def _same(ours: Tensor, theirs: Tensor, limit: float) -> bool:
    if ours.shape != theirs.shape:
        return False
    return torch.equal(ours, theirs) or relative_error(ours.float(), theirs.float()) <= limit
