"""bcosify convert"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .console import console, show_table


def convert(
    reference: str,
    out: Path | None = None,
    method: str = "bcos",
    keep: list[str] | None = None,
    set: list[str] | None = None,
    pretrained: bool = True,
    weights: Path | None = None,
    head: str = "auto",
    image_size: int | None = None,
    labels: Path | None = None,
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
        method: the target family: {methods}.
        keep: modules to leave as they are, by name (with all below) or 're:PATTERN'.
        set: settings of the method, such as scale=unbounded (bcos: B-cosification's own variant), squash=sq (coda),
            dampening=branch (fa-cnn), stages=3 (ca-stream) or prototypes=5 (kmeans).
        pretrained: take random weights, without the network.
        weights: a .safetensors state dict of your own, in place of the published weights.
        head: which output of a transformers model: `classifier`, `embedding` (what is compared with text), `pooled`;
            `auto` is what its checkpoint was made for.
        image_size: side in pixels to use the model at, where it is not its own.
        labels: a file with a name for each class, one a line in their order, in place of the model's own.
        calibrate: shards; the student is saved at --b with its biases carried, and with the sizes that the teacher's
            layers have on a few of these pictures.
        calibration_pictures: how many.
        b: the B that --calibrate and the cost table go to, where the method has one; by default 2.
        dry_run: print the plan, every layer with its reason, and write nothing.
        overwrite: replace the folder if it exists.
        json: print the result as JSON on stdout.
    """
    from ..convert import convert as convert_model
    from ..convert import plan_for
    from ..convert.output import output_kind
    from ..core.errors import CheckpointError

    which = {"method": method, "keep": keep or (), "set": set or ()}
    source = {"pretrained": pretrained, "weights": weights, "head": head, "image_size": image_size, "labels": labels}
    if dry_run:
        plan = plan_for(reference, **which, **source)
        if not json:
            rows = [(step.name or "(whole model)", step.found, step.becomes or "-", step.reason) for step in plan.steps]
            show_table(f"{reference}: plan for {method}", ["layer", "is", "becomes", "why"], rows)
        shown = ("name", "found", "becomes", "reason")
        steps = [{name: getattr(step, name) for name in shown} for step in plan.steps]
        return {"reference": reference, "method": method, "counts": plan.counts(), "steps": steps}
    if out is None:
        raise CheckpointError("--out FOLDER is missing (or pass --dry-run to see the plan only).")
    student = convert_model(
        reference,
        **which,
        **source,
        out=out,
        calibrate=calibrate,
        calibration_pictures=calibration_pictures,
        b=b,
        costs=True,
        overwrite=overwrite,
    )
    counts, measured = student.plan.counts(), student.history.conversion
    costs, error = list(measured.lossy_steps), measured.identity_error
    console.print(f"{reference}: {', '.join(f'{count} {name}' for name, count in counts.items())}")
    output = output_kind(student)
    hint = "; name them: --labels FILE" if output.chooses and output.names is None else ""
    console.print(f"output: {output}{hint}")
    console.print(f"identity at {student.start}: relative error {error:.1e}")
    calibration = student.history.calibration
    what = "noise pictures" if calibration is None else f"{calibration.pictures} pictures from {calibrate}"
    if costs:
        show_table(
            f"What each step costs before alignment ({what})",
            ["step", "cosine to teacher"],
            [(row["step"], row["cosine"]) for row in costs],
        )
    if student.text is not None:
        console.print("text tower: kept unchanged, so that --text and --zero-shot work on the student")
    console.print(f"wrote {out}")
    console.print(f"next: bcosify align {out} --data SHARDS", soft_wrap=True)
    return {
        "reference": reference,
        "out": str(out),
        "method": method,
        "counts": counts,
        "output": {"kind": output.kind, "count": output.count, "named_by": output.named_by or None},
        "identity_error": error,
        "lossy_steps": costs,
    }
