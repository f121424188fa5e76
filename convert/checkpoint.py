"""A converted model is a folder. Saving is atomic; loading is strict, and checks that the function is still the same.

    model.safetensors    weights, and B and beta of every layer
    bcosify.json         schema, source, method, plan digest, preprocessing, labels, versions, report, sha256 of all
    config.json          the source architecture in its library's own words
    probe.safetensors    a small input and the output that it had when saved
    text/                the text tower of a dual encoder, unchanged; opened when the first text is embedded

Nothing here can run code: safetensors and JSON only; a pickle is refused by name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import CheckpointError, near_miss
from .files import file_digest, new_folder
from .layers import watching_writes
from .methods import find_method
from .plan import plan_conversion
from .sources import Preprocess, SavedText, Source, build
from .sources.weights import hollow, take_weights
from .student import Student, apply_plan, output_of
from .trace import fitted, noise_pictures

__all__ = ["load", "read_record", "save", "versions"]

SCHEMA = 1
WEIGHTS, RECORD, PROBE, CONFIG = "model.safetensors", "bcosify.json", "probe.safetensors", "config.json"
TEXT = "text"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
VERSIONED = ("bcosify", "torch", "timm", "open_clip_torch", "transformers")
# The probe was computed by the same code on the same weights: only another machine's kernels may differ.
PROBE_TOLERANCE = 1e-3


def save(student: Student, out: str | Path, overwrite: bool = False) -> Path:
    """Writes the folder `out` whole, or nothing.

    Raises:
        CheckpointError: `out` exists (without `overwrite`), or the disk refuses.
    """
    out = Path(out)
    with new_folder(out, overwrite) as folder:
        save_file(_state(student.model), folder / WEIGHTS, metadata={"format": "pt"})
        picture = noise_pictures(1, student.preprocess.size)
        with torch.no_grad(), _in_eval_mode(student.model):
            output = output_of(student.model, fitted(picture, student.model))
        save_file({"input": picture, "output": output.detach().float().cpu()}, folder / PROBE)
        (folder / CONFIG).write_text(json.dumps(CONFIGS.get(student.source.library, _timm_config)(student), indent=2))
        record = _record(student)
        record["files"] = {name: file_digest(folder / name) for name in (WEIGHTS, PROBE, CONFIG)}
        if student.text is not None:
            (folder / TEXT).mkdir()
            student.text.save(folder / TEXT)
            record["text"] = {path.name: file_digest(path) for path in sorted((folder / TEXT).iterdir())}
        record["digest"] = _digest(record)
        (folder / RECORD).write_text(json.dumps(record, indent=2))
    return out


def load(folder: str | Path, *, check: bool = True) -> Student:
    """Opens a folder that `save` wrote: same keys, same shapes, same bytes, same function.

    Args:
        check: False skips the hashes and the probe (never the keys and shapes).

    Raises:
        CheckpointError: names what is missing, unknown, of another shape, changed, or a pickle.
    """
    folder = Path(folder)
    record = read_record(folder)
    if check:
        _check_record(folder, record)
    _refuse_pickles(folder)
    method = find_method(record["method"])
    config = _config_from_json(method.config_class, record["config"])
    preprocess = Preprocess.from_json(record["preprocess"])
    source = Source(**record["source"])
    model = build(source) if method.tries else hollow(lambda: build(source))
    plan = plan_conversion(model, method, config, preprocess.size)
    if plan.digest != record["plan"]:
        raise CheckpointError(
            f"{folder}: the plan made now differs from the one that it was saved with, so the "
            f"layers would not match. It was "
            f"written with {_versions_text(record['versions'])}; here are {_versions_text(versions())}."
        )
    apply_plan(model, plan, preprocess, config)
    _load_weights(model, folder)
    labels = None if record["labels"] is None else tuple(record["labels"])
    # Folders written before text towers were kept have no such entry.
    files = record.get("text")
    text = None if files is None else SavedText(folder / TEXT, files if check else None)
    student = Student(model, source, preprocess, labels, method.name, config, plan, record["report"], text)
    if check:
        _check_files(folder, record)
        _check_probe(folder, model)
    return student


def read_record(folder: str | Path) -> dict[str, Any]:
    """The parsed `bcosify.json` of a converted model; raises CheckpointError where there is none, or a newer one."""
    path = Path(folder) / RECORD
    if not path.is_file():
        _refuse_pickles(Path(folder))
        raise CheckpointError(f"{folder} is not a converted model: {RECORD} is missing. `bcosify convert` makes one.")
    try:
        record = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not JSON any more: {error}") from error
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        found = record.get("schema") if isinstance(record, dict) else type(record).__name__
        raise CheckpointError(f"{path} has schema {found}; this version reads {SCHEMA}. Update bcosify.")
    return record


def _record(student: Student) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "source": dataclasses.asdict(student.source),
        "method": student.method,
        "config": dataclasses.asdict(student.config),
        "plan": student.plan.digest,
        "preprocess": dataclasses.asdict(student.preprocess),
        "labels": student.labels,
        "versions": versions(),
        "report": student.report,
    }


def _own_config(student: Student) -> dict[str, Any]:
    """A model type of our own around the library's words: opened as an ordinary model, it would be another function."""
    return {
        "model_type": "bcosify",
        "bcosify": {"method": student.method, "schema": SCHEMA, "library": student.source.library},
        "architectures": [student.source.architecture],
        "source_config": student.source.model_args["config"],
        "id2label": dict(enumerate(student.labels)) if student.labels else None,
    }


def _timm_config(student: Student) -> dict[str, Any]:
    """timm's own words for the source; no `num_classes` in `model_args`, as transformers' wrapper passes it too."""
    preprocess = student.preprocess
    num_classes = getattr(student.model, "num_classes", None)
    return {
        "architecture": student.source.architecture,
        "num_classes": num_classes,
        "num_features": getattr(student.model, "num_features", None),
        "model_args": {key: value for key, value in student.source.model_args.items() if key != "num_classes"},
        "bcosify": {"method": student.method, "schema": SCHEMA},
        "pretrained_cfg": {
            "input_size": [3, *preprocess.size],
            "mean": preprocess.mean,
            "std": preprocess.std,
            "interpolation": preprocess.interpolation,
            "crop_pct": preprocess.crop_pct,
            "crop_mode": preprocess.crop_mode,
            "num_classes": num_classes,
        },
    }


CONFIGS: dict[str, Callable[[Student], dict[str, Any]]] = {
    "timm": _timm_config,
    "open_clip": _own_config,
    "transformers": _own_config,
}


def _state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict, each tied tensor under its first name only (safetensors refuses shared memory)."""
    seen: dict[int, str] = {}
    return {
        name: tensor.detach().contiguous()
        for name, tensor in model.state_dict(keep_vars=True).items()
        if seen.setdefault(_memory(tensor), name) == name
    }


def _memory(tensor: Tensor) -> int:
    return tensor.data_ptr() if tensor.numel() and not tensor.is_meta else id(tensor)


@contextlib.contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in training:
            module.training = mode


def _load_weights(model: nn.Module, folder: Path) -> None:
    path = folder / WEIGHTS
    wanted = {name: tuple(tensor.shape) for name, tensor in _state(model).items()}
    try:
        with safe_open(path, "pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        faults = [f"{name} is missing" for name in wanted if name not in found]
        faults += [
            f"{name} is unknown{near_miss(name, set(wanted) - set(found), 1)}" for name in found if name not in wanted
        ]
        faults += [
            f"{name} has shape {found[name]}, should be {shape}"
            for name, shape in wanted.items()
            if name in found and found[name] != shape
        ]
        if faults:
            more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
            raise CheckpointError(f"{path} does not fit the model: {'; '.join(faults[:5])}{more}. Nothing was loaded.")
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from error
    # Of the first weight: counters and strengths in the file say nothing about the model's precision.
    model.to(state[next(name for name, _ in model.named_parameters())].dtype)
    take_weights(model, state)


def _check_record(folder: Path, record: dict[str, Any]) -> None:
    if record.get("digest") != _digest(record):
        raise CheckpointError(f"{folder / RECORD} was changed after it was written: its own digest does not match.")


def _check_files(folder: Path, record: dict[str, Any]) -> None:
    for name, digest in record["files"].items():
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name} is missing.")
        if file_digest(folder / name) != digest:
            raise CheckpointError(
                f"{folder / name} was changed after it was written: its sha256 does not match {RECORD}."
            )
    for name in record.get("text") or ():  # read, and hashed, when it is opened: a text tower may be large
        if not (folder / TEXT / name).is_file():
            raise CheckpointError(f"{folder / TEXT / name} is missing.")


def _check_probe(folder: Path, model: nn.Module) -> None:
    try:
        probe = load_file(folder / PROBE)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder / PROBE} cannot be read as safetensors: {error}") from error
    parameter = next(model.parameters())
    with torch.no_grad(), watching_writes(model):
        output = output_of(model, fitted(probe["input"], model)).float()
    error = float((output - probe["output"]).abs().max() / probe["output"].abs().max().clamp_min(1e-12))
    if not error <= PROBE_TOLERANCE * (1 if parameter.dtype == torch.float32 else 100):
        raise CheckpointError(
            f"{folder}: the model does not compute what it computed when it was saved (probe "
            f"differs by {error:.1e}). Written "
            f"with {_versions_text(read_record(folder)['versions'])}; here are {_versions_text(versions())}."
        )


def _refuse_pickles(folder: Path) -> None:
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles and not (folder / WEIGHTS).is_file():
        raise CheckpointError(
            f"{folder} holds {', '.join(pickles)}: pickles can run code and are never opened. Only {WEIGHTS} is read."
        )
    if not (folder / WEIGHTS).is_file():
        raise CheckpointError(f"{folder / WEIGHTS} is missing.")


def _config_from_json(config_class: type, values: dict[str, Any]) -> Any:
    known = {field.name for field in dataclasses.fields(config_class)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise CheckpointError(
            f"{RECORD} has settings that this version does not know: {', '.join(unknown)}. Update bcosify."
        )
    return config_class(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def versions() -> dict[str, str]:
    """Name -> installed version of every library whose code decides what a model computes."""
    return {name: importlib.metadata.version(name) for name in VERSIONED}


def _versions_text(found: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in found.items())


def _digest(record: dict[str, Any]) -> str:
    rest = {key: value for key, value in record.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
