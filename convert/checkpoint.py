"""A converted model is a folder. Saving is atomic; loading is strict, and checks that the function is still the same.

    model.safetensors    weights, and B and beta of every layer
    bcosify.json         what the model is made of (see below), and the sha256 of all files
    config.json          what timm and transformers read (see `library_files`)
    probe.safetensors    a small input and the output that it had when saved
    text/                the text tower of a dual encoder, unchanged; opened when the first text is embedded
    open_clip_config.json  what open_clip reads, for its own pairs of towers

`bcosify.json` (schema 2) is an object with

    schema      2
    source      the teacher's library, architecture and its arguments, revision (`libraries.Source`)
    method      name of the method. config: its settings
    swaps       [{"name": of a module, "swap": id, "args": its arguments}, ...] (see `swaps`)
    preprocess  how pictures are prepared
    labels      one name for each output, or null. named_by: where they come from, in words. output: what the outputs
                are, where the source does not say it (see `output`); older folders have neither
    history     what was done to it, and measured (see `history`)
    versions    name -> version of the libraries that wrote it
    text, files name -> sha256 of the files in text/ and of all others. digest: sha256 of the rest of this object

Loading builds the source's empty model, carries out the swaps, takes the weights, and computes the probe. No rule of
any method is asked, so folders stay readable when rules change. Folders of schema 1 have no swaps (see `schema_1`).

Nothing here can run code: safetensors and JSON only; a pickle is refused by name. What a folder asks for is compared
with what it holds before it is given memory (see `limits`).
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..core.errors import CheckpointError, PlanError, SourceError, first_line, translated
from ..core.files import check_free, file_digest, finite, json_text, new_folder, read_json
from ..core.pictures import fitted, noise_pictures
from ..core.settings import faults, parse
from ..core.tensors import mismatches, relative_error, untied_state
from ..core.versions import versions, versions_text
from . import schema_1
from .agreement import trained_since
from .history import History
from .hub import CONFIG, OPEN_CLIP, PROBE, RECORD, TEXT, WEIGHTS, is_text_file, student_folder
from .layers import scheduled_layers, watching
from .libraries import Preprocess, SavedText, Source, build
from .libraries.weights import assign_weights, build_on_meta
from .library_files import config_of, own_files
from .limits import Header, bounded_run, check_inside, check_numbers, read_header, within
from .methods import find_method
from .output import KINDS, output_kind
from .plan import Method, Plan, apply_plan, read_swaps, written_swaps
from .rebuilt import check_loadable
from .student import Student, output_of, weights_size

__all__ = ["load", "read_record", "save", "skeleton", "text_of", "written"]

SCHEMA = 2
READ = (schema_1.SCHEMA, SCHEMA)
RECORD_LIMIT = 2**26  # bytes; a record with the labels of 21,843 classes has 2**20
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
# The probe was computed by the same code on the same weights: only another machine's kernels may differ.
PROBE_TOLERANCE = 1e-3
PRECISIONS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Strengths that folders may lack: they were written before these came.
NEWER_STRENGTHS = {"carry", "window", "spread"}


def save(student: Student, out: str | Path, overwrite: bool = False, *, parameters: torch.dtype | None = None) -> Path:
    """Writes the folder `out` whole, or nothing.

    Args:
        parameters: the precision of the parameters in the file, where it is not the model's: `torch.float16` halves
            the file. What is saved is then the student with its parameters rounded. Its buffers are as they were, and
            it computes in the precision that it has now.

    Raises:
        CheckpointError: `out` exists (without `overwrite`), the disk refuses, `load` would not give the same model
            again (see `rebuilt`), or a parameter is too large for that precision.
    """
    out = Path(out)
    if parameters is not None and parameters not in PRECISIONS:
        known = ", ".join(map(str, PRECISIONS))
        raise CheckpointError(f"parameters must be one of {known}; got {parameters!r}. Nothing was written.")
    check_free(out, overwrite, written)
    check_loadable(student)
    computes = next(student.model.parameters()).dtype
    if parameters is not None:
        student = _in_precision(student, parameters)
    with new_folder(out, overwrite, written) as folder:
        save_file(_stored(student.model, parameters), folder / WEIGHTS, metadata={"format": "pt"})
        picture = noise_pictures(1, student.preprocess.size)
        with torch.no_grad(), _in_eval_mode(student.model):
            output = output_of(student.model, fitted(picture, student.model))
        save_file({"input": picture, "output": output.detach().float().cpu()}, folder / PROBE)
        configs = {CONFIG: config_of(student)}
        record = finite(_record(student))
        if parameters is not None:
            record["computes"] = str(computes).removeprefix("torch.")
        if student.text is not None:
            (folder / TEXT).mkdir()
            student.text.save(folder / TEXT)
            record["text"] = {path.name: file_digest(path) for path in _text_files(folder / TEXT)}
        configs |= own_files(folder, student)
        for name, config in configs.items():
            (folder / name).write_text(json_text(config, indent=2))
        record["files"] = {name: file_digest(folder / name) for name in (WEIGHTS, PROBE, *configs)}
        record["digest"] = _digest(record)
        (folder / RECORD).write_text(json.dumps(record, indent=2))
    return out


def _in_precision(student: Student, precision: torch.dtype) -> Student:
    """`student` with rounded parameters. Rounding is no training: what tells that by the weights goes along."""
    made, recorded = dataclasses.replace(student, model=_rounded(student.model, precision)), student.history.conversion
    if recorded.weights is None or trained_since(student):
        return made
    return made.with_history(conversion=dataclasses.replace(recorded, weights=weights_size(made.model)))


def _rounded(model: nn.Module, precision: torch.dtype) -> nn.Module:
    """A copy of `model` whose parameters are rounded to `precision`; CheckpointError where one is too large for it."""
    model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        rounded = parameter.data.to(precision).to(parameter.dtype)
        if not torch.equal(rounded.isfinite(), parameter.data.isfinite()):
            raise CheckpointError(f"{name} has values that are too large for {precision}. Nothing was written.")
        parameter.data = rounded
    return model


def _stored(model: nn.Module, parameters: torch.dtype | None) -> dict[str, Tensor]:
    """What the file of the weights holds."""
    state = untied_state(model)
    if parameters is not None:
        state |= {name: state[name].to(parameters) for name, _ in model.named_parameters() if name in state}
    return state


def _text_files(folder: Path) -> list[Path]:
    """The files of a text tower; what else its library wrote, such as code of a tokenizer, is removed."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif not is_text_file(path.name):
            path.unlink()
    return sorted(folder.iterdir())


def written(folder: Path) -> set[str] | None:
    """The names in `folder` that `save` wrote there, by its record; None where there is no record of a student."""
    try:
        record = read_record(folder)
        _check_names(folder, record)
    except CheckpointError:
        return None
    text, there = record.get("text"), folder / TEXT
    whole = text is not None and there.is_dir() and {path.name for path in there.iterdir()} <= set(text)
    return {RECORD, *record["files"], *([TEXT] if whole else [])}


def load(reference: str | Path, *, check: bool = True, **hub: Any) -> Student:
    """Opens what `save` wrote, here or on the hub: same keys, same shapes, same bytes, same function.

    Args:
        reference: a folder, or a hub repository `ORG/REPO[@rev]` (see `hub.student_folder`, which takes `hub`).
        check: False skips the hashes and the probe (never the keys and shapes).

    Raises:
        CheckpointError: names what is missing, unknown, of another shape, changed, too large, or a pickle.
    """
    folder = student_folder(reference, **hub)
    record = read_record(folder)
    if check:
        _check_record(folder, record)
    student = _skeleton(folder, record, check)
    if check:
        _check_files(folder, record)
    _load_weights(student.model, folder, _computes(record))
    if check:
        _check_probe(folder, record, student.model)
    return student


def skeleton(reference: str | Path, **hub: Any) -> Student:
    """The student of `load` with random weights, for weights of one's own; raises as `load` does."""
    folder = student_folder(reference, **hub)
    record = read_record(folder)
    _check_record(folder, record)
    return _skeleton(folder, record, check=True, random=True)


def text_of(reference: str | Path, **hub: Any) -> SavedText | None:
    """The text tower of the student of `load`, which is not opened for it; raises as `load` does."""
    folder = student_folder(reference, **hub)
    record = read_record(folder)
    _check_record(folder, record)
    _check_names(folder, record)
    return None if record.get("text") is None else SavedText(folder / TEXT, record["text"])


def _skeleton(folder: Path, record: dict[str, Any], check: bool, random: bool = False) -> Student:
    """The empty student of a record: no larger than the weights beside it, and nothing of it outside of the folder."""
    _check_names(folder, record)
    _refuse_pickles(folder)
    header = read_header(folder / WEIGHTS)
    method, config, preprocess, source, history = _described(folder, record, header)
    if check:
        _check_picture(folder, preprocess)
    old = record["schema"] == schema_1.SCHEMA
    with within(header):
        # Weights that come out of a file need no random ones first.
        model = build(source) if random or old else build_on_meta(lambda: build(source))
    try:
        if old:
            with bounded_run(str(folder)):
                plan = schema_1.plan_of(record["plan"], model, method, config, preprocess.size, str(folder))
        else:
            check_numbers(record["swaps"], header, f"{folder / RECORD}: swaps")
            plan = Plan(method.name, read_swaps(record["swaps"], model))
        with within(header):
            apply_plan(model, plan, preprocess)
    except PlanError as error:
        raise CheckpointError(
            f"{folder / RECORD} has swaps that cannot be carried out: {error}. It was written with "
            f"{versions_text(record['versions'])}; here are {versions_text(versions())}. If yours are older, update."
        ) from error
    labels = None if record["labels"] is None else tuple(record["labels"])
    # Folders written before text towers were kept have no such entry.
    files = record.get("text")
    text = None if files is None else SavedText(folder / TEXT, files, check)
    output, named_by = record.get("output"), record.get("named_by", "")
    student = Student(model, source, preprocess, labels, method.name, config, plan, history, text, output, named_by)
    try:
        output_kind(student)
    except SourceError as error:
        raise CheckpointError(f"{folder / RECORD}: {error}") from error
    return student


def _described(folder: Path, record: dict[str, Any], header: Header) -> tuple[Method, Any, Preprocess, Source, History]:
    """What a record says of its model, each of its kind and no larger than the weights in `header`."""
    try:
        method = find_method(record["method"])
        check_numbers(record["config"], header, f"{folder / RECORD}: config")
        check_numbers(record["source"]["model_args"], header, f"{folder / RECORD}: source.model_args")
        config = _config_from_json(method.config_class, record["config"])
        preprocess, source = Preprocess.from_json(record["preprocess"]), Source(**record["source"])
        strings = (source.reference, source.library, source.architecture)
        if not all(isinstance(text, str) for text in strings) or not isinstance(source.model_args, dict):
            raise TypeError("source must have texts, and model_args an object")
        old = record["schema"] == schema_1.SCHEMA
        own = {"plan": str, "report": dict} if old else {"swaps": list, "history": dict}
        kinds = {"labels": list | None, "versions": dict, "files": dict, **own}
        wrong = [key for key, kind in kinds.items() if not isinstance(record[key], kind)]
        if wrong:
            raise TypeError(f"{', '.join(wrong)} must be an object (labels and swaps: a list)")
        _check_output(record)
        history = schema_1.history_of(record["report"]) if old else History.from_json(record["history"])
    except (KeyError, TypeError, ValueError, PlanError) as error:
        raise CheckpointError(
            f"{folder / RECORD} is no record of a student: {type(error).__name__}: {error}."
        ) from error
    return method, config, preprocess, source, history


def _check_output(record: dict[str, Any]) -> None:
    """What a record says of the outputs is of its kind."""
    if not all(isinstance(label, str) for label in record["labels"] or ()):
        raise TypeError("labels must be texts")
    if not isinstance(record.get("named_by", ""), str) or record.get("output") not in (None, *KINDS):
        raise ValueError(f"named_by must be a text, and output one of {', '.join(KINDS)}, or null")
    if record.get("computes") not in (None, *(str(precision).removeprefix("torch.") for precision in PRECISIONS)):
        raise ValueError("computes must be the name of a precision")


def _check_names(folder: Path, record: dict[str, Any]) -> None:
    """Every file that is opened lies in the folder, and a record names no others."""
    files, text = record.get("files"), record.get("text") or {}
    if not isinstance(files, dict) or not isinstance(text, dict):
        raise CheckpointError(f"{folder / RECORD} does not list the folder's files.")
    check_inside(folder, [*files, WEIGHTS, PROBE, CONFIG, OPEN_CLIP, TEXT])
    if unknown := sorted(set(files) - {WEIGHTS, PROBE, CONFIG, OPEN_CLIP}):
        raise CheckpointError(f"{folder / RECORD} names files that a student does not have: {', '.join(unknown)}.")
    if unknown := sorted(name for name in text if not is_text_file(name)):
        check_inside(folder, unknown, below=TEXT)
        raise CheckpointError(f"{folder / RECORD} names files that a text tower does not have: {', '.join(unknown)}.")
    check_inside(folder, text, below=TEXT)


def _check_picture(folder: Path, preprocess: Preprocess) -> None:
    """The recorded size is that of the probe, which bounds it by a file's length."""
    found, size = read_header(folder / PROBE).shapes.get("input"), (1, 3, *preprocess.size)
    if found != size:
        raise CheckpointError(f"{folder / PROBE} holds a picture {found}, but {RECORD} says {size}. Nothing was built.")


def read_record(folder: str | Path) -> dict[str, Any]:
    """The parsed `bcosify.json` of a converted model; raises CheckpointError where there is none, or a newer one."""
    path = Path(folder) / RECORD
    if not path.is_file():
        _refuse_pickles(Path(folder))
        raise CheckpointError(f"{folder} is not a converted model: {RECORD} is missing. `bcosify convert` makes one.")
    check_inside(Path(folder), [RECORD])
    record = read_json(path, most=RECORD_LIMIT)
    if not isinstance(record, dict) or record.get("schema") not in READ:
        found = record.get("schema") if isinstance(record, dict) else type(record).__name__
        raise CheckpointError(
            f"{path} has schema {found}; this version reads {' and '.join(map(str, READ))}. Update bcosify."
        )
    return record


def _record(student: Student) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "source": dataclasses.asdict(student.source),
        "method": student.method,
        "config": dataclasses.asdict(student.config),
        "swaps": written_swaps(student.plan),
        "preprocess": dataclasses.asdict(student.preprocess),
        "labels": student.labels,
        "named_by": student.named_by,
        "output": student.output,
        "versions": versions(),
        "history": student.history.to_json(),
    }


@contextlib.contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in training:
            module.training = mode


def _computes(record: dict[str, Any]) -> torch.dtype | None:
    """The precision that the model computes in; None for that of its file."""
    return None if record.get("computes") is None else getattr(torch, record["computes"])


def _load_weights(model: nn.Module, folder: Path, computes: torch.dtype | None = None) -> None:
    path = folder / WEIGHTS
    wanted = {name: tuple(tensor.shape) for name, tensor in untied_state(model).items()}
    found = read_header(path).shapes
    # Written before there were these strengths: they are where they start.
    newer = {
        f"{name}.{strength}": getattr(layer, strength)
        for name, layer in scheduled_layers(model)
        for strength in NEWER_STRENGTHS & set(layer.strengths())
        if f"{name}.{strength}" not in found
    }
    misfits = mismatches(wanted, {**found, **{name: value.shape for name, value in newer.items()}})
    if misfits:
        more = f"; and {len(misfits) - 5} more" if len(misfits) > 5 else ""
        raise CheckpointError(f"{path} does not fit the model: {'; '.join(misfits[:5])}{more}. Nothing was loaded.")
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from error
    state |= newer
    if odd := [name for name, _ in model.named_parameters() if name in state and state[name].dtype not in PRECISIONS]:
        raise CheckpointError(
            f"{path} holds {odd[0]} as {state[odd[0]].dtype}; weights are float32, bfloat16, float16 or float64. "
            "Nothing was loaded."
        )
    # Of the first weight: counters and strengths in the file say nothing about the model's precision.
    model.to(computes or state[next(name for name, _ in model.named_parameters())].dtype)
    if computes is not None:
        state |= {name: state[name].to(computes) for name, _ in model.named_parameters() if name in state}
    assign_weights(model, state)


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


def _check_probe(folder: Path, record: dict[str, Any], model: nn.Module) -> None:
    try:
        probe = load_file(folder / PROBE)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder / PROBE} cannot be read as safetensors: {error}") from error
    parameter = next(model.parameters())
    if set(probe) != {"input", "output"} or not all(tensor.dtype in PRECISIONS for tensor in probe.values()):
        raise CheckpointError(f"{folder / PROBE} does not hold an input and an output.")

    def not_run(error: Exception) -> str:
        return f"{folder}: its model cannot be run on {PROBE}: {first_line(error)}"

    with torch.no_grad(), watching(model), translated(Exception, CheckpointError, not_run), bounded_run(str(folder)):
        output = output_of(model, fitted(probe["input"], model)).float()
    if probe["output"].shape != output.shape:
        raise CheckpointError(f"{folder / PROBE} does not hold the {tuple(output.shape)} outputs of this model.")
    error = relative_error(output, probe["output"])
    if not error <= PROBE_TOLERANCE * (1 if parameter.dtype == torch.float32 else 100):
        raise CheckpointError(
            f"{folder}: the model does not compute what it computed when it was saved (probe "
            f"differs by {error:.1e}). Written "
            f"with {versions_text(record['versions'])}; here are {versions_text(versions())}."
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
    if wrong := list(faults(config_class, values)):
        raise CheckpointError(f"{RECORD}: its settings do not fit --method: {'; '.join(wrong)}.")
    return parse(config_class, values)


def _digest(record: dict[str, Any]) -> str:
    rest = {key: value for key, value in record.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
