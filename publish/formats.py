"""A finished student as one file that needs no bcosify: ONNX, or a program of `torch.export`.

B, beta and all else that a schedule moved are constants in it; the batch axis is free, the picture's sides are not. The
file is run and compared with the model, on batches of several sizes, before it gets its name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
import mmap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..convert import Agreement, Student, agreement_of, fold, load
from ..convert.hub import BUNDLED
from ..convert.libraries import FEATURES, REGRESSION
from ..convert.output import output_kind
from ..core.errors import CheckpointError, first_line, near_miss, translated
from ..core.files import check_free, new_file, paths_in
from ..core.pictures import fitted, noise_pictures
from ..core.quiet import quiet
from ..core.tensors import relative_error
from ..core.versions import versions
from ..explain.attribution import MapsOf
from ..explain.self_explaining import SelfExplaining

__all__ = ["FORMATS", "Exported", "Format", "export"]

BATCHES = (1, 3)
# What the output is called in a file, by its kind.
OUTPUTS = {FEATURES: "features", REGRESSION: "values"}
INPUTS, PICTURE = ("pixel_values", "classes"), "pixel_values"
ONNX_LIMIT = 2 * 10**9  # bytes of one ONNX file: a protocol buffer ends there


@dataclasses.dataclass(frozen=True)
class Format:
    """How a graph is written, and run again.

    Attributes:
        suffix: of the file.
        write: (module, example inputs, names of outputs, facts, path).
        open: path -> function of the inputs that returns the outputs.
        tolerance: largest difference from the model, over its largest output: kernels are other ones.
    """

    suffix: str
    write: Callable[[nn.Module, tuple[Tensor, ...], tuple[str, ...], dict[str, str], Path], None]
    open: Callable[[Path], Callable[..., tuple[Tensor, ...]]]
    tolerance: float


@dataclasses.dataclass(frozen=True)
class Exported:
    """A written file.

    Attributes:
        outputs: their names, in order.
        error: the largest difference from the model in any of them, over the largest output.
        agreement: how far the student stands for its teacher.
    """

    out: Path
    format: str
    bytes: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    error: float
    agreement: Agreement


def export(
    model: Student | str | Path,
    out: str | Path | None = None,
    format: str = "onnx",
    explain: bool = False,
    overwrite: bool = False,
) -> Exported:
    """Writes a student as one file of `format`, or nothing.

    The graph takes `pixel_values` (B, 3, H, W) of the student's own size, normalised, and returns `logits` (B, K),
    `values` (B, K) of a regression, or `features` (B, D) of a student without classes. With `explain` it also takes
    `classes` (B,), whole numbers, and also returns `contributions` (B, H, W): what every pixel adds to that output, as
    `explain` says it. Only students that hold their maps in the forward pass can be written so.

    Args:
        model: a Student, or a converted model: a folder, or ORG/REPO[@rev] on the hub.
        out: the file; default the name of that folder or repository with the suffix of the format, here.

    Raises:
        CheckpointError: no such format, `out` exists, a package is missing, the library cannot write this model, or
            what it wrote computes something else. Nothing is left behind.
    """
    if format not in FORMATS:
        raise CheckpointError(
            f"no format {format!r}.{near_miss(format, FORMATS)} For --format there are {', '.join(FORMATS)}."
        )
    if out is None:
        if isinstance(model, Student):
            raise CheckpointError("out is missing: a Student has no name that the file could have. Pass out=FILE.")
        out = f"{Path(str(model).partition('@')[0]).name.removeprefix(BUNDLED)}{FORMATS[format].suffix}"
    out = Path(out)
    check_free(out, overwrite, _written, paths_in(model))
    student = model if isinstance(model, Student) else load(model)
    return _export(student, out, format, explain)


def _written(file: Path) -> set[str] | None:
    """Nothing further of a file that `export` wrote, by the facts in it; None of other files."""
    if not file.is_file() or not file.stat().st_size:
        return None
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        known = data[:2] == b"PK" or data[:1] == b"\x08"  # torch writes a zip; ONNX begins with its version
        return set() if known and data.find(b"bcosify") >= 0 else None


def _export(student: Student, out: Path, format: str, explain: bool) -> Exported:
    chosen, model = FORMATS[format], student.model.eval().requires_grad_(False)
    graph = _explaining(student, model) if explain else fold(student).requires_grad_(False)
    output = OUTPUTS.get(output_kind(student).kind, "logits")
    names = (output, *(("contributions",) if explain else ()))
    facts = {"bcosify": json.dumps(_facts(student))}
    with new_file(out) as scratch:
        with _export_errors(student, format, explain), quiet(logging.ERROR):
            chosen.write(graph, _inputs(student, 2, explain), names, facts, scratch)
            error = _difference(chosen.open(scratch), graph if explain else model, student, explain)
        if not error <= chosen.tolerance:
            raise CheckpointError(
                f"{student.source.reference}: as {format} it computes something else (differs by {error:.1e}, limit "
                f"{chosen.tolerance:g}). Nothing was written."
            )
        size = scratch.stat().st_size
    return Exported(out, format, size, INPUTS[: 1 + explain], names, error, agreement_of(student))


def _explaining(student: Student, model: nn.Module) -> nn.Module:
    if isinstance(model, SelfExplaining):
        return MapsOf(model)
    raise CheckpointError(
        f"--explain: a student of --method {student.method} is explained by a backward pass, which is not written to "
        "a file here. Leave --explain out, and use `bcosify explain`. Students of fa-cnn, and of kmeans where the "
        "classifier reads an average over places, hold their maps in the forward pass."
    )


def _facts(student: Student) -> dict[str, Any]:
    """What someone who has only the file should know."""
    return {
        "source": student.source.reference,
        "method": student.method,
        "preprocess": dataclasses.asdict(student.preprocess),
        "output": output_kind(student).kind,
        "labels": student.labels,
        "agreement": agreement_of(student).words,
        "versions": versions(),
    }


def _inputs(student: Student, batch: int, explain: bool) -> tuple[Tensor, ...]:
    pictures = fitted(noise_pictures(batch, student.preprocess.size, seed=batch), student.model)
    return (pictures, torch.arange(batch)) if explain else (pictures,)


def _difference(program: Callable[..., tuple[Tensor, ...]], graph: nn.Module, student: Student, explain: bool) -> float:
    worst = 0.0
    for batch in BATCHES:
        inputs = _inputs(student, batch, explain)
        with torch.no_grad():
            expected = graph(*inputs)
        for ours, theirs in zip(program(*inputs), _several(expected), strict=True):
            worst = max(worst, relative_error(ours, theirs) if ours.shape == theirs.shape else float("inf"))
    return worst


def _several(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


# ---------------------------------------------------------------------------------------------------------- formats


def _program(module: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    """The exported program, with a free batch axis."""
    axis = torch.export.Dim("batch")
    return torch.export.export(module, inputs, dynamic_shapes=tuple({0: axis} for _ in inputs))


def _write_torch(
    module: nn.Module, inputs: tuple[Tensor, ...], names: tuple[str, ...], facts: dict[str, str], path: Path
) -> None:
    # Not to `path`: on a full disk torch's own writer ends the process.
    held = io.BytesIO()
    torch.export.save(_program(module, inputs), held, extra_files=facts)
    path.write_bytes(held.getbuffer())


def _open_torch(path: Path) -> Callable[..., tuple[Tensor, ...]]:
    program = torch.export.load(path).module()

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return _several(program(*inputs))

    return run


def _write_onnx(
    module: nn.Module, inputs: tuple[Tensor, ...], names: tuple[str, ...], facts: dict[str, str], path: Path
) -> None:
    size = sum(tensor.nbytes for tensor in [*module.parameters(), *module.buffers()])
    if size > ONNX_LIMIT:
        raise CheckpointError(f"{size:,} bytes of weights: one ONNX file holds 2 GB. Pass --format torch.")
    program: Any = torch.onnx.export(
        _program(module, inputs),
        dynamo=True,
        input_names=list(INPUTS[: len(inputs)]),
        output_names=list(names),
        verbose=False,
    )
    program.model.metadata_props.update(facts)
    program.save(path, external_data=False)


def _open_onnx(path: Path) -> Callable[..., tuple[Tensor, ...]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        given = {name: tensor.numpy() for name, tensor in zip(INPUTS, inputs, strict=False)}
        return tuple(torch.from_numpy(output) for output in session.run(None, given))

    return run


FORMATS: dict[str, Format] = {
    "onnx": Format(".onnx", _write_onnx, _open_onnx, 1e-4),
    "torch": Format(".pt2", _write_torch, _open_torch, 1e-5),
}


@contextlib.contextmanager
def _export_errors(student: Student, format: str, explain: bool) -> Iterator[None]:
    """Turns what the exporters raise into one error with what to do next."""

    def missing(error: Exception) -> str:
        return f"--format {format} needs {getattr(error, 'name', None)}. Run: pip install 'bcosify[export]'"

    def refused(error: Exception) -> str:
        other = "leave --explain out" if explain else f"pass --format {'torch' if format == 'onnx' else 'onnx'}"
        return (
            f"{student.source.reference}: cannot be written as {format}{' with explanations' if explain else ''}: "
            f"{first_line(error)} Nothing was written; {other}."
        )

    with (  # exporters raise anything on a call that they do not know
        translated(Exception, CheckpointError, refused, ours=(CheckpointError, OSError)),  # a full disk is told as such
        translated(ImportError, CheckpointError, missing, ours=CheckpointError),
    ):
        yield
