"""bcosify inspect"""

from __future__ import annotations

import dataclasses
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
    from ..convert import StudentFacts
    from ..convert import inspect as inspect_model

    found = inspect_model(reference, pretrained=pretrained)
    facts = dataclasses.asdict(found)
    if not json:
        show_table(reference, ["", ""], [(key.replace("_", " "), _short(value)) for key, value in facts.items()])
        converted = isinstance(found, StudentFacts)
        console.print("" if converted else f"next: bcosify convert {reference} --out runs/NAME")
    return facts


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return "\n".join(f"{key}: {_short(item)}" for key, item in value.items())
    return "\n".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
