"""Checkpoints of a running alignment: written beside, flushed, renamed, and only then older ones go.

A checkpoint is a folder with the student's and the optimizer's tensors (safetensors) and state.json; no pickle. The
order of pictures, the learning rate, B and beta are pure functions of the step, so the step is all that a resumed run
must know. COMPLETE is written last, and holds the size and the hash of every other file: what a copy or a disk has
damaged since is told from what is whole, and the next older checkpoint takes its place.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..core.errors import CheckpointError, first_line
from ..core.files import all_of_it, file_digest, new_folder
from .distributed import sharded_like, whole

__all__ = [
    "CHECKPOINTS",
    "Progress",
    "Saved",
    "damage",
    "latest",
    "newest",
    "newest_progress",
    "restore",
    "restore_optimizer",
    "saved_of",
    "sizes_of",
    "snapshot",
    "trusted_of",
    "write",
]

CHECKPOINTS = "checkpoints"  # folder inside a run's
STUDENT, AVERAGE, OPTIMIZER = "student.safetensors", "average.safetensors", "optimizer.safetensors"
PROGRESS, MARK = "state.json", "COMPLETE"
FORMAT = 1  # of what a checkpoint holds; a later one may mean other things by the same names
SIZES = "sizes.safetensors"  # running means that reference gains come from
TRUSTED = "trusted.safetensors"  # weights and optimizer to go back to, in a warm-up by trust
BEST = "best.safetensors"  # in the place of a file of each callback, in checkpoints from before they had one


@dataclasses.dataclass(frozen=True)
class Saved:
    """What a callback keeps in a checkpoint: plain values for state.json, and tensors for a file of its name."""

    values: dict[str, Any]
    tensors: dict[str, Tensor] | None = None


@dataclasses.dataclass
class Progress:
    """Where a run is.

    Attributes:
        step: finished steps over all phases. phase: the phase that the optimizer's state belongs to.
        data: digest of the shards' index.
        scales: one number a parameter that its learning rate is multiplied by in this phase.
        begun: what the objective noted of the student at the start of this phase.
        curve: held-out fidelity so far.
        versions: of the libraries that the run was last started with.
        ends: the steps at which the finished phases ended, early or not.
        trust: what the phase's trust counted (see `trust`).
        run_id: what trackers know the run by, also after a resume.
    """

    step: int
    phase: int
    data: str
    scales: tuple[float, ...] = ()
    curve: tuple[dict[str, Any], ...] = ()
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    ends: tuple[int, ...] = ()
    run_id: str = ""
    begun: dict[str, float] = dataclasses.field(default_factory=dict)
    trust: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def first(self) -> int:
        """Steps before this phase."""
        return self.ends[-1] if self.ends else 0

    def begin_phase(self, number: int, scales: tuple[float, ...], begun: dict[str, float] | None = None) -> None:
        """At the start of a phase."""
        self.phase, self.scales, self.begun, self.trust = number, scales, begun or {}, {}

    def end_phase(self) -> None:
        """At the end of a phase."""
        self.ends = (*self.ends, self.step)


def snapshot(student: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict in main memory, each tensor on its own and contiguous, as safetensors takes it."""
    return {name: _copied(tensor.detach()) for name, tensor in student.state_dict().items()}


def write(
    folder: Path,
    student: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    average: nn.Module | None = None,
    keep: int = 2,
    callbacks: Mapping[str, Saved] | None = None,
    trusted: dict[str, Any] | None = None,
    sizes: dict[str, Tensor] | None = None,
    main: bool = True,
) -> Path:
    """Writes `folder/step-XXXXXXXX` whole, then removes all but the newest `keep`.

    What `callbacks` keep, by their names, `trusted` and `sizes` go with it.

    All processes call it, as an optimizer in shards is gathered from all; the `main` one writes.

    Raises CheckpointError on a full disk.
    """
    out = folder / f"step-{progress.step:08d}"
    tensors, plain = _optimizer_state(optimizer, main)
    if not main:
        return out
    with new_folder(out, overwrite=True, own=all_of_it) as scratch:
        save_file(snapshot(student), scratch / STUDENT)
        if average is not None:
            save_file(snapshot(average), scratch / AVERAGE)
        for name, saved in (callbacks or {}).items():
            if saved.tensors:
                save_file(saved.tensors, scratch / f"{name}.safetensors")
        save_file(tensors, scratch / OPTIMIZER, metadata={"plain": json.dumps(plain)})
        if trusted:
            _save_values(trusted, scratch / TRUSTED)
        if sizes:
            _save_values(sizes, scratch / SIZES)
        values = {name: saved.values for name, saved in (callbacks or {}).items()}
        (scratch / PROGRESS).write_text(json.dumps({**dataclasses.asdict(progress), "callbacks": values}))
        files = {path.name: [path.stat().st_size, file_digest(path)] for path in sorted(scratch.iterdir())}
        (scratch / MARK).write_text(json.dumps({"format": FORMAT, "files": files}))
    # Later ones than this were passed over when the run went on.
    kept = [path for path in _all(folder) if path.name <= out.name][-keep:]
    for old in set(_all(folder)) - set(kept):
        shutil.rmtree(old, ignore_errors=True)
    return out


def latest(folder: Path) -> tuple[Path, Progress] | None:
    """The newest whole checkpoint in `folder`, and None where there is none at all; damaged ones are warned about.

    Raises CheckpointError where none is whole.
    """
    told = []
    for checkpoint in reversed(_all(folder)):
        if not (fault := damage(checkpoint)):
            if told:
                warnings.warn(f"going on from {checkpoint.name}: {'; '.join(told)}", stacklevel=3)
            return checkpoint, _progress(checkpoint)
        told.append(f"{checkpoint.name} {fault}")
    if told:
        raise CheckpointError(
            f"no checkpoint in {folder} is whole: {'; '.join(told)}. Copy one here again, or begin anew, with "
            "--overwrite in the place of --resume."
        )
    return None


def damage(checkpoint: Path) -> str:
    """What is wrong with a checkpoint, after its name; empty where nothing is."""
    name = MARK
    try:
        mark = (checkpoint / name).read_text()
        written = json.loads(mark) if mark else None  # empty in checkpoints of before: no sizes, no hashes
        if written and written["format"] > FORMAT:
            return f"is of a later version of bcosify (format {written['format']}, this one reads {FORMAT})"
        for name, (size, digest) in (written["files"] if written else {}).items():
            path = checkpoint / name
            if not path.is_file():
                return f"lacks {name}"
            if (found := path.stat().st_size) != size:
                return f"is damaged: {name} has {found} bytes, and had {size}"
            if file_digest(path) != digest:
                return f"is damaged: the bytes of {name} are not those that were written"
        name = PROGRESS
        _progress(checkpoint)
        for name in (STUDENT, OPTIMIZER, *(path.name for path in checkpoint.glob("*.safetensors"))):
            with safe_open(checkpoint / name, "pt"):
                pass  # the sizes that its header tells are compared with the file's
    except FileNotFoundError as error:
        return f"lacks {Path(error.filename or STUDENT).name}"
    except (OSError, ValueError, TypeError, KeyError, AttributeError, SafetensorError) as error:
        return f"is damaged: {name}: {first_line(error)}"
    return ""


def _progress(checkpoint: Path) -> Progress:
    values = json.loads((checkpoint / PROGRESS).read_text())
    known: dict[str, Any] = {
        field.name: values[field.name] for field in dataclasses.fields(Progress) if field.name in values
    }
    lists = {name: tuple(value) for name, value in known.items() if isinstance(value, list)}
    return Progress(**{**known, **lists})


def saved_of(checkpoint: Path, name: str) -> Saved | None:
    """What the callback `name` kept in `checkpoint`, also in one from before callbacks had states of their own."""
    values = json.loads((checkpoint / PROGRESS).read_text())
    if "callbacks" in values:
        found, path = values["callbacks"].get(name), checkpoint / f"{name}.safetensors"
    else:
        found, path = _one_state(values).get(name), checkpoint / BEST
    return None if found is None else Saved(found, load_file(path) if path.is_file() else None)


def _one_state(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The callbacks' states in a state.json of the time when they shared one, and one snapshot."""
    judged = {"score": values["best"], "step": values["best_step"], "waited": values["waited"]}
    walked = {} if values.get("walk") is None else {"strength-walk": values["walk"]}
    return {"early-stopping": judged, "agreement-floor": {"step": values["best_step"]}, **walked}


def restore(checkpoint: Path, student: nn.Module, average: nn.Module | None = None) -> None:
    """Loads the tensors of `checkpoint` into the student and, where given, the average; strict."""
    student.load_state_dict(load_file(checkpoint / STUDENT), strict=True)
    if average is not None:
        average.load_state_dict(load_file(checkpoint / AVERAGE), strict=True)


def restore_optimizer(checkpoint: Path, optimizer: torch.optim.Optimizer) -> None:
    """Loads the optimizer's state; each process takes its shards where the weights are in shards.

    What has a weight's shape also gets its memory format: fused steps pair numbers by where they lie.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    values = _load_values(checkpoint / OPTIMIZER)
    for key, value in values.items():
        index, _, name = key.partition(".")
        place = parameters[int(index)]
        # The count of steps is one number beside any weight.
        alike = isinstance(value, Tensor) and value.shape == place.shape
        state.setdefault(int(index), {})[name] = _placed_like(place, value) if alike else value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _copied(tensor: Tensor) -> Tensor:
    return tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)


def _placed_like(place: Tensor, value: Tensor) -> Tensor:
    """`value` in the shards of `place`, or in its memory format."""
    if isinstance(place, DTensor):
        return sharded_like(place, value)
    return torch.empty_like(place, dtype=value.dtype, device=value.device).copy_(value)


def sizes_of(checkpoint: Path, device: torch.device) -> dict[str, Tensor]:
    """What was written as `sizes` with `checkpoint`."""
    return {name: mean.to(device) for name, mean in load_file(checkpoint / SIZES).items()}


def trusted_of(checkpoint: Path, device: torch.device) -> dict[str, Any]:
    """What was written as `trusted` with `checkpoint`; empty where nothing was."""
    path = checkpoint / TRUSTED
    values = _load_values(path) if path.is_file() else {}
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in values.items()}


def _save_values(values: dict[str, Any], path: Path) -> None:
    """Tensors and plain values in one file."""
    tensors = {key: value.to("cpu").contiguous() for key, value in values.items() if isinstance(value, Tensor)}
    plain = {key: value for key, value in values.items() if key not in tensors}
    save_file(tensors, path, metadata={"plain": json.dumps(plain)})


def _load_values(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        plain = json.loads((file.metadata() or {}).get("plain", "{}"))
        return {**{key: file.get_tensor(key) for key in file.keys()}, **plain}


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
                tensors[f"{index}.{name}"] = _copied(gathered)
    return tensors, plain


def newest_progress(folder: Path) -> Progress | None:
    """Where the run was at the checkpoint that was written last; None where it cannot be told."""
    try:
        return None if (last := newest(folder)) is None else _progress(last)
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def newest(folder: Path) -> Path | None:
    """The checkpoint that was written last, whatever became of it since."""
    return max(_all(folder), default=None)


def _all(folder: Path) -> list[Path]:
    """All checkpoints, whole or not, oldest first."""
    return sorted(path for path in folder.glob("step-????????") if path.is_dir())
