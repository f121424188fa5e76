"""bcosify inspect"""

from __future__ import annotations

from typing import Any

from .console import console, show_table


def inspect(reference: str, pretrained: bool = True, json: bool = False) -> dict[str, Any]:
    """Shows what a model is: a converted folder, or a reference with what `convert` would do to it.

    Example: bcosify inspect runs/resnet50

    Args:
        reference: a converted model (a folder, or ORG/REPO[@rev] on the hub), or a model reference ({references}).
        pretrained: do not fetch the weights of a reference.
        json: print the result as JSON on stdout.
    """
    from ..convert.hub import is_student

    converted = is_student(reference)
    facts = _converted(reference) if converted else _reference(reference, pretrained)
    if not json:
        rows = [(key.replace("_", " "), _short(value)) for key, value in facts.items()]
        show_table(reference, ["", ""], rows)
        console.print("" if converted else f"next: bcosify convert {reference} --out runs/NAME")
    return facts


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return "\n".join(f"{key}: {_short(item)}" for key, item in value.items())
    return "\n".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _converted(reference: str) -> dict[str, Any]:
    from ..convert import load
    from ..convert.layers import strength_spans

    student = load(reference)
    alignment = student.history.alignment
    return {
        "source": student.source.reference,
        "architecture": student.source.architecture,
        "method": student.method,
        "parameters": sum(parameter.numel() for parameter in student.model.parameters()),
        "layers": student.plan.counts(),
        "strengths": {
            name: f"{least:g}" + (f" to {most:g}" if most > least else "")
            for name, (least, most) in strength_spans(student.model).items()
        },
        "size": f"{student.preprocess.size[0]} x {student.preprocess.size[1]}",
        "identity_error": student.history.conversion.identity_error,
        "text_tower": "none" if student.text is None else "kept, unchanged",
        "aligned_on": f"{alignment.pictures} pictures" if alignment else "not aligned",
        "held_out_fidelity": (alignment and alignment.final) or {},
    }


def _reference(reference: str, pretrained: bool) -> dict[str, Any]:
    from ..convert import BcosConfig, load_teacher, plan_for
    from ..convert.taps import depth_taps, find_blocks

    teacher = load_teacher(reference, pretrained=pretrained)
    plan = plan_for(teacher, BcosConfig())
    blocks = find_blocks(teacher.model)
    return {
        "architecture": teacher.source.architecture,
        "parameters": sum(parameter.numel() for parameter in teacher.model.parameters()),
        "size": f"{teacher.preprocess.size[0]} x {teacher.preprocess.size[1]}",
        "mean_and_std": f"{teacher.preprocess.mean}, {teacher.preprocess.std}",
        "classes": len(teacher.labels) if teacher.labels else "unknown or none",
        "text_tower": "none" if teacher.text is None else "kept beside the student",
        "convert_bcos": plan.counts(),
        "blocks": len(blocks),
        "taps": depth_taps(blocks),
    }
