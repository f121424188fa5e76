"""bcosify convert"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from .console import console, show_table


def convert(
    reference: str,
    out: Path | None = None,
    method: str = "bcos",
    keep: list[str] | None = None,
    set: list[str] | None = None,  # noqa: A002 - the flag reads --set
    pretrained: bool = True,
    weights: Path | None = None,
    head: str = "auto",
    image_size: int | None = None,
    calibrate: str | None = None,
    calibration_pictures: int = 64,
    b: float | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    json: bool = False,
) -> dict[str, Any]:
    """Turns a pretrained model into an interpretable student, and checks that it is still the same function.

    Nothing is trained here. What each step away from that function will cost before alignment is measured and printed.
    Example: bcosify convert timm:resnet50.a1_in1k --out runs/resnet50

    Args:
        reference: the model to convert ({references}). Inside timm: and open_clip: also hf-hub:ORG/NAME[@rev] and
            local-dir:PATH.
        out: folder to write; not needed with --dry-run.
        method: the target family: `bcos`, `coda`, `fa-cnn`, `ca-stream` or `kmeans`.
        keep: modules to leave as they are, by name (with all below) or 're:PATTERN'.
        set: settings of the method, such as scale=unbounded (bcos: B-cosification's own variant), squash=sq (coda),
            dampening=branch (fa-cnn), stages=3 (ca-stream) or prototypes=5 (kmeans).
        pretrained: take random weights, without the network.
        weights: a .safetensors state dict of your own, in place of the published weights.
        head: which output of a transformers model: `classifier`, `embedding` (what is compared with text), `pooled`;
            `auto` is what its checkpoint was made for.
        image_size: side in pixels to use the model at, where it is not its own.
        calibrate: shards; the student is saved at --b with its biases carried, and with the sizes that the teacher's
            layers have on a few of these pictures.
        calibration_pictures: how many.
        b: the B that --calibrate and the cost table go to, where the method has one; by default 2.
        dry_run: print the plan, every layer with its reason, and write nothing.
        overwrite: replace the folder if it exists.
        json: print the result as JSON on stdout.
    """
    from ..convert import convert as convert_model
    from ..convert import load_teacher, lossy_steps, plan_for, save
    from ..convert.layers import ReferenceSized
    from ..convert.memory import laid_out
    from ..convert.methods import find_method
    from ..core.errors import CheckpointError, PlanError
    from ..core.files import check_free
    from ..core.pictures import noise_pictures
    from ..core.settings import from_assignments

    family = find_method(method)
    config = from_assignments(family.config_class, set or (), keep=keep or [])
    ends = dict(family.ends(config))
    if b is not None:
        if "b" not in ends or not 1 <= b < float("inf"):
            known = "B is at least 1 (1 is the source model, 2 the usual end)" if "b" in ends else "it has no B"
            raise PlanError(f"--b {b} --method {method}: {known}.")
        ends["b"] = b
    if calibrate and calibration_pictures < 1:
        raise PlanError(f"--calibration-pictures {calibration_pictures}: at least one is needed; 64 are enough.")
    if not dry_run:
        if out is None:
            raise CheckpointError("--out FOLDER is missing (or pass --dry-run to see the plan only).")
        check_free(out, overwrite)
    teacher = load_teacher(reference, pretrained=pretrained, weights=weights, image_size=image_size, head=head)
    plan = plan_for(teacher, config)
    if dry_run:
        if not json:
            rows = [(step.name or "(whole model)", step.found, step.becomes or "-", step.reason) for step in plan.steps]
            show_table(f"{reference}: plan for {method}", ["layer", "is", "becomes", "why"], rows)
        return {
            "reference": reference,
            "method": method,
            "counts": plan.counts(),
            "steps": [
                {"name": step.name, "found": step.found, "becomes": step.becomes, "reason": step.reason}
                for step in plan.steps
            ],
        }
    assert out is not None
    student = convert_model(teacher, config, plan=plan)
    if calibrate and not any(isinstance(layer, ReferenceSized) for layer in student.model.modules()):
        raise PlanError(f"--calibrate: no layer of a {method} student has a gain. Leave it out, and align.")
    del teacher  # the student is the same function, and a large model need not be held twice
    pictures = _pictures(calibrate, calibration_pictures, student) if calibrate else None
    if pictures is not None:
        laid_out(student.model)
    shown = noise_pictures(2, student.preprocess.size) if pictures is None else pictures
    costs = lossy_steps(student, shown, ends) if ends else []
    if pictures is not None:
        student = _calibrated(student, pictures, ends)
    conversion = dataclasses.replace(student.history.conversion, lossy_steps=tuple(costs))
    save(student.with_history(conversion=conversion), out, overwrite)
    swapped = ", ".join(f"{count} {name}" for name, count in plan.counts().items())
    console.print(f"{reference}: {swapped}")
    console.print(f"identity at {student.start}: relative error {conversion.identity_error:.1e}")
    what = "noise pictures" if pictures is None else f"{len(pictures)} pictures from {calibrate}"
    if costs:
        show_table(
            f"What each step costs before alignment ({what})",
            ["step", "cosine to teacher"],
            [(r["step"], r["cosine"]) for r in costs],
        )
    if student.text is not None:
        console.print("text tower: kept unchanged, so that --text and --zero-shot work on the student")
    console.print(f"wrote {out}")
    return {
        "reference": reference,
        "out": str(out),
        "method": method,
        "counts": plan.counts(),
        "identity_error": conversion.identity_error,
        "lossy_steps": costs,
    }


def _pictures(shards: str, count: int, student: Any) -> Any:
    """The first `count` pictures of `shards`, as the model takes them."""
    import torch

    from ..data.index import index_shards
    from ..data.loader import held_out_batches
    from ..data.names import expand
    from ..data.views import to_model_input

    preprocess = student.preprocess
    batches = held_out_batches(
        index_shards(expand(shards)), size=preprocess.size[0], crop_pct=preprocess.crop_pct, limit=count, workers=0
    )
    return to_model_input(torch.cat([batch.pictures for batch in batches]), preprocess.mean, preprocess.std)


def _calibrated(student: Any, pictures: Any, ends: dict[str, float]) -> Any:
    import copy

    from ..convert import set_strength
    from ..convert.history import Calibration
    from ..convert.student import carrying, with_reference_gains

    original, ends = copy.deepcopy(student.model), ends | carrying(student.model)
    set_strength(student.model, **ends)
    gains = with_reference_gains(student.model, original, [pictures])
    return student.with_history(calibration=Calibration(len(pictures), ends, len(gains)))
