"""Checkpoints of a running alignment: written beside, flushed, renamed, marked COMPLETE, and only then older ones go.

A checkpoint is a folder with the student's and the optimizer's tensors (safetensors) and state.json; no pickle. The
order of pictures, the learning rate, B and beta are pure functions of the step, so the step is all that a resumed run
must know.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..convert.files import new_folder
from .distributed import sharded_like, whole

__all__ = ["CHECKPOINTS", "Progress", "latest", "restore", "restore_optimizer", "write"]

CHECKPOINTS = "checkpoints"  # folder inside a run's
STUDENT, AVERAGE, OPTIMIZER = "student.safetensors", "average.safetensors", "optimizer.safetensors"
PROGRESS, MARK = "state.json", "COMPLETE"


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a run is.

    Attributes:
        step: finished steps over all phases. phase: the phase that the optimizer's state belongs to.
        data: digest of the shards' index.
        scales: one number a parameter that its learning rate is multiplied by in this phase.
        curve: held-out fidelity so far.
        versions: of the libraries that the run was last started with.
    """

    step: int
    phase: int
    data: str
    scales: tuple[float, ...] = ()
    curve: tuple[dict[str, Any], ...] = ()
    versions: dict[str, str] = dataclasses.field(default_factory=dict)


def write(
    folder: Path,
    student: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    average: nn.Module | None = None,
    keep: int = 2,
    main: bool = True,
) -> Path:
    """Writes `folder/step-XXXXXXXX` whole, then removes all but the newest `keep`.

    All processes call it, as an optimizer in shards is gathered from all; the `main` one writes.

    Raises CheckpointError on a full disk.
    """
    out = folder / f"step-{progress.step:08d}"
    tensors, plain = _optimizer_state(optimizer, main)
    if not main:
        return out
    with new_folder(out, overwrite=True) as scratch:
        save_file(_copies(student), scratch / STUDENT)
        if average is not None:
            save_file(_copies(average), scratch / AVERAGE)
        save_file(tensors, scratch / OPTIMIZER, metadata={"plain": json.dumps(plain)})
        (scratch / PROGRESS).write_text(json.dumps(dataclasses.asdict(progress)))
        (scratch / MARK).touch()
    for old in _complete(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return out


def latest(folder: Path) -> tuple[Path, Progress] | None:
    """The newest complete checkpoint in `folder`; a half-written one is passed over."""
    for checkpoint in reversed(_complete(folder)):
        values = json.loads((checkpoint / PROGRESS).read_text())
        return checkpoint, Progress(**{**values, "curve": tuple(values["curve"]), "scales": tuple(values["scales"])})
    return None


def restore(
    checkpoint: Path,
    student: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    average: nn.Module | None = None,
) -> None:
    """Loads the tensors of `checkpoint` into the student and, where given, the optimizer and the average; strict."""
    student.load_state_dict(load_file(checkpoint / STUDENT), strict=True)
    if average is not None:
        average.load_state_dict(load_file(checkpoint / AVERAGE), strict=True)
    if optimizer is not None:
        restore_optimizer(checkpoint, optimizer)


def restore_optimizer(checkpoint: Path, optimizer: torch.optim.Optimizer) -> None:
    """Loads the optimizer's state; each process takes its shards where the weights are in shards."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    with safe_open(checkpoint / OPTIMIZER, "pt") as file:
        plain = json.loads((file.metadata() or {}).get("plain", "{}"))
        values = {**{key: file.get_tensor(key) for key in file.keys()}, **plain}  # noqa: SIM118
    for key, value in values.items():
        index, _, name = key.partition(".")
        place = parameters[int(index)]
        # The count of steps is one number beside any weight.
        alike = isinstance(value, Tensor) and value.shape == place.shape
        state.setdefault(int(index), {})[name] = sharded_like(place, value) if alike else value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _copies(model: nn.Module) -> dict[str, Tensor]:
    """Tied parameters share memory, which safetensors refuses: a copy of each name costs less than a second format."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _optimizer_state(optimizer: torch.optim.Optimizer, keep: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors, whole, and plain values (some optimizers keep a flag or a counter) by `index.name`.

    No tensors where this process need not `keep` them: it only helps to gather them.
    """
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for index, part in optimizer.state_dict()["state"].items():
        for name, value in part.items():
            if not isinstance(value, Tensor):
                plain[f"{index}.{name}"] = value
                continue
            gathered = whole(value.detach())
            if keep:
                tensors[f"{index}.{name}"] = gathered.to("cpu", copy=True).contiguous()
    return tensors, plain


def _complete(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-????????") if (path / MARK).is_file())
