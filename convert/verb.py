"""`bcosify.convert`: a reference or a Teacher becomes a Student, with the command's options; also saved, calibrated."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..core.errors import PlanError
from ..core.files import check_free, paths_in
from ..core.pictures import noise_pictures
from ..core.ranges import COUNT, EXPONENT, SIDE, ranged
from ..core.settings import from_assignments
from .checkpoint import save, written
from .history import Calibration
from .layers import ReferenceSized, set_strength
from .libraries import Teacher, load_teacher
from .memory import laid_out
from .methods import find_method, method_of
from .output import with_labels
from .plan import Plan
from .student import Student, carrying, convert_teacher, lossy_steps, plan_teacher, with_reference_gains

__all__ = ["convert", "plan_for"]

Settings = Mapping[str, Any] | Sequence[str]


@ranged(image_size=SIDE, calibration_pictures=COUNT, b=EXPONENT)
def convert(
    reference: Teacher | str | Path,
    method: Any = "bcos",
    *,
    out: str | Path | None = None,
    keep: Sequence[str] = (),
    set: Settings = (),
    pretrained: bool = True,
    weights: str | Path | None = None,
    head: str = "auto",
    image_size: int | None = None,
    labels: str | Path | Sequence[str] | None = None,
    calibrate: str | Path | Tensor | None = None,
    calibration_pictures: int = 64,
    b: float | None = None,
    costs: bool = False,
    plan: Plan | None = None,
    overwrite: bool = False,
) -> Student:
    """Converts a model; until a strength moves the student is the teacher, and that is checked.

    Args:
        reference: a Teacher, of which a copy is converted, or a reference such as `timm:resnet50` (see
            `load_teacher`), or the folder of a model as a Path.
        method: name of the target family, such as `coda`; or a config of one, such as `CodaConfig(rank=2)`.
        out: also save the student to this folder.
        keep: modules to leave as they are, by name (with all below) or `re:PATTERN`.
        set: settings of the method by name; or `key=value` texts.
        pretrained, weights, head, image_size: of `load_teacher`, for a reference.
        labels: names of the classes, or a file with one a line, in place of the model's own.
        calibrate: shards, or normalised pictures (N, 3, H, W): the student comes out at `b` with its biases carried,
            and with the sizes that the teacher's layers have on these pictures.
        calibration_pictures: how many of the shards'.
        b: the B that `calibrate` and `costs` go to, where the method has one.
        costs: measure what each step away from the teacher costs before alignment, on the pictures of `calibrate` or
            else on noise; `history.conversion.lossy_steps` of the student has it. The command does this.
        plan: a plan made before by `plan_for`, to spare making it again.
        overwrite: replace `out` where it exists.

    A teacher in half precision is converted and compared in float32, then rounded back. One on the meta device is
    converted without the comparison.

    Raises:
        SourceError, PlanError, CheckpointError, DataError: before anything is changed or written.
        LedgerError: the student differs from the teacher by more than rounding.
    """
    config = _config(method, keep, set)
    ends = _ends(config, b)
    if calibrate is not None and calibration_pictures < 1:
        raise PlanError(f"--calibration-pictures {calibration_pictures}: at least one is needed; 64 are enough.")
    if out is not None:
        check_free(Path(out), overwrite, written, paths_in(reference, weights, calibrate))
    teacher = _teacher(reference, pretrained=pretrained, weights=weights, image_size=image_size, head=head)
    if labels is not None:
        teacher = with_labels(teacher, labels)
    student = convert_teacher(teacher, config, plan=plan)
    if calibrate is not None and not any(isinstance(layer, ReferenceSized) for layer in student.model.modules()):
        raise PlanError(f"--calibrate: no layer of a {student.method} student has a gain. Leave it out, and align.")
    del teacher  # the student is the same function, and a large model need not be held twice
    pictures = None
    if calibrate is not None:
        pictures = _pictures(calibrate, calibration_pictures, student)
        laid_out(student.model)
    if costs:
        shown = noise_pictures(2, student.preprocess.size) if pictures is None else pictures
        rows = lossy_steps(student, shown, ends) if ends else []
        conversion = dataclasses.replace(student.history.conversion, lossy_steps=tuple(rows))
        student = student.with_history(conversion=conversion)
    if pictures is not None:
        student = _calibrated(student, pictures, ends)
    if out is not None:
        save(student, Path(out), overwrite)
    return student


@ranged(image_size=SIDE)
def plan_for(
    reference: Teacher | str | Path,
    method: Any = "bcos",
    *,
    keep: Sequence[str] = (),
    set: Settings = (),
    pretrained: bool = True,
    weights: str | Path | None = None,
    head: str = "auto",
    image_size: int | None = None,
    labels: str | Path | Sequence[str] | None = None,
) -> Plan:
    """What `convert` would do with the same options, every layer with its reason; changes nothing.

    Raises SourceError or PlanError where `convert` would.
    """
    config = _config(method, keep, set)
    teacher = _teacher(reference, pretrained=pretrained, weights=weights, image_size=image_size, head=head)
    if labels is not None:
        with_labels(teacher, labels)
    return plan_teacher(teacher, config)


def _config(method: Any, keep: Sequence[str], settings: Settings) -> Any:
    """The config of a method that is named; or the one that is given."""
    if isinstance(method, str):
        kind = find_method(method).config_class
        if isinstance(settings, Mapping):
            return from_assignments(kind, (), **{"keep": list(keep), **settings})
        return from_assignments(kind, settings, keep=list(keep))
    method_of(method)
    if keep or settings:
        raise PlanError(f"keep and set belong into the config that is given: {type(method).__name__}(...).")
    return method


def _ends(config: Any, b: float | None) -> dict[str, float]:
    """Where the method takes its strengths; B to `b`."""
    family = method_of(config)
    ends = dict(family.ends(config))
    if b is not None:
        if "b" not in ends:
            raise PlanError(f"--b {b} --method {family.name}: it has no B.")
        ends["b"] = b
    return ends


def _teacher(reference: Teacher | str | Path, **options: Any) -> Teacher:
    if isinstance(reference, Path):
        reference = f"dir:{reference}"
    if isinstance(reference, str):
        return load_teacher(reference, **options)
    if not isinstance(reference, Teacher):
        raise PlanError(_advice(reference))
    defaults = {"pretrained": True, "weights": None, "image_size": None, "head": "auto"}
    if given := [name for name, value in options.items() if value != defaults[name]]:
        raise PlanError(f"{' and '.join(given)} belong to loading a reference; a Teacher is loaded already.")
    return reference


def _advice(given: Any) -> str:
    """What to type for a model that is given as a module, or as something else that is no reference."""
    kind = type(given).__name__
    if not isinstance(given, nn.Module):
        return (
            f"a {kind} is no model. Pass a reference such as timm:NAME, the folder of a model as a Path, or a Teacher."
        )
    known = (getattr(given, "pretrained_cfg", None) or {}).get("architecture")
    name = f"timm:{known}" if known else "timm:NAME"
    return (
        f"a {kind} says neither where it comes from nor how its pictures are prepared. Pass a reference, with your own "
        f"weights in a file: safetensors.torch.save_file(model.state_dict(), 'mine.safetensors'), then "
        f"bcosify.convert('{name}', weights='mine.safetensors'); open_clip:ARCH/TAG and hf:ORG/NAME work alike. A "
        "module of any architecture is explained as it is: bcosify.explain(model, normalised_pictures, target)."
    )


def _pictures(source: str | Path | Tensor, count: int, student: Student) -> Tensor:
    """The first `count` pictures of shards as the model takes them; or those that are given."""
    if isinstance(source, Tensor):
        return source
    import torch

    from ..data.index import index_shards
    from ..data.loader import held_out_batches
    from ..data.names import expand
    from ..data.views import to_model_input

    preprocess = student.preprocess
    batches = held_out_batches(
        index_shards(expand(source)), size=preprocess.size[0], crop_pct=preprocess.crop_pct, limit=count, workers=0
    )
    return to_model_input(torch.cat([batch.pictures for batch in batches]), preprocess.mean, preprocess.std)


def _calibrated(student: Student, pictures: Tensor, ends: Mapping[str, float]) -> Student:
    original, ends = copy.deepcopy(student.model), {**ends, **carrying(student.model)}
    set_strength(student.model, **ends)
    gains = with_reference_gains(student.model, original, [pictures])
    return student.with_history(calibration=Calibration(len(pictures), ends, len(gains)))
