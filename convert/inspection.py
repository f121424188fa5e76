"""`bcosify.inspect`: what a model is, or what a conversion would do to it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from .agreement import agreement_of
from .checkpoint import load
from .hub import is_student
from .layers import strength_spans
from .libraries import Preprocess, Teacher, load_teacher
from .methods.bcos import BcosConfig
from .output import output_kind
from .student import Student, plan_teacher
from .taps import depth_taps, find_blocks

__all__ = ["StudentFacts", "TeacherFacts", "inspect"]


@dataclasses.dataclass(frozen=True)
class StudentFacts:
    """What a converted model is.

    Attributes:
        output: what its output is, in words; see `output_kind`.
        layers: class of converted layers -> how many there are.
        strengths: name -> its value, or `LEAST to MOST`.
        agreement: how far it stands for its teacher, in words.
        identity_error: largest difference from the teacher's outputs right after the conversion, relative.
        held_out_fidelity: measured at the end of the alignment; empty where there was none.
    """

    source: str
    architecture: str
    method: str
    output: str
    parameters: int
    layers: dict[str, int]
    strengths: dict[str, str]
    size: str
    identity_error: float | None
    text_tower: str
    agreement: str
    aligned_on: str
    held_out_fidelity: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class TeacherFacts:
    """What a source model is, and what a conversion to B-cos would do to it.

    Attributes:
        output: what its output is, in words; see `output_kind`.
        convert_bcos: class of converted layers -> how many there would be.
        taps: names of modules at a third, two thirds and the end of the depth.
    """

    architecture: str
    parameters: int
    size: str
    mean_and_std: str
    output: str
    text_tower: str
    convert_bcos: dict[str, int]
    blocks: int
    taps: tuple[str, ...]


def inspect(reference: str | Path | Student | Teacher, *, pretrained: bool = True) -> StudentFacts | TeacherFacts:
    """What a model is: a converted one, or a source model with what `convert` would do to it.

    Args:
        reference: a converted model (a Student, its folder, or ORG/REPO[@rev] on the hub), or a source model (a
            Teacher, or a reference such as timm:NAME).
        pretrained: False does not fetch the weights of a reference.
    """
    if isinstance(reference, Path):
        reference = str(reference)
    if isinstance(reference, str):
        converted = is_student(reference)
        reference = load(reference) if converted else load_teacher(reference, pretrained=pretrained)
    return _student(reference) if isinstance(reference, Student) else _teacher(reference)


def _student(student: Student) -> StudentFacts:
    alignment = student.history.alignment
    spans = strength_spans(student.model)
    return StudentFacts(
        source=student.source.reference,
        architecture=student.source.architecture,
        method=student.method,
        output=str(output_kind(student)),
        parameters=_parameters(student),
        layers=student.plan.counts(),
        strengths={n: f"{low:g}" + (f" to {high:g}" if high > low else "") for n, (low, high) in spans.items()},
        size=_size(student.preprocess),
        identity_error=student.history.conversion.identity_error,
        text_tower="none" if student.text is None else "kept, unchanged",
        agreement=agreement_of(student).words,
        aligned_on=f"{alignment.pictures} pictures" if alignment else "not aligned",
        held_out_fidelity=(alignment and alignment.final) or {},
    )


def _teacher(teacher: Teacher) -> TeacherFacts:
    blocks = find_blocks(teacher.model)
    return TeacherFacts(
        architecture=teacher.source.architecture,
        parameters=_parameters(teacher),
        size=_size(teacher.preprocess),
        mean_and_std=f"{teacher.preprocess.mean}, {teacher.preprocess.std}",
        output=str(output_kind(teacher)),
        text_tower="none" if teacher.text is None else "kept beside the student",
        convert_bcos=plan_teacher(teacher, BcosConfig()).counts(),
        blocks=len(blocks),
        taps=depth_taps(blocks),
    )


def _parameters(model: Student | Teacher) -> int:
    return sum(parameter.numel() for parameter in model.model.parameters())


def _size(preprocess: Preprocess) -> str:
    return f"{preprocess.size[0]} x {preprocess.size[1]}"
