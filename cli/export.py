"""bcosify export"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from .console import console, show_agreement


def export(
    model: str,
    *,
    format: str,
    out: Path | None = None,
    explain: bool = False,
    overwrite: bool = False,
    json: bool = False,
) -> dict[str, Any]:
    """Writes a finished student as one file that runs without bcosify: for ONNX Runtime, or for torch.export.load.

    The graph takes `pixel_values` (B, 3, H, W), pictures prepared and normalised as the student's own (said in the
    file's metadata), any number of them, and returns `logits` or `features`. It is run and compared with the model
    before it gets its name. Needs: pip install 'bcosify[export]'.
    Example: bcosify export runs/resnet50/aligned --format onnx --out resnet50.onnx

    Args:
        model: a converted model: a folder, or ORG/REPO[@rev] on the hub.
        format: `onnx`, or `torch` (a .pt2 file: torch.export.load(FILE).module()).
        out: the file; default the model's name with .onnx or .pt2, here.
        explain: the graph also takes `classes` (B,), and also returns `contributions` (B, H, W): what every pixel adds
            to the output of that number, exactly. For students that explain themselves in the forward pass alone
            (fa-cnn, and kmeans on an average); others are refused.
        overwrite: replace the file if it exists.
        json: print the result as JSON on stdout.
    """
    from ..publish import export as export_model

    written = export_model(model, out, format, explain, overwrite)
    console.print(f"{', '.join(written.inputs)} -> {', '.join(written.outputs)}; any number of pictures")
    console.print(f"compared with the model: largest difference {written.error:.1e} of the largest output")
    show_agreement(written.agreement)
    console.print(f"wrote {written.out} ({written.bytes / 1e6:.1f} MB)")
    return {**dataclasses.asdict(written), "out": str(written.out)}
