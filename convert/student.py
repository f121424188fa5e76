"""Conversion: a Teacher becomes a Student that is the same function, with layers whose strengths can move."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LedgerError, SourceError
from .calibrate import Gain, calibrate
from .layers import described, set_strength, watching
from .methods import find_method
from .methods.bcos import BcosConfig
from .plan import Plan, plan_conversion
from .sources import Preprocess, Source, Teacher, Text, check_plain, load_teacher
from .trace import fitted, noise_pictures

__all__ = ["Student", "check_teacher", "convert", "identity_error", "lossy_steps", "output_of"]

# A larger relative difference than float32 rounding through a deep network explains: the student is another function.
IDENTITY_LIMIT = 1e-4
# What a value of a strength means.
WORDS: dict[str, Callable[[float], str]] = {
    "b": lambda value: "" if value == 1 else f"B={value:g}",
    "beta": lambda value: "biases removed" if value == 0 else "biases kept" if value == 1 else f"{value:.0%} of biases",
    "dampening": lambda value: f"dampening={value:g}" if value else "",
    "carry": lambda value: f"{value:.0%} of biases carried" if value else "",
}


@dataclasses.dataclass(frozen=True)
class Student:
    """A converted model with all that travels with it.

    Attributes:
        model: takes what the teacher's model takes: a normalised picture (B, 3, H, W).
        method, config, plan: how it was converted.
        report: measured facts (identity error, calibration, alignment), JSON values only.
        text: the teacher's text tower, unchanged, where it has one.
    """

    model: nn.Module
    source: Source
    preprocess: Preprocess
    labels: tuple[str, ...] | None
    method: str
    config: Any
    plan: Plan
    report: dict[str, Any] = dataclasses.field(default_factory=dict)
    text: Text | None = None

    @property
    def start(self) -> str:
        """Where it is its teacher, in words."""
        return described(find_method(self.method).start(self.config))

    def with_report(self, **facts: Any) -> Student:
        """The same student with more facts in its report."""
        return dataclasses.replace(self, report={**self.report, **facts})


def convert(teacher: Teacher | str, config: Any = None, *, plan: Plan | None = None) -> Student:
    """Converts a copy of `teacher`; until a strength moves the student is the teacher, and that is checked.

    Args:
        teacher: a Teacher, or a reference such as `timm:resnet50` (see `load_teacher`).
        config: settings of the method; its class chooses the method. Default `BcosConfig()`.
        plan: a plan made before by `plan_for`, to spare making it again.

    A teacher in half precision is converted and compared in float32, then rounded back. One on the meta device is
    converted without the comparison.

    Raises:
        SourceError, PlanError: before anything is changed.
        LedgerError: the student differs from the teacher by more than rounding.
    """
    teacher = load_teacher(teacher) if isinstance(teacher, str) else teacher
    check_plain(teacher.model, teacher.source.reference)
    config = BcosConfig() if config is None else config
    plan = plan or plan_for(teacher, config)
    original = _in_single_precision(teacher.model)
    model = copy.deepcopy(original)
    apply_plan(model, plan, teacher.preprocess, config)
    student = Student(
        model, teacher.source, teacher.preprocess, teacher.labels, plan.method, config, plan, text=teacher.text
    )
    if any(parameter.is_meta for parameter in model.parameters()):
        return student  # without memory there is nothing to compare
    # The first is the picture of the fingerprint.
    size = teacher.preprocess.size
    pictures = fitted(torch.cat([noise_pictures(1, size, seed) for seed in (0, 1)]), original)
    with torch.no_grad(), watching(model):
        theirs, ours = output_of(original, pictures), output_of(model, pictures)
    error = _relative_error(ours, theirs)
    if original is not teacher.model:
        _take_precision(model, teacher.model)
    if not error <= IDENTITY_LIMIT:
        raise LedgerError(
            f"{teacher.source.reference}: the student differs from its teacher by {error:.1e} at "
            f"{student.start} (limit {IDENTITY_LIMIT:g}). One of the swapped layers acts differently in this model; "
            "nothing was written. See `bcosify convert REF --dry-run`, and leave layers out with --keep."
        )
    return student.with_report(identity_error=error, teacher=_fingerprint(theirs[:1]))


HALF = (torch.float16, torch.bfloat16)


def _in_single_precision(model: nn.Module) -> nn.Module:
    """`model` itself, or a float32 copy of one in half precision, whose rounding would hide a difference."""
    if not any(parameter.dtype in HALF for parameter in model.parameters()):
        return model
    return copy.deepcopy(model).float()


def _take_precision(model: nn.Module, source: nn.Module) -> None:
    """Gives every parameter and buffer the precision that it has in `source`, new ones that of the first weight."""
    named = {name: tensor.dtype for name, tensor in [*source.named_parameters(), *source.named_buffers()]}
    common = next(parameter.dtype for parameter in source.parameters() if parameter.dtype in HALF)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(named.get(name, common))
    for name, buffer in model.named_buffers():
        if name in named:
            buffer.data = buffer.data.to(named[name])


def plan_for(teacher: Teacher, config: Any) -> Plan:
    """The plan of converting `teacher` with `config`; changes nothing."""
    return plan_conversion(teacher.model, _method_of(config), config, teacher.preprocess.size)


def apply_plan(model: nn.Module, plan: Plan, preprocess: Preprocess, config: Any) -> None:
    """Carries out every swap of `plan` on `model`, in place."""
    swaps = find_method(plan.method).swaps
    for step in plan.swaps:
        assert step.becomes is not None
        swaps[step.becomes](model.get_submodule(step.name), preprocess, config)


def _method_of(config: Any):  # noqa: ANN202
    from .methods import METHODS

    return next(method for method in METHODS.values() if method.config_class is type(config))


def output_of(model: nn.Module, pictures: Tensor) -> Tensor:
    """(B, D) what a model says of pictures: logits, or the pooled feature of a headless one."""
    return model(pictures)


@torch.no_grad()
def identity_error(student: nn.Module, teacher: nn.Module, pictures: Tensor) -> float:
    """Largest difference of outputs over the teacher's largest output, on pictures (B, 3, H, W)."""
    return _relative_error(output_of(student, pictures), output_of(teacher, pictures))


def _relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-12))


FINGERPRINT = 16  # outputs in a fingerprint
# What other versions and machines may change in a fingerprint, over its largest number; other weights change far more.
SAME_TEACHER = 1e-2


def _fingerprint(output: Tensor) -> list[float]:
    """Of a model's output on one noise picture, evenly chosen numbers: tells one set of weights from another."""
    output = output.flatten().float()
    return output[:: -(-len(output) // FINGERPRINT)].tolist()


def check_teacher(student: Student, model: nn.Module) -> None:
    """Raises SourceError where `model`, loaded again, is not what `student` was converted from.

    Hub repositories and folders change. A student without a record of its teacher passes.
    """
    recorded = student.report.get("teacher")
    if recorded is None:
        return
    wanted = torch.tensor(recorded)
    with torch.no_grad():
        output = output_of(model, fitted(noise_pictures(1, student.preprocess.size), model))
    found = torch.tensor(_fingerprint(output))
    scale = wanted.abs().max().clamp_min(1e-12)
    if wanted.shape != found.shape or not (wanted - found).abs().max() <= SAME_TEACHER * scale:
        raise SourceError(
            f"{student.source.reference} is not the teacher that this student was converted from: it computes "
            "something else now, so its files were changed or replaced. Put the old ones back, or convert again."
        )


@torch.no_grad()
def lossy_steps(
    student: Student, pictures: Tensor, ends: Mapping[str, float] | None = None, gain: Gain = "least-squares"
) -> list[dict[str, Any]]:
    """What each step away from identity costs: mean cosine of outputs to the teacher's on pictures (N, 3, H, W).

    Args:
        student: fresh from `convert`, so that it is its teacher; comes back as it was.
        ends: where strengths go, such as {"b": 1.5}; by default, and those not named, where its method takes them.
    """
    model = student.model
    theirs = output_of(model, pictures)

    method = find_method(student.method)
    ends = {**method.ends(student.config), **(ends or {})}
    start = method.start(student.config)

    def row(changed: nn.Module, strengths: dict[str, float], more: str = "") -> dict[str, Any]:
        words = filter(None, (WORDS[name](value) for name, value in strengths.items()))
        what = "identity" if strengths == start else ", ".join([*words, *filter(None, [more])])
        ours = theirs if strengths == start else output_of(changed, pictures)
        cosine = nn.functional.cosine_similarity(ours, theirs, dim=-1).mean()
        return {"step": what, **strengths, "cosine": round(float(cosine), 4)}

    rows = []
    alone = [{**start, name: ends[name]} for name in reversed(ends)]
    try:
        for strengths in (start, *alone, *([ends] if len(ends) > 1 else [])):
            set_strength(model, **strengths)
            rows.append(row(model, strengths))
    finally:
        set_strength(model, **start)
    scaled = copy.deepcopy(model)
    set_strength(scaled, **ends)
    if calibrate(scaled, model, pictures, gain):
        rows.append(row(scaled, ends, "gains calibrated"))
    return rows
