"""How a run is spread over processes: DDP, or FSDP2 where accelerate's configuration asks for it.

Under FSDP2 a phase trains a twin of the student. Its weights, gradients and optimizer state are in shards, one a
process; only the block that runs is whole. Everything that is no training step (gains, measuring, saving) sees the
student itself: `Prepared.whole` gathers the weights into it and spreads them again afterwards, so that such code knows
nothing of shards, and checkpoints are the same files for one process, DDP and FSDP2.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    str_to_bool,
)
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from ..convert.layers import scheduled_layers, set_strength
from ..convert.taps import find_blocks
from ..core.errors import RecipeError
from .compiling import eager
from .objectives import Objective
from .recipe import Recipe

__all__ = ["Prepared", "check_sharded", "described", "make_accelerator", "prepare", "sharded_like", "whole"]


def make_accelerator(precision: str, **options: Any) -> Accelerator:
    """The accelerator that `accelerate launch` asked for; `precision` as `Recipe.precision`.

    Raises RecipeError where it asks for the first FSDP.
    """
    bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    chosen = ("bf16" if bf16 else "no") if precision == "auto" else precision
    # Units that a phase does not touch have no gradient; buffers are set alike in every process.
    ddp = DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)
    cpu, plugin = not torch.cuda.is_available(), _sharding()
    accelerator = Accelerator(mixed_precision=chosen, cpu=cpu, kwargs_handlers=[ddp], fsdp_plugin=plugin, **options)
    if plugin is not None and accelerator.distributed_type == DistributedType.MULTI_CPU:
        # accelerate 1.15 passes FSDP over on CPUs without a word, but its FSDP2 and torch's run there: over gloo.
        accelerator.state.fsdp_plugin = plugin
        accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    return accelerator


def _sharding() -> FullyShardedDataParallelPlugin | None:
    """What a configuration with `distributed_type: FSDP` says (accelerate hands it on in the environment)."""
    if not str_to_bool(os.environ.get("ACCELERATE_USE_FSDP", "false")):
        return None
    plugin = FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        raise RecipeError(
            "accelerate's configuration asks for FSDP 1; only FSDP 2 is supported. Set fsdp_version: 2 under "
            "fsdp_config, as recipes/accelerate/fsdp.yaml does."
        )
    # Precision is autocast's business, as without shards: weights and sums of gradients stay float32.
    plugin.mixed_precision_policy = MixedPrecisionPolicy()
    plugin.cpu_ram_efficient_loading = False  # it takes the weights away to the meta device, and B and beta with them
    return plugin


def check_sharded(accelerator: Accelerator, recipe: Recipe) -> None:
    """Raises RecipeError for what a recipe asks and shards do not do (yet)."""
    if accelerator.distributed_type != DistributedType.FSDP:
        return
    wrong = ["average"] if recipe.average else []
    for number, phase in enumerate(recipe.phases):
        settings = [key for key in ("weight_norm", "map_weight") if phase.settings.get(key)]
        wrong += [f"phases.{number}.objective.{phase.objective}.{key}" for key in settings]
        wrong += [f"phases.{number}.optimizer"] if phase.optimizer != "adamw" else []
        wrong += [f"phases.{number}.adaptive_clip"] if phase.adaptive_clip else []
        wrong += [f"phases.{number}.trust"] if phase.trust else []
        wrong += [f"phases.{number}.own_inputs"] if any(phase.own_inputs) else []
    if wrong:
        raise RecipeError(
            f"FSDP: {', '.join(wrong)} needs whole weights, and was not made for weights in shards. Leave it at its "
            "default, or run without shards: recipes/accelerate/one_node.yaml."
        )


def described(accelerator: Accelerator) -> dict[str, Any]:
    """What the log says of the processes of a run."""
    return {
        "processes": accelerator.num_processes,
        "device": str(accelerator.device),
        "distributed": accelerator.distributed_type.value,
    }


class _Root(nn.Module):
    """An objective as the root of FSDP, which wraps its student's blocks. Called with nothing it does nothing."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective
        blocks = (objective.student.get_submodule(name) for name in find_blocks(objective.student))
        self._no_split_modules = sorted({type(block).__name__ for block in blocks})  # accelerate reads it

    def forward(self, *args: Any) -> Any:
        return self.objective(*args) if args else None


@dataclasses.dataclass(frozen=True)
class Prepared:
    """An objective that is ready to be trained.

    Attributes:
        module: the objective as it is called: as it is, in DDP, or in FSDP.
        model: the student that is trained: `student`, or its twin in shards.
        student: the whole student, on which all that is no training step is done.
    """

    module: nn.Module
    model: nn.Module
    optimizer: Any
    student: nn.Module
    device: torch.device

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Inside, `student` is up to date, whole and not compiled; changes to it are kept. All processes must enter."""
        with eager(self.student):
            if self.model is self.student:
                yield
                return
            self.student.to(self.device)
            self.student.load_state_dict({name: whole(tensor) for name, tensor in self.model.state_dict().items()})
            yield
            with torch.no_grad():
                now = self.student.state_dict()
                for name, tensor in self.model.state_dict().items():
                    tensor.copy_(sharded_like(tensor, now[name]))
            self.student.cpu()


def prepare(
    accelerator: Accelerator, objective: Objective, optimizer: Callable[[nn.Module], torch.optim.Optimizer]
) -> Prepared:
    """Prepares `objective` and the optimizer that `optimizer` makes for the model that will be trained."""
    accelerator.free_memory()  # what an earlier phase prepared
    student = objective.student
    if accelerator.distributed_type != DistributedType.FSDP:
        module, made = accelerator.prepare(objective, optimizer(student))
        return Prepared(module, student, made, student, accelerator.device)
    twin = copy.deepcopy(objective)
    model = twin.student.to(memory_format=torch.contiguous_format)  # all that FSDP takes; pictures tell convolutions
    # FSDP reads parameters as attributes when it first runs, and at beta = 1 those are the parameters themselves.
    set_strength(model, beta=1)
    root, made = accelerator.prepare(_Root(twin), optimizer(model))
    root()
    for (_, ours), (_, theirs) in zip(scheduled_layers(model), scheduled_layers(student), strict=True):
        for name, value in theirs.strengths().items():
            ours.set_strength(name, value)
    student.cpu()
    return Prepared(root, model, made, student, accelerator.device)


def whole(tensor: Tensor) -> Tensor:
    """A tensor in shards put together, in every process; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_like(place: Tensor, tensor: Tensor) -> Tensor:
    """This process's shards of `tensor`, which all processes have, where `place` is in shards; else `tensor`."""
    if not isinstance(place, DTensor):
        return tensor
    device = place.to_local().device
    return distribute_tensor(tensor.to(device), place.device_mesh, place.placements, src_data_rank=None)
