"""bcosify convert"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from .console import console, show_table


def convert(
    reference: str,
    out: Path | None = None,
    method: str = "bcos",
    keep: list[str] | None = None,
    scale: str | None = None,
    dampening: str | None = None,
    pretrained: bool = True,
    weights: Path | None = None,
    head: str = "auto",
    image_size: int | None = None,
    calibrate: str | None = None,
    calibration_pictures: int = 64,
    b: float = 2.0,
    dry_run: bool = False,
    overwrite: bool = False,
    json: bool = False,
) -> dict[str, Any]:
    """Turns a pretrained model into an interpretable student, and checks that it is still the same function.

    Nothing is trained here. What each step away from that function will cost before alignment is measured and printed.
    Example: bcosify convert timm:resnet50.a1_in1k --out runs/resnet50

    Args:
        reference: the model: timm:NAME[.TAG], open_clip:ARCH/TAG, hf:ORG/NAME[@rev], dir:PATH or bundled:NAME.
        out: folder to write; not needed with --dry-run.
        method: the target family: `bcos` (B-cos network) or `fa-cnn` (one map for each class, dampened skips).
        keep: modules to leave as they are, by name (with all below) or 're:PATTERN'.
        scale: of `bcos`: `cosine` (in [0, 1]; the default), or `unbounded` (B-cosification's own variant).
        dampening: of `fa-cnn`: what its skips do: `bound` (the default), `convex`, `shortcut` or `branch`.
        pretrained: take random weights, without the network.
        weights: a .safetensors state dict of your own, in place of the published weights.
        head: which output of a transformers model: `classifier`, `embedding` (what is compared with text), `pooled`;
            `auto` is what its checkpoint was made for.
        image_size: side in pixels to use the model at, where it is not its own.
        calibrate: shards; the student is saved at --b without biases, its gains fitted on a few of these pictures.
        calibration_pictures: how many.
        b: of `bcos`: the B that --calibrate and the cost table go to.
        dry_run: print the plan, every layer with its reason, and write nothing.
        overwrite: replace the folder if it exists.
        json: print the result as JSON on stdout.
    """
    from ..convert import convert as convert_model
    from ..convert import load_teacher, lossy_steps, plan_for, save
    from ..convert.files import check_free
    from ..convert.trace import noise_pictures
    from ..errors import CheckpointError, PlanError

    if not 1 <= b < math.inf:
        raise PlanError(f"--b {b}: B is at least 1 (1 is the source model, 2 the usual end).")
    if calibrate and calibration_pictures < 1:
        raise PlanError(f"--calibration-pictures {calibration_pictures}: at least one is needed; 64 are enough.")
    if not dry_run:
        if out is None:
            raise CheckpointError("--out FOLDER is missing (or pass --dry-run to see the plan only).")
        check_free(out, overwrite)
    config = _config(method, keep=tuple(keep or ()), scale=scale, dampening=dampening)
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
            "steps": [vars(s) for s in plan.steps],
        }
    assert out is not None
    student = convert_model(teacher, config, plan=plan)
    del teacher  # the student is the same function, and a large model need not be held twice
    pictures = _pictures(calibrate, calibration_pictures, student) if calibrate else None
    costs = lossy_steps(student, noise_pictures(8, student.preprocess.size) if pictures is None else pictures, b)
    if pictures is not None:
        student = _calibrated(student, pictures, b)
    save(student.with_report(lossy_steps=costs), out, overwrite)
    swapped = ", ".join(f"{count} {name}" for name, count in plan.counts().items())
    console.print(f"{reference}: {swapped}")
    start = {name: value for name, value in costs[0].items() if name not in ("step", "cosine")}
    at = ", ".join(f"{'B' if name == 'b' else name}={value:g}" for name, value in start.items())
    console.print(f"identity{at and f' at {at}'}: relative error {student.report['identity_error']:.1e}")
    what = "noise pictures" if pictures is None else f"{len(pictures)} pictures from {calibrate}"
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
        "identity_error": student.report["identity_error"],
        "lossy_steps": costs,
    }


def _config(method: str, **settings: Any) -> Any:
    """The method's config with those settings that were given; PlanError for one that it does not have."""
    import dataclasses

    from ..convert.methods import find_method
    from ..errors import PlanError

    config_class = find_method(method).config_class
    given = {name: value for name, value in settings.items() if value is not None}
    known = [field.name for field in dataclasses.fields(config_class)]
    for name in given:
        if name not in known:
            raise PlanError(
                f"--{name} is no setting of --method {method}, which has: {', '.join(known)}. Leave it out."
            )
    return config_class(**given)


def _pictures(shards: str, count: int, student: Any) -> Any:
    """The first `count` pictures of `shards`, as the model takes them."""
    import torch

    from ..align.loader import held_out_batches, to_model_input
    from ..align.shards import expand, index_shards

    preprocess = student.preprocess
    batches = held_out_batches(
        index_shards(expand(shards)), size=preprocess.size[0], crop_pct=preprocess.crop_pct, limit=count, workers=0
    )
    return to_model_input(torch.cat([batch.pictures for batch in batches]), preprocess.mean, preprocess.std)


def _calibrated(student: Any, pictures: Any, b: float) -> Any:
    import copy

    from ..convert import calibrate, set_strength
    from ..convert.methods import find_method
    from ..errors import PlanError

    original = copy.deepcopy(student.model)
    _, end = find_method(student.method).lossy(student.config, b)[-1]
    set_strength(student.model, **end)
    gains = calibrate(student.model, original, pictures)
    if not gains:
        raise PlanError(f"--calibrate: no layer of a {student.method} student has a gain. Leave it out, and align.")
    return student.with_report(calibration={"pictures": len(pictures), "b": b, "layers": len(gains)})
