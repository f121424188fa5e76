"""What other libraries read of a student's folder: one `config.json` for timm and transformers, and open_clip's own.

Both name `bcosify` as the architecture: `import bcosify.publish` opens that door in each library, and without it they
say that they do not know it, rather than take a converted model for an ordinary one of another function.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from .hub import ARCHITECTURE
from .libraries import find_library
from .student import Student

__all__ = ["ARCHITECTURE", "class_count", "config_of", "own_files"]

# What timm's own configuration says of the network beside its pictures.
NETWORK = ("first_conv", "classifier", "pool_size")


def class_count(student: Student) -> int:
    """How many classes the student's outputs are logits of; 0 for features and embeddings."""
    return find_library(student.source.library).class_count(student.source, student.model)


def config_of(student: Student) -> dict[str, Any]:
    """config.json. `num_classes` is in no `model_args`: timm writes it there, and transformers cannot read that."""
    preprocess, classes = student.preprocess, class_count(student)
    own = getattr(student.model, "pretrained_cfg", None) or {}
    network = {key: own[key] for key in NETWORK if own.get(key) is not None}
    names = {"label_names": student.labels} if student.labels else {}
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
        "architectures": ["BcosifyForImageClassification" if classes else "BcosifyModel"],
        "image_processor_type": "BcosifyImageProcessor",
        **({"id2label": dict(enumerate(student.labels))} if student.labels else {"num_labels": classes}),
        "bcosify": {
            "method": student.method,
            "source": student.source.reference,
            "preprocess": dataclasses.asdict(preprocess),
        },
    }


def own_files(folder: Path, student: Student) -> dict[str, Any]:
    """File name -> JSON values, of what the source's library reads beside config.json; its text tower is there."""
    return find_library(student.source.library).student_files(folder, student.preprocess)
