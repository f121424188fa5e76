"""What other libraries read of a student's folder: one `config.json` for timm and transformers, and open_clip's own.

Both name `bcosify` as the architecture: `import bcosify.publish` opens that door in each library, and without it they
say that they do not know it, rather than take a converted model for an ordinary one of another function.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from .hub import ARCHITECTURE
from .libraries import LABELS, REGRESSION, find_library
from .output import output_kind
from .student import Student

__all__ = ["ARCHITECTURE", "config_of", "own_files"]

# What timm's own configuration says of the network beside its pictures.
NETWORK = ("first_conv", "classifier", "pool_size")


# transformers' words for outputs that are no logits of one class each.
PROBLEMS = {LABELS: "multi_label_classification", REGRESSION: "regression"}


def config_of(student: Student) -> dict[str, Any]:
    """config.json. `num_classes` is in no `model_args`: timm writes it there, and transformers cannot read that."""
    preprocess, output = student.preprocess, output_kind(student)
    # timm calls the width of an embedding that a head makes so, too.
    classes = output.count or getattr(student.model, "num_classes", 0) or 0
    own = getattr(student.model, "pretrained_cfg", None) or {}
    network = {key: own[key] for key in NETWORK if own.get(key) is not None}
    names = {"label_names": output.names} if output.names else {}
    return {
        "architecture": ARCHITECTURE,
        "num_classes": classes,
        "num_features": getattr(student.model, "num_features", None),
        "model_args": {},
        "pretrained_cfg": {
            "input_size": [3, *preprocess.size],
            "mean": preprocess.mean,
            "std": preprocess.std,
            "interpolation": preprocess.interpolation,
            "crop_pct": preprocess.crop_pct,
            "crop_mode": preprocess.crop_mode,
            "num_classes": classes,
            **network,
            **names,
        },
        "model_type": ARCHITECTURE,
        "architectures": ["BcosifyForImageClassification" if output.count else "BcosifyModel"],
        "image_processor_type": "BcosifyImageProcessor",
        **({"id2label": dict(enumerate(output.names))} if output.names else {"num_labels": output.count}),
        **({"problem_type": PROBLEMS[output.kind]} if output.kind in PROBLEMS else {}),
        "bcosify": {
            "method": student.method,
            "source": student.source.reference,
            "preprocess": dataclasses.asdict(preprocess),
        },
    }


def own_files(folder: Path, student: Student) -> dict[str, Any]:
    """File name -> JSON values, of what the source's library reads beside config.json; its text tower is there."""
    return find_library(student.source.library).student_files(folder, student.preprocess)
