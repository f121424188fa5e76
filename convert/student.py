"""Conversion: a Teacher becomes a Student that is the same function, with layers whose strengths can move."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import LedgerError, SourceError
from ..core.pictures import fitted, noise_pictures
from ..core.tensors import relative_error
from .history import Conversion, History
from .layers import STRENGTHS, described, estimate_gains, fold_gains, set_strength, strength_spans, watching
from .libraries import Opened, Preprocess, Source, Teacher, Text, check_plain, with_own_head
from .methods import find_method, method_of
from .plan import Plan, apply_plan, plan_conversion

__all__ = [
    "Student",
    "carrying",
    "check_teacher",
    "convert_teacher",
    "identity_error",
    "lossy_steps",
    "output_of",
    "plan_teacher",
    "weights_size",
    "with_reference_gains",
]

# A larger relative difference than float32 rounding through a deep network explains: the student is another function.
IDENTITY_LIMIT = 1e-4


@dataclasses.dataclass(frozen=True, repr=False)
class Student(Opened):
    """A converted model with all that travels with it.

    Attributes:
        model: takes what the teacher's model takes: a normalised picture (B, 3, H, W).
        labels, output, named_by: as the teacher's (see `Teacher`); `output_kind` says what they mean.
        method, config, plan: how it was converted.
        history: what was done to it, and measured.
        text: the teacher's text tower, unchanged, where it has one.
    """

    model: nn.Module
    source: Source
    preprocess: Preprocess
    labels: tuple[str, ...] | None
    method: str
    config: Any
    plan: Plan
    history: History = History()
    text: Text | None = None
    output: str | None = None
    named_by: str = ""

    @property
    def start(self) -> str:
        """Where it is its teacher, in words."""
        return described(find_method(self.method).start(self.config))

    def save(self, out: str | Path, overwrite: bool = False) -> Path:
        """Writes the student, as it is now, to the folder `out`, which `bcosify.load` opens (see `checkpoint.save`)."""
        from .checkpoint import save

        return save(self, out, overwrite)

    def _how(self) -> str:
        aligned = self.history.alignment
        return f", {self.method}, " + (f"aligned on {aligned.pictures:,} pictures" if aligned else "not aligned")

    def with_history(self, **stages: Any) -> Student:
        """The same student with other `History` attributes, such as `alignment`."""
        return dataclasses.replace(self, history=dataclasses.replace(self.history, **stages))


def convert_teacher(teacher: Teacher, config: Any = "bcos", *, plan: Plan | None = None) -> Student:
    """Converts a copy of `teacher`; until a strength moves the student is the teacher, and that is checked.

    Args:
        config: settings of the method, or its name for the default ones.
        plan: a plan made before by `plan_teacher`, to spare making it again.

    A teacher in half precision is converted and compared in float32, then rounded back. One on the meta device is
    converted without the comparison.

    Raises:
        SourceError, PlanError: before anything is changed.
        LedgerError: the student differs from the teacher by more than rounding.
    """
    config = _settings(config)
    check_plain(teacher.model, teacher.source.reference)
    teacher = with_own_head(teacher)
    plan = plan or plan_teacher(teacher, config)
    original = _in_single_precision(teacher.model)
    model = copy.deepcopy(original)
    apply_plan(model, plan, teacher.preprocess)
    student = Student(
        model,
        teacher.source,
        teacher.preprocess,
        teacher.labels,
        plan.method,
        config,
        plan,
        text=teacher.text,
        output=teacher.output,
        named_by=teacher.named_by,
    )
    if any(parameter.is_meta for parameter in model.parameters()):
        return student  # without memory there is nothing to compare
    # The first is the picture of the fingerprint.
    size = teacher.preprocess.size
    pictures = fitted(torch.cat([noise_pictures(1, size, seed) for seed in (0, 1)]), original)
    with torch.no_grad(), watching(model):
        theirs, ours = output_of(original, pictures), output_of(model, pictures)
    error = relative_error(ours, theirs)
    if original is not teacher.model:
        _take_precision(model, teacher.model)
    if not error <= IDENTITY_LIMIT:
        raise LedgerError(
            f"{teacher.source.reference}: the student differs from its teacher by {error:.1e} at "
            f"{student.start} (limit {IDENTITY_LIMIT:g}). One of the swapped layers acts differently in this model; "
            "nothing was written. See `bcosify convert REF --dry-run`, and leave layers out with --keep."
        )
    return student.with_history(conversion=Conversion(error, _fingerprint(theirs[:1]), size, weights_size(model)))


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


def plan_teacher(teacher: Teacher, config: Any) -> Plan:
    """The plan of converting `teacher` with `config` (settings, or the name of a method); changes nothing."""
    config = _settings(config)
    return plan_conversion(teacher.model, method_of(config), config, teacher.preprocess.size)


def _settings(config: Any) -> Any:
    """`config` itself, or the default settings of the method that it names."""
    return find_method(config).config_class() if isinstance(config, str) else config


def output_of(model: nn.Module, pictures: Tensor) -> Tensor:
    """(B, D) what a model says of pictures: logits, or the pooled feature of a headless one.

    Raises SourceError where it returns anything else, such as several tensors.
    """
    output = model(pictures)
    if isinstance(output, Tensor) and output.dim() == 2 and len(output) == len(pictures):
        return output
    found = f"a tensor {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
    way = "y[:, None]" if isinstance(output, Tensor) and output.dim() == 1 else "its logits or its pooled feature alone"
    raise SourceError(
        f"{type(model).__name__} returns {found}; what is converted returns one vector a picture, (B, D). Let its "
        f"forward return {way}."
    )


@torch.no_grad()
def identity_error(student: nn.Module, teacher: nn.Module, pictures: Tensor) -> float:
    """Largest difference of outputs over the teacher's largest output, on pictures (B, 3, H, W)."""
    return relative_error(output_of(student, pictures), output_of(teacher, pictures))


FINGERPRINT = 16  # outputs in a fingerprint
# What other versions and machines may change in a fingerprint, over its largest number; other weights change far more.
SAME_TEACHER = 1e-2


def _fingerprint(output: Tensor) -> tuple[float, ...]:
    """Of a model's output on one noise picture, evenly chosen numbers: tells one set of weights from another."""
    output = output.flatten().float()
    return tuple(output[:: -(-len(output) // FINGERPRINT)].tolist())


@torch.no_grad()
def weights_size(model: nn.Module) -> float:
    """The sum of the sizes of all weights and buffers, in float64: any training changes it."""
    tensors = [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]
    # On the CPU: not every device has float64.
    return float(sum(tensor.cpu().abs().sum(dtype=torch.float64).item() for tensor in tensors))


@torch.no_grad()
def check_teacher(student: Student, teacher: Teacher) -> None:
    """Raises SourceError where `teacher`, loaded again, is not what `student` was converted from.

    Hub repositories and folders change. A student without a record of its teacher passes. One that was aligned at
    another size may not say at which size its teacher was recorded: then that was its teacher's own, or the student's.
    """
    recorded = student.history.conversion
    if recorded.teacher is None:
        return
    own = (teacher.preprocess.size, student.preprocess.size)
    if not any(
        _is_known(teacher.model, recorded.teacher, size) for size in ([recorded.size] if recorded.size else own)
    ):
        raise SourceError(
            f"{student.source.reference} is not the teacher that this student was converted from: it computes "
            "something else now, so its files were changed or replaced. Put the old ones back, or convert again."
        )


def _is_known(model: nn.Module, fingerprint: Sequence[float], size: tuple[int, int]) -> bool:
    output = output_of(model, fitted(noise_pictures(1, size), model))
    wanted, found = torch.tensor(fingerprint), torch.tensor(_fingerprint(output))
    return wanted.shape == found.shape and relative_error(found, wanted) <= SAME_TEACHER


@torch.no_grad()
def lossy_steps(student: Student, pictures: Tensor, ends: Mapping[str, float] | None = None) -> list[dict[str, Any]]:
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
    carried = carrying(model)

    def row(changed: nn.Module, strengths: Mapping[str, float], more: str = "") -> dict[str, Any]:
        what = "identity" if strengths == start else ", ".join(filter(None, [*_words(strengths), more]))
        ours = theirs if strengths == start else output_of(changed, pictures)
        cosine = nn.functional.cosine_similarity(ours, theirs, dim=-1).mean()
        return {"step": what, **strengths, "cosine": round(float(cosine), 4)}

    alone = [{**start, name: ends[name]} for name in reversed(ends)]
    steps = [start, *([{**start, **carried}] if carried else []), *alone, *([ends] if len(ends) > 1 else [])]
    rows = []
    try:
        for strengths in steps:
            set_strength(model, **{**start, **dict.fromkeys(carried, 0.0), **strengths})
            rows.append(row(model, strengths))
    finally:
        set_strength(model, **{**dict.fromkeys(carried, 0.0), **start})
    for strengths in (ends, *([{**ends, **carried}] if carried else [])):
        scaled = copy.deepcopy(model)
        set_strength(scaled, **strengths)
        if with_reference_gains(scaled, model, [pictures]):
            rows.append(row(scaled, strengths, "reference gains"))
    return rows


# Within how many places of a BatchNorm's map biases are carried where nothing else is asked for.
WINDOW = 7.0


def carrying(model: nn.Module) -> dict[str, float]:
    """The strengths at which all biases of `model` are carried; empty where it has no layers that carry any."""
    found = strength_spans(model)
    wanted = {"beta": 0.0, "carry": 1.0, "window": WINDOW}
    return {name: value for name, value in wanted.items() if name in found} if "carry" in found else {}


def with_reference_gains(student: nn.Module, teacher: nn.Module, batches: Sequence[Tensor]) -> dict[str, float]:
    """Gives the layers of `student` the sizes of `teacher`'s on `batches`, each (B, 3, H, W), in their weights.

    Returns the mean gain of every layer that has one; none of a method without such layers.
    """
    gains = estimate_gains(student, teacher, batches)
    fold_gains(student)
    return gains


def _words(strengths: Mapping[str, float]) -> list[str]:
    """What strengths mean, such as `B=1.5` and `biases carried`."""
    carried = strengths.get("carry", 0.0)
    told = {name: STRENGTHS[name].words(value) for name, value in strengths.items()}
    if carried:
        told |= {"beta": "biases carried" if carried == 1 else f"{carried:.0%} of biases carried"}
    return list(filter(None, told.values()))
