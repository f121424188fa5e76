"""What other libraries read of a student's folder: one `config.json` for timm and transformers, and open_clip's own.

Both name `bcosify` as the architecture: `import bcosify.publish` opens that door in each library, and without it they
say that they do not know it, rather than take a converted model for an ordinary one of another function.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from .hub import OPEN_CLIP, TEXT
from .sources import Preprocess
from .student import Student

__all__ = ["ARCHITECTURE", "class_count", "config_of", "open_clip_config", "open_clip_preprocessing"]

ARCHITECTURE = "bcosify"
# What timm's own configuration says of the network beside its pictures.
NETWORK = ("first_conv", "classifier", "pool_size")


def class_count(student: Student) -> int:
    """How many classes the student's outputs are logits of; 0 for features and embeddings."""
    if student.source.library == "transformers":
        args = student.source.model_args
        return args["config"]["num_labels"] if args["head"] == "classifier" else 0
    return getattr(student.model, "num_classes", 0) or 0


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


def open_clip_config(folder: Path, student: Student) -> dict[str, Any] | None:
    """open_clip_config.json, from the one in the text tower's folder; None for students that are no pair of its."""
    path = folder / TEXT / OPEN_CLIP
    if student.source.library != "open_clip" or not path.is_file():
        return None
    config = json.loads(path.read_text())["model_cfg"]
    return {
        "model_cfg": {
            "embed_dim": config["embed_dim"],
            # The image tower is no architecture of open_clip's any more; the text tower still is.
            "vision_cfg": {"timm_model_name": ARCHITECTURE, "image_size": student.preprocess.size[0]},
            "text_cfg": config["text_cfg"],
        },
        "preprocess_cfg": open_clip_preprocessing(student.preprocess),
    }


def open_clip_preprocessing(record: Preprocess) -> dict[str, Any]:
    """`record` in open_clip's words."""
    return {
        "size": record.size,
        "mean": record.mean,
        "std": record.std,
        "interpolation": record.interpolation,
        "resize_mode": RESIZE_MODES[record.crop_mode],
        "fill_color": record.fill,
    }


RESIZE_MODES = {"center": "shortest", "border": "longest", "squash": "squash"}
